"""A transformer without its head, run over sequences of any lengths: unpadded where we know how, else padded.

Both give the same. Unpadded, the sequences of a batch are one row (see `attention`), and the prefix that prompts of one
query have in common is in it once: a decoder's states of a prefix do not depend on what follows it.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from rag_rerank.errors import ConfigError
from rag_rerank.local.checkpoint.checkpoint import position_tables
from rag_rerank.local.transformer.attention import NAME, Layout, Segment, available, to_device
from rag_rerank.local.transformer.batching import Batching, TokenSequence, by_length, by_tokens
from rag_rerank.local.transformer.linear import pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Architectures (``model_type``) that tests run both ways: what is run without padding where nothing is to be verified.
# Where it is (see `proof`), all that have transformers' interface for attention are tried.
ENCODERS = frozenset(
    {"bert", "camembert", "distilbert", "electra", "eurobert", "gte", "modernbert", "roberta", "xlm-roberta"}
)
DECODERS = frozenset(
    {
        *("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3"),
        *("qwen2", "qwen2_vl_text", "qwen3", "qwen3_vl_text"),
    }
)

Path = Literal["unpadded", "padded", "equal lengths"]

LEAST_SHARED = 16  # fewer tokens in common are not worth the bookkeeping


@dataclass(frozen=True, slots=True)
class States:
    """Last hidden states of some sequences."""

    tokens: Tensor  # [tokens, size], in the model's dtype
    firsts: Tensor  # int64 [sequences]: where in `tokens` each begins
    lasts: Tensor  # where each has its last token
    lengths: Sequence[int]  # how many tokens each has

    @classmethod
    def of_rows(cls, states: Tensor, lengths: Sequence[int]) -> "States":
        """Find them in rows that are filled up on the right, ``[sequences, longest, size]``."""
        firsts = torch.arange(len(lengths)) * states.shape[1]
        lasts = firsts + torch.tensor(lengths) - 1
        return cls(states.flatten(0, 1), firsts.to(states.device), lasts.to(states.device), lengths)

    def first(self) -> Tensor:
        """Give the state of each first token, ``[sequences, size]``."""
        return self.tokens[self.firsts]

    def last(self) -> Tensor:
        """Give the state of each last token, ``[sequences, size]``."""
        return self.tokens[self.lasts]

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give the states of all tokens, one sequence after the other; whose each is, and its place, int64."""
        counts = self.lasts - self.firsts + 1
        owners = torch.repeat_interleave(counts, output_size=sum(self.lengths))
        places = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts)[owners]
        return self.tokens[self.firsts[owners] + places], owners, places

    def mean(self, layers: Callable[[Tensor], Tensor] = torch.Tensor.float) -> Tensor:
        """Average over each sequence's tokens what `layers` make of their states; float32 ``[sequences, size]``."""
        tokens, owners, _ = self.flat()
        values = layers(tokens).float()
        sums = values.new_zeros(len(self.lengths), values.shape[1]).index_add_(0, owners, values)
        return sums / (self.lasts - self.firsts + 1).unsqueeze(1)

    def select(self, positions: Sequence[int]) -> "States":
        """Take those of some of the sequences."""
        lengths = [self.lengths[position] for position in positions]
        return States(self.tokens, self.firsts[list(positions)], self.lasts[list(positions)], lengths)


Head = Callable[[States], Tensor]  # from the states of a batch to outputs, float32 [sequences, size]


def largest_of_each(values: Tensor, owners: Tensor, count: int) -> Tensor:
    """Find the largest values ``[count, size]`` of each owner, of ``[rows, size]``; each owns a row at least."""
    largest = values.new_full((count, values.shape[1]), -torch.inf)
    return largest.scatter_reduce_(0, owners.unsqueeze(1).expand_as(values), values, "amax")


class Transformer(Protocol):
    """Runs sequences. Several threads may call `states`, each with a batch of its own."""

    @property
    def path(self) -> Path:
        """How it runs them."""

    @property
    def batching(self) -> Batching:
        """How large its batches are best."""

    def batches(self, sequences: Sequence[TokenSequence], token_budget: int) -> list[list[int]]:
        """Group the positions of the sequences, each exactly once, into batches of at most so many tokens."""

    def states(self, sequences: Sequence[TokenSequence]) -> States:
        """Run one batch."""


