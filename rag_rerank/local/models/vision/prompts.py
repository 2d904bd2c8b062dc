"""Prompts with pictures in them: where they stand, how many tokens they take, and what is cut when all is too long.

As in vLLM's score API, the placeholders of a query's or document's pictures stand before its text, whatever their order
was, and the template gets both as one string. Then each placeholder's middle token is replaced with as many as
the picture has. In `VisionSequence.ids` these are numbers below 0, different for different pictures: so two prompts
have just those tokens in common that mean the same, and a prefix with a picture in it can be shared like any other.
"""

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, cast

from rag_rerank.errors import BackendRejected, ContentError
from rag_rerank.inputs.multimodal import Multimodal, Prepared
from rag_rerank.local.models.model import Side, TokenSequence, Unreadable
from rag_rerank.local.models.prompts import PLACEHOLDER_TOKENS, SLACK, Prompts, no_room
from rag_rerank.local.models.vision.tower import SeenPicture, Tower

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rag_rerank.inputs.images import ImageFile

PLACEHOLDER = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
"""What stands for a picture in a prompt of Qwen2-VL and its successors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSequence(TokenSequence):
    """A token sequence with pictures.

    Attributes:
        seen: Its pictures, in their order.
    """

    seen: tuple[SeenPicture, ...]


@dataclass(frozen=True, slots=True)
class PicturePrompts:
    """Makes the token sequences of pairs, some of them with pictures.

    Attributes:
        prompts: For text, which pictures become for a start.
        tower: Where the pictures are to go.
    """

    prompts: Prompts
    tower: Tower
    sees: ClassVar[bool] = True
    _marks: tuple[int, ...] = field(init=False)
    _known: "weakref.WeakValueDictionary[ImageFile, SeenPicture]" = field(
        init=False, repr=False, default_factory=weakref.WeakValueDictionary
    )
    _numbers: "itertools.count[int]" = field(init=False, repr=False, default_factory=lambda: itertools.count(-1, -1))

    def __post_init__(self) -> None:
        ids = cast("list[int]", self.prompts.tokenizer.convert_tokens_to_ids(list(PLACEHOLDER)))
        object.__setattr__(self, "_marks", tuple(ids))

    def sequences(self, queries: Sequence[Prepared], documents: Sequence[Prepared]) -> list[TokenSequence]:
        """One sequence per pair.

        Args:
            queries: One for all documents, or one each.
            documents: The documents.

        Raises:
            Unreadable: A picture can't be read, or takes more tokens than there are.
            BackendRejected: A query leaves no room for any document.
        """
        rows = list(queries) * len(documents) if len(queries) == 1 else list(queries)
        made: list[TokenSequence | None] = [None] * len(documents)
        texts: list[tuple[int, str, str]] = []
        for position, (query, document) in enumerate(zip(rows, documents, strict=True)):
            if isinstance(query, str) and isinstance(document, str):
                texts.append((position, query, document))
            else:
                made[position] = self._sequence(query, document)
        if texts:
            positions, asked, read = zip(*texts, strict=True)
            for position, sequence in zip(positions, self.prompts.sequences(asked, read), strict=True):
                made[position] = sequence
        return cast("list[TokenSequence]", made)

    def room(self, queries: Sequence[Prepared]) -> list[int]:
        """How many tokens of a document fit beside each query."""
        rooms = self.prompts.room([_flat(query) for query in queries])
        seen = [self._see("queries", query) for query in queries]
        return [room - _beyond(pictures) for room, pictures in zip(rooms, seen, strict=True)]

    def _sequence(self, query: Prepared, document: Prepared) -> TokenSequence:
        asked, read = self._see("queries", query), self._see("documents", document)
        seen = asked + read
        # The same prompt, with a placeholder for each picture, in what the pictures leave.
        space = self.prompts.max_length - _beyond(seen)
        try:
            [plain] = replace(self.prompts, max_length=max(1, space)).sequences([_flat(query)], [_flat(document)])
        except BackendRejected as error:
            self._check_room(query, document)
            raise no_room(self.prompts.max_length) from error
        if any(plain.ids.count(mark) != len(seen) for mark in self._marks):
            if plain.cut:  # within a placeholder
                self._check_room(query, document, spare=SLACK)
            raise ContentError(
                "the template or instruction holds a placeholder for an image; leave these to the images"
            )
        pictures = iter(seen)
        ids: list[int] = []
        for token in plain.ids:
            if token == self._marks[1]:
                picture = next(pictures)
                ids += [picture.number] * picture.tokens
            else:
                ids.append(token)
        self.tower.expect(seen)
        return VisionSequence(ids=ids, query=query, cut=plain.cut, seen=seen)

    def _see(self, side: Side, value: Prepared) -> tuple[SeenPicture, ...]:
        if isinstance(value, str):
            return ()
        try:
            return tuple(self._seen(picture) for picture in value.images)
        except ContentError as error:
            raise Unreadable(side, value, str(error)) from error

    def _seen(self, picture: "ImageFile") -> SeenPicture:
        seen = self._known.get(picture)
        if seen is None:
            tokens = self.tower.processor.tokens(picture.width, picture.height)
            seen = self._known[picture] = SeenPicture(picture, next(self._numbers), tokens)
        return seen

    def _check_room(self, query: Prepared, document: Prepared, spare: int = 0) -> None:
        """Raise Unreadable if it is the pictures of one of the two that don't fit.

        Args:
            query: The query.
            document: The document.
            spare: Tokens that are to be left.
        """
        if isinstance(query, Multimodal):
            [room] = self.prompts.room([""])
            self._check_fit("queries", query, room - len(self._text_ids(query.text)) - spare)
        if isinstance(document, Multimodal):
            [room] = self.room([query])
            if room > 0:  # else it is the query's text
                self._check_fit("documents", document, room - spare)

    def _check_fit(self, side: Side, value: Multimodal, room: int) -> None:
        count, processor = len(value.images), self.tower.processor
        around = PLACEHOLDER_TOKENS - 1
        needed = sum(seen.tokens + around for seen in self._see(side, value))
        if needed <= room:
            return
        # Sides are rounded to whole tokens, which may make a picture a little larger.
        pixels = int(0.8 * (room // count - around) * processor.side**2)
        remedy = (
            f"scale down with Image(..., max_pixels={pixels})"
            if pixels >= processor.least_pixels
            else "not even small ones fit: pass fewer, shorten the query, or raise max_length"
        )
        raise Unreadable(
            side,
            value,
            f"holds {'a picture' if count == 1 else f'{count} pictures'} of {needed} tokens, and there is room for "
            f"{max(0, room)} of the {self.prompts.max_length} that the model reads; {remedy}",
        )

    def _text_ids(self, text: str) -> list[int]:
        ids: list[int] = self.prompts.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _flat(value: Prepared) -> str:
    """As text: a placeholder for each picture, then what text there is, nothing between."""
    return value if isinstance(value, str) else "".join(PLACEHOLDER) * len(value.images) + value.text


def _beyond(seen: "Iterable[SeenPicture]") -> int:
    """How many tokens pictures have beyond their placeholders' one."""
    return sum(picture.tokens - 1 for picture in seen)
