"""Cutting sequences into batches."""

from collections.abc import Sequence


def by_length(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group sequences of like length so that little is padded.

    Args:
        lengths: Length of each sequence, in tokens.
        token_budget: Most tokens in a batch after padding to its longest. A longer sequence gets a batch of its own.

    Returns:
        Positions in `lengths`, each exactly once, longest first: the batch that needs most memory comes first, and if
        it fits, so does the rest.
    """
    grouped: list[list[int]] = []
    room = 0
    for position in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if room == 0:
            grouped.append([])
            room = max(1, token_budget // max(1, lengths[position]))
        grouped[-1].append(position)
        room -= 1
    return grouped


def by_tokens(costs: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group sequences that are not padded: in their order, as many as the budget holds.

    Args:
        costs: What each adds to a batch, in tokens.
        token_budget: Most tokens in a batch. A longer sequence gets a batch of its own.

    Returns:
        Positions in `costs`, each exactly once, in order.
    """
    grouped: list[list[int]] = []
    room = 0
    for position, cost in enumerate(costs):
        if not grouped or cost > room:
            grouped.append([])
            room = token_budget
        grouped[-1].append(position)
        room -= cost
    return grouped