def make_transformer(
    model: "PreTrainedModel", pad_id: int | None, batching: Batching, *, unpadded: bool = True, packed: bool = True
) -> "Padded | Unpadded":
    """Choose the fastest way to run a model without its head; `packed` replaces layers. False for `unpadded` pads."""
    prepare(model)
    if unpadded and can_unpad(model):
        model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        return Padded(model, pad_id or 0, batching)
    if packed:
        pack(model, batching.token_budget)
    first_position = next((first for first, _ in position_tables(model)), 0)
    return Unpadded(model, pad_id or 0, batching, _has_causal_layers(model), first_position)


def prepare(model: "PreTrainedModel") -> None:
    """Have a model give what transformers' most exact kernels give, and keep nothing."""
    model.config.return_dict = True  # some config.json has False, which gives tuples
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # nothing is generated: keys and values are not asked for again
    if _soft_capped(model) and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # the fast kernels don't know it


def tested(model: "PreTrainedModel") -> bool:
    """Tell whether this is an architecture that the tests cover, and not a checkpoint's own code."""
    return model.config.model_type in ENCODERS | DECODERS and from_transformers(model)


def from_transformers(model: "PreTrainedModel") -> bool:
    """Tell whether transformers wrote the code, not the checkpoint's authors."""
    return type(model).__module__.startswith("transformers.")


def _has_causal_layers(model: "PreTrainedModel") -> bool:
    return any(getattr(module, "is_causal", False) for module in model.modules())


def can_unpad(model: "PreTrainedModel") -> bool:
    """Tell whether a model may be run unpadded, if a proof says so."""
    if model.config._attn_implementation not in ("sdpa", "eager", NAME):
        return False  # the caller asked for another
    if not from_transformers(model) or not (tested(model) or model._supports_attention_backend):
        return False
    if looks_ahead(model):
        return False  # only transformers' masks know it
    if model.device.type == "cuda" and _soft_capped(model):
        return False  # the varlen kernel has no soft cap
    return available(model.device, model.dtype)


def looks_ahead(model: "PreTrainedModel") -> bool:
    """Tell whether tokens of a decoder attend to those behind them, as its config says."""
    two_way = getattr(model.config, "is_causal", None) is False and _has_causal_layers(model)
    return two_way or bool(getattr(model.config, "use_bidirectional_attention", None))


def _soft_capped(model: "PreTrainedModel") -> bool:
    return getattr(model.config, "attn_logit_softcapping", None) is not None


@dataclass(frozen=True, slots=True)
class _Runner(ABC):
    model: "PreTrainedModel"
    pad_id: int
    device_batching: Batching
    limit: int | None = field(default=None, kw_only=True)  # see `rope_limit`
    _ahead: ClassVar[int] = 1

    @property
    def batching(self) -> Batching:
        """How large its batches are best; one at a time where the rope of the last is kept in the model."""
        batching = replace(self.device_batching, batches_ahead=self._ahead)
        return batching if self.limit is None else replace(batching, parallel=1)

    def batches(self, sequences: Sequence[TokenSequence], token_budget: int) -> list[list[int]]:
        """Group sequences, those on each side of the limit apart."""
        sides: dict[bool, list[int]] = {}
        for place, each in enumerate(sequences):
            sides.setdefault(self.limit is not None and len(each.ids) > self.limit, []).append(place)
        return [
            [side[item] for item in batch]
            for side in sides.values()
            for batch in self._batches([sequences[place] for place in side], token_budget)
        ]

    @abstractmethod
    def _batches(self, sequences: Sequence[TokenSequence], token_budget: int) -> list[list[int]]:
        """Group those of one side."""


