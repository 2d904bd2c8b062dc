"""One query against 100 documents: this package beside what users would pick instead, on the same weights.

    make bench                                        # or: .venv/bin/python -m benchmarks.rerank --rounds 10

The model is a cross-encoder of MiniLM's shape: the encoder of all-MiniLM-L6-v2 with a random one-label head, so times
are those of ms-marco-MiniLM-L6-v2, while scores mean nothing. Queries and documents are those of the embedded
collection. Every round runs all contestants on the same query, in rotating order; what counts is the ratio within a
round, for machines are noisy. Agreement is against sentence-transformers in float32.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoTokenizer, BertForSequenceClassification

from rag_rerank import LocalScorer, VLLMScorer
from rag_rerank.embedded import collection_folder, minilm_folder
from rag_rerank.evaluation import BM25, Collection
from tests import vllm_server

Contestant = Callable[[str, list[str]], list[float]]
DEPTH = 100
GAP = 0.8  # seconds between contestants: vLLM's OpenMP threads spin on for 0.2 s and would slow whoever comes next
REFERENCE = "sentence-transformers"


def make_model(folder: Path) -> Path:
    """MiniLM's encoder with a one-label head."""
    torch.manual_seed(0)
    BertForSequenceClassification.from_pretrained(minilm_folder(), num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(folder)
    return folder


def contestants(folder: Path) -> dict[str, Contestant]:
    """Each as its users get it: default settings, float32 where it doesn't choose by itself."""
    from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
    from langchain_core.cross_encoders import BaseCrossEncoder
    from langchain_core.documents import Document
    from llama_index.core.postprocessor import SentenceTransformerRerank
    from llama_index.core.schema import NodeWithScore, TextNode
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(str(folder), device="cpu")

    class HuggingFace(BaseCrossEncoder):
        """What langchain-community's HuggingFaceCrossEncoder does."""

        def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
            return encoder.predict(text_pairs)

    langchain = CrossEncoderReranker(model=HuggingFace(), top_n=DEPTH)
    llama_index = SentenceTransformerRerank(model=str(folder), top_n=DEPTH, device="cpu")

    def through_langchain(query: str, documents: list[str]) -> list[float]:
        langchain.compress_documents([Document(text) for text in documents], query)
        return []  # it returns no scores

    def through_llama_index(query: str, documents: list[str]) -> list[float]:
        nodes = [NodeWithScore(node=TextNode(id_=str(index), text=text)) for index, text in enumerate(documents)]
        scores = {
            node.node_id: float(node.score or 0) for node in llama_index.postprocess_nodes(nodes, query_str=query)
        }
        return [scores[str(index)] for index in range(len(documents))]

    return {
        REFERENCE: lambda query, documents: encoder.predict([(query, text) for text in documents]).tolist(),
        "LangChain CrossEncoderReranker": through_langchain,
        "LlamaIndex SentenceTransformerRerank": through_llama_index,
        "rag_rerank float32": LocalScorer(folder, dtype="float32").score,
        "rag_rerank dtype=auto": LocalScorer(folder).score,
    }


@contextlib.contextmanager
def vllm(folder: Path) -> Iterator[dict[str, Contestant]]:
    """A vLLM CPU server in float32, asked by VLLMScorer; nothing where it is not installed."""
    if vllm_server.why_not() is not None:
        yield {}
        return
    with vllm_server.serving(folder, name="bench") as server, VLLMScorer(server.base_url, timeout=600) as scorer:
        yield {"vLLM CPU server float32": scorer.score}


def kendall(first: list[float], second: list[float]) -> float:
    """Kendall's tau: 1 for the same order, -1 for the reverse."""
    pairs = [(i, j) for i in range(len(first)) for j in range(i)]
    signs = [(first[i] - first[j]) * (second[i] - second[j]) for i, j in pairs]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(pairs)


def measure(runners: dict[str, Contestant], rounds: int, console: Console) -> None:
    collection = Collection.load(collection_folder())
    bm25 = BM25(collection.documents)
    queries = [query for query in collection.queries.values() if len(bm25.retrieve(query, DEPTH)) == DEPTH]
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    scores: dict[str, list[list[float]]] = {name: [] for name in runners}
    names = list(runners)
    for number in track(range(rounds + 1), "Rounds", console=console, transient=True):
        query = queries[number]
        documents = [collection.documents[name] for name in bm25.retrieve(query, DEPTH)]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            time.sleep(GAP)
            began = time.perf_counter()
            result = runners[name](query, documents)
            if number:  # the first round loads models and connects
                seconds[name].append(time.perf_counter() - began)
                scores[name].append(result)
    show(seconds, scores, console)


def show(seconds: dict[str, list[float]], scores: dict[str, list[list[float]]], console: Console) -> None:
    table = Table(title=f"1 query x {DEPTH} documents, {len(seconds[REFERENCE])} rounds, {os.cpu_count()} CPU cores")
    for column in ("", "p50 ms", "documents/s", "times the reference [min-max]", "largest difference", "tau"):
        table.add_column(column, justify="left" if not column else "right")
    for name, times in seconds.items():
        ratios = [reference / own for reference, own in zip(seconds[REFERENCE], times, strict=True)]
        p50 = statistics.median(times)
        agreement = ("", "")
        if all(scores[name]):
            both = list(zip(scores[name], scores[REFERENCE], strict=True))
            largest = max(abs(a - b) for own, reference in both for a, b in zip(own, reference, strict=True))
            agreement = f"{largest:.1e}", f"{statistics.mean(kendall(*pair) for pair in both):.4f}"
        ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]"
        table.add_row(name, f"{p50 * 1000:.0f}", f"{DEPTH / p50:.0f}", ratio, *agreement)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder, "minilm-cross-encoder"))
        with vllm(model) as remote:
            measure(contestants(model) | remote, arguments.rounds, Console(width=140))


if __name__ == "__main__":
    main()
