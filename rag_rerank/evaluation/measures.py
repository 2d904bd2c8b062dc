"""nDCG, MRR, recall, MAP and whatever else ir-measures knows: means, and values of each query."""

from collections.abc import Mapping, Sequence
from typing import Any

import ir_measures

from rag_rerank.errors import ConfigError

Run = Mapping[str, Mapping[str, float]]
"""Query id to document id to score."""

Rankings = Mapping[str, Sequence[str]]
"""Query id to document ids, best first."""

DEFAULT_MEASURES = ("nDCG@10", "MRR@10", "Recall@10", "MAP")


def measure(
    judgments: Mapping[str, Mapping[str, int]], run: Run, measures: Sequence[str] = ("nDCG@10", "RR@10")
) -> dict[str, float]:
    """Average each measure over every judged query; one without results counts as 0.

    Args:
        judgments: Query id to document id to grade.
        run: What was retrieved or reranked.
        measures: Names as in ir-measures; a ConfigError for one that it does not know or can't calculate. nDCG has
            linear gain, ties are broken by document id: pytrec_eval's habits.
    """
    values = Measurer(judgments, measures).measure_run(run)
    return {name: mean(values[name]) for name in measures}


def mean(values: Mapping[str, float]) -> float:
    """Average over all queries."""
    return sum(values.values()) / len(values)


class Measurer:
    """Measures rankings against judgments; arguments and errors as of `measure`.

    Attributes:
        measures: The names.
        deepest: The largest cutoff among the measures: what is behind it in a ranking only one without a cutoff sees.
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

    def measure_rankings(self, rankings: Rankings) -> dict[str, dict[str, float]]:
        """Map each measure to query id to value, for every judged query; only the order counts, so nothing ties."""
        run = {query: {name: -rank for rank, name in enumerate(names)} for query, names in rankings.items()}
        return self.measure_run(run)

    def measure_run(self, run: Run) -> dict[str, dict[str, float]]:
        """Measure documents in the order of their scores, ties by document id; a query without results gets 0."""
        values = {measure: dict.fromkeys(self._queries, 0.0) for measure in self._wanted.values()}
        for metric in self._evaluator.iter_calc(run):
            values[metric.measure][metric.query_id] = float(metric.value)
        return {name: dict(values[measure]) for name, measure in self._wanted.items()}


def _parsed(name: str) -> Any:
    try:
        return ir_measures.parse_measure(name)
    except (NameError, ValueError, SyntaxError, TypeError, AttributeError, KeyError) as error:
        known = "nDCG@10, MRR@10, Recall@100, MAP, P@5"
        raise ConfigError(f"the measure {name!r} is not known ({error}); some that are: {known}") from error
