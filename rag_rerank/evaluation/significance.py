"""Is a difference more than luck? The paired bootstrap over queries, and on how many of them each side was better."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0

Verdict = Literal["helps", "no clear difference", "hurts"]

_ROUNDING = 1e-9  # what sums in another order may differ by
_NUMBERS_DRAWN = 2_000_000  # at a time: 16 MB


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two systems on the same queries, by one measure.

    Attributes:
        gain: The mean over all queries of the second one's value less the first one's.
        low, high: The 95 % confidence interval of it: percentiles of 10,000 means, each over as many queries drawn with
            replacement, with a fixed seed.
        wins, losses, ties: On how many queries the second one was better, worse, equal.
    """

    gain: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int

    @property
    def verdict(self) -> Verdict:
        """``"helps"`` or ``"hurts"`` where the interval excludes 0."""
        return "helps" if self.low > _ROUNDING else "hurts" if self.high < -_ROUNDING else "no clear difference"


def compare(differences: Sequence[Sequence[float]], *, resamples: int = RESAMPLES) -> list[Comparison]:
    """Judge several comparisons on the same queries at once, all by the same draws.

    Args:
        differences: For each comparison the differences, one a query, the queries in the same order; a
            ValueError without any, or without the same number everywhere.
        resamples: How many times to draw.
    """
    if not differences:
        return []
    table = np.array(differences, dtype=np.float64).T  # [queries, comparisons]
    if table.ndim != 2 or not (queries := len(table)):
        raise ValueError("every comparison needs one difference for each of the same queries, at least one")
    table[np.abs(table) < _ROUNDING] = 0.0
    rng, step = np.random.default_rng(SEED), max(1, _NUMBERS_DRAWN // queries)
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    means = np.concatenate([_means(table, size, rng) for size in sizes])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    counts = [each.sum(axis=0) for each in (table > 0, table < 0, table == 0)]
    return list(map(Comparison, *(values.tolist() for values in (table.mean(axis=0), low, high, *counts))))


def _means(table: NDArray[np.float64], size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Average the columns over `size` drawings of as many rows as there are: ``[size, columns]``."""
    queries = len(table)
    drawn = rng.integers(queries, size=(size, queries)) + np.arange(size)[:, None] * queries
    counts = np.bincount(drawn.ravel(), minlength=size * queries).reshape(size, queries)
    return counts @ table / queries
