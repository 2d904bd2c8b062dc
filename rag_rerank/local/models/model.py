"""The seam between the engine, which knows time and threads, and the score types, which know models.

A model turns (queries, documents) into token sequences, runs any batch of sequences from any mixture of calls, and
turns the outputs of one call's sequences into its scores. A cross-encoder makes one sequence per pair and one logit of
each; a bi-encoder makes one sequence per text and an embedding of each; late interaction makes one sequence per
document and, in `run`, its score against the query that the sequence refers to.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rag_rerank.errors import ContentError
from rag_rerank.inputs.multimodal import Multimodal

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["queries", "documents"]


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One model input, not padded.

    Attributes:
        ids: Token ids, special tokens included.
        types: Token type ids (0 for the query's part, 1 for the document's), where the tokenizer makes them.
        query: The query of a prompt. Prompts of one query begin alike, which a decoder makes use of.
        cut: Whether the text was longer than what the model reads.
    """

    ids: list[int]
    types: list[int] | None = None
    query: Hashable | None = None
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one call wants to have run.

    Attributes:
        sequences: The token sequences.
        scores: Turns their outputs, float32 ``[len(sequences), size]`` in the same order, into the call's scores.
    """

    sequences: Sequence[TokenSequence]
    scores: "Callable[[Tensor], list[float]]"


@dataclass(frozen=True, slots=True)
class Pace:
    """How a model is best fed.

    Attributes:
        token_budget: Most tokens in a batch.
        batches_ahead: How many batches' worth of waiting sequences are best cut into batches at a time.
        at_a_time: How many batches are run side by side, each on a core of its own; 1 for one after the other.
    """

    token_budget: int
    batches_ahead: int = 1
    at_a_time: int = 1


class Model(Protocol):
    """A loaded model. One thread tokenises; batches may be run by several at once."""

    @property
    def pace(self) -> "Pace":
        """How it is best fed."""

    @property
    def sees(self) -> bool:
        """Whether queries and documents may be `Multimodal`; if not, all are text."""

    # Any: str, and Multimodal where it sees.
    def room(self, queries: Sequence[Any]) -> list[int]:
        """How many tokens of a document it reads beside each of the queries."""

    def inputs(self, queries: list[Any], documents: list[Any]) -> Inputs:
        """Tokenise a call or a part of one: one query for all documents, or one each.

        Raises:
            Unreadable: It can't read one of them.
        """

    def batches(self, sequences: "Sequence[TokenSequence]", token_budget: int) -> list[list[int]]:
        """Positions of the sequences, each exactly once, grouped into batches of at most so many tokens for `run`."""

    def run(self, sequences: "Sequence[TokenSequence]") -> "Tensor":
        """Outputs of one batch: float32 ``[len(sequences), size]``, perhaps still being computed on a device."""


class Unreadable(ContentError):
    """A query or document that the model can't read; `LocalScorer` puts its position before the message.

    Args:
        side: Which of the two it is.
        value: The query or document.
        message: Why, to follow ``documents[3]``.
    """

    def __init__(self, side: Side, value: Multimodal, message: str) -> None:
        super().__init__(message)
        self.side, self.value = side, value


class TextOnly(ContentError):
    """The model doesn't see; `LocalScorer` says which query or document asks it to."""
