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

from rag_rerank.errors import BackendError, ConfigError, DeadlineExceeded
from rag_rerank.evaluation.cache import ScoreCache
from rag_rerank.identity import PROBES, Identity
from rag_rerank.inputs import NEUTRAL
from rag_rerank.scorer import Scorer

TIMED_QUERIES = 200
"""The first so many queries are scored one by one, and timed: enough for percentiles at each of four depths."""

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
        # (query, its candidates without a score by their position, the scores to be completed)
        self._pending: list[tuple[str, dict[int, str], list[float | None]]] = []
        self._pairs_per_second = 0.0  # of the last call
        # A model of this process may have to be downloaded first.
        self._first_deadline = deadline if scorer.remote else None
        self._identity = scorer.identity(deadline=self._first_deadline)
        self._is_warm = bool(self._identity.probes)
        self._cache = ScoreCache(folder if self._identity.steady else None, self._identity)
        self.close = self._cache.close

    def add(self, name: str, query: str, documents: Sequence[str]) -> None:
        """Find the scores of a query's candidates, up to the deepest depth, now or with those of queries to come.

        A ConfigError where another model answers than before; None for the score of what alone can't be scored.
        """
        documents, position = documents[: self._depths[-1]], len(self.scores)
        known = self.scores[name] = self._cache.scores(query, documents)
        missing = {place: documents[place] for place, score in enumerate(known) if score is None}
        self.pairs_scored += len(missing)
        self.pairs_cached += len(documents) - len(missing)
        if not missing:  # their times are those of the calls in which they were scored
            for depth in self._depths:
                if (seconds := self._cache.seconds(query, documents[:depth])) is not None:
                    self.calls[depth].append((min(depth, len(documents)), seconds))
        elif len(missing) == len(documents) and position < TIMED_QUERIES:
            self.scores[name] = self._time(query, documents, self._depths[position % len(self._depths)])
        else:
            self._pending.append((query, missing, known))
            if sum(len(texts) for _, texts, _ in self._pending) > self._pairs_per_second * _SECONDS_PER_CALL:
                self.finish()

    def _time(self, query: str, documents: Sequence[str], depth: int) -> list[float | None]:
        """Score candidates of which none is known: those up to `depth` in a call that is timed, the others in one."""
        first, rest = documents[:depth], documents[depth:]
        scores, seconds = self._score([query], first)
        self._cache.keep(query, first, scores, seconds)
        for each in self._depths:
            if min(each, len(documents)) == len(first):  # the call would have been the same
                self.calls[each].append((len(first), seconds))
        if rest:
            more, _ = self._score([query], rest)
            self._cache.keep(query, rest, more)
            scores += more
        return scores

    def finish(self) -> None:
        """Score all that is pending in one call: a server or a large device has more to do at a time."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        pairs = [(query, text) for query, texts, _ in pending for text in texts.values()]
        scores = iter(self._score(*zip(*pairs, strict=True))[0])
        for query, texts, known in pending:
            found = dict(zip(texts, scores, strict=False))
            self._cache.keep(query, list(texts.values()), list(found.values()))
            for position, score in found.items():
                known[position] = score

    def _score(self, queries: Sequence[str], documents: Sequence[str]) -> tuple[list[float | None], float]:
        """Scores, None for a document that can't be scored, and the seconds that it took."""
        if not self._is_warm:  # loading the model is in no query's time
            self._scorer.score(NEUTRAL, NEUTRAL, deadline=self._first_deadline)
            self._is_warm = True
        began = time.perf_counter()
        scores = self._scores(queries, documents)
        seconds = time.perf_counter() - began
        self._pairs_per_second = len(documents) / max(seconds, 1e-3)
        self._check_scorer()
        return scores, seconds

    def _scores(self, queries: Sequence[str], documents: Sequence[str]) -> list[float | None]:
        try:
            return [*self._scorer.score(queries, documents, deadline=self._deadline)]
        except BackendError as error:
            if len(error.scores) == len(documents):
                return list(error.scores)
            if isinstance(error, DeadlineExceeded) or documents[-1] == NEUTRAL:
                raise
        # All failed, be it for what they are or because nothing works now: a neutral pair beside them tells.
        rows = [*queries] * (len(documents) // len(queries))
        return self._scores([*rows, NEUTRAL], [*documents, NEUTRAL])[:-1]

    def _check_scorer(self) -> None:
        """Refuse scores of another model than before: a server may have been restarted since the last call."""
        if not (self._scorer.remote and self._identity.steady and self._identity.probes):
            return
        queries, documents = zip(*PROBES, strict=True)
        probes = self._scorer.score(queries, documents, deadline=self._deadline)
        if not Identity({}, probes).differences(Identity({}, self._identity.probes)):
            return
        # In half precision, probes may differ by the other pairs of a batch: `Scorer.identity` decides.
        if changes := self._scorer.identity(deadline=self._deadline).differences(self._identity):
            changed = f"{self._scorer.model_name} became another scorer during the run: {'; '.join(changes)}"
            raise ConfigError(f"{changed}. Run again to evaluate this one.")