@dataclass(frozen=True, slots=True)
class Padded(_Runner):
    """Sequences of like length side by side, padded on the right, or of equal length and so not padded."""

    equal: bool = False
    _ahead: ClassVar[int] = 8  # so that lengths are alike in each batch

    @property
    def path(self) -> Path:
        """What users are told."""
        return "equal lengths" if self.equal else "padded"

    def _batches(self, sequences: Sequence[TokenSequence], token_budget: int) -> list[list[int]]:
        return by_length([len(sequence.ids) for sequence in sequences], token_budget, equal=self.equal)

    def inputs(self, sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
        """Make what the model takes, int64 ``[len(sequences), longest]`` each."""
        longest = self._width(max(len(each.ids) for each in sequences))
        attended = [len(each.ids) - each.unattended for each in sequences]
        rows = {
            "input_ids": [each.ids + [self.pad_id] * (longest - len(each.ids)) for each in sequences],
            "attention_mask": [[1] * count + [0] * (longest - count) for count in attended],
        }
        if sequences[0].types is not None:
            rows["token_type_ids"] = [(each.types or []) + [0] * (longest - len(each.ids)) for each in sequences]
        return {name: to_device(numbers, self.model.device) for name, numbers in rows.items()}

    def _width(self, longest: int) -> int:
        """Round the length of rows up, by a sixteenth at most, to few different ones: see `padding_of`."""
        if self.equal or self.model.device.type != "cpu":
            return longest
        step = 1 << max(4, longest.bit_length() - 5)
        positions: int = getattr(self.model.config, "max_position_embeddings", None) or 10**9
        most = positions - 2  # RoBERTa and its kin count from 2
        if self.limit is not None and longest <= self.limit:
            most = self.limit  # padding has positions, too: beyond it, it would turn all tokens otherwise
        return max(longest, min(longest + -longest % step, most))

    def states(self, sequences: Sequence[TokenSequence]) -> States:
        """Run one batch. In a decoder, padding on the right is never seen: tokens attend to those before them."""
        states: Tensor = self.model(**self.inputs(sequences)).last_hidden_state
        return States.of_rows(states, [len(sequence.ids) for sequence in sequences])


@dataclass(frozen=True, slots=True)
class Unpadded(_Runner):
    """Sequences end to end in one row."""

    share: bool  # whether a prefix that sequences of one group have in common is run once; only right for decoders
    first_position: int  # the number of a sequence's first position
    path: ClassVar[Path] = "unpadded"

    @property
    def batching(self) -> Batching:
        """A batch at a time; with prefixes to share, as much as may become one."""
        return replace(super(Unpadded, self).batching, batches_ahead=2 if self.share else 1)

    def _batches(self, sequences: Sequence[TokenSequence], token_budget: int) -> list[list[int]]:
        """Keep sequences that begin alike together, and in order."""
        order: list[int] = []
        costs: list[int] = []
        for positions, common in _groups(sequences, share=self.share):
            order += positions
            costs += [len(sequences[position].ids) - common for position in positions]
            costs[-len(positions)] += common
        return [[order[item] for item in batch] for batch in by_tokens(costs, token_budget)]

    def states(self, sequences: Sequence[TokenSequence]) -> States:
        """Run one batch. With shared prefixes, only the last states are those of the sequences."""
        row = lay_out(sequences, share=self.share)
        first, flat = self.first_position, itertools.chain.from_iterable
        ids = list(flat(sequences[of].ids[start:stop] for of, start, stop in row.parts))
        positions = list(flat(range(first + start, first + stop) for _, start, stop in row.parts))
        types = list(flat((sequences[of].types or [])[start:stop] for of, start, stop in row.parts))
        padding = padding_of(len(ids), self.model.device)
        inputs = {"input_ids": ids + [self.pad_id] * padding, "position_ids": positions + [first] * padding}
        if types:
            inputs["token_type_ids"] = types + [0] * padding
        states: Tensor = self.model(
            **{name: to_device([numbers], self.model.device) for name, numbers in inputs.items()},
            layout=Layout.of(row.segments, self.model.device),
        ).last_hidden_state
        return row.states_of(states[0])


@torch.inference_mode()
def rope_limit(model: "PreTrainedModel", longest: int) -> int | None:
    """Find the length beyond which all positions of a sequence are turned otherwise (LongRoPE); None up to `longest`.

    ConfigError where transformers' own scores depend on what ran before: dynamic NTK's, and BigBird's of long texts.
    """
    limits: set[int] = set()
    if getattr(model.config, "attention_type", None) == "block_sparse":
        limit = (5 + 2 * model.config.num_random_blocks) * model.config.block_size
        if longest > limit:
            raise ConfigError(
                f"its attention beyond {limit} tokens depends on what ran before; pass max_length={limit}"
            )
    for rope in model.modules():
        kinds: Any = getattr(rope, "rope_type", None)
        for layers, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if kind in ("longrope", "dynamic"):
                limits |= _rope_limits(rope, layers, longest)
    if len(limits) > 1:
        raise ConfigError(f"a rope with several limits ({sorted(limits)}) is not supported; pass another model")
    return limits.pop() if limits else None


def _rope_limits(rope: Any, layers: str | None, longest: int) -> set[int]:
    parameters = rope.config.rope_parameters if layers is None else rope.config.rope_parameters[layers]
    limit: int = parameters.get("original_max_position_embeddings") or rope.config.max_position_embeddings
    if longest <= limit:
        return set()

    def turned(length: int) -> Tensor:
        positions = torch.tensor([[*range(8), length - 1]], device=next(rope.buffers()).device)
        options = {} if layers is None else {"layer_type": layers}
        cosines: Tensor = rope(torch.zeros(1, device=positions.device), positions, **options)[0]
        return cosines[0, :8]

    if not (torch.equal(turned(9), turned(limit)) and torch.equal(turned(limit + 1), turned(longest))):
        raise ConfigError(f"its rope changes with each length beyond {limit} tokens; pass max_length={limit}")
    return set() if torch.equal(turned(limit), turned(longest)) else {limit}


@dataclass(frozen=True, slots=True)
class Row:
    """Where the tokens of a batch are in its one row."""

    parts: Sequence[tuple[int, int, int]]  # in order: (sequence, start, stop) for its tokens [start, stop)
    segments: Sequence[Segment]  # the same, as attention wants to know it
    spans: Sequence[tuple[int, int]]  # of each sequence's own tokens in the row, those behind a prefix that is shared

    def states_of(self, tokens: Tensor) -> States:
        """Find the sequences' states among those of the row, ``[tokens, size]``."""
        return States(
            tokens,
            to_device([start for start, _ in self.spans], tokens.device),
            to_device([stop - 1 for _, stop in self.spans], tokens.device),
            [stop - start for start, stop in self.spans],
        )


def lay_out(sequences: Sequence[TokenSequence], *, share: bool) -> Row:
    """Put sequences end to end; with `share`, what those of one group begin with alike once, before them."""
    parts: list[tuple[int, int, int]] = []
    segments: list[Segment] = []
    spans = [(0, 0)] * len(sequences)

    def add(of: int, start: int, stop: int, prefix: tuple[int, int]) -> tuple[int, int]:
        begin = segments[-1].stop if segments else 0
        span = begin, begin + stop - start
        parts.append((of, start, stop))
        segments.append(Segment(*span, prefix))
        return span

    for members, common in _groups(sequences, share=share):
        prefix = add(members[0], 0, common, (0, 0)) if common else (0, 0)
        for position in members:
            spans[position] = add(position, common, len(sequences[position].ids), prefix)
    return Row(parts, segments, spans)


def padding_of(tokens: int, device: torch.device) -> int:
    """Say how many tokens to fill a row up with.

    On the CPU each new number of rows costs a new kernel, 0.6 ms and memory that is never given back (441 MB after
    1,000 documents of different lengths). So there are few, at 1.5 % more tokens, which the last sequence may run into.
    """
    return 0 if device.type != "cpu" else -tokens % (16 if tokens < 512 else 64)


def _groups(sequences: Sequence[TokenSequence], *, share: bool) -> list[tuple[list[int], int]]:
    """Find the positions of each group, or of each sequence, and how many tokens these begin with alike."""
    if not share:
        return [([position], 0) for position in range(len(sequences))]
    groups: dict[object, list[int]] = {}
    for position, sequence in enumerate(sequences):
        key = position if sequence.group is None else sequence.group
        groups.setdefault(key, []).append(position)
    return [(members, _common([sequences[position].ids for position in members])) for members in groups.values()]


def _common(rows: Sequence[list[int]]) -> int:
    """Count the tokens that all begin with; at least the last of each is its own, for its state is read."""
    if len(rows) < 2:
        return 0
    # What the first and the last in lexical order have in common, all have.
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(rows), max(rows), strict=False))
    common = min(sum(1 for _ in alike), min(map(len, rows)) - 1)
    return common if common >= LEAST_SHARED else 0
