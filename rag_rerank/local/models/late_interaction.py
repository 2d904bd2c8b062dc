"""Late interaction (ColBERT): a vector per token, scored by how well each query token is met by some document token.

The score is the sum, over all tokens of the query, of the largest dot product with any token of the document. This is
what vLLM answers to ``/score`` for such a model, not what ColBERT's authors compute: special tokens count, there are no
``[Q]`` and ``[D]`` markers, and the query is not filled up with ``[MASK]``. Scores grow with the length of the query.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from rag_rerank.errors import ConfigError
from rag_rerank.local.models.encoding import TextEncoder
from rag_rerank.local.models.model import Inputs
from rag_rerank.local.transformer.batching import TokenSequence
from rag_rerank.local.transformer.transformer import States, largest_of_each


@dataclass(slots=True, eq=False)
class _Query:
    """A query that many documents share; its vectors come with the first batch that needs them."""

    sequence: TokenSequence
    vectors: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Document(TokenSequence):
    """A document, and the query that it is scored against."""

    against: _Query


@dataclass(frozen=True, slots=True)
class LateInteraction(TextEncoder):
    """An encoder with a linear projection of its token states.

    A document is reduced to its score in the batch that encodes it, on the device. Kept until the call ends, the
    vectors of 1,000 documents of 512 tokens would be 262 MB (128 numbers each, float32), all copied from the GPU.

    Attributes:
        projection: From states to token vectors; float32, as in vLLM, whatever the encoder computes in.
        normalize: Whether token vectors are brought to length 1; without it scores are sums of plain dot products.
    """

    projection: torch.nn.Module
    normalize: bool = True

    def inputs(self, queries: list[str], documents: list[str], _instruction: str | None = None) -> Inputs:
        """Make one sequence per pair, its document; a query is encoded once, however many documents it has."""
        if len(queries) == 1:
            queries = queries * len(documents)
        different = list(dict.fromkeys(queries))
        shared = dict(zip(different, map(_Query, self.encode(different)), strict=True))
        sequences = [
            _Document(ids=text.ids, types=text.types, truncated=text.truncated, against=shared[query])
            for query, text in zip(queries, self.encode(documents), strict=True)
        ]

        def scores(outputs: Tensor) -> list[float]:
            as_list: list[float] = outputs[:, 0].tolist()
            return as_list

        return Inputs(sequences, scores)

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Compute scores ``[len(sequences), 1]``."""
        documents = cast("Sequence[_Document]", sequences)  # the engine hands back what `inputs` made
        rows_of: dict[_Query, list[int]] = {}
        for row, document in enumerate(documents):
            rows_of.setdefault(document.against, []).append(row)
        query_vectors = self._query_vectors(rows_of)
        states = self.transformer.states(documents)
        scores = torch.empty(len(documents), dtype=torch.float32, device=states.tokens.device)
        for query, rows in zip(query_vectors, rows_of.values(), strict=True):
            vectors, owners = self._vectors(states.select(rows))
            scores[rows] = largest_of_each(vectors @ query.T, owners, len(rows)).sum(dim=1)
        return scores.unsqueeze(1)

    def _query_vectors(self, queries: Iterable[_Query]) -> list[Tensor]:
        missing = [query for query in queries if query.vectors is None]
        for batch in self.transformer.batches(
            [query.sequence for query in missing], self.transformer.batching.token_budget
        ):
            group = [missing[position] for position in batch]
            states = self.transformer.states([query.sequence for query in group])
            vectors, _ = self._vectors(states)
            for query, rows in zip(group, torch.split(vectors, list(states.lengths)), strict=True):
                query.vectors = rows.clone()  # a view would keep those of all queries alive
        return [cast("Tensor", query.vectors) for query in queries]

    def _vectors(self, states: States) -> tuple[Tensor, Tensor]:
        """Token vectors, float32 ``[tokens, size]``, and which sequence each is of."""
        tokens, owners = states.flat()
        vectors: Tensor = self.projection(tokens.float())
        if self.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return vectors, owners


def is_late_interaction(architecture: str, modules: Collection[str]) -> bool:
    """Tell whether a checkpoint is a ColBERT.

    Args:
        architecture: The first of its config's ``architectures``: ``HF_ColBERT`` or one of vLLM's ``ColBERT...Model``.
        modules: The kinds in its ``modules.json``. PyLate writes ``Transformer``, ``Dense`` and no ``Pooling``, with
            the bare encoder's architecture; vLLM needs ``--hf-overrides`` with a ``ColBERT...Model`` to serve that.
    """
    return architecture.startswith(("HF_ColBERT", "ColBERT")) or set(modules) == {"Transformer", "Dense"}


def read_projection(
    file: Callable[[str], str | Path | None], dense: Mapping[str, Mapping[str, Any]]
) -> torch.nn.Sequential:
    """Read the projection from states to token vectors, float32 on the CPU.

    Args:
        file: The local path of a file of the checkpoint, or None where it has no such file.
        dense: Folder and configuration of each ``Dense`` module, in order. None at all: the projection is beside the
            encoder in ``model.safetensors``.

    Raises:
        ConfigError: There is no projection, or one with an activation or a residual connection.
    """
    for folder, config in dense.items():
        activation = str(config.get("activation_function") or "Identity").rpartition(".")[2]
        if activation != "Identity" or config.get("use_residual"):
            extra = "a residual connection" if activation == "Identity" else f"the activation {activation}"
            raise ConfigError(f"{folder} has {extra}; as projections to token vectors only linear ones are supported")
    paths = [f"{folder}/model.safetensors" for folder in dense] or ["model.safetensors"]
    return torch.nn.Sequential(*(_linear(path, file(path)) for path in paths)).requires_grad_(False)


def _linear(name: str, path: str | Path | None) -> torch.nn.Linear:
    """Read the one linear layer in a file of weights, under one of the names that vLLM looks for."""
    if path is None:
        raise ConfigError(f"the checkpoint has no {name}, where the projection to token vectors should be")
    with safe_open(path, framework="pt") as weights:
        names = set(weights.keys())
        prefix = next((prefix for prefix in ("linear.", "colbert_linear.") if f"{prefix}weight" in names), None)
        if prefix is None:
            raise ConfigError(
                f"{name} holds no linear.weight, the projection to token vectors: not a ColBERT checkpoint"
            )
        weight = weights.get_tensor(f"{prefix}weight").float()
        bias = weights.get_tensor(f"{prefix}bias").float() if f"{prefix}bias" in names else None
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float32)
    linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return linear
