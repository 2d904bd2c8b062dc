"""What the adapters cost beside `Scorer.rerank` itself, with a scorer that costs nothing.

    .venv/bin/python -m benchmarks.adapters                      # make bench runs it

Calls take turns. The time beyond that of `rerank` is fitted by a line over the number of documents: so much a call, so
much a document. Tracing is off: what LangSmith or a tracer costs is theirs.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

os.environ["LANGSMITH_TRACING"] = "false"

from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from rich.console import Console
from rich.table import Table

import langchain_rag_rerank
from benchmarks.rerank import shown
from llama_index.postprocessor import rag_rerank as llama_index_rag_rerank
from rag_rerank import Scorer

COUNTS = (1, 10, 50, 100, 200)
QUERY = "how do I copy a file?"


class Instant(Scorer):
    """Scores that are there already."""

    model_name = "instant"

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        return [float(number) for number in range(len(documents))]


def calls(texts: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Each way to have the same texts reranked."""
    scorer = Instant()
    documents = [Document(text, metadata={"source": "here"}) for text in texts]
    nodes = [NodeWithScore(node=TextNode(text=text, metadata={"source": "here"}), score=0.5) for text in texts]
    langchain = langchain_rag_rerank.ScorerReranker(scorer=scorer, top_n=None)
    llama_index = llama_index_rag_rerank.ScorerReranker(scorer=scorer, top_n=None)
    bundle = QueryBundle(QUERY)
    contents = [node.get_content("embed") for node in nodes]  # LlamaIndex's own work, which any postprocessor has
    return {
        "Scorer.rerank": lambda: scorer.rerank(QUERY, contents),
        "LangChain, compress_documents": lambda: langchain.compress_documents(documents, QUERY),
        "LlamaIndex, postprocess_nodes": lambda: llama_index.postprocess_nodes(nodes, bundle),
        "LlamaIndex's get_content alone": lambda: [node.get_content("embed") for node in nodes],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    arguments = parser.parse_args()
    console = Console(width=120)
    table = Table(
        "", *(f"{count} documents" for count in COUNTS), "a call", "a document", title="Microseconds, medians"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    medians: dict[str, list[float]] = {}
    with shown(console) as progress:
        for count in COUNTS:
            ways = calls([f"text {number} about this and that" for number in range(count)])
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for _ in progress.track(range(arguments.rounds), description=f"{count} documents"):
                for name, call in ways.items():
                    began = time.perf_counter()
                    call()
                    taken[name].append(1e6 * (time.perf_counter() - began))
            for name, times in taken.items():
                medians.setdefault(name, []).append(statistics.median(times))
    plain = next(iter(medians.values()))
    for name, row in medians.items():
        if row is plain or "alone" in name:
            table.add_row(name, *(f"{time:.0f}" for time in row), "", "")
        else:
            slope, start = statistics.linear_regression(
                COUNTS, [own - base for own, base in zip(row, plain, strict=True)]
            )
            table.add_row(f"{name}, beyond rerank", *(f"{time:.0f}" for time in row), f"{start:.0f}", f"{slope:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
