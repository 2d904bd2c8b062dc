"""The proof at load: what runs a model must give what plain transformers give for one sequence at a time.

Whether an architecture can be run end to end in a row, or padded, is seen on the model itself: a short sequence beside
a long one comes out as it does alone, or it doesn't. A small copy of the model is tried, in float32 on the CPU, where
rounding hides nothing: of equal layers it has two, for those of one kind compute alike, and of a vocabulary the words
that occur. For Qwen3-0.6B's shape that takes 0.25 s of CPU, beside 2.3 s (float32) or 1.0 s (bfloat16) of loading; in
bfloat16 itself, without AMX, it took 3.2 s.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - it has no other name

from rag_rerank.errors import ConfigError
from rag_rerank.local.transformer.batching import TokenSequence
from rag_rerank.local.transformer.transformer import (
    Head,
    Padded,
    Path,
    Unpadded,
    make_transformer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The largest difference that is rounding, as a share of an output's size or, of small outputs, of `_SMALL`. Seen were
# 6e-7 (MiniLM-L12), 3e-6 (Qwen3-0.6B's shape) and 6e-6 (tiny models of 120 architectures); what sees its padding is
# 0.005 to 1.2 off.
TOLERANCE = 1e-4
_SMALL = 0.25
# The same for what a model gives in a format of its own: there, only kernels that fail are still to be found.
_ROUNDED = 0.5
_FORMATS = {torch.float32: TOLERANCE, torch.float16: 0.01, torch.bfloat16: 0.05}  # between two runs in one format
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

    def way(self, path: Path) -> tuple[Padded | Unpadded, Head] | None:
        """Make what runs it this way, which may replace layers; None if there is none."""
        if path != "unpadded":
            return replace(self.plain, equal=path == "equal lengths"), self.plain_head
        if self.head is None:
            return None
        made = make_transformer(self.body, self.plain.pad_id, self.plain.device_batching)
        if not isinstance(made, Unpadded):
            return None
        return replace(made, share=made.share and self.share), self.head

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
    own, precise = (model.device, model.dtype), (torch.device("cpu"), torch.float32)
    config = model.config.get_text_config().to_dict().items()
    words = {take_apart(model).plain.pad_id, *(word for sequence in sequences for word in sequence.ids)}
    words |= {word for name, word in config if name.endswith("_token_id") and isinstance(word, int)}
    stacks, tolerance = _stacks(model), TOLERANCE
    try:
        small = _copy(model, stacks, sorted(words))
        expected = _alone(take_apart(small), sequences)
    except torch.OutOfMemoryError:
        raise
    except FAILURES:  # not every model can be shortened, or computes in another format than its own
        small, precise, tolerance = model, own, _FORMATS.get(own[1], TOLERANCE)
        expected = _alone(take_apart(small), sequences)
    differences: dict[Path, float] = {}
    for path in paths:
        seen = _difference(take_apart(_copy(small)), path, sequences, expected, limit)
        if seen is not None and seen <= tolerance and own != precise:
            short = take_apart(_copy(model, stacks))
            rounded = _difference(short, path, sequences[:1], expected[:1], limit)
            seen = rounded if rounded is None or rounded > _ROUNDED else seen
        if seen is not None:
            differences[path] = seen
        if seen is not None and seen <= tolerance:
            return Proof(path, differences)
    tried = ", ".join(f"{path}: {seen:.2g}" for path, seen in differences.items())
    raise Unproven(
        "what it gives for a pair alone and in a batch differs by more than rounding "
        f"({tolerance:g} of its size; {tried}). Use another model; verify=False scores it nevertheless"
    )


def _alone(parts: Parts, sequences: Sequence[TokenSequence]) -> Tensor:
    different = {id(each.ids): each for each in sequences}
    with _NothingRandom():  # type: ignore[no-untyped-call]
        made = {key: parts.outputs(each).float() for key, each in different.items()}
    return torch.cat([made[id(each.ids)] for each in sequences])


def _difference(
    parts: Parts, path: Path, sequences: Sequence[TokenSequence], expected: Tensor, limit: int | None
) -> float | None:
    """Tell how far outputs are from those expected at most, as a share of their size; None without such a path."""
    got = torch.empty_like(expected, device=parts.body.device)
    try:
        way = parts.way(path)
        if way is None:
            return None
        transformer = replace(way[0], limit=limit)
        for batch in transformer.batches(sequences, 1 << 20):
            got[batch] = way[1](transformer.states([sequences[each] for each in batch])).float()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 - whatever it is, this is no way to run the model
        return torch.inf
    got = got.to(expected.device)
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
    if isinstance(owner, nn.Embedding) and len(tensor) >= _VOCABULARY:
        made = torch.from_numpy(np.zeros(tensor.shape, np.float32))  # memory that nobody touches is not used
        rows = [word for word in words if 0 <= word < len(made)]
        made[rows] = tensor[rows].to("cpu", dtype)
    else:
        made = tensor.to("cpu", dtype)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made


def _stacks(model: nn.Module) -> list[tuple[nn.ModuleList, int]]:
    """Find the lists of layers, and how many of each are enough; lists within layers are experts and the like."""
    found: dict[str, tuple[nn.ModuleList, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            kinds = [_kind(layer) for layer in module]
            found[name] = module, max([2, *(kinds.index(kind) + 1 for kind in kinds)])
    return [(stack, keep) for stack, keep in found.values() if keep < len(stack)]


def _kind(layer: nn.Module) -> object:
    """Tell what a layer is made of; those of the same kind compute alike, with other weights."""
    parts = [(name, type(part), vars(part)) for name, part in layer.named_modules()]
    return [(name, kind, {key: each for key, each in own.items() if _says_how(key, each)}) for name, kind, own in parts]


def _says_how(name: str, value: object) -> bool:
    numbers_the_layer = isinstance(value, int) and name.startswith("layer")
    return isinstance(value, bool | int | float | str) and not numbers_the_layer
