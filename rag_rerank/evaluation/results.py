"""The results of an evaluation: for people by the command line and `report`, for programs by `as_json`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rag_rerank import __version__
from rag_rerank.errors import ConfigError
from rag_rerank.evaluation.collection import Collection
from rag_rerank.evaluation.measures import CONFIDENCE, RESAMPLES, SEED, Comparison, mean
from rag_rerank.evaluation.scoring import Latency, Scores
from rag_rerank.ranking import Ranking

Values = Mapping[str, Mapping[str, float]]  # measure to query id to value


def reranked(candidates: Sequence[str], scores: Scores, depth: int) -> list[str]:
    """Order the first `depth` candidates as `Scorer.rerank` does; those behind stay where they were."""
    ranked = Ranking().rank(scores[:depth])
    return [candidates[item.index] for item in ranked] + list(candidates[depth:])


@dataclass(frozen=True, slots=True)
class Kept:
    """What a policy keeps of the candidates, for a prompt to hold.

    Attributes:
        policy: Arguments of `Scorer.rerank`, such as ``"min_precision=0.8 top_n=10"``.
        precision: The share of what is kept that is relevant; None where nothing is kept.
        recall: The share of the relevant candidates that is kept.
        documents: How many are kept, a query.
        tokens: What these take of a prompt, a query: one for four bytes of UTF-8, by rule of thumb.
        queries_without: For how many queries nothing is kept.
    """

    policy: str
    precision: float | None
    recall: float
    documents: float
    tokens: float
    queries_without: int


def ranking(policy: str) -> Ranking:
    """Read a policy; a ConfigError for one that can't be."""
    try:
        return Ranking(**{name: json.loads(value) for name, value in (each.split("=") for each in policy.split())})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{policy!r} is no policy such as 'min_precision=0.8 top_n=10': {error}") from error


def keep(
    policy: str, collection: Collection, candidates: Mapping[str, Sequence[str]], scores: Mapping[str, Scores]
) -> Kept:
    """Say what a policy keeps of the candidates that have been scored, all queries together."""
    wanted = ranking(policy)
    ranked = {query: wanted.rank(row) for query, row in scores.items()}
    kept = [(query, candidates[query][each.index]) for query, best in ranked.items() for each in best]
    scored = [(query, name) for query, row in scores.items() for name in candidates[query][: len(row)]]
    grades = collection.judgments
    right, relevant = (sum(grades[query].get(name, 0) > 0 for query, name in pairs) for pairs in (kept, scored))
    size = sum(len(collection.documents[name].encode(errors="surrogatepass")) for _, name in kept)
    means = right / max(relevant, 1), len(kept) / len(scores), size / 4 / len(scores)
    return Kept(policy, right / len(kept) if kept else None, *means, sum(not best for best in ranked.values()))


@dataclass(frozen=True, slots=True)
class Level:
    """One reranker at one depth: what every query got.

    Attributes:
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
        scores: Query id to the scores of its candidates, as deep as the deepest depth.
        pairs_scored, pairs_cached: How many pairs of query and document were scored now; how many were known.
        kept: What each policy keeps, at the deepest depth.
    """

    name: str
    levels: tuple[Level, ...]
    scores: Mapping[str, Scores]
    pairs_scored: int
    pairs_cached: int
    kept: tuple[Kept, ...]

    @property
    def rejected(self) -> int:
        """How many documents could not be scored; they are ranked behind the others."""
        return sum(list(scores).count(None) for scores in self.scores.values())

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
        first_stage: What found the candidates: ``"BM25"``, or the name of a run.
        measures: Their names. The first one decides what is shown first and in plots.
        candidates: Query id to what the first stage found, best first; nothing for a query without any.
        before: What every query got without reranking.
        ceilings: Depth to what every query gets when the judgments themselves order so many candidates.
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
    between: tuple[tuple[str, str, Mapping[str, Comparison]], ...]
    retrieval: Latency | None

    @property
    def measure(self) -> str:
        """The first one."""
        return self.measures[0]

    @property
    def without_candidates(self) -> list[str]:
        """The queries for which the first stage found nothing: no order helps them, and each counts as 0."""
        return [query for query, ranking in self.candidates.items() if not ranking]

    def ranking(self, system: System, query: str) -> list[str]:
        """List document ids as a system orders them, at the deepest depth."""
        return reranked(self.candidates[query], system.scores[query], self.depths[-1])

    def query_gains(self, system: System) -> dict[str, float]:
        """Map each query id to its gain at the deepest depth, by the first measure."""
        before, after = self.before[self.measure], system.deepest.values[self.measure]
        return {query: after[query] - before[query] for query in before}

    def run(self, system: System) -> dict[str, list[tuple[str, float | None]]]:
        """List (document id, score) as a system orders them, for `write_run`; None behind the deepest depth."""
        scores = {query: dict(zip(self.candidates[query], row, strict=False)) for query, row in system.scores.items()}
        return {
            query: [(document, known.get(document)) for document in self.ranking(system, query)]
            for query, known in scores.items()
        }

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
            "ndcg_gain": "linear",  # a grade counts as it is, as in trec_eval, and not as 2^grade - 1
            "interval": {"confidence": CONFIDENCE, "method": "paired bootstrap", "resamples": RESAMPLES, "seed": SEED},
            "before": {"means": _means(self.before), "per_query": self.before},
            "ceilings": {str(depth): _means(values) for depth, values in self.ceilings.items()},
            "retrieval_seconds": self.retrieval and asdict(self.retrieval),
            "systems": [
                {
                    **{name: getattr(system, name) for name in ("name", "pairs_scored", "pairs_cached", "rejected")},
                    "verdict": system.deepest.gains[self.measure].verdict,
                    "enough_depth": system.enough(self.measure).depth,
                    "kept": [asdict(each) for each in system.kept],
                    "depths": [_level(each) for each in system.levels],
                }
                for system in self.systems
            ],
            "between": [
                {"first": first, "second": second, "gains": {name: asdict(gain) for name, gain in gains.items()}}
                for first, second, gains in self.between
            ],
        }


def _level(level: Level) -> dict[str, Any]:
    figures = asdict(level)
    figures |= {"per_query": figures.pop("values"), "seconds_per_query": figures.pop("latency")}
    return {"means": _means(level.values), **figures}


def _means(values: Values) -> dict[str, float]:
    return {measure: mean(each) for measure, each in values.items()}
