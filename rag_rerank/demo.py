"""The main job on real data, as a terminal sees it: BM25 finds 100 candidates, the reranker orders them, and it shows.

This is where everything comes together, so it is the one module of the package that names LangChain and LlamaIndex; it
imports them where it shows that they return what `Scorer.rerank` returns.
"""

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from rag_rerank.embedded import collection_folder
from rag_rerank.evaluation import BM25, Collection, measure
from rag_rerank.scorer import Scorer

DEPTH = 100  # candidates per query, as in the published BM25-then-rerank baselines
SHOWN = 3  # queries, and documents of each


@dataclass(frozen=True, slots=True)
class _Reranked:
    """One query, before and after.

    Attributes:
        before, after: Document ids to scores, best first.
        seconds_before, seconds_after: Time for retrieving; time for reranking what was retrieved.
    """

    query: str
    before: dict[str, float]
    after: dict[str, float]
    seconds_before: float
    seconds_after: float


def run_demo(scorer: Scorer, console: Console, *, model: str, limit: int | None = None) -> dict[str, float]:
    """Rerank the embedded collection and show what came of it.

    Args:
        scorer: Does the reranking.
        console: Where tables and the progress bar go.
        model: What to call it.
        limit: Only the first so many queries; None for all 170.

    Returns:
        ``nDCG@10 before``, ``nDCG@10 after`` and the same of ``RR@10``.
    """
    collection = Collection.load(collection_folder())
    queries = dict(list(collection.queries.items())[:limit])
    judgments = {query: collection.judgments[query] for query in queries}
    console.print(
        f"[bold]Python FAQ[/]: {len(collection.documents)} documents, {len(queries)} questions, one right answer each. "
        f"BM25 retrieves {DEPTH}, [bold]{escape(model)}[/] reranks them.\n"
    )
    bm25 = BM25(collection.documents)
    scorer.score("warm up", "loads the model, or connects")  # not part of any query's time
    results = {
        name: _rerank(collection, bm25, scorer, text)
        for name, text in track(queries.items(), "Reranking", console=console, transient=True)
    }
    gains = _gains(judgments, results)
    for title, name in _worth_showing(gains).items():
        console.print(_movements(title, results[name], judgments[name], collection.documents))
    summary = _summary(console, judgments, results)
    _agreement(console, scorer, collection.documents, [results[name] for name in _worth_showing(gains).values()])
    return summary


def _rerank(collection: Collection, bm25: BM25, scorer: Scorer, query: str) -> _Reranked:
    began = time.perf_counter()
    before = bm25.retrieve(query, DEPTH)
    retrieved = time.perf_counter()
    candidates = list(before)
    ranked = scorer.rerank(query, [collection.documents[document] for document in candidates])
    done = time.perf_counter()
    after = {candidates[item.index]: item.score for item in ranked if item.score is not None}
    return _Reranked(query, before, after, retrieved - began, done - retrieved)


def _gains(judgments: Mapping[str, Mapping[str, int]], results: Mapping[str, _Reranked]) -> dict[str, float]:
    """What reranking did to the reciprocal rank of each query's right answer."""

    def reciprocal(run: Mapping[str, float], relevant: Mapping[str, int]) -> float:
        ranks = [rank for rank, document in enumerate(run, 1) if relevant.get(document, 0) > 0]
        return 1 / min(ranks) if ranks else 0.0

    return {
        name: reciprocal(result.after, judgments[name]) - reciprocal(result.before, judgments[name])
        for name, result in results.items()
    }


