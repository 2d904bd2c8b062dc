"""What is made of scores: threshold, stable order, cut; and what becomes of a query that failed."""

import logging
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from operator import truediv
from typing import Literal, TypedDict

from rag_rerank.errors import BackendError, ContentError, RerankError
from rag_rerank.isolation import Outcome, failure

logger = logging.getLogger(__name__)

OnError = Literal["raise", "passthrough"]
OnBatchError = Literal["raise", "passthrough", "return"]
_NUMBERS = (
    ("top_n", numbers.Integral, "an int or None"),
    ("score_threshold", numbers.Real, "a number or None"),
    ("min_precision", numbers.Real, "a number or None"),
    ("min_n", numbers.Integral, "an int"),
)


@dataclass(frozen=True, slots=True)
class Ranked:
    """One document of a reranked list.

    Attributes:
        index: Its position in the documents that were passed.
        score: Its relevance score, higher is better; None only after ``on_error="passthrough"``.
    """

    index: int
    score: float | None


class RankOptions(TypedDict, total=False):
    """How to rank; `Scorer.rerank` describes each and has the defaults."""

    top_n: int | None
    score_threshold: float | None
    min_precision: float | None
    min_n: int
    instruction: str | None
    deadline: float | None


@dataclass(frozen=True, slots=True)
class Ranking:
    """The arguments of `Scorer.rerank` and `Scorer.rerank_batch`; those that say how to rank are checked."""

    top_n: int | None = None
    score_threshold: float | None = None
    min_precision: float | None = None
    min_n: int = 0
    instruction: str | None = None
    deadline: float | None = None
    on_error: str = "raise"
    may_return: bool = False

    def __post_init__(self) -> None:
        top_n, threshold, precision, least = self.top_n, self.score_threshold, self.min_precision, self.min_n
        for name, kind, wanted in _NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, kind) or (value is None and "None" in wanted)):
                raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
        if top_n is not None and top_n < 1:
            raise ValueError(f"top_n must be at least 1, got {top_n}; None keeps all documents")
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"score_threshold must be finite, got {threshold}; None keeps all documents")
        if precision is not None and not 0 < precision <= 1:
            raise ValueError(f"min_precision must be above 0 and at most 1, got {precision}; None keeps all documents")
        if least < 0 or (top_n is not None and least > top_n):
            raise ValueError(f"min_n must be from 0 to top_n ({top_n}), got {least}")
        allowed = ("raise", "passthrough", "return") if self.may_return else ("raise", "passthrough")
        if self.on_error not in allowed:
            raise ValueError(f"on_error must be {' or '.join(map(repr, allowed))}, got {self.on_error!r}")

    @property
    def kept(self) -> tuple[type[RerankError], ...]:
        """The errors that `on_error` keeps from being raised; others are mistakes in the call or the settings."""
        return {"raise": (), "passthrough": (BackendError,)}.get(self.on_error, (BackendError, ContentError))

    def rank(self, scores: Sequence[float | None]) -> list[Ranked]:
        """Sort, threshold, cut. Documents without a score follow the scored ones, in retrieval order."""
        threshold = -math.inf if self.score_threshold is None else self.score_threshold
        scored = [index for index, score in enumerate(scores) if score is not None]
        # Sorted on the negative, not reversed: reversing would turn ties around.
        scored.sort(key=lambda index: -(scores[index] or 0.0))
        best = [scores[index] or 0.0 for index in scored]
        kept = sum(score >= threshold for score in best)
        if self.min_precision is not None:  # best first, so that the mean never rises
            kept = min(kept, sum(mean >= self.min_precision for mean in map(truediv, accumulate(best), count(1))))
        unscored = [index for index, score in enumerate(scores) if score is None]
        ranked = scored[: max(kept, self.min_n)] + unscored
        return [Ranked(index, scores[index]) for index in ranked[: self.top_n]]

    def result(self, outcomes: Sequence[Outcome]) -> list[Ranked] | RerankError:
        """Rank one query's documents; those without a score follow under ``"passthrough"``, else its error is given."""
        error = None if self.on_error == "passthrough" else failure(outcomes)
        return error or self.rank([None if isinstance(outcome, RerankError) else outcome for outcome in outcomes])


def warn_of(outcomes: Sequence[Outcome]) -> None:
    """Log one warning for a call that is passed through although something failed."""
    error = failure(outcomes)
    failed = sum(isinstance(outcome, RerankError) for outcome in outcomes)
    if failed and failed == len(outcomes):
        logger.warning("reranking failed, %d documents keep their retrieval order: %s", failed, error)
    elif failed:
        logger.warning("%d of %d documents could not be scored and are ranked last: %s", failed, len(outcomes), error)
