"""What the number format costs in quality: nDCG@10 of real models in float32, bfloat16 and as dtype="auto" chooses.

    .venv/bin/python -m benchmarks.quality --collection FOLDER --collection FOLDER

The models are the embedded all-MiniLM-L6-v2, a bi-encoder, and the cross-encoder ms-marco-MiniLM-L-12-v2, dequantised
from int8 (see `tests.released`). They rerank what BM25 finds: the first 100 for every question of the embedded
collection, and of folders with corpus.jsonl, queries.jsonl and qrels.tsv (BEIR's layout).
"""

import argparse
import statistics
from pathlib import Path

import ir_measures
from rich.console import Console
from rich.table import Table

from benchmarks.does_it_help import sample
from benchmarks.report import kendall
from benchmarks.rerank import shown
from rag_rerank import LocalScorer
from rag_rerank.embedded import collection_folder, minilm_folder
from rag_rerank.evaluation import BM25, Collection
from tests import released

MEASURE = ir_measures.nDCG @ 10
DTYPES = ("float32", "bfloat16", "auto")
MODELS = {"minilm": minilm_folder, "released": released.folder}
Runs = dict[str, dict[str, float]]


def rerank(collection: Collection, found: Runs, model: Path, dtype: str) -> Runs:
    """Scores for what was found, all in one call, ordered by document: a bi-encoder embeds each about once."""
    pairs = [(query, document) for query, documents in found.items() for document in documents]
    pairs.sort(key=lambda pair: pair[1])
    with LocalScorer(model, dtype=dtype, use_activation=False) as scorer:
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
    parser.add_argument("--model", action="append", choices=MODELS, help="may be repeated; both if not given")
    parser.add_argument("--queries", type=int, help="how many of each collection; all if not given")
    parser.add_argument("--depth", type=int, default=100, help="documents for each query")
    arguments = parser.parse_args()
    models = arguments.model or list(MODELS)
    console = Console(width=120)
    table = Table(title=f"BM25's first {arguments.depth}, reranked")
    for column in ("collection", "queries", "reranked by", "", str(MEASURE), "change to float32", "tau to float32"):
        table.add_column(column, justify="right" if column == str(MEASURE) or "float32" in column else "left")
    with shown(console) as progress:
        task = progress.add_task("", total=(1 + len(arguments.collection)) * len(models) * len(DTYPES))
        for folder in (collection_folder(), *arguments.collection):
            collection = sample(Collection.load(folder), arguments.queries)
            bm25 = BM25(collection.documents)
            found = {name: bm25.retrieve(text, arguments.depth) for name, text in collection.queries.items()}
            judged = ir_measures.evaluator([MEASURE], collection.judgments)
            before = judged.calc_aggregate(found)[MEASURE]
            table.add_row(folder.name, str(len(collection.queries)), "not reranked", "", f"{before:.4f}")
            for model in models:
                reference: Runs = {}
                for dtype in DTYPES:
                    progress.update(task, description=f"{folder.name}: {model}, {dtype}")
                    run = rerank(collection, found, MODELS[model](), dtype)
                    reference = reference or run
                    own, exact = (judged.calc_aggregate(each)[MEASURE] for each in (run, reference))
                    change = f"{own - exact:+.4f}"
                    table.add_row("", "", model, dtype, f"{own:.4f}", change, f"{tau(reference, run):.4f}")
                    progress.advance(task)
            table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