def _worth_showing(gains: Mapping[str, float]) -> dict[str, str]:
    """The query that gained most, the median one and the one that lost most: not only the flattering ones."""
    ordered = sorted(gains, key=lambda name: gains[name])
    titles = {"Gained most": ordered[-1], "Lost most": ordered[0], "Median": ordered[len(ordered) // 2]}
    return {title: name for title, name in titles.items() if title == "Gained most" or len(ordered) >= SHOWN}


def _movements(title: str, result: _Reranked, relevant: Mapping[str, int], documents: Mapping[str, str]) -> Table:
    table = Table(title=f"{title}: {escape(result.query)}", title_justify="left", title_style="bold", expand=True)
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("moved", justify="right")
    table.add_column("score", justify="right")
    table.add_column("document (✓ the right answer)", ratio=1, no_wrap=True, overflow="ellipsis")
    ranks = {document: rank for rank, document in enumerate(result.before, 1)}
    for rank, (document, score) in enumerate(result.after.items(), 1):
        right = relevant.get(document, 0) > 0
        if rank > SHOWN and not right:
            continue
        moved = ranks[document] - rank
        arrow = f"[green]▲ {moved}[/]" if moved > 0 else f"[red]▼ {-moved}[/]" if moved < 0 else "="
        snippet = " ".join(documents[document].split())[:120]
        mark = "[bold green]✓[/] " if right else ""
        table.add_row(str(ranks[document]), str(rank), arrow, f"{score:.4f}", mark + escape(snippet))
    return table


def _summary(
    console: Console, judgments: Mapping[str, Mapping[str, int]], results: Mapping[str, _Reranked]
) -> dict[str, float]:
    before = measure(judgments, {name: result.before for name, result in results.items()})
    after = measure(judgments, {name: result.after for name, result in results.items()})
    table = Table(title=f"All {len(results)} queries", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("BM25", justify="right")
    table.add_column("reranked", justify="right")
    table.add_column("change", justify="right")
    for name, label in (("nDCG@10", "nDCG@10"), ("RR@10", "MRR@10")):
        table.add_row(label, f"{before[name]:.4f}", f"{after[name]:.4f}", f"{after[name] - before[name]:+.4f}")
    retrieving = statistics.median(result.seconds_before for result in results.values())
    reranking = statistics.median(result.seconds_after for result in results.values())
    documents = statistics.mean(len(result.before) for result in results.values())
    times = f"{retrieving * 1000:.1f} ms", f"{(retrieving + reranking) * 1000:.0f} ms"
    table.add_row("time per query, median", *times, f"{documents / reranking:.0f} documents/s")
    console.print(table)
    return {f"{name} before": before[name] for name in before} | {f"{name} after": after[name] for name in after}


def _agreement(console: Console, scorer: Scorer, documents: Mapping[str, str], results: Sequence[_Reranked]) -> None:
    """The same documents through both frameworks, in the same order or it says so."""
    table = Table(title="The same through the frameworks", title_justify="left", title_style="bold")
    table.add_column("query")
    table.add_column("rag_rerank's top 3")
    orders: dict[str, Callable[[Scorer, str, Mapping[str, str]], list[str]]] = {
        "LangChain": _langchain_order,
        "LlamaIndex": _llama_index_order,
    }
    for framework in orders:
        table.add_column(framework)
    for result in results:
        expected = list(result.after)
        row = [escape(result.query), ", ".join(expected[:3])]
        candidates = {document: documents[document] for document in result.before}
        for order in orders.values():
            try:
                same = order(scorer, result.query, candidates) == expected
                row.append(f"[green]same order, {len(expected)} of {len(expected)}[/]" if same else "[red]differs[/]")
            except ModuleNotFoundError as error:
                row.append(f"not installed: {error.name}")
        table.add_row(*row)
    console.print(table)


def _langchain_order(scorer: Scorer, query: str, candidates: Mapping[str, str]) -> list[str]:
    """Document ids as ``ContextualCompressionRetriever`` returns them."""
    from langchain_classic.retrievers import ContextualCompressionRetriever
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    from langchain_rag_rerank import ScorerReranker

    class Candidates(BaseRetriever):
        def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
            return [Document(id=name, page_content=text) for name, text in candidates.items()]

    retriever = ContextualCompressionRetriever(
        base_compressor=ScorerReranker(scorer=scorer, top_n=None), base_retriever=Candidates()
    )
    return [str(document.id) for document in retriever.invoke(query)]


def _llama_index_order(scorer: Scorer, query: str, candidates: Mapping[str, str]) -> list[str]:
    """Node ids as a query engine returns them, with no model to write the answer."""
    from llama_index.core.llms import MockLLM
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index.core.response_synthesizers.no_text import NoText
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    from llama_index.postprocessor.rag_rerank import ScorerReranker

    class Candidates(BaseRetriever):
        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            return [NodeWithScore(node=TextNode(id_=name, text=text)) for name, text in candidates.items()]

    logging.getLogger("llama_index").setLevel(logging.WARNING)
    engine = RetrieverQueryEngine.from_args(
        Candidates(),
        llm=MockLLM(),
        response_synthesizer=NoText(llm=MockLLM()),  # response_mode="no_text" would ask for an OpenAI key
        node_postprocessors=[ScorerReranker(scorer=scorer, top_n=None)],
    )
    return [node.node_id for node in engine.query(query).source_nodes]
