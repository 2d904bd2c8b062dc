"""`evaluate`: first stage, scores, measures at every depth, and whether what changed is more than luck."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from rag_rerank.errors import ConfigError
from rag_rerank.evaluation.cache import default_folder
from rag_rerank.evaluation.collection import Collection
from rag_rerank.evaluation.measures import DEFAULT_MEASURES, Rankings, Ruler, Run
from rag_rerank.evaluation.results import Evaluation, Level, System, Values, ideal, reranked
from rag_rerank.evaluation.retrieval import BM25
from rag_rerank.evaluation.scoring import Asking, Latency, Scored
from rag_rerank.evaluation.significance import Comparison, compare
from rag_rerank.evaluation.trec import best_first, check_known
from rag_rerank.scorer import Scorer

DEFAULT_DEPTHS = (10, 20, 50, 100)
LEAST_FOUND = 100  # candidates by BM25, however few of them are reranked: recall and MAP need some

Progress = Callable[[str, int, int], None]
"""Is told what is being done, for how many queries it is done, and of how many."""


def evaluate(
    collection: Collection,
    scorers: Scorer | Mapping[str, Scorer],
    *,
    run: Run | None = None,
    first_stage: str | None = None,
    depths: Sequence[int] = DEFAULT_DEPTHS,
    measures: Sequence[str] = DEFAULT_MEASURES,
    limit: int | None = None,
    cache: str | Path | bool = True,
    deadline: float | None = 600.0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure what reranking does to a collection, at several depths, and how sure that is.

    At depth d, the first d candidates of each query are put in the scorer's order, as `Scorer.rerank` does; those
    behind them stay where they were. Every pair is scored once, at the deepest depth. What was scored is kept, so that
    an interrupted evaluation goes on where it was, and the same one again asks no scorer (but a server four pairs).

    Args:
        collection: Documents, queries and judgments. Means are over all of its queries; one without candidates has 0.
        scorers: One, or several by name to be compared. They stay open. None at all measures the first stage alone.
        run: What a first stage of yours found, instead of BM25's; in the order of its scores, see `read_run`.
        first_stage: What to call that.
        depths: How many candidates to rerank.
        measures: Names as in ir-measures. nDCG has linear gain. The first one is what verdicts and plots are about.
        limit: Only the first so many queries.
        cache: The folder in which scores are kept; True for ``~/.cache/rag_rerank``, False for none.
        deadline: Seconds that a call of a scorer may take.
        progress: Is called before each query and after the last.

    Returns:
        Means and values of every query before, after and at best, confidence intervals, times.

    Raises:
        ConfigError: A depth or measure that can't be, nothing to evaluate, documents in the run that the collection
            does not have, a cache that can't be used, or as `Scorer.score`.
        BackendError: As `Scorer.score`. What was scored before is in the cache.
    """
    depths = _checked_depths(depths)
    collection = _first(collection, limit)
    ruler = Ruler(collection.judgments, measures)
    tell = progress or (lambda what, done, of: None)
    candidates, retrieval = _found(collection, run, max(*depths, ruler.deepest, LEAST_FOUND), tell)
    named = {scorers.model_name: scorers} if isinstance(scorers, Scorer) else dict(scorers)
    if named:
        check_known({query: found[: depths[-1]] for query, found in candidates.items()}, collection.documents)
    folder = None if cache is False else default_folder() if cache is True else Path(cache).expanduser()
    scored = {}
    for name, scorer in named.items():
        with closing(Asking(scorer, depths, folder, deadline)) as asking:
            for done, (query, found) in enumerate(candidates.items()):
                tell(name, done, len(candidates))
                texts = [collection.documents[document] for document in found[: depths[-1]]]
                asking.ask(query, collection.queries[query], texts)
            asking.finish()
            tell(name, len(candidates), len(candidates))
        scored[name] = asking.result
    before = ruler.of(candidates)
    systems, between = _judged(ruler, depths, candidates, before, scored)
    return Evaluation(
        collection=collection,
        first_stage=first_stage or ("BM25" if run is None else "the run"),
        measures=ruler.measures,
        depths=depths,
        candidates=candidates,
        before=before,
        ceilings={depth: ruler.of(_ideal(collection, candidates, depth)) for depth in depths},
        systems=systems,
        between=between,
        retrieval=retrieval,
    )


