"""Does reranking help? BM25 and MiniLM retrieval, reranked by MiniLM's cosine and by a cross-encoder, at three depths.

    .venv/bin/python -m benchmarks.does_it_help FOLDER FOLDER --queries 50     # the table, as Markdown, on stdout

The cross-encoder is ms-marco-MiniLM-L-12-v2, dequantised from int8 (see `tests.released`); both models are run in
float32. FOLDER is a collection in BEIR's layout; the embedded one if none. Every score is kept in .benchmarks/scores: a
run that was interrupted goes on where it was, and one with more queries scores only what is new.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmarks.models import ROOT
from benchmarks.rerank import shown
from rag_rerank import LocalScorer
from rag_rerank.embedded import collection_folder, minilm_folder
from rag_rerank.evaluation import BM25, Collection, Comparison, Run, evaluate, read_run, write_run
from rag_rerank.evaluation.measures import mean
from tests.released import folder

OUT = ROOT / ".benchmarks"
MEASURE = "nDCG@10"
DEPTHS = (10, 20, 100)
FOUND = 100  # documents for each query by each first stage


def sample(collection: Collection, size: int | None) -> Collection:
    """The collection with `size` of its queries, chosen by a hash of their ids: any smaller sample is part of it."""
    ids = sorted(collection.queries, key=lambda name: hashlib.sha256(name.encode()).digest())[:size]
    queries = {name: collection.queries[name] for name in ids}
    return replace(collection, queries=queries, judgments={name: collection.judgments[name] for name in ids})


def bm25_run(collection: Collection) -> Run:
    bm25 = BM25(collection.documents)
    return {name: bm25.retrieve(text, FOUND) for name, text in collection.queries.items()}


def minilm_run(collection: Collection) -> Run:
    """What all-MiniLM-L6-v2 finds for every query of the whole collection; kept in a file."""
    path = OUT / "runs" / f"{collection.name}.minilm.trec.gz"
    if not path.exists():
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(minilm_folder()), device="cpu")
        documents, queries = (
            model.encode(list(texts.values()), normalize_embeddings=True, convert_to_tensor=True)
            for texts in (collection.documents, collection.queries)
        )
        names = list(collection.documents)
        scores, rows = (queries @ documents.T).topk(min(FOUND, len(names)))
        rankings = {
            query: [(names[row], score) for row, score in zip(best, found, strict=True)]
            for query, best, found in zip(collection.queries, rows.tolist(), scores.tolist(), strict=True)
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"unfinished.{path.name}")
        write_run(unfinished, rankings, tag="all-MiniLM-L6-v2")
        unfinished.rename(path)
    return read_run(path)


def cell(mean_after: float, comparison: Comparison) -> str:
    """The mean, and what was gained with its interval; bold where that excludes 0."""
    text = f"{mean_after:.3f} ({comparison.gain:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}])"
    return text if comparison.verdict == "no clear difference" else f"**{text}**"


def rows(
    whole: Collection, queries: int | None, depths: tuple[int, ...], scorers: dict[str, LocalScorer]
) -> Iterator[tuple[str, ...]]:
    """The collection's rows of the table."""
    collection = sample(whole, queries)
    size = f"{len(collection.queries)} of {len(whole.queries)}"
    for first_stage in ("BM25", "MiniLM"):
        run = bm25_run(collection) if first_stage == "BM25" else minilm_run(whole)
        # To order by MiniLM's cosine what MiniLM's cosine has ordered changes nothing.
        wanted = {name: scorer for name, scorer in scorers.items() if not name.startswith(first_stage)}
        with shown(Console(stderr=True)) as progress:
            tasks = {name: progress.add_task(f"{whole.name}, {first_stage}: {name}") for name in wanted}
            found = evaluate(
                collection,
                wanted,
                run={name: run.get(name, {}) for name in collection.queries},
                depths=depths,
                measures=[MEASURE],
                cache=OUT / "scores",
                deadline=None,
                progress=lambda name, done, of, tasks=tasks: progress.update(tasks[name], completed=done, total=of),
            )
        before = f"{mean(found.before[MEASURE]):.3f}"
        for system in found.systems:
            cells = [cell(level.mean(MEASURE), level.gains[MEASURE]) for level in system.levels]
            yield whole.name, size, first_stage, before, system.name, *cells


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", default=[collection_folder()], metavar="FOLDER")
    parser.add_argument("--queries", type=int, help="how many of each collection; all if not given")
    parser.add_argument("--depth", type=int, action="append", help="may be repeated; 10, 20 and 100 if not given")
    arguments = parser.parse_args()
    depths = tuple(arguments.depth or DEPTHS)
    head = ("collection", "queries", "found by", MEASURE, "reranked by", *(f"first {depth}" for depth in depths))
    sys.stdout.write(line(head) + line(("---",) * len(head)))
    with (
        LocalScorer(minilm_folder(), dtype="float32") as minilm,
        LocalScorer(folder(), dtype="float32", use_activation=False) as cross_encoder,
    ):
        scorers = {"MiniLM cosine": minilm, "cross-encoder": cross_encoder}
        for path in arguments.folders:
            for row in rows(Collection.load(path), arguments.queries, depths, scorers):
                sys.stdout.write(line(row))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
