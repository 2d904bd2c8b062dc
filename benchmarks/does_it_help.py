"""Does reranking help? What BM25 and MiniLM find, reranked by MiniLM's cosine and by a cross-encoder, at three depths.

    .venv/bin/python -m benchmarks.does_it_help FOLDER FOLDER --queries 50     # the table, as Markdown, on stdout

The cross-encoder is ms-marco-MiniLM-L-12-v2, dequantised from int8 (see `tests.released`); both models are run in
float32. FOLDER is a collection in BEIR's layout; the embedded one if none. Every score is kept in .benchmarks/scores: a
run that was interrupted goes on where it was, and one with more queries scores only what is new.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from benchmarks.models import ROOT
from benchmarks.rerank import shown
from rag_rerank import LocalScorer, Scorer
from rag_rerank.embedded import collection_folder, minilm_folder
from rag_rerank.evaluation import BM25, Collection, Comparison, Run, evaluate
from rag_rerank.evaluation.measures import mean
from tests.released import folder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

OUT = ROOT / ".benchmarks"
MEASURE = "nDCG@10"
DEPTHS = (10, 20, 100)
FOUND = 100  # documents for each query by each first stage


class MiniLM(Scorer):
    """Cosines of all-MiniLM-L6-v2's embeddings; each text is embedded once, for retrieval and for reranking."""

    model_name = "all-MiniLM-L6-v2"
    _file = OUT / "minilm.pt"

    def __init__(self) -> None:
        self._vectors: dict[str, torch.Tensor] = torch.load(self._file) if self._file.exists() else {}

    @cached_property
    def _model(self) -> "SentenceTransformer":
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(minilm_folder()), device="cpu")

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """A row for each text."""
        if new := [text for text in dict.fromkeys(texts) if text not in self._vectors]:
            vectors = self._model.encode(new, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=True)
            self._vectors.update(zip(new, vectors, strict=True))
            self._file.parent.mkdir(exist_ok=True)
            unfinished = self._file.with_name("unfinished.pt")
            torch.save(self._vectors, unfinished)
            unfinished.rename(self._file)
        return torch.stack([self._vectors[text] for text in texts])

    def retrieve(self, collection: Collection) -> Run:
        """What it finds for each query."""
        names = list(collection.documents)
        cosines = self.embed(list(collection.queries.values())) @ self.embed(list(collection.documents.values())).T
        scores, rows = cosines.topk(min(FOUND, len(names)))
        return {
            query: {names[row]: score for row, score in zip(found, best, strict=True)}
            for query, found, best in zip(collection.queries, rows.tolist(), scores.tolist(), strict=True)
        }

    def _score(self, queries: Sequence[str], documents: Sequence[str], until: float | None) -> list[float]:
        pairs = self.embed([*queries, *documents]).split([len(queries), len(documents)])
        return torch.cosine_similarity(*pairs).tolist()


def sample(collection: Collection, size: int | None) -> Collection:
    """The collection with `size` of its queries, chosen by a hash of their ids: any smaller sample is part of it."""
    ids = sorted(collection.queries, key=lambda name: hashlib.sha256(name.encode()).digest())[:size]
    queries = {name: collection.queries[name] for name in ids}
    return replace(collection, queries=queries, judgments={name: collection.judgments[name] for name in ids})


def bm25_run(collection: Collection) -> Run:
    bm25 = BM25(collection.documents)
    return {name: bm25.retrieve(text, FOUND) for name, text in collection.queries.items()}


def cell(mean_after: float, comparison: Comparison) -> str:
    """The mean, and what was gained with its interval; bold where that excludes 0."""
    text = f"{mean_after:.3f} ({comparison.gain:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}])"
    return text if comparison.verdict == "no clear difference" else f"**{text}**"


def rows(
    whole: Collection, queries: int | None, depths: tuple[int, ...], minilm: MiniLM, cross_encoder: LocalScorer
) -> Iterator[tuple[str, ...]]:
    """The collection's rows of the table."""
    collection = sample(whole, queries)
    size = f"{len(collection.queries)} of {len(whole.queries)}"
    for first_stage in ("BM25", "MiniLM"):
        run = bm25_run(collection) if first_stage == "BM25" else minilm.retrieve(collection)
        # To order by MiniLM's cosine what MiniLM's cosine has ordered changes nothing.
        scorers = {"MiniLM cosine": minilm} if first_stage == "BM25" else {}
        with shown(Console(stderr=True)) as progress:
            task = progress.add_task("", total=len(run))
            found = evaluate(
                collection,
                {**scorers, "cross-encoder": cross_encoder},
                run=run,
                depths=depths,
                measures=[MEASURE],
                cache=OUT / "scores",
                deadline=None,
                progress=lambda name, done, _, task=task, first_stage=first_stage: progress.update(
                    task, description=f"{whole.name}, {first_stage}: {name}", completed=done
                ),
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
    with MiniLM() as minilm, LocalScorer(folder(), dtype="float32", use_activation=False) as cross_encoder:
        for path in arguments.folders:
            for row in rows(Collection.load(path), arguments.queries, depths, minilm, cross_encoder):
                sys.stdout.write(line(row))
                sys.stdout.flush()


if __name__ == "__main__":
    main()
