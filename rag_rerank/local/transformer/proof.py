"""The proof at load: what runs a model must give what plain transformers give for one sequence at a time.

Whether an architecture can be run end to end in a row, or padded, is seen on the model itself: a short sequence beside
a long one comes out as it does alone, or it doesn't. A small copy of the model is tried, in float32 on the CPU, where
rounding hides nothing: it has the first layer of each kind, for those of one kind compute alike, and of a vocabulary
the words that occur. Then the kernels are tried in the model's own format, against that copy.
"""

import copy
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - it has no other name

from rag_rerank.errors import ConfigError
from rag_rerank.local.transformer.batching import TokenSequence
from rag_rerank.local.transformer.transformer import Head, Padded, Path, Unpadded, make_transformer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The largest difference that is rounding, as a share of an output's size or, of small outputs, of `_SMALL`. Seen were
# 6e-7 (MiniLM-L12), 3e-6 (Qwen3-0.6B's shape) and 6e-6 (tiny models of 120 architectures); what sees its padding is
# 0.005 to 1.2 off.
TOLERANCE = 1e-4
_SMALL = 0.25
# The same between two formats, or two runs in one: of states (seen were 0.0025 and 0.016 at most, in tiny models of 100
# architectures), and of logits, which may be small differences of large numbers.
_FORMATS = {torch.float32: TOLERANCE, torch.float16: 0.01, torch.bfloat16: 0.05}
_LOGITS = 0.5
_VOCABULARY = 4096  # rows of an embedding from which on it is no table of positions

FAILURES = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Proof:
    """How a model is run, and what was seen of that when it was loaded.

    Attributes:
        path: ``"unpadded"``: sequences end to end in one row. ``"padded"``: side by side, filled up to the longest.
            ``"equal lengths"``: side by side, those of one length together.
        differences: For each path that was tried, the largest difference of an output from that of plain transformers
            for the sequence alone, in float32, as a share of its size; infinite where it failed. Empty with
            ``verify=False``.
    """

    path: Path
    differences: Mapping[Path, float]


class Unproven(ConfigError):
    """A model does not give in batches what it gives for a sequence alone."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A model taken apart: what makes its outputs, ``[sequences, size]``."""

    body: "PreTrainedModel"
    head: Head | None  # makes outputs of the body's states; None where it is not known, so that only `plain` can
    plain: Padded  # runs the model as transformers wrote it
    plain_head: Head  # makes outputs of the states that this gives
    alone: Callable[[TokenSequence], Tensor] | None = None  # outputs of plain transformers; None: those of `plain`
    share: bool = True  # whether sequences may share a prefix: whether `head` reads only their last states

    def way(self, path: Path, *, packed: bool = True) -> tuple[Padded | Unpadded, Head]:
        """Make what runs it this way, padded if it can't be unpadded; `packed` replaces layers."""
        if path == "unpadded" and self.head is not None:
            made = make_transformer(self.body, self.plain.pad_id, self.plain.device_batching, packed=packed)
            if isinstance(made, Unpadded):
                return replace(made, share=made.share and self.share), self.head
        return replace(self.plain, equal=path == "equal lengths"), self.plain_head

    def outputs(self, sequence: TokenSequence) -> Tensor:
        """Run a sequence alone, by plain transformers."""
        if self.alone is not None:
            return self.alone(sequence)
        return self.plain_head(replace(self.plain, equal=True).states([sequence]))


@torch.inference_mode()
def prove(
    model: "PreTrainedModel",
    take_apart: Callable[[Any], Parts],
    sequences: Sequence[TokenSequence],
    paths: Sequence[Path],
    limit: int | None = None,
) -> Proof:
    """Find the first of the paths on which a model gives what plain transformers give for each sequence alone.

    `limit` is that of `rope_limit`. `Unproven` if there is none; what transformers raise where they can't run it.
    """
    parts = take_apart(model)
    own = parts.body.device, parts.body.dtype  # not the model's: its head may compute in float32
    config = model.config.get_text_config().to_dict().items()
    words = {parts.plain.pad_id, *(word for sequence in sequences for word in sequence.ids)}
    words |= {word for name, word in config if name.endswith("_token_id") and isinstance(word, int)}
    differences: dict[Path, float] = {}
    for path in paths:
        # In a row, any layer mixes what it may not mix; padding may be zero before the first, and no longer behind it.
        stacks, tolerance = _stacks(model, 1 if path == "unpadded" else 2), TOLERANCE
        try:
            parts = take_apart(_copy(model, stacks, sorted(words)))
            expected = _alone(parts, sequences)
        except torch.OutOfMemoryError:
            raise
        except FAILURES:  # not every model can be shortened, or computes in another format than its own
            parts, tolerance = take_apart(_copy(model)), _FORMATS.get(own[1], TOLERANCE)
            expected = _alone(parts, sequences)
        precise = (parts.body.device, parts.body.dtype) == own
        way = parts.way(path, packed=precise)
        if way[0].path != path:
            continue
        outputs, states = _run(*way, sequences, limit)
        seen = _difference(outputs, expected)
        if seen <= tolerance and not precise:  # then its kernels, which are packed for its own format
            short = take_apart(_copy(model, stacks)).way(path)
            kernels = _difference(_run(*short, sequences[:1], limit)[1], states[:1])
            seen = kernels if kernels > (_FORMATS.get(own[1], TOLERANCE) if path == "unpadded" else _LOGITS) else seen
        differences[path] = seen
        if seen <= tolerance:
            return Proof(path, differences)
    all_seen = ", ".join(f"{path}: {seen:.2g}" for path, seen in differences.items())
    raise Unproven(
        "what it gives for a pair alone and in a batch differs by more than rounding "
        f"({tolerance:g} of its size; {all_seen}). Use another model; verify=False scores it nevertheless"
    )


