"""What sentence-transformers puts behind a transformer: pooling, Dense, LayerNorm, activations; all in float32."""

import functools
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rag_rerank.errors import ConfigError
from rag_rerank.local.checkpoint.declaration import IDENTITY, SIGMOID, Layer, Pooling
from rag_rerank.local.checkpoint.files import WEIGHTS, Files, Weights
from rag_rerank.local.transformer.transformer import States, largest_of_each

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_OWN = ("linear", "colbert_linear", "score", "residual", "norm", "activation_function")


def activation(name: str, where: str) -> nn.Module:
    """Make the activation of a full name such as ``torch.nn.modules.activation.Sigmoid``, named in the file `where`.

    ConfigError if it is none of `torch.nn`, or mixes the scores of several documents.
    """
    found = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    numbers = torch.tensor([[-1.0, 2.0]])
    try:
        made: nn.Module = found().eval()  # type: ignore[misc]
        alone = torch.stack([made(number) for number in numbers[0]])
        if torch.allclose(made(numbers)[0], alone):  # some CPUs' GELU has other last digits for single numbers
            return made
    except (TypeError, RuntimeError, ValueError, IndexError):
        pass
    why = "which is none of torch.nn that works on each number alone"
    raise ConfigError(f"{where} asks for the activation {name!r}, {why}. Use the library that wrote it")


def config_activation(config: "PreTrainedConfig") -> str | None:
    """Find the activation that a ``config.json`` names, as vLLM finds it; None where it names none.

    sentence-transformers wrote ``Identity`` into ms-marco models of old: then scores are logits, not within 0 and 1.
    (vLLM 0.32, ``model_executor/layers/pooler/activations.py``.)
    """
    problem_type = getattr(config, "problem_type", None)
    if problem_type == "regression":
        return IDENTITY
    if problem_type in ("single_label_classification", "multi_label_classification"):
        return SIGMOID
    named: str | None = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    return named or getattr(config, "sbert_ce_default_activation_function", None)


def read_layers(files: Files, layers: Sequence[Layer]) -> nn.Sequential:
    """Read modules with their weights, float32 on the CPU; ConfigError if these are missing or damaged."""
    return nn.Sequential(*(_module(files, layer) for layer in layers)).requires_grad_(False)


class _Residual(nn.Module):
    """A Dense that adds its input, projected if the sizes differ, to its output."""

    def __init__(self, dense: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.dense, self.projection = dense, projection

    def forward(self, vectors: Tensor) -> Tensor:
        made: Tensor = self.dense(vectors) + self.projection(vectors)
        return made


class _Normalize(nn.Module):
    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=-1)


def _module(files: Files, layer: Layer) -> nn.Module:
    if layer.kind == "Normalize":
        return _Normalize()
    path, stored = str(PurePosixPath(layer.folder, WEIGHTS)), Weights(files, layer.folder)
    if stored.missing:
        missing = PurePosixPath(layer.folder, stored.missing[0])
        raise ConfigError(f"the checkpoint has no {missing}; only safetensors weights are read, pickle can run code")
    weights = {name: stored.rows(name).float() for name in stored.home if name.partition(".")[0] in _OWN}
    if layer.kind == "LayerNorm":
        norm = nn.LayerNorm(len(weights["norm.weight"]))
        norm.load_state_dict({name.removeprefix("norm."): weight for name, weight in weights.items()})
        return norm
    projection = linear(path, weights, ("linear.", "colbert_linear.", "score."))
    act = activation(layer.activation, f"{layer.folder}/config.json")
    trained = {name: weight for name, weight in weights.items() if name.startswith("activation_function.")}
    act.load_state_dict({name.partition(".")[2]: weight for name, weight in trained.items()})  # PReLU's
    dense = nn.Sequential(projection, act)
    if not layer.residual:
        return dense
    square = "residual.weight" not in weights
    return _Residual(dense, nn.Identity() if square else linear(path, weights, ("residual.",)))


def linear(path: str, weights: dict[str, Tensor], prefixes: Sequence[str]) -> nn.Linear:
    """Make a linear layer, float32, of the weights with the first prefix that any has; ConfigError if none has."""
    prefix = next((prefix for prefix in prefixes if f"{prefix}weight" in weights), None)
    if prefix is None:
        raise ConfigError(f"{path} holds no {prefixes[0]}weight, the projection that the checkpoint declares")
    weight, bias = weights[f"{prefix}weight"], weights.get(f"{prefix}bias")
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float32)
    made.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return made


def pool(states: States, pooling: Pooling, skip: int = 0) -> Tensor:
    """Make one vector of each sequence, without its first `skip` tokens: float32 ``[sequences, modes * size]``."""
    return torch.cat([_POOLINGS[mode](states, skip) for mode in pooling.modes], dim=1)


def _counted(states: States, skip: int) -> tuple[Tensor, Tensor, Tensor]:
    """Select the states that count, float32, with the sequence that each is of and its place in it, from 1."""
    tokens, owners, places = states.flat()
    kept = places >= skip
    return tokens[kept].float(), owners[kept], places[kept] + 1


def _mean(states: States, skip: int, power: float = 1.0, *, weighted: bool = False) -> Tensor:
    tokens, owners, places = _counted(states, skip)
    weights = places.float() if weighted else torch.ones_like(places, dtype=torch.float32)
    sums = tokens.new_zeros(len(states.lengths), tokens.shape[1] + 1)
    sums.index_add_(0, owners, torch.cat([tokens, torch.ones_like(tokens[:, :1])], dim=1) * weights.unsqueeze(1))
    return sums[:, :-1] / sums[:, -1:].clamp(min=1e-9) ** power


def _max(states: States, skip: int) -> Tensor:
    tokens, owners, _ = _counted(states, skip)
    return largest_of_each(tokens, owners, len(states.lengths))


def _first(states: States, skip: int) -> Tensor:
    # Where nothing but the prompt is left, sentence-transformers takes the first token of all.
    places = torch.where(states.firsts + skip > states.lasts, states.firsts, states.firsts + skip)
    return states.tokens[places].float()


_POOLINGS: dict[str, Callable[[States, int], Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": functools.partial(_mean, power=0.5),
    "weightedmean": functools.partial(_mean, weighted=True),
    "lasttoken": lambda states, _skip: states.last().float(),
}
