"""Every candidate's score, from the scorer or from the cache, each pair scored once; and how long it took.

A depth of 10 needs no scores that a depth of 100 has not got, but its time can't be told from that of 100. So the
queries take turns: of four depths, every fourth query has one call with 10 candidates, which is timed, and one with the
other 90, which is not. When enough were timed, the others are scored together, which takes less time.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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


@dataclass(slots=True)
class Scored:
    """What came of scoring: scores by query id, and pairs that were scored now, were cached, can't be scored.

    Attributes:
        calls: Depth to (documents, seconds) of every call that was timed at it, now or when its scores were cached.
    """

    calls: dict[int, list[tuple[int, float]]]
    scores: dict[str, Scores] = field(default_factory=dict)
    pairs_scored: int = 0
    pairs_cached: int = 0
    rejected: int = 0


class _Pending(NamedTuple):
    """A query, its candidates that have no score yet, by their position, and the scores to be completed."""

    query: str
    documents: dict[int, str]
    scores: list[float | None]


class ScoringRun:
    """Scores the candidates of one query after the other, and of many at once when enough calls were timed.

    Depths ascend; a call may take `deadline` seconds. The scorer stays open. Scores are not cached without a `folder`,
    or if another scorer may answer from call to call.
    """

    def __init__(self, scorer: Scorer, depths: Sequence[int], folder: Path | None, deadline: float | None) -> None:
        self._scorer, self._depths, self._deadline = scorer, depths, deadline
        self._pending: list[_Pending] = []
        self._pairs_per_second = 0.0  # of the last call
        # A model of this process may have to be downloaded first.
        self._first_deadline = deadline if scorer.remote else None
        self._identity = scorer.identity(deadline=self._first_deadline)
        self._is_warm = bool(self._identity.probes)
        self._cache = ScoreCache(folder, self._identity) if folder is not None and self._identity.steady else None
        self.result = Scored(calls={depth: [] for depth in depths})

    def add(self, name: str, query: str, documents: Sequence[str]) -> None:
        """Find the scores of a query's candidates, up to the deepest depth, now or with those of queries to come.

        A ConfigError where another model answers than before; None for the score of what alone can't be scored.
        """
        documents, position = documents[: self._depths[-1]], len(self.result.scores)
        known: list[float | None] = self._cache.scores(query, documents) if self._cache else [None] * len(documents)
        missing = {place: documents[place] for place, score in enumerate(known) if score is None}
        self.result.scores[name] = known
        self.result.pairs_scored += len(missing)
        self.result.pairs_cached += len(documents) - len(missing)
        if not missing:
            self._take_known_times(query, documents)
        elif len(missing) == len(documents) and position < TIMED_QUERIES:
            self._time(name, query, documents, self._depths[position % len(self._depths)])
        else:
            self._pending.append(_Pending(query, missing, known))
            if sum(len(each.documents) for each in self._pending) > self._pairs_per_second * _SECONDS_PER_CALL:
                self._score_pending()

    def finish(self) -> None:
        """Score what is left; raises as `add`."""
        self._score_pending()
        self.result.rejected = sum(scores.count(None) for scores in self.result.scores.values())

    def close(self) -> None:
        """Close the cache."""
        if self._cache:
            self._cache.close()

    def _time(self, name: str, query: str, documents: Sequence[str], depth: int) -> None:
        """Score candidates of which none is known: those up to `depth` in a call that is timed, the others in one."""
        first, rest = documents[:depth], documents[depth:]
        scores, seconds = self._score([query], first)
        self._keep(query, first, scores, seconds)
        for each in self._depths:
            if min(each, len(documents)) == len(first):  # the call would have been the same
                self.result.calls[each].append((len(first), seconds))
        if rest:
            more, _ = self._score([query], rest)
            self._keep(query, rest, more)
            scores = [*scores, *more]
        self.result.scores[name] = scores

    def _score_pending(self) -> None:
        """Score all pending queries in one call: a server or a large device has more to do at a time."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        pairs = [(each.query, document) for each in pending for document in each.documents.values()]
        scores = iter(self._score(*zip(*pairs, strict=True))[0])
        for each in pending:
            part = dict(zip(each.documents, scores, strict=False))
            self._keep(each.query, list(each.documents.values()), list(part.values()))
            for position, score in part.items():
                each.scores[position] = score

    def _score(self, queries: Sequence[str], documents: Sequence[str]) -> tuple[Scores, float]:
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

    def _scores(self, queries: Sequence[str], documents: Sequence[str]) -> Scores:
        try:
            return self._scorer.score(queries, documents, deadline=self._deadline)
        except BackendError as error:
            if len(error.scores) == len(documents):
                return list(error.scores)
            if isinstance(error, DeadlineExceeded) or documents[-1] == NEUTRAL:
                raise
        # All failed, be it for what they are or because nothing works now: a neutral pair beside them tells.
        rows = [*queries] * (len(documents) // len(queries))
        return self._scores([*rows, NEUTRAL], [*documents, NEUTRAL])[:-1]

    def _check_scorer(self) -> None:
        """Refuse scores of another model than before: a server may have been restarted since the last call.

        In half precision, probes may differ by the other pairs of a batch: `Scorer.identity` decides.
        """
        if not (self._scorer.remote and self._identity.steady and self._identity.probes):
            return
        queries, documents = zip(*PROBES, strict=True)
        probes = self._scorer.score(queries, documents, deadline=self._deadline)
        if not Identity({}, probes).differences(Identity({}, self._identity.probes)):
            return
        if changes := self._scorer.identity(deadline=self._deadline).differences(self._identity):
            changed = f"{self._scorer.model_name} became another scorer during the run: {'; '.join(changes)}"
            raise ConfigError(f"{changed}. Run again to evaluate this one.")

    def _take_known_times(self, query: str, documents: Sequence[str]) -> None:
        """Take the times of the calls in which a query's candidates were once scored."""
        if not self._cache:
            return
        calls = [documents[:depth] for depth in self._depths]
        for depth, call, seconds in zip(self._depths, calls, self._cache.seconds(query, calls), strict=True):
            if seconds is not None:
                self.result.calls[depth].append((len(call), seconds))

    def _keep(self, query: str, documents: Sequence[str], scores: Scores, seconds: float | None = None) -> None:
        if self._cache:
            self._cache.keep(query, documents, scores, seconds)
