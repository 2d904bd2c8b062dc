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
from rag_rerank.evaluation.measures import DEFAULT_MEASURES, Measurer, Run
from rag_rerank.evaluation.results import Evaluation, Level, System, Values, ideal, reranked
from rag_rerank.evaluation.retrieval import BM25
from rag_rerank.evaluation.scoring import Latency, Scored, ScoringRun
from rag_rerank.evaluation.significance import Comparison, compare
from rag_rerank.evaluation.trec import best_first, check_known
from rag_rerank.scorer import Scorer

DEFAULT_DEPTHS = (10, 20, 50, 100)
MIN_CANDIDATES = 100  # by BM25, however few of them are reranked: recall and MAP need some

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
    language: str = "english",
    cache: str | Path | bool = True,
    deadline: float | None = 600.0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure what reranking does to a collection, at several depths, and how sure that is.

    At depth d, the first d candidates of each query are put in the scorer's order, as `Scorer.rerank` does; those
    behind them stay where they were. Every pair is scored once, at the deepest depth. Scores are cached for each
    `Scorer.identity`, so that an interrupted evaluation goes on where it was, and the same one again scores nothing
    but what tells who the scorer is. A `FallbackScorer`'s are not: another scorer may answer next time.

    Args:
        collection: Documents, queries and judgments. Means are over all of its queries; one without candidates has 0.
        scorers: One, or several by name to be compared. They stay open. None at all measures the first stage alone.
        run: The results of your own first stage, instead of BM25's; in the order of its scores, see `read_run`.
        first_stage: What to call that.
        depths: How many candidates to rerank.
        measures: Names as in ir-measures. nDCG has linear gain. The first one is what verdicts and plots are about.
        limit: Only the first so many queries.
        language: Of the texts, for BM25: see `BM25`.
        cache: The folder in which scores are kept; True for ``~/.cache/rag_rerank``, False for none.
        deadline: Seconds that a call of a scorer may take.
        progress: Is called before each query and after the last.

    Returns:
        Means and values of every query before, after and at best, confidence intervals, times.

    Raises:
        ConfigError: A depth, measure or language that can't be, no candidates for any query, documents in the run that
            the collection does not have, a cache that can't be used, a server that another model answers on than at the
            start, or as `Scorer.score`.
        BackendError: As `Scorer.score`. What was scored before is in the cache.
    """
    depths = _checked_depths(depths)
    collection = _first(collection, limit)
    measurer = Measurer(collection.judgments, measures)
    report = progress or (lambda task, done, total: None)
    deepest = max(*depths, measurer.deepest, MIN_CANDIDATES)
    candidates, retrieval = _candidates(collection, run, deepest, language, report)
    named = {scorers.model_name: scorers} if isinstance(scorers, Scorer) else dict(scorers)
    if named:
        check_known({query: ranking[: depths[-1]] for query, ranking in candidates.items()}, collection.documents)
    folder = None if cache is False else default_folder() if cache is True else Path(cache).expanduser()
    scored = {}
    for name, scorer in named.items():
        with closing(ScoringRun(scorer, depths, folder, deadline)) as scoring:
            for done, (query, ranking) in enumerate(candidates.items()):
                report(name, done, len(candidates))
                texts = [collection.documents[document] for document in ranking[: depths[-1]]]
                scoring.add(query, collection.queries[query], texts)
            scoring.finish()
            report(name, len(candidates), len(candidates))
        scored[name] = scoring.result
    before = measurer.measure_rankings(candidates)
    ceilings, after = {}, {name: list[Values]() for name in scored}
    for depth in depths:
        best = {query: ideal(ranking, collection.judgments[query], depth) for query, ranking in candidates.items()}
        ceilings[depth] = measurer.measure_rankings(best)
        for name, result in scored.items():
            ranked = {query: reranked(candidates[query], scores, depth) for query, scores in result.scores.items()}
            after[name].append(measurer.measure_rankings(ranked))
    stage, compared = first_stage or ("BM25" if run is None else "the run"), _compare(depths, before, after, scored)
    return Evaluation(
        collection, stage, measurer.measures, depths, candidates, before, ceilings, *compared, retrieval=retrieval
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
    """Keep the collection's first `limit` queries, and no judgments of others."""
    queries = dict(list(collection.queries.items())[:limit])
    if not queries:
        raise ConfigError("there are no queries to evaluate")
    return replace(collection, queries=queries, judgments={name: collection.judgments[name] for name in queries})


def _candidates(
    collection: Collection, run: Run | None, keep: int, language: str, report: Progress
) -> tuple[dict[str, list[str]], Latency | None]:
    """Candidates of every query: all of the run's, or BM25's best `keep` and how long finding these took."""
    if run is not None:
        if not collection.queries.keys() & run.keys():
            raise ConfigError("the run has none of the collection's queries: was it made from another one?")
        return {query: list(best_first(run.get(query, {}))) for query in collection.queries}, None
    report("BM25", 0, len(collection.queries))
    bm25 = BM25(collection.documents, language)
    candidates: dict[str, list[str]] = {}
    calls = []
    for name, query in collection.queries.items():
        began = time.perf_counter()
        candidates[name] = list(bm25.retrieve(query, keep))
        calls.append((len(candidates[name]), time.perf_counter() - began))
        report("BM25", len(calls), len(collection.queries))
    if not any(candidates.values()):
        raise ConfigError(
            f"BM25 found no candidate for any of {len(candidates)} queries as {language}: name the language of the "
            'texts, or "characters" where no spaces part the words'
        )
    return candidates, Latency.of(calls)


def _compare(
    depths: Sequence[int], before: Values, after: Mapping[str, Sequence[Values]], scored: Mapping[str, Scored]
) -> tuple[tuple[System, ...], tuple[tuple[str, str, Mapping[str, Comparison]], ...]]:
    """Compare the rerankers at every depth with the first stage and with their deepest depth; and each two of them."""
    pairs = list(combinations(after, 2))
    wanted = [(before, level) for levels in after.values() for level in levels]
    wanted += [(levels[-1], level) for levels in after.values() for level in levels]
    wanted += [(after[first][-1], after[second][-1]) for first, second in pairs]
    differences = [
        [new[measure][query] - old[measure][query] for query in old[measure]] for old, new in wanted for measure in old
    ]
    # All at once, for drawing takes longer than adding up.
    comparisons = iter(compare(differences))
    compared = iter([{measure: next(comparisons) for measure in before} for _ in wanted])
    gains = {name: [next(compared) for _ in depths] for name in after}
    against_deepest = {name: [next(compared) for _ in depths] for name in after}
    systems = []
    for name, result in scored.items():
        times = [Latency.of(result.calls[depth]) for depth in depths]
        levels = tuple(map(Level, depths, after[name], gains[name], against_deepest[name], times))
        counts = result.pairs_scored, result.pairs_cached, result.rejected
        systems.append(System(name, levels, result.scores, *counts))
    return tuple(systems), tuple((*pair, gain) for pair, gain in zip(pairs, compared, strict=True))
