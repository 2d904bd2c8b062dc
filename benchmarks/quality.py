"""What the number format costs in quality: nDCG@10 of a real model in float32, bfloat16 and as dtype="auto" chooses.

    .venv/bin/python -m benchmarks.quality --collection FOLDER --collection FOLDER

The model is the embedded all-MiniLM-L6-v2, which reranks what BM25 finds: the first 100 for every question of the
embedded collection, and of folders with corpus.jsonl, queries.jsonl and qrels.tsv (BEIR's layout).
"""

import argparse
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.report import kendall
from benchmarks.rerank import shown
from rag_rerank import LocalScorer
from rag_rerank.embedded import collection_folder, minilm_folder
from rag_rerank.evaluation import BM25, Collection, measure

DEPTH = 100
MEASURE = "nDCG@10"
DTYPES = ("float32", "bfloat16", "auto")
Runs = dict[str, dict[str, float]]


def rerank(collection: Collection, found: Runs, dtype: str) -> Runs:
    """Scores for what was found, all in one call, ordered by document: each is embedded about once."""
    pairs = [(query, document) for query, documents in found.items() for document in documents]
    pairs.sort(key=lambda pair: pair[1])
    with LocalScorer(minilm_folder(), dtype=dtype) as scorer:
        scores = scorer.score(
            [collection.queries[query] for query, _ in pairs], [collection.documents[name] for _, name in pairs]
        )
    run: Runs = {query: {} for query in found}
    for (query, document), score in zip(pairs, scores, strict=True):
        run[query][document] = score
    return run


def tau(first: Runs, second: Runs) -> float:
    """Kendall's, mean over queries with at least two documents."""
    return statistics.mean(
        kendall(list(scores.values()), [second[query][document] for document in scores])
        for query, scores in first.items()
        if len(scores) > 1
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--collection", type=Path, action="append", default=[], metavar="FOLDER")
    arguments = parser.parse_args()
    console = Console(width=120)
    table = Table(title=f"BM25's first {DEPTH} reranked with all-MiniLM-L6-v2")
    for column in ("collection", "", MEASURE, "change to float32", "tau to float32"):
        table.add_column(column, justify="left" if column in {"collection", ""} else "right")
    with shown(console) as progress:
        task = progress.add_task("", total=(1 + len(arguments.collection)) * len(DTYPES))
        for folder in (collection_folder(), *arguments.collection):
            collection = Collection.load(folder)
            bm25 = BM25(collection.documents)
            found = {name: bm25.retrieve(text, DEPTH) for name, text in collection.queries.items()}
            table.add_row(folder.name, "BM25", f"{measure(collection.judgments, found, [MEASURE])[MEASURE]:.4f}")
            reference: Runs = {}
            for dtype in DTYPES:
                progress.update(task, description=f"{folder.name}: {dtype}")
                run = rerank(collection, found, dtype)
                reference = reference or run
                own, exact = (measure(collection.judgments, each, [MEASURE])[MEASURE] for each in (run, reference))
                table.add_row("", dtype, f"{own:.4f}", f"{own - exact:+.4f}", f"{tau(reference, run):.4f}")
                progress.advance(task)
            table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
