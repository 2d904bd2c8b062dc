"""The proof at load: what runs a model must give what plain transformers give for one sequence at a time.

Whether an architecture can be run end to end in a row, or padded, is seen on the model itself: a short sequence beside
a long one comes out as it does alone, or it doesn't. Stacks of equal layers are shortened meanwhile: layers of one kind
compute alike, and two of 28 take a tenth of the time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: PLC2701 - it has no other name

from rag_rerank.errors import ConfigError
from rag_rerank.local.transformer.batching import TokenSequence
from rag_rerank.local.transformer.transformer import Path, States, Transformer

# The largest difference that is rounding, as a share of an output's size or, of small outputs, of `_SMALL`. Seen were
# in float32 6e-7 (MiniLM-L12), 3e-6 (Qwen3-0.6B's shape) and 6e-6 (tiny models of 120 architectures), in bfloat16 0.001
# and 0.024 (the first two). What sees its padding is 0.005 to 1.2 off. float16, with 8 times the digits: not seen.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
_SMALL = 0.25


@dataclass(frozen=True, slots=True)
class Proof:
    """How a model is run, and what was seen of that when it was loaded.

    Attributes:
        path: ``"unpadded"``: sequences end to end in one row. ``"padded"``: side by side, filled up to the longest.
            ``"equal lengths"``: side by side, those of one length together.
        differences: For each path that was tried, the largest difference of an output from that of plain transformers
            for the sequence alone, as a share of its size; infinite where it failed. Empty with ``verify=False``.
    """

    path: Path
    differences: Mapping[Path, float]


class Unproven(ConfigError):
    """A model does not give in batches what it gives for a sequence alone."""


class Reference:
    """What plain transformers give for a few sequences, one at a time; made before any of the model is replaced."""

    def __init__(
        self, body: nn.Module, sequences: Sequence[TokenSequence], run: Callable[[TokenSequence], Tensor]
    ) -> None:
        self._body, self._sequences = body, sequences
        self.tolerance = TOLERANCES[next(body.parameters()).dtype]  # the largest difference that is rounding
        self._stacks = _stacks(body)
        try:
            self._expected = self._run(run)
        except (IndexError, KeyError, TypeError, ValueError, RuntimeError):  # not every model can be shortened
            if not self._stacks:
                raise
            self._stacks = {}
            self._expected = self._run(run)

    @torch.inference_mode()
    def _run(self, run: Callable[[TokenSequence], Tensor]) -> Tensor:
        with self._shortened(), _NothingRandom():  # type: ignore[no-untyped-call]
            outputs = {
                key: run(sequence).float() for key, sequence in {id(each.ids): each for each in self._sequences}.items()
            }
        return torch.cat([outputs[id(sequence.ids)] for sequence in self._sequences])

    @torch.inference_mode()
    def difference(self, transformer: Transformer, head: Callable[[States], Tensor]) -> float:
        """Tell how far outputs, ``[sequences, size]``, are from these at most, as a share of their size."""
        got = torch.empty_like(self._expected)
        try:
            with self._shortened():
                for batch in transformer.batches(self._sequences, 1 << 20):
                    got[batch] = head(transformer.states([self._sequences[each] for each in batch])).float()
        except torch.OutOfMemoryError:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, this is no way to run the model
            return torch.inf
        shares = (got - self._expected).norm(dim=1) / self._expected.norm(dim=1).clamp(min=_SMALL)
        numbers = got.isfinite().all(1), self._expected.isfinite().all(1)
        shares[numbers[0] != numbers[1]] = torch.inf
        shares[~numbers[0] & ~numbers[1]] = 0.0  # a damaged model: its documents get their error when they are scored
        return float(shares.max())

    @contextmanager
    def _shortened(self) -> Iterator[None]:
        """Leave of each stack of layers the first few meanwhile."""
        try:
            for name, (stack, keep) in self._stacks.items():
                self._body.set_submodule(name, nn.ModuleList(list(stack)[:keep]))
            yield
        finally:
            for name, (stack, _) in self._stacks.items():
                self._body.set_submodule(name, stack)


class _NothingRandom(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises ConfigError where a model draws random numbers (Reformer's hashes): each run gives other scores."""

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        """Run an operator of torch."""
        if operator.name().removeprefix("aten::").partition(".")[0] in _RANDOM:
            raise ConfigError("it draws random numbers as it scores: no score comes twice")
        return operator(*arguments, **(options or {}))


_RANDOM = {"bernoulli", "bernoulli_", "multinomial", "normal_", "rand", "rand_like", "randint", "randn", "randn_like"}


def _stacks(body: nn.Module) -> dict[str, tuple[nn.ModuleList, int]]:
    """Find the lists of layers, and how many of each are enough; lists within layers are experts and the like."""
    found: dict[str, tuple[nn.ModuleList, int]] = {}
    for name, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            kinds = [_kind(layer) for layer in module]
            found[name] = module, max([2, *(kinds.index(kind) + 1 for kind in kinds)])
    return {name: (stack, keep) for name, (stack, keep) in found.items() if keep < len(stack)}


def _kind(layer: nn.Module) -> object:
    """Tell what a layer is made of; those of the same kind compute alike, with other weights."""
    parts = [(name, type(part), vars(part)) for name, part in layer.named_modules()]
    return [(name, kind, {key: each for key, each in own.items() if _says_how(key, each)}) for name, kind, own in parts]


def _says_how(name: str, value: object) -> bool:
    numbers_the_layer = isinstance(value, int) and name.startswith("layer")
    return isinstance(value, bool | int | float | str) and not numbers_the_layer
