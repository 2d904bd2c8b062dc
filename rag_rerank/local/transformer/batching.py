"""Token sequences, and how they are cut into batches."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One model input, not padded."""

    ids: list[int]  # special tokens included
    types: list[int] | None = None  # where the tokenizer makes token type ids: 0 for the query, 1 for the document
    group: Hashable | None = None  # the same for prompts that begin alike; a decoder runs what they have in common once
    truncated: int = 0  # how many texts in it are longer than what the model reads
    unattended: int = 0  # how many tokens at the end no token attends to; `Padded` only


@dataclass(frozen=True, slots=True)
class Batching:
    """How large batches are best, and how many run at a time."""

    token_budget: int  # most tokens in a batch
    batches_ahead: int = 1  # how many batches' worth of waiting sequences are best cut into batches at a time
    parallel: int = 1  # how many batches are run side by side, each on a core of its own; 1 for one after the other


def by_length(lengths: Sequence[int], token_budget: int, *, equal: bool = False) -> list[list[int]]:
    """Group positions of sequences of like length, longest first, so that few tokens are padding; `equal`: none.

    After padding to its longest a batch has at most `token_budget` tokens; a longer sequence gets one of its own.
    """
    grouped: list[list[int]] = []
    left = 0
    for position in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if left == 0 or (equal and lengths[position] != lengths[grouped[-1][0]]):
            grouped.append([])
            left = max(1, token_budget // max(1, lengths[position]))
        grouped[-1].append(position)
        left -= 1
    return grouped


def by_tokens(costs: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group positions in order, as many as the budget holds; a longer sequence gets a batch of its own."""
    grouped: list[list[int]] = []
    left = 0
    for position, cost in enumerate(costs):
        if not grouped or cost > left:
            grouped.append([])
            left = token_budget
        grouped[-1].append(position)
        left -= cost
    return grouped
