"""Every candidate's score, from the scorer or from the cache, each pair scored once; and how long it took.

A depth of 10 needs no scores that a depth of 100 has not got, but its time can't be told from that of 100. So the
queries take turns: of four depths, every fourth query is asked in one call of 10 candidates, which is timed, and one of
the other 90, which is not. When enough were timed, the others are asked about together, which takes less time.
"""

import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rag_rerank.errors import DocumentRejected
from rag_rerank.evaluation.cache import ScoreCache
from rag_rerank.evaluation.identity import identify, is_remote
from rag_rerank.scorer import Scorer

TIMED = 200
"""The first so many queries are asked one by one, and timed: enough for percentiles at each of four depths."""

_AT_ONCE = 10.0  # seconds' worth of pairs of later queries in one call: what an interruption may lose

logger = logging.getLogger(__name__)

Scores = Sequence[float | None]
"""Of one query's candidates, in the order of the first stage; None for a document that the scorer refused."""

# The first call loads the model or connects, and is in no query's time; a server's scores of these show whether it
# still has the model and the prompt that the cached scores came from.
PROBE = (
    ("Why is the sky blue?", "Air scatters the short waves of sunlight more than the long ones."),
    ("Why is the sky blue?", "Bread needs flour, water, salt and time."),
    ("how to undo the last commit in git", "git reset --soft HEAD~1 goes one commit back and keeps your changes."),
    ("how to undo the last commit in git", "Git was written by Linus Torvalds in 2005."),
)


@dataclass(frozen=True, slots=True)
class Latency:
    """How long queries waited for their candidates to be scored.

    Attributes:
        queries: How many were timed.
        p50, p95, p99: Seconds that so many percent of them stayed below.
        pairs_per_second: Pairs of query and document, one query at a time.
    """

    queries: int
    p50: float
    p95: float
    p99: float
    pairs_per_second: float

    @classmethod
    def of(cls, calls: Sequence[tuple[int, float]]) -> "Latency | None":
        """From (documents, seconds) of every call; None for no calls."""
        if not calls:
            return None
        seconds = sorted(time for _, time in calls)
        p50, p95, p99 = (_percentile(seconds, percent) for percent in (50, 95, 99))
        return cls(len(calls), p50, p95, p99, sum(count for count, _ in calls) / max(sum(seconds), 1e-9))


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """Linear between the two nearest."""
    if len(ordered) == 1:
        return ordered[0]
    return statistics.quantiles(ordered, n=100, method="inclusive")[percent - 1]


