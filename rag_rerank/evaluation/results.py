"""The results of an evaluation: for people by the command line and `report`, for programs by `as_json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rag_rerank import __version__
from rag_rerank.evaluation.collection import Collection
from rag_rerank.evaluation.measures import mean
from rag_rerank.evaluation.scoring import Latency, Scores
from rag_rerank.evaluation.significance import CONFIDENCE, RESAMPLES, SEED, Comparison
from rag_rerank.ranking import Ranking

Values = Mapping[str, Mapping[str, float]]
"""Measure to query id to value."""

GAIN = "linear"
"""What nDCG counts a grade as: the grade itself, as trec_eval does, and not 2^grade - 1."""


def reranked(candidates: Sequence[str], scores: Scores, depth: int) -> list[str]:
    """Order the first `depth` candidates as `Scorer.rerank` does; those behind stay where they were."""
    ranked = Ranking().rank(scores[:depth])
    return [candidates[item.index] for item in ranked] + list(candidates[depth:])


def ideal(candidates: Sequence[str], grades: Mapping[str, int], depth: int) -> list[str]:
    """Order as a scorer that knows the judgments: no other order of the first `depth` measures better."""
    return sorted(candidates[:depth], key=lambda document: -grades.get(document, 0)) + list(candidates[depth:])


@dataclass(frozen=True, slots=True)
class Level:
    """One reranker at one depth.

    Attributes:
        depth: How many candidates of each query were reranked.
        values: What every query got.
        gains: Measure to comparison with the first stage.
        against_deepest: Measure to comparison with the deepest depth: where that is better, this one "hurts".
        latency: How long queries waited; None where no time was measured, all scores having been cached otherwise.
    """

    depth: int
    values: Values
    gains: Mapping[str, Comparison]
    against_deepest: Mapping[str, Comparison]
    latency: Latency | None

    def mean(self, measure: str) -> float:
        """Average a measure over all queries."""
        return mean(self.values[measure])


@dataclass(frozen=True, slots=True)
class System:
    """One reranker.

    Attributes:
        name: What reports call it.
        levels: One for each depth, ascending.
        scores: Query id to the scores of its candidates, as deep as the deepest depth.
        pairs_scored, pairs_cached: How many pairs of query and document were scored now; how many were known.
        rejected: How many documents could not be scored; they are ranked behind the others.
    """

    name: str
    levels: tuple[Level, ...]
    scores: Mapping[str, Scores]
    pairs_scored: int
    pairs_cached: int
    rejected: int

    @property
    def deepest(self) -> Level:
        """The level of the deepest depth."""
        return self.levels[-1]

    def enough(self, measure: str) -> Level:
        """Find the shallowest level that the deepest is not clearly better than."""
        return next(level for level in self.levels if level.against_deepest[measure].verdict != "hurts")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What reranking did to a collection.

    Attributes:
        collection: What was evaluated, with its judged queries.
        first_stage: What found the candidates: ``"BM25"``, or the name of a run.
        measures: Their names. The first one decides what is shown first and in plots.
        depths: How many candidates were reranked, ascending.
        candidates: Query id to what the first stage found, best first; nothing for a query without any.
        before: What every query got without reranking.
        ceilings: Depth to what every query gets when the judgments themselves order so many candidates.
        systems: The rerankers.
        between: (first, second, measure to comparison) of every two rerankers at the deepest depth.
        retrieval: How long the first stage took; None for a run.
    """

    collection: Collection
    first_stage: str
    measures: tuple[str, ...]
    depths: tuple[int, ...]
    candidates: Mapping[str, Sequence[str]]
    before: Values
    ceilings: Mapping[int, Values]
    systems: tuple[System, ...]
    between: tuple[tuple[str, str, Mapping[str, Comparison]], ...] = ()
    retrieval: Latency | None = None

    @property
    def measure(self) -> str:
        """The first one."""
        return self.measures[0]

    @property
    def without_candidates(self) -> list[str]:
        """The ids of the queries for which the first stage found nothing: no order helps them, and each counts as 0."""
        return [query for query, ranking in self.candidates.items() if not ranking]

    def ranking(self, system: System, query: str, depth: int | None = None) -> list[str]:
        """List document ids as a system orders them, at the deepest depth unless told."""
        return reranked(self.candidates[query], system.scores[query], depth or self.depths[-1])

    def run(self, system: System) -> dict[str, list[tuple[str, float | None]]]:
        """List (document id, score) as a system orders them, for `write_run`; None behind the deepest depth."""
        rankings = {}
        for query, candidates in self.candidates.items():
            scores = dict(zip(candidates, system.scores[query], strict=False))
            rankings[query] = [(document, scores.get(document)) for document in self.ranking(system, query)]
        return rankings

    def as_json(self) -> dict[str, Any]:
        """Collect everything but the texts, for `json.dump`; seconds, not milliseconds."""
        return {
            "rag_rerank": __version__,
            "collection": self.collection.name,
            "documents": None if self.retrieval is None else len(self.collection.documents),  # a run needs not all
            "queries": len(self.candidates),
            "queries_without_candidates": self.without_candidates,
            "first_stage": self.first_stage,
            "candidates_per_query": sum(map(len, self.candidates.values())) / len(self.candidates),
            "depths": list(self.depths),
            "measures": list(self.measures),
            "ndcg_gain": GAIN,
            "interval": {"confidence": CONFIDENCE, "method": "paired bootstrap", "resamples": RESAMPLES, "seed": SEED},
            "before": {"means": _means(self.before), "per_query": self.before},
            "ceilings": {str(depth): _means(values) for depth, values in self.ceilings.items()},
            "retrieval_seconds": self.retrieval and asdict(self.retrieval),
            "systems": [self._system(system) for system in self.systems],
            "between": [{"first": one, "second": two, "gains": _gains(gains)} for one, two, gains in self.between],
        }

    def _system(self, system: System) -> dict[str, Any]:
        return {
            "name": system.name,
            "verdict": system.deepest.gains[self.measure].verdict,
            "enough_depth": system.enough(self.measure).depth,
            "pairs_scored": system.pairs_scored,
            "pairs_cached": system.pairs_cached,
            "rejected": system.rejected,
            "depths": [
                {
                    "depth": level.depth,
                    "means": _means(level.values),
                    "gains": _gains(level.gains),
                    "against_deepest": _gains(level.against_deepest),
                    "seconds_per_query": level.latency and asdict(level.latency),
                    "per_query": level.values,
                }
                for level in system.levels
            ],
        }


def _means(values: Values) -> dict[str, float]:
    return {measure: mean(each) for measure, each in values.items()}


def _gains(gains: Mapping[str, Comparison]) -> dict[str, dict[str, Any]]:
    return {measure: asdict(gain) | {"verdict": gain.verdict} for measure, gain in gains.items()}
