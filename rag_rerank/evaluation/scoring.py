"""Every candidate's score, from the scorer or from the cache, each pair scored once; and how long it took.

A depth of 10 needs no scores that a depth of 100 has not got, but its time can't be told from that of 100. So the
queries take turns: of four depths, every fourth query has one call with 10 candidates, which is timed, and one with the
other 90, which is not. When enough were timed, the others are scored together, which takes less time.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rag_rerank.errors import ConfigError, RerankError
from rag_rerank.evaluation.cache import ScoreCache
from rag_rerank.inputs import NEUTRAL
from rag_rerank.runs import Asker
from rag_rerank.scorer import Scorer

TIMED_QUERIES = 200
"""The first so many queries are scored one by one, and timed: enough for percentiles at each of four depths."""

_Asked = tuple[str, str, dict[int, str], list[float | None]]
# a query, its key in the cache, its candidates without a score by their position, the scores to be completed
_SECONDS_PER_CALL = 10.0  # of pairs of later queries: what an interruption may lose

Scores = Sequence[float | None]
"""Of one query's candidates, in the order of the first stage; None for a document that can't be scored."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds that 50, 95 and 99 percent of the timed queries waited at most; and pairs a second, query by query."""

    queries: int
    p50: float
    p95: float
    p99: float
    pairs_per_second: float

    @classmethod
    def of(cls, calls: Sequence[tuple[int, float]]) -> "Latency | None":
        """Sum up (documents, seconds) of every call; None for no calls."""
        if not calls:
            return None
        pairs, seconds = np.sum(calls, axis=0)
        p50, p95, p99 = np.percentile([time for _, time in calls], [50, 95, 99]).tolist()
        return cls(len(calls), p50, p95, p99, float(pairs / max(seconds, 1e-9)))


class ScoringRun:
    """Scores the candidates of one query after the other, and of many at once when enough calls were timed.

    Depths ascend; a call may take `deadline` seconds. The scorer stays open. Scores are not kept without a `folder`,
    or if another scorer may answer from call to call.

    Attributes:
        scores: Query id to the scores of its candidates.
        calls: Depth to (documents, seconds) of every call that was timed at it, now or when its scores were cached.
        pairs_scored, pairs_cached: How many were scored now; how many were known.
    """

    def __init__(self, scorer: Scorer, depths: Sequence[int], folder: Path | None, deadline: float | None) -> None:
        self.scores: dict[str, list[float | None]] = {}
        self.calls: dict[int, list[tuple[int, float]]] = {depth: [] for depth in depths}
        self.pairs_scored = self.pairs_cached = 0
        self._scorer, self._depths, self._deadline = scorer, depths, deadline
        self._pending: list[_Asked] = []
        self._pairs_per_second = 0.0  # of the last call
        # A model of this process may have to be downloaded first.
        self._first_deadline = deadline if scorer.remote else None
        self._identity = scorer.identity(deadline=self._first_deadline)
        self._is_warm = bool(self._identity.probes)
        if scorer.listwise and len(depths) > 1:
            listwise = f"{scorer.model_name} scores a query's documents together, so that each depth has its own scores"
            raise ConfigError(f"{listwise}: evaluate one depth at a time")
        self._asker = Asker(scorer, self._identity, deadline)
        self._cache = ScoreCache(folder if self._identity.steady else None, self._identity)
        self.close = self._cache.close

    def add(self, name: str, query: str, documents: Sequence[str]) -> None:
        """Find the scores of a query's candidates, up to the deepest depth, now or with those of queries to come.

        A ConfigError where another model answers than before; None for the score of what alone can't be scored.
        """
        documents, position = documents[: self._depths[-1]], len(self.scores)
        # A listwise score is of the whole list, and so is its key.
        key = str([query, *documents]) if self._scorer.listwise else query
        known = self.scores[name] = self._cache.scores(key, documents)
        whole = self._scorer.listwise and None in known
        missing = {place: documents[place] for place, score in enumerate(known) if score is None or whole}
        self.pairs_scored += len(missing)
        self.pairs_cached += len(documents) - len(missing)
        if not missing:  # their times are those of the calls in which they were scored
            for depth in self._depths:
                if (seconds := self._cache.seconds(key, documents[:depth])) is not None:
                    self.calls[depth].append((min(depth, len(documents)), seconds))
        elif len(missing) == len(documents) and position < TIMED_QUERIES:
            depth = self._depths[position % len(self._depths)]
            seconds = self._score([(query, key, dict(list(missing.items())[:depth]), known)], timed=True)
            for each in self._depths:
                if min(each, len(documents)) == min(depth, len(documents)):  # the call would have been the same
                    self.calls[each].append((min(depth, len(documents)), seconds))
            self._score([(query, key, dict(list(missing.items())[depth:]), known)])
        else:
            self._pending.append((query, key, missing, known))
            if sum(len(texts) for _, _, texts, _ in self._pending) > self._pairs_per_second * _SECONDS_PER_CALL:
                self.finish()

    def finish(self) -> None:
        """Score all that is pending at once: a server or a large device has more to do at a time."""
        pending, self._pending = self._pending, []
        self._score(pending)

    def _score(self, asked: Sequence[_Asked], *, timed: bool = False) -> float:
        """Complete and keep the scores of queries; returns the seconds that the call took, which `timed` keeps, too."""
        asked = [each for each in asked if each[2]]
        if not asked:
            return 0.0
        if not self._is_warm:  # loading the model is in no query's time
            self._scorer.score(NEUTRAL, NEUTRAL, deadline=self._first_deadline)
            self._is_warm = True
        documents = [list(texts.values()) for _, _, texts, _ in asked]
        began = time.perf_counter()
        outcomes = self._asker.ask([query for query, *_ in asked], documents, probe=False)
        seconds = time.perf_counter() - began
        self._pairs_per_second = sum(map(len, documents)) / max(seconds, 1e-3)
        self._asker.ask([], [])  # whether it is the same scorer as before
        for (_, key, texts, known), outcome in zip(asked, outcomes, strict=True):
            scores = getattr(outcome, "scores", ()) if isinstance(outcome, RerankError) else outcome
            scores = scores if len(scores) == len(texts) else [None] * len(texts)
            self._cache.keep(key, list(texts.values()), scores, seconds if timed else None)
            for place, score in zip(texts, scores, strict=True):
                known[place] = score
        return seconds