@dataclass(slots=True)
class Scored:
    """What came of asking a scorer.

    Attributes:
        scores: Query id to scores of its candidates.
        calls: Depth to (documents, seconds) of every call that was timed at it, now or when its scores were cached.
        pairs_scored, pairs_cached: How many pairs were scored now; how many were known.
        rejected: How many the scorer refused.
    """

    scores: dict[str, Scores] = field(default_factory=dict)
    calls: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    pairs_scored: int = 0
    pairs_cached: int = 0
    rejected: int = 0


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A query of which some candidates have no score yet: texts, and their positions among the candidates."""

    name: str
    query: str
    documents: Sequence[str]
    positions: Sequence[int]


class Asking:
    """A scorer that is asked about one query after the other, and about many at once when enough were timed.

    Args:
        scorer: The scorer.
        depths: How many candidates of a query are reranked, ascending.
        folder: Of the cache; None for none.
        deadline: Seconds that a call may take.

    Attributes:
        result: What is known so far; complete after `finish`.

    Raises:
        ConfigError: The cache can't be used.
        BackendError: The scorer is a server and does not answer.
    """

    def __init__(self, scorer: Scorer, depths: Sequence[int], folder: Path | None, deadline: float | None) -> None:
        self._scorer, self._depths, self._deadline = scorer, depths, deadline
        self._warm = False
        self._waiting: list[_Waiting] = []
        self._pace = 0.0  # pairs per second, as last seen
        self._cache: ScoreCache | None = None
        self.result = Scored(calls={depth: [] for depth in depths})
        probe = self._warm_up() if is_remote(scorer) else None
        identity = None if folder is None else identify(scorer)
        if folder is None or identity is None:
            return
        self._cache = ScoreCache(folder, identity)
        if probe is not None and not self._cache.verify(probe):
            logger.warning("%s does not score as it did when its scores were cached: forgotten", scorer.model_name)

    def ask(self, name: str, query: str, documents: Sequence[str]) -> None:
        """Find the scores of a query's candidates, cut at the deepest depth, now or with those of queries to come.

        Raises:
            BackendError: As `Scorer.score`, but documents that are refused have None for a score.
        """
        documents, position = documents[: self._depths[-1]], len(self.result.scores)
        known: list[float | None] = [None] * len(documents)
        if self._cache is not None:
            known = self._cache.scores(query, documents)
        missing = [place for place, score in enumerate(known) if score is None]
        self.result.scores[name] = known
        self.result.pairs_scored += len(missing)
        self.result.pairs_cached += len(documents) - len(missing)
        if not missing:
            self._take_known_times(query, documents)
        elif len(missing) == len(documents) and position < TIMED:
            self._time(name, query, documents, self._depths[position % len(self._depths)])
        else:
            self._waiting.append(_Waiting(name, query, [documents[place] for place in missing], missing))
            if sum(len(each.documents) for each in self._waiting) > self._pace * _AT_ONCE:
                self._score_waiting()

    def finish(self) -> None:
        """Score what still waits.

        Raises:
            BackendError: As `ask`.
        """
        self._score_waiting()
        self.result.rejected = sum(scores.count(None) for scores in self.result.scores.values())

    def close(self) -> None:
        """Close the cache. The scorer stays open."""
        if self._cache is not None:
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
            self._keep(query, rest, more, None)
            scores = scores + more
        self.result.scores[name] = scores

    def _score_waiting(self) -> None:
        """Score all that waits in one call: a server or a large device has more to do at a time."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        queries = [each.query for each in waiting for _ in each.documents]
        scores, _ = self._score(queries, [document for each in waiting for document in each.documents])
        start = 0
        for each in waiting:
            part = scores[start : start + len(each.documents)]
            start += len(part)
            self._keep(each.query, each.documents, part, None)
            complete = list(self.result.scores[each.name])
            for place, score in zip(each.positions, part, strict=True):
                complete[place] = score
            self.result.scores[each.name] = complete

    def _score(self, queries: Sequence[str], documents: Sequence[str]) -> tuple[list[float | None], float]:
        """Scores, None for what is refused, and the seconds that it took."""
        self._warm_up()
        scores: list[float | None]
        began = time.perf_counter()
        try:
            scores = [*self._scorer.score(queries, documents, deadline=self._deadline)]
        except DocumentRejected as error:
            if len(error.scores) != len(documents):
                raise
            scores = [*error.scores]
        seconds = time.perf_counter() - began
        self._pace = len(documents) / max(seconds, 1e-3)
        return scores, seconds

    def _take_known_times(self, query: str, documents: Sequence[str]) -> None:
        """Of the calls in which a query's candidates were once scored."""
        if self._cache is None:
            return
        calls = [documents[:depth] for depth in self._depths]
        for depth, call, seconds in zip(self._depths, calls, self._cache.seconds(query, calls), strict=True):
            if seconds is not None:
                self.result.calls[depth].append((len(call), seconds))

    def _keep(self, query: str, documents: Sequence[str], scores: Scores, seconds: float | None) -> None:
        if self._cache is not None:
            self._cache.keep(query, documents, scores, seconds)

    def _warm_up(self) -> list[float]:
        """The scores of the probe; nothing after the first time."""
        if self._warm:
            return []
        self._warm = True
        queries, documents = zip(*PROBE, strict=True)
        # A model of this process may have to be downloaded first.
        return self._scorer.score(queries, documents, deadline=self._deadline if is_remote(self._scorer) else None)
