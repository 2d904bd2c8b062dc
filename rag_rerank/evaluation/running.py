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
from rag_rerank.evaluation.measures import DEFAULT_MEASURES, Comparison, Measurer, Run, compare
from rag_rerank.evaluation.results import Evaluation, Level, System, Values, keep, ranking, reranked
from rag_rerank.evaluation.retrieval import BM25
from rag_rerank.evaluation.scoring import Latency, Scores, ScoringRun
from rag_rerank.evaluation.trec import best_first
from rag_rerank.scorer import Scorer

DEFAULT_DEPTHS = (10, 20, 50, 100)
POLICIES = ("top_n=3", "top_n=5", "top_n=10")
CALIBRATED_POLICIES = (*POLICIES, "score_threshold=0.5", "min_precision=0.5", "min_precision=0.8")
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
    policies: Sequence[str] | None = None,
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
        scorers: One, or several by name to be compared. They stay open. Without any, the first stage alone is measured.
        run: The results of your own first stage, instead of BM25's; in the order of its scores, see `read_run`.
        first_stage: What to call that.
        depths: How many candidates to rerank.
        measures: Names as in ir-measures. nDCG has linear gain. The first one is what verdicts and plots are about.
        policies: What to keep for a prompt, by arguments of `Scorer.rerank`: ``"min_precision=0.8 top_n=10"``. None
            compares ``top_n`` 3, 5, 10, and with a `Calibrated` scorer ``score_threshold`` and ``min_precision``, too.
        limit: Only the first so many queries.
        language: Of the texts, for BM25: see `BM25`.
        cache: The folder in which scores are kept; True for ``~/.cache/rag_rerank``, False for none.
        deadline: Seconds that a call of a scorer may take.
        progress: Is called before each query and after the last.

    Returns:
        Means and values of every query before, after and at best, confidence intervals, times.

    Raises:
        ConfigError: A depth, measure or language that can't be, no candidates for any query, documents in the run that
            the collection does not have, a policy that needs probabilities, a cache that can't be used, a server that
            another model answers on than at the start, or as `Scorer.score`.
        BackendError: As `Scorer.score`. What was scored before is in the cache.
    """
    for depth in depths:
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ConfigError(f"a depth is a number of candidates, at least 1; got {depth!r}")
    if not depths:
        raise ConfigError("depths is empty; pass at least one number of candidates")
    depths = tuple(sorted(set(depths)))
    queries = dict(list(collection.queries.items())[:limit])
    if not queries:
        raise ConfigError("there are no queries to evaluate")
    collection = replace(collection, queries=queries, judgments={name: collection.judgments[name] for name in queries})
    measurer = Measurer(collection.judgments, measures)
    report = progress or (lambda task, done, total: None)
    deepest = max(*depths, measurer.deepest, MIN_CANDIDATES)
    candidates, retrieval = _candidates(collection, run, deepest, language, report)
    named = {scorers.model_name: scorers} if isinstance(scorers, Scorer) else dict(scorers)
    precisions = [ranking(policy).min_precision for policy in policies or ()]
    if any(precisions) and not all(scorer.calibrated for scorer in named.values()):
        raise ConfigError("min_precision needs probabilities: Calibrated(scorer, file), see rag-rerank calibrate")
    texts = {query: _texts(collection, query, names[: depths[-1]]) for query, names in candidates.items() if named}
    folder = None if cache is False else default_folder() if cache is True else Path(cache).expanduser()

    def measured(scores: Mapping[str, Scores]) -> dict[int, Values]:
        return {
            depth: measurer.measure({query: reranked(candidates[query], row, depth) for query, row in scores.items()})
            for depth in depths
        }

    before, systems = measurer.measure(candidates), list[System]()
    # A scorer that knows the judgments: no other order of so many candidates measures better.
    grades = {
        query: [collection.judgments[query].get(name, 0) for name in names] for query, names in candidates.items()
    }
    for name, scorer in named.items():
        with closing(ScoringRun(scorer, depths, folder, deadline)) as scoring:
            for done, (query, documents) in enumerate(texts.items()):
                report(name, done, len(texts))
                scoring.add(query, queries[query], documents)
            scoring.finish()
            report(name, len(texts), len(texts))
        values = measured(scoring.scores)
        levels = tuple(
            Level(depth, each, _gains(before, each), _gains(values[depths[-1]], each), Latency.of(scoring.calls[depth]))
            for depth, each in values.items()
        )
        chosen = policies or (CALIBRATED_POLICIES if scorer.calibrated else POLICIES)
        kept = tuple(keep(policy, collection, candidates, scoring.scores) for policy in chosen)
        systems.append(System(name, levels, scoring.scores, scoring.pairs_scored, scoring.pairs_cached, kept))
    between = tuple(
        (one.name, other.name, _gains(one.deepest.values, other.deepest.values))
        for one, other in combinations(systems, 2)
    )
    stage = first_stage or ("BM25" if run is None else "the run")
    figures = candidates, before, measured(grades), tuple(systems), between, retrieval
    return Evaluation(collection, stage, measurer.measures, depths, *figures)


def _texts(collection: Collection, query: str, names: Sequence[str]) -> list[str]:
    """Look up the texts of documents; a ConfigError for a run's that the collection does not have."""
    if unknown := [name for name in names if name not in collection.documents]:
        has = f"the run has the document {unknown[0]!r} (for the query {query!r}), the collection has not"
        raise ConfigError(f"{has}: was the run made from another one?")
    return [collection.documents[name] for name in names]


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


def _gains(old: Values, new: Values) -> dict[str, Comparison]:
    """Compare values with those before, by each measure."""
    differences = [[new[name][query] - value for query, value in before.items()] for name, before in old.items()]
    return dict(zip(old, compare(differences), strict=True))
