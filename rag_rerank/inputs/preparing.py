"""From what callers pass to what back ends get: types checked, text cleaned, images read, each with its position."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from rag_rerank.errors import ContentError, DeadlineExceeded
from rag_rerank.inputs.cleaning import clean
from rag_rerank.inputs.content import Content, Image, Input, Video, from_mapping, is_pil, placed
from rag_rerank.inputs.images import ImageFile, read_image
from rag_rerank.inputs.multimodal import Contents, Link, Multimodal, Prepared

P = ParamSpec("P")
T = TypeVar("T")


def prepare(value: Any, where: str) -> Prepared:
    """Check, clean and read one query or document; errors have its position, such as ``documents[3]``.

    What holds text alone becomes a text, and what is prepared already stays as it is.
    """
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Multimodal):
        return value
    try:
        if isinstance(value, Mapping) and "content" in value:
            value = from_mapping(value)
        if isinstance(value, Image | Video):
            value = Content(value)
        if not isinstance(value, Content):
            hint = "; wrap it in Image(...)" if isinstance(value, Path | bytes) or is_pil(value) else ""
            raise TypeError(f"must be str, got {type(value).__name__}{hint}")  # noqa: TRY301 - joins the others
        parts = tuple(clean(part) if isinstance(part, str) else _read(part) for part in value.parts)
    except (TypeError, ValueError) as error:  # ConfigError is a ValueError
        raise placed(error, where) from error
    texts = [part for part in parts if isinstance(part, str)]
    return "\n".join(texts) if len(texts) == len(parts) else Multimodal(parts)  # joined as vLLM joins them


def prepare_all(
    value: Input | Iterable[Input],
    name: str,
    until: float | None = None,
    known: dict[int, tuple[Any, Prepared]] | None = None,
) -> list[Prepared]:
    """Prepare queries or documents, one alone as a list of one; DeadlineExceeded if images are left to read then.

    What is in it twice, the same object, is read once. `known` is what was read already, by the id of what it was read
    from, kept with it so that the id stays its own.
    """
    if is_one(value):
        return [prepare(value, name)]
    # Mappings and tables iterate over keys, sets in no order, bytes as numbers: each would score what nobody meant.
    odd = isinstance(value, Mapping | AbstractSet | bytes | bytearray | memoryview) or hasattr(value, "columns")
    if odd or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a string or a sequence of strings, got {type(value).__name__}")
    began = time.monotonic()
    prepared: list[Prepared] = []
    known = {} if known is None else known
    for position, each in enumerate(value):
        if isinstance(each, str):
            prepared.append(clean(each))
            continue
        if id(each) not in known:
            where = f"{name}[{position}]"
            if until is not None and time.monotonic() >= until:
                elapsed = time.monotonic() - began
                raise DeadlineExceeded(f"the deadline passed before {where} had been read", elapsed=elapsed)
            known[id(each)] = each, prepare(each, where)
        prepared.append(known[id(each)][1])
    return prepared


def pair_up(
    queries: Input | Iterable[Input], documents: Input | Iterable[Input], until: float | None = None
) -> tuple[list[Prepared], list[Prepared]]:
    """Prepare one query or N, and N documents; a ValueError where their numbers do not go together."""
    prepared = prepare_all(queries, "queries", until), prepare_all(documents, "documents", until)
    if len(prepared[0]) not in (1, len(prepared[1])):
        raise ValueError(
            f"got {len(prepared[0])} queries and {len(prepared[1])} documents; "
            "pass one query for all documents (1:N) or as many queries as documents (N:N)"
        )
    return prepared


def is_one(value: Any) -> bool:
    """Tell one query or document from a sequence of them."""
    return isinstance(value, str | Image | Video | Content | Multimodal) or (
        isinstance(value, Mapping) and "content" in value
    )


MANY = 500
"""Documents of which more keep an event loop from its other work: reading them takes 26 us each."""


async def off_loop(slow: bool, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do something, in a worker thread where it takes longer than an event loop may stand."""
    return await asyncio.to_thread(do, *args, **kwargs) if slow else do(*args, **kwargs)


def is_slow(value: Any) -> bool:
    """Tell whether preparing takes longer than an event loop may stand: many texts, or an image (10 ms a megapixel)."""
    if not isinstance(value, list | tuple):  # nothing else is looked into
        return not isinstance(value, str)
    return len(value) > MANY or not all(isinstance(each, str) for each in value)


def text_only(model: str, queries: Contents, documents: Contents) -> ContentError:
    """Make the error for a model that reads text only, with the position of the first thing that is more."""
    sides = ("queries", queries), ("documents", documents)
    more = (f"{name}[{n}]" for name, side in sides for n, each in enumerate(side) if isinstance(each, Multimodal))
    return ContentError(f"{next(more)} holds an image or a video, but {model} reads text only")


def _read(part: Image | Video) -> ImageFile | Link:
    if isinstance(part, Video):
        return Link("video_url", part.url)
    source = part.held()
    return Link("image_url", str(part.url)) if source is None else read_image(source, part.max_pixels)
