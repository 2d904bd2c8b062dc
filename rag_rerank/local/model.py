"""The seam between the engine, which knows time and threads, and the score types, which know models.

A model turns (queries, documents) into token sequences, runs any batch of sequences from any mixture of calls, and
turns the outputs of one call's sequences into its scores. A cross-encoder makes one sequence per pair and one logit of
each; a bi-encoder makes one sequence per text and an embedding of each; late interaction makes one sequence per
document and, in `run`, its score against the query that the sequence refers to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One model input, not padded.

    Attributes:
        ids: Token ids, special tokens included.
        types: Token type ids (0 for the query's part, 1 for the document's), where the tokenizer makes them.
        query: The query of a prompt. Prompts of one query begin alike, which a decoder makes use of.
    """

    ids: list[int]
    types: list[int] | None = None
    query: str | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one call wants to have run.

    Attributes:
        sequences: The token sequences.
        scores: Turns their outputs, float32 ``[len(sequences), size]`` in the same order, into the call's scores.
    """

    sequences: Sequence[TokenSequence]
    scores: "Callable[[Tensor], list[float]]"


class Model(Protocol):
    """A loaded model. Used by one thread only."""

    @property
    def round_tokens(self) -> int:
        """How many tokens of waiting sequences are best cut into batches at a time."""

    def room(self, queries: "Sequence[str]") -> list[int]:
        """How many tokens of a document it reads beside each of the queries."""

    def inputs(self, queries: list[str], documents: list[str]) -> Inputs:
        """Tokenise a call or a part of one: one query for all documents, or one each."""

    def batches(self, sequences: "Sequence[TokenSequence]") -> list[list[int]]:
        """Positions of the sequences, each exactly once, grouped into batches for `run`."""

    def run(self, sequences: "Sequence[TokenSequence]") -> "Tensor":
        """Outputs of one batch: float32 ``[len(sequences), size]``, perhaps still being computed on a device."""
