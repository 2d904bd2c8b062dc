"""Measures as ir-measures has them; and whether a difference is more than luck: the paired bootstrap."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ir_measures
import numpy as np

from rag_rerank.errors import ConfigError

Run = Mapping[str, Mapping[str, float]]
"""Query id to document id to score."""

DEFAULT_MEASURES = ("nDCG@10", "MRR@10", "Recall@10", "MAP")
RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0

_ROUNDING = 1e-9  # what sums in another order may differ by
_NUMBERS_DRAWN = 2_000_000  # at a time: 16 MB


def mean(values: Mapping[str, float]) -> float:
    """Average over all queries."""
    return sum(values.values()) / len(values)


class Measurer:
    """Measures rankings against judgments, by `measures`; `deepest` is the largest cutoff among these.

    They are called as in ir-measures; a ConfigError for one that it does not know or can't calculate. nDCG has linear
    gain.
    """

    def __init__(self, judgments: Mapping[str, Mapping[str, int]], measures: Sequence[str]) -> None:
        if not (judgments and measures):
            raise ConfigError("there is nothing to measure: no judgments or no measures")
        self._wanted = {name: _parsed(name) for name in measures}
        self._queries = list(judgments)
        self.measures = tuple(self._wanted)
        self.deepest: int = max(measure.params.get("cutoff") or 0 for measure in self._wanted.values())
        try:
            self._evaluator = ir_measures.evaluator(list(self._wanted.values()), judgments)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"{', '.join(self.measures)} can't all be calculated here: {error}") from error

    def measure(self, rankings: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
        """Map each measure to query id to value, for every judged query; one without results gets 0."""
        run = {query: {name: -rank for rank, name in enumerate(names)} for query, names in rankings.items()}
        values = {measure: dict.fromkeys(self._queries, 0.0) for measure in self._wanted.values()}
        for metric in self._evaluator.iter_calc(run):
            values[metric.measure][metric.query_id] = float(metric.value)
        return {name: dict(values[measure]) for name, measure in self._wanted.items()}


def _parsed(name: str) -> Any:
    try:
        measure = ir_measures.parse_measure(name)
        if measure.params.get("cutoff", 1) < 1:
            raise ValueError("its cutoff is below 1")  # noqa: TRY301 - trec_eval would end the process
        return measure  # noqa: TRY300
    except (NameError, ValueError, SyntaxError, TypeError, AttributeError, KeyError) as error:
        known = "nDCG@10, MRR@10, Recall@100, MAP, P@5"
        raise ConfigError(f"the measure {name!r} is not known ({error}); some that are: {known}") from error


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two systems on the same queries, by one measure.

    Attributes:
        gain: The mean over all queries of the second one's value less the first one's.
        low, high: Its 95 % confidence interval: percentiles of 10,000 means, each over as many queries drawn anew.
        wins, losses, ties: On how many queries the second one was better, worse, equal.
        verdict: ``"helps"`` or ``"hurts"`` where the interval excludes 0.
    """

    gain: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    verdict: Literal["helps", "no clear difference", "hurts"] = field(init=False)

    def __post_init__(self) -> None:
        verdict = "helps" if self.low > _ROUNDING else "hurts" if self.high < -_ROUNDING else "no clear difference"
        object.__setattr__(self, "verdict", verdict)  # past frozen


def compare(differences: Sequence[Sequence[float]], *, resamples: int = RESAMPLES) -> list[Comparison]:
    """Judge several comparisons on the same queries at once, all by the same draws; the seed is fixed.

    Each has one difference a query, the queries in the same order: a ValueError without the same number everywhere.
    """
    if not differences:
        return []
    table = np.array(differences, dtype=np.float64).T  # [queries, comparisons]
    if table.ndim != 2 or not (queries := len(table)):
        raise ValueError("every comparison needs one difference for each of the same queries, at least one")
    table[np.abs(table) < _ROUNDING] = 0.0
    rng, step = np.random.default_rng(SEED), max(1, _NUMBERS_DRAWN // table.size)
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    means = np.concatenate([table[rng.integers(queries, size=(size, queries))].mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    counts = [each.sum(axis=0) for each in (table > 0, table < 0, table == 0)]
    return list(map(Comparison, *(values.tolist() for values in (table.mean(axis=0), low, high, *counts))))
