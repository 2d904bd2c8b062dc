"""A loaded model: the seam between the engine, which knows time and threads, and the score types, which know models.

A cross-encoder makes one sequence per pair and one logit of each; a bi-encoder one sequence per text and an embedding
of each; late interaction one sequence per document and, in `run`, its score against the query that it refers to; a
listwise model one sequence for many documents.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rag_rerank.errors import ConfigError, ContentError
from rag_rerank.inputs.multimodal import Multimodal, Prepared
from rag_rerank.local.models.encoding import truncate
from rag_rerank.local.models.passages import split_document

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rag_rerank.local.checkpoint.declaration import Declaration
    from rag_rerank.local.transformer.batching import TokenSequence
    from rag_rerank.local.transformer.proof import Proof
    from rag_rerank.local.transformer.transformer import Transformer

Side = Literal["queries", "documents"]

PLACEHOLDER_TOKENS = 3  # <|vision_start|><|image_pad|><|vision_end|>, before an image's own replace the middle one
# A lower limit leaves query or document as it is; so does `VLLMScorer`, which can't know a model's placeholder.
_MIN_TOKENS_PER_IMAGE = 16


class InputError(ContentError):
    """A query or document that the model can't read, and why; the engine puts its position before the message."""

    def __init__(self, side: Side, value: Prepared, message: str) -> None:
        super().__init__(message)
        self.side, self.value = side, value


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one call wants to have run."""

    sequences: "Sequence[TokenSequence]"
    scores: "Callable[[Tensor], list[float]]"  # from their outputs, float32 [len(sequences), size] in the same order


class ScoreType(Protocol):
    """How a model scores. One thread tokenises; batches may be run by several at once."""

    @property
    def transformer(self) -> "Transformer":
        """What computes."""

    # Any: text, and Multimodal where the model accepts images.
    def inputs(self, queries: list[Any], documents: list[Any], instruction: str | None = None, /) -> Inputs:
        """Tokenise: one query for all documents, or one each; InputError for what it can't read."""

    def document_space(self, queries: list[Any], instruction: str | None = None, /) -> list[int]:
        """Count the tokens of a document that are read beside each of the queries."""

    def run(self, sequences: "Sequence[TokenSequence]") -> "Tensor":
        """Run one batch and give float32 ``[len(sequences), size]``, perhaps still being computed on a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model as `LocalScorer` was asked to use it."""

    score_type: ScoreType
    tokenizer: "PreTrainedTokenizerBase"
    facts: Mapping[str, str]  # what can change a score, for `Scorer.identity`
    declaration: "Declaration"  # what its files say
    proof: "Proof"  # how it is run, and what shows that this is right
    text_only: str | None = None  # why it takes no images, to follow documents[3]
    no_instruction: str | None = None  # why a call can't bring an instruction
    max_tokens_per_query: int | None = None
    max_tokens_per_doc: int | None = None
    listwise: bool = False  # whether the documents of a query are read together, in their order
    passages: bool = False  # whether a document longer than the window is scored as passages, by the best of them
    special: re.Pattern[str] | None = None  # first characters of what a prompt's tokenizer takes for a special token
    # What `LocalScorer` puts before each; a document's also before each passage.
    prompts: Mapping[Side, str] = field(default_factory=dict)

    def inputs(
        self, queries: Sequence[Prepared], documents: Sequence[Prepared], instruction: str | None = None
    ) -> Inputs:
        """Tokenise a call or a part of one; ConfigError without a place for its instruction, else as `ScoreType`."""
        if instruction is not None and self.no_instruction is not None:
            raise ConfigError(self.no_instruction)
        cut_queries = self._cut("queries", queries, self.max_tokens_per_query)
        cut_documents = self._cut("documents", documents, self.max_tokens_per_doc)
        make = self._by_passages if self.passages else self.score_type.inputs
        try:
            return make(cut_queries, cut_documents, instruction)
        except InputError as error:
            given, cut = (queries, cut_queries) if error.side == "queries" else (documents, cut_documents)
            error.value = given[cut.index(error.value)]  # as the caller passed it
            raise

    def _by_passages(self, queries: list[Prepared], documents: list[Prepared], instruction: str | None) -> Inputs:
        spaces = self.score_type.document_space(queries, instruction)
        if len(queries) == 1:
            queries, spaces = queries * len(documents), spaces * len(documents)
        pairs = zip(documents, spaces, strict=True)
        split = [
            split_document(self.tokenizer, document, space, self.prompts.get("documents", ""))
            for document, space in pairs
        ]
        inputs = self.score_type.inputs(
            [query for query, passages in zip(queries, split, strict=True) for _ in passages],
            [passage for passages in split for passage in passages],
            instruction,
        )

        def best(outputs: "Tensor") -> list[float]:
            scores = iter(inputs.scores(outputs))
            return [max(next(scores) for _ in passages) for passages in split]

        return Inputs(inputs.sequences, best)

    def _cut(self, side: Side, inputs: Sequence[Prepared], limit: int | None) -> list[Prepared]:
        for each in inputs if self.text_only is not None else ():
            if isinstance(each, Multimodal):
                raise InputError(side, each, self.text_only or "")
        if self.special is not None:
            inputs = [_as_plain_text(each, self.special, self.prompts.get(side, "")) for each in inputs]
        return list(inputs) if limit is None else [self._limited(each, limit) for each in inputs]

    def _limited(self, each: Prepared, limit: int) -> Prepared:
        if isinstance(each, str):
            return truncate(self.tokenizer, each, limit)
        # vLLM counts an image's placeholder and would cut that, too, where there is nothing else to cut.
        images = each.images
        if limit < _MIN_TOKENS_PER_IMAGE * len(images):
            return each
        return Multimodal((*images, truncate(self.tokenizer, each.text, limit - PLACEHOLDER_TOKENS * len(images))))


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str] | None:
    """Match the first character of each special token of a tokenizer, also of those that `clean` does not know."""
    spelled = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special and len(str(token)) > 1]
    ways = (f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in spelled)
    return re.compile("|".join(ways)) if spelled else None


def _as_plain_text(value: Prepared, special: re.Pattern[str], prompt: str) -> Prepared:
    if isinstance(value, str):
        text = value.removeprefix(prompt)
        return value[: len(value) - len(text)] + special.sub(r"\g<0> ", text)
    return Multimodal(tuple(special.sub(r"\g<0> ", part) if isinstance(part, str) else part for part in value.parts))
