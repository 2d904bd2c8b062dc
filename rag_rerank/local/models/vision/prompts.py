"""Prompts with images in them: where they stand, how many tokens they take, and what is cut when all is too long.

As in vLLM's score API, the placeholders of images stand before the text, whatever their order was. Each one's middle
token is then replaced with as many as the image has: in `VisionSequence.ids` numbers below 0, different for different
images, so that a prefix with an image in it can be shared like any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

from rag_rerank.errors import BackendRejected, ContentError
from rag_rerank.inputs.multimodal import Multimodal, Prepared
from rag_rerank.local.models.model import PLACEHOLDER_TOKENS, InputError, Side
from rag_rerank.local.models.prompts import SLACK, Prompts, no_space
from rag_rerank.local.models.vision.tower import SharedImage, Tower
from rag_rerank.local.transformer.batching import TokenSequence

# What stands for an image in a prompt of Qwen2-VL and its successors.
PLACEHOLDER = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionSequence(TokenSequence):
    """A token sequence with images, in their order."""

    images: tuple[SharedImage, ...]


@dataclass(frozen=True, slots=True)
class ImagePrompts:
    """Makes the token sequences of pairs, some of them with images."""

    prompts: Prompts  # for text, which images become for a start
    tower: Tower

    def instructed(self, instruction: str | None) -> Self:
        """Give the same with a call's own instruction; None keeps the scorer's."""
        return self if instruction is None else replace(self, prompts=self.prompts.instructed(instruction))

    def sequences(self, queries: Sequence[Prepared], documents: Sequence[Prepared]) -> list[TokenSequence]:
        """Make one sequence per pair, of one query for all documents or one each.

        InputError for an image that can't be read or takes too many tokens; see `no_space` besides.
        """
        rows = list(queries) * len(documents) if len(queries) == 1 else list(queries)
        pairs = list(zip(rows, documents, strict=True))
        texts = [pair for pair in pairs if isinstance(pair[0], str) and isinstance(pair[1], str)]
        encoded = iter(self.prompts.sequences(*cast("list[list[str]]", zip(*texts, strict=True))) if texts else ())
        return [
            next(encoded) if isinstance(query, str) and isinstance(document, str) else self._sequence(query, document)
            for query, document in pairs
        ]

    def document_space(self, queries: Sequence[Prepared]) -> list[int]:
        """Count the tokens of a document that fit beside each query."""
        spaces = self.prompts.document_space([_as_text(query) for query in queries])
        extra = [_extra_tokens(self._images("queries", query)) for query in queries]
        return [space - more for space, more in zip(spaces, extra, strict=True)]

    def _sequence(self, query: Prepared, document: Prepared) -> TokenSequence:
        images = self._images("queries", query) + self._images("documents", document)
        if self.prompts.template is not None and self.prompts.template.document_first:
            images = images[::-1]  # as vLLM has it for jina-reranker-m0, several of one document, too
        # The same prompt, with a placeholder for each image, in what the images leave.
        space = self.prompts.max_length - _extra_tokens(images)
        try:
            [plain] = replace(self.prompts, max_length=max(1, space)).sequences([_as_text(query)], [_as_text(document)])
        except BackendRejected as error:
            self._check_space(query, document)
            raise no_space(self.prompts.max_length) from error
        start, pad, end = cast("list[int]", self.prompts.tokenizer.convert_tokens_to_ids(list(PLACEHOLDER)))
        if any(plain.ids.count(mark) != len(images) for mark in (start, pad, end)):
            if plain.truncated:  # within a placeholder
                self._check_space(query, document, spare=SLACK)
            where = "the template or instruction"
            raise ContentError(f"{where} holds a placeholder for an image; leave these to the images")
        numbers = ([image.number] * image.tokens for image in images)
        ids: list[int] = []
        for token in plain.ids:
            ids += next(numbers) if token == pad else [token]
        self.tower.expect(images)
        return VisionSequence(ids=ids, group=self.prompts.group(query), truncated=plain.truncated, images=images)

    def _images(self, side: Side, value: Prepared) -> tuple[SharedImage, ...]:
        if isinstance(value, str):
            return ()
        try:
            return tuple(self.tower.share(image) for image in value.images)
        except ContentError as error:
            raise InputError(side, value, str(error)) from error

    def _check_space(self, query: Prepared, document: Prepared, spare: int = 0) -> None:
        """Raise InputError if it is the images of one of the two that leave less than `spare` tokens."""
        if isinstance(query, Multimodal):
            [space] = self.prompts.document_space([""])
            text = self.prompts.tokenizer(query.text, add_special_tokens=False, verbose=False)
            self._check_fit("queries", query, space - len(text["input_ids"]) - spare)
        if isinstance(document, Multimodal):
            [space] = self.document_space([query])
            if space > 0:  # else it is the query's text
                self._check_fit("documents", document, space - spare)

    def _check_fit(self, side: Side, value: Multimodal, space: int) -> None:
        count, processor = len(value.images), self.tower.processor
        around = PLACEHOLDER_TOKENS - 1
        needed = sum(image.tokens + around for image in self._images(side, value))
        if needed <= space:
            return
        # Sides are rounded to whole tokens, which may make an image a little larger.
        pixels = int(0.8 * (space // count - around) * (processor.patch * processor.merge) ** 2)
        remedy = (
            f"scale down with Image(..., max_pixels={pixels})"
            if pixels >= processor.min_pixels
            else "not even small ones fit: pass fewer, shorten the query, or raise max_length"
        )
        raise InputError(
            side,
            value,
            f"holds {'an image' if count == 1 else f'{count} images'} of {needed} tokens, and there is room for "
            f"{max(0, space)} of the {self.prompts.max_length} that the model reads; {remedy}",
        )


def _as_text(value: Prepared) -> str:
    """Write a placeholder for each image, then what text there is, nothing between."""
    return value if isinstance(value, str) else "".join(PLACEHOLDER) * len(value.images) + value.text


def _extra_tokens(images: Sequence[SharedImage]) -> int:
    """How many tokens images have beyond their placeholders' one."""
    return sum(image.tokens - 1 for image in images)
