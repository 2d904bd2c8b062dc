"""Do calibrated probabilities hold? Fitted on one half of the queries and tried on the other, ten random splits.

    .venv/bin/python -m benchmarks.calibration FOLDER FOLDER              # the table, as Markdown, on stdout
    .venv/bin/python -m benchmarks.calibration FOLDER --run BM25.trec --scored MINILM.trec    # by a run's scores

Candidates are BM25's first 50. Models are MiniLM and the released cross-encoder (dequantised from int8, see
`tests.released`), in float32; every score is kept in .benchmarks/scores. The columns: log loss of the base rate, of the
raw scores through a sigmoid and of the probabilities, on the half that is tried, and in how many splits the last was
the least; how many bins of a predicted probability above 0.1 with 20 pairs or more had their observed share within
their interval, by luck of the tried half alone (binomial) and of both halves (beta-binomial); how many of the stated
thresholds for 80 % precision kept theirs; in how many splits the data could not tell.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from benchmarks.does_it_help import OUT, line, sample
from rag_rerank import LocalScorer
from rag_rerank.embedded import collection_folder, minilm_folder
from rag_rerank.errors import ConfigError
from rag_rerank.evaluation import Collection, evaluate, read_run
from rag_rerank.evaluation.calibrating import Pairs, fit, log_losses, over, quality, target
from tests.released import folder

SPLITS = 10
HEAD = ("collection", "model", "queries", "pairs", "relevant", "base rate", "raw", "calibrated", "least", "curves")
HEAD += ("bins, binomial", "bins", "80 % precision kept", "can't tell")


def half(pairs: tuple[Any, Any, Any], queries: Any) -> Pairs:
    values, relevant, owners = pairs
    kept = np.isin(owners, queries)
    return Pairs(values[kept], relevant[kept], owners[kept])


def row(pairs: tuple[Any, Any, Any]) -> tuple[str, ...]:
    """What ten splits give."""
    values, relevant, owners = pairs
    losses, methods, least = [], [], 0
    wide = narrow = bins = kept = stated = silent = 0
    for split in range(SPLITS):
        queries = np.random.default_rng(split).permutation(np.unique(owners))
        middle = len(queries) // 2
        fitted, tried = half(pairs, queries[:middle]), half(pairs, queries[middle:])
        curve, _ = fit(fitted)
        methods.append(curve.method)
        predicted = over(curve, tried.values)
        three = [
            float(log_losses(each, tried.relevant).mean())
            for each in (np.full(len(predicted), fitted.relevant.mean()), 1 / (1 + np.exp(-tried.values)), predicted)
        ]
        losses.append(three)
        least += three[2] < min(three[:2])
        for each in quality(tried, predicted).bins:
            if each.predicted > 0.1 and each.pairs >= 20:
                low, high = binom.interval(0.95, each.pairs, each.predicted)
                bins += 1
                wide += each.low <= each.observed <= each.high
                narrow += low / each.pairs <= each.observed <= high / each.pairs
        found = target(fitted, over(curve, fitted.values), "precision", 0.8)
        if found.threshold is None or found.elsewhere is None or found.why_not:
            silent += 1
            continue
        above = tried.relevant[predicted >= found.threshold.value]
        stated += 1
        kept += len(above) > 0 and found.elsewhere.low <= above.mean() <= found.elsewhere.high
    means = (f"{each:.4f}" for each in np.mean(losses, axis=0))
    sizes = str(len(np.unique(owners))), f"{len(values):,}", f"{relevant.mean():.1%}"
    curves = f"{methods.count('platt')} Platt, {methods.count('isotonic')} isotonic"
    return (
        *sizes,
        *means,
        f"{least}/{SPLITS}",
        curves,
        f"{narrow}/{bins}",
        f"{wide}/{bins}",
        f"{kept}/{stated}",
        str(silent),
    )


def of_runs(collection: Collection, run: Path, scored: Path, depth: int) -> tuple[Any, Any, Any]:
    first, second = read_run(run), read_run(scored)
    rows = [
        (second[query][name], grades.get(name, 0) > 0, number)
        for number, (query, grades) in enumerate(collection.judgments.items())
        for name in list(first.get(query, {}))[:depth]
    ]
    values, relevant, owners = (np.array(column) for column in zip(*rows, strict=True))
    return values, relevant.astype(int), owners


def of_scorer(collection: Collection, scorer: LocalScorer, depth: int) -> tuple[Any, Any, Any]:
    found = evaluate(collection, scorer, depths=(depth,), measures=["nDCG@10"], cache=OUT / "scores", deadline=None)
    rows = [
        (score, found.collection.judgments[query].get(name, 0) > 0, number)
        for number, (query, names) in enumerate(found.candidates.items())
        for name, score in zip(names[:depth], found.systems[0].scores[query], strict=True)
        if score is not None
    ]
    values, relevant, owners = (np.array(column) for column in zip(*rows, strict=True))
    return values, relevant.astype(int), owners


def rows(arguments: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    for path in arguments.folders:
        collection = sample(Collection.load(path), arguments.queries)
        if arguments.run is not None:
            pairs = of_runs(collection, arguments.run, arguments.scored, arguments.depth)
            yield collection.name, arguments.scored.name, *row(pairs)
            continue
        for name, model in (("MiniLM cosine", minilm_folder()), ("cross-encoder", folder())):
            if arguments.model in (None, name):
                with LocalScorer(model, dtype="float32", use_activation=False) as scorer:
                    yield collection.name, name, *row(of_scorer(collection, scorer, arguments.depth))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", default=[collection_folder()], metavar="FOLDER")
    parser.add_argument("--queries", type=int, help="how many of each collection; all if not given")
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--model", choices=("MiniLM cosine", "cross-encoder"), help="only this one")
    parser.add_argument("--run", type=Path, help="a first stage's run, with --scored")
    parser.add_argument("--scored", type=Path, help="the same documents with a reranker's scores, as a run")
    arguments = parser.parse_args()
    if (arguments.run is None) != (arguments.scored is None):
        raise ConfigError("--run and --scored go together")
    sys.stdout.write(line(HEAD) + line(("---",) * len(HEAD)))
    for cells in rows(arguments):
        sys.stdout.write(line(cells))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
