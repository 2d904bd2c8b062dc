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
    """

    ids: list[int]
    types: list[int] | None = None


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
    def token_budget(self) -> int:
        """How many tokens, padding included, one batch may hold."""

    def inputs(self, queries: list[str], documents: list[str]) -> Inputs:
        """Tokenise one call: one query for all documents, or one each."""

    def run(self, sequences: "Sequence[TokenSequence]") -> "Tensor":
        """Outputs of one batch: float32 on the CPU, ``[len(sequences), size]``."""
