"""Which documents go in one request: not too many, not too many bytes."""

from collections.abc import Sequence

from rag_rerank.inputs.multimodal import Link, Multimodal, Prepared

MOST_BYTES = 8 << 20
"""Of one request, where it has more than one document: about 10 ms of encoding, in which an event loop stands still."""


def cut(
    group: Sequence[int], most: int, documents: Sequence[Prepared], queries: Sequence[Prepared] | None
) -> list[list[int]]:
    """Cut positions into pieces, each for one request, in order.

    What the server has to fetch first goes alone: the others don't wait for it, nor fail with it.

    Args:
        group: Positions of pairs that may go together.
        most: How many of them.
        documents: All documents.
        queries: One for each of them, or None where a request has just one query.
    """
    pieces: list[list[int]] = [[]]
    size = 0
    for position in group:
        document = documents[position]
        more = size_of(document) + (0 if queries is None else size_of(queries[position]))
        alone = not isinstance(document, str) and bool(links([document]))
        if pieces[-1] and (len(pieces[-1]) == most or size + more > MOST_BYTES or alone):
            pieces.append([])
            size = 0
        pieces[-1].append(position)
        size = MOST_BYTES if alone else size + more
    return pieces


def size_of(value: Prepared) -> int:
    """About how many bytes it takes in a request."""
    return len(value) if isinstance(value, str) else value.size


def links(inputs: Sequence[Prepared]) -> list[Link]:
    """What the server has to fetch."""
    return [part for each in inputs if isinstance(each, Multimodal) for part in each.parts if isinstance(part, Link)]


def has_image(inputs: Sequence[Prepared]) -> bool:
    """Whether there is an image in any of them; videos don't count."""
    parts = (part for each in inputs if isinstance(each, Multimodal) for part in each.parts)
    return any(
        not isinstance(part, str) and not (isinstance(part, Link) and part.kind == "video_url") for part in parts
    )


def places(value: Prepared) -> int:
    """How many images and videos it has."""
    return 0 if isinstance(value, str) else sum(not isinstance(part, str) for part in value.parts)