def _checked_depths(depths: Sequence[int]) -> tuple[int, ...]:
    """Ascending, each once."""
    for depth in depths:
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ConfigError(f"a depth is a number of candidates, at least 1; got {depth!r}")
    if not depths:
        raise ConfigError("depths is empty; pass at least one number of candidates")
    return tuple(sorted(set(depths)))


def _first(collection: Collection, limit: int | None) -> Collection:
    """The collection with its first `limit` queries, and no judgments of others."""
    queries = dict(list(collection.queries.items())[:limit])
    if not queries:
        raise ConfigError("there are no queries to evaluate")
    return replace(collection, queries=queries, judgments={name: collection.judgments[name] for name in queries})


def _found(
    collection: Collection, run: Run | None, keep: int, tell: Progress
) -> tuple[dict[str, list[str]], Latency | None]:
    """Candidates of every query: all of the run's, or BM25's best `keep`, and how long finding these took."""
    if run is not None:
        if not collection.queries.keys() & run.keys():
            raise ConfigError("the run has none of the collection's queries: was it made from another one?")
        return {query: list(best_first(run.get(query, {}))) for query in collection.queries}, None
    total = len(collection.queries)
    tell("BM25", 0, total)
    bm25 = BM25(collection.documents)
    candidates: dict[str, list[str]] = {}
    calls = []
    for done, (name, query) in enumerate(collection.queries.items(), 1):
        began = time.perf_counter()
        candidates[name] = list(bm25.retrieve(query, keep))
        calls.append((len(candidates[name]), time.perf_counter() - began))
        tell("BM25", done, total)
    return candidates, Latency.of(calls)


def _ideal(collection: Collection, candidates: Rankings, depth: int) -> Rankings:
    return {query: ideal(found, collection.judgments[query], depth) for query, found in candidates.items()}


def _judged(
    ruler: Ruler, depths: Sequence[int], candidates: Rankings, before: Values, scored: Mapping[str, Scored]
) -> tuple[tuple[System, ...], tuple[tuple[str, str, Mapping[str, Comparison]], ...]]:
    """The rerankers, measured at every depth and compared: with the first stage, with the deepest depth, in pairs."""
    values = {
        name: [
            ruler.of({query: reranked(found, result.scores[query], depth) for query, found in candidates.items()})
            for depth in depths
        ]
        for name, result in scored.items()
    }
    pairs = list(combinations(scored, 2))
    wanted = [(before, level) for levels in values.values() for level in levels]
    wanted += [(levels[-1], level) for levels in values.values() for level in levels]
    wanted += [(values[first][-1], values[second][-1]) for first, second in pairs]
    # All at once, for drawing takes longer than adding up.
    compared = _compared(wanted, ruler.measures)
    gains, against_deepest = compared, compared[len(scored) * len(depths) :]
    systems = []
    for number, (name, result) in enumerate(scored.items()):
        places = range(number * len(depths), (number + 1) * len(depths))
        levels = tuple(
            Level(depth, level, gains[place], against_deepest[place], Latency.of(result.calls[depth]))
            for depth, level, place in zip(depths, values[name], places, strict=True)
        )
        counts = result.pairs_scored, result.pairs_cached, result.rejected
        systems.append(System(name, levels, result.scores, *counts))
    between = compared[2 * len(scored) * len(depths) :]
    return tuple(systems), tuple((*pair, gain) for pair, gain in zip(pairs, between, strict=True))


def _compared(pairs: Sequence[tuple[Values, Values]], measures: Sequence[str]) -> list[dict[str, Comparison]]:
    """Each pair, by every measure: what the second one gains."""
    differences = [
        [second[measure][query] - value for query, value in first[measure].items()]
        for first, second in pairs
        for measure in measures
    ]
    compared = iter(compare(differences))
    return [{measure: next(compared) for measure in measures} for _ in pairs]