def _alone(parts: Parts, sequences: Sequence[TokenSequence]) -> Tensor:
    different = {id(each.ids): each for each in sequences}
    random = _random_states(parts.body.device)
    made = {key: parts.outputs(each).float() for key, each in different.items()}
    if not all(map(torch.equal, random, _random_states(parts.body.device))):
        # By this model or by another thread. To watch every operator takes half as long again, so only where it tells.
        with _NothingRandom():  # type: ignore[no-untyped-call]
            made = {key: parts.outputs(each).float() for key, each in different.items()}
    return torch.cat([made[id(each.ids)] for each in sequences])


def _random_states(device: torch.device) -> list[Tensor]:
    modules = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    return [module.get_rng_state() for module in modules]


def _run(
    transformer: Padded | Unpadded, head: Head, sequences: Sequence[TokenSequence], limit: int | None
) -> tuple[Tensor, Tensor]:
    """Give the outputs of sequences in batches, and their last states; not a number if that fails."""
    outputs: dict[int, Tensor] = {}
    states: dict[int, Tensor] = {}
    try:
        transformer = replace(transformer, limit=limit)
        for batch in transformer.batches(sequences, 1 << 20):
            made = transformer.states([sequences[each] for each in batch])
            outputs |= zip(batch, head(made).float().cpu(), strict=True)
            states |= zip(batch, made.last().float().cpu(), strict=True)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 - whatever it is, this is no way to run the model
        failed = torch.full((len(sequences), 1), torch.nan)
        return failed, failed
    outputs_, states_ = (torch.stack([each[place] for place in sorted(each)]) for each in (outputs, states))
    return outputs_, states_


def _difference(got: Tensor, expected: Tensor) -> float:
    """Tell how far outputs are from those expected at most, as a share of their size."""
    shares = (got - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=_SMALL)
    numbers = got.isfinite().all(1), expected.isfinite().all(1)
    shares[numbers[0] != numbers[1]] = torch.inf
    shares[~numbers[0] & ~numbers[1]] = 0.0  # a damaged model: its documents get their error when they are scored
    return float(shares.max())


class _NothingRandom(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises ConfigError where a model draws random numbers (Reformer's hashes): each run gives other scores."""

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        """Run an operator of torch."""
        if operator.name().removeprefix("aten::").partition(".")[0] in _RANDOM:
            raise ConfigError("it draws random numbers as it scores: no score comes twice")
        return operator(*arguments, **(options or {}))


_RANDOM = {"bernoulli", "bernoulli_", "multinomial", "normal_", "rand", "rand_like", "randint", "randn", "randn_like"}


def _copy(model: nn.Module, stacks: Sequence[tuple[nn.ModuleList, int]] = (), words: list[int] | None = None) -> Any:
    """Copy a model with less of its stacks, which shares its weights; with `words` in float32 on the CPU."""
    kept = {id(layer) for stack, keep in stacks for layer in stack[:keep]}
    left_out = {id(layer) for stack, keep in stacks for layer in stack[keep:]} - kept

    def parts(module: nn.Module) -> Iterator[nn.Module]:
        yield module
        for child in module.children():
            if id(child) not in left_out:
                yield from parts(child)

    copies: dict[int, Any] = {}
    for part in parts(model):
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor if words is None else _precise(tensor, words, part)
    for stack, keep in stacks:
        copies[id(stack)] = copy.deepcopy(nn.ModuleList(list(stack)[:keep]), copies)
    return copy.deepcopy(model, copies)


def _precise(tensor: Tensor, words: list[int], owner: nn.Module) -> Tensor:
    """Convert a weight; of a vocabulary only some words, for that has hundreds of megabytes."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    if (tensor.device.type, tensor.dtype) == ("cpu", dtype):
        return tensor
    if isinstance(owner, nn.Embedding) and tensor.dim() == 2 and len(tensor) >= _VOCABULARY:
        memory = mmap.mmap(-1, 4 * tensor.numel())  # what nobody touches is not used; numpy's zeros have huge pages
        made = torch.frombuffer(memory, dtype=torch.float32).view(tensor.shape)
        rows = [word for word in words if 0 <= word < len(made)]
        made[rows] = tensor[rows].to("cpu", dtype)
    else:
        made = tensor.to("cpu", dtype)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _stacks(model: nn.Module, least: int) -> list[tuple[nn.ModuleList, int]]:
    """Find the lists of layers, and how many have all kinds and are at `least` so many."""
    found: dict[str, tuple[nn.ModuleList, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            kinds = [_kind(layer) for layer in module]
            found[name] = module, max([least, *(kinds.index(kind) + 1 for kind in kinds)])
    return [(stack, keep) for stack, keep in found.values() if keep < len(stack)]


def _kind(layer: nn.Module) -> object:
    """Tell what a layer is made of; those of the same kind compute alike, with other weights."""
    return [
        (name, type(part), [item for item in vars(part).items() if type(item[1]) in _SAY_HOW and not _numbers(*item)])
        for name, part in layer.named_modules()
    ]


_SAY_HOW = {bool, int, float, str}


def _numbers(name: str, value: object) -> bool:
    """Tell whether an attribute is the number of its layer."""
    return isinstance(value, int) and name.startswith("layer")
