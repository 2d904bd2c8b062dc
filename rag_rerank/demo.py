"""The main job on real data, as a terminal sees it: BM25 finds 100 candidates, the reranker orders them, and it shows.

This is where everything comes together, so it is the one module of the package that names LangChain and LlamaIndex; it
imports them where it shows that they return what `Scorer.rerank` returns.
"""

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from rag_rerank.display import Reranked
from rag_rerank.embedded import collection_folder
from rag_rerank.evaluation import Collection, Evaluation, evaluate
from rag_rerank.evaluation.measures import mean
from rag_rerank.ranking import Ranked
from rag_rerank.scorer import Scorer

DEPTH = 100  # candidates per query, as in the published BM25-then-rerank baselines
SHOWN = 3  # queries, and documents of each


def run_demo(scorer: Scorer, console: Console, *, model: str, limit: int | None = None) -> dict[str, float]:
    """Rerank the embedded collection and show the result; `limit` keeps only the first so many of its 170 queries.

    Returns:
        ``nDCG@10 before``, ``nDCG@10 after`` and the same of ``RR@10``.
    """
    collection = Collection.load(collection_folder())
    console.print(
        f"[bold]Python FAQ[/]: {len(collection.documents)} documents, "
        f"{len(list(collection.queries)[:limit])} questions, one right answer each. "
        f"BM25 retrieves {DEPTH}, [bold]{escape(model)}[/] reranks them.\n"
    )
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("")
        evaluation = evaluate(
            collection,
            {"Reranking": scorer},
            depths=[DEPTH],
            measures=["nDCG@10", "RR@10", "RR"],
            limit=limit,
            cache=False,
            progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
        )
    queries = _queries_to_show(evaluation)
    for title, query in queries.items():
        console.print(f"[bold]{title}[/]", _movements(evaluation, query))
    console.print(_summary(evaluation))
    console.print(_agreement(scorer, evaluation, list(queries.values())))
    means = {"before": evaluation.before, "after": evaluation.systems[0].deepest.values}
    return {f"{name} {when}": mean(values[name]) for when, values in means.items() for name in ("nDCG@10", "RR@10")}


def _queries_to_show(evaluation: Evaluation) -> dict[str, str]:
    """Choose what gained most, what lost most and the median by the right answer's reciprocal rank: not only gains."""
    before, after = evaluation.before["RR"], evaluation.systems[0].deepest.values["RR"]
    ordered = sorted(before, key=lambda query: after[query] - before[query])
    titles = {"Gained most": ordered[-1], "Lost most": ordered[0], "Median": ordered[len(ordered) // 2]}
    return titles if len(ordered) >= SHOWN else {"Gained most": ordered[-1]}


def _movements(evaluation: Evaluation, query: str) -> Reranked:
    collection, candidates = evaluation.collection, evaluation.candidates[query]
    ranking = evaluation.run(evaluation.systems[0])[query]
    ranked = [Ranked(candidates.index(document), score) for document, score in ranking]
    relevant = [place for place, name in enumerate(candidates) if collection.judgments[query].get(name, 0) > 0]
    documents = [collection.documents[document] for document in candidates]
    return Reranked(collection.queries[query], documents, ranked, gold=relevant, rows=SHOWN)


def _summary(evaluation: Evaluation) -> Table:
    after = evaluation.systems[0].deepest
    table = Table(title=f"All {len(evaluation.candidates)} queries", title_justify="left", title_style="bold")
    for number, name in enumerate(("", "BM25", "reranked", "change")):
        table.add_column(name, justify="right" if number else "left")
    for name, label in (("nDCG@10", "nDCG@10"), ("RR@10", "MRR@10")):
        old, new = mean(evaluation.before[name]), after.mean(name)
        table.add_row(label, f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}")
    if evaluation.retrieval and after.latency:
        retrieving, both = evaluation.retrieval.p50, evaluation.retrieval.p50 + after.latency.p50
        times = f"{retrieving * 1000:.1f} ms", f"{both * 1000:.0f} ms"
        table.add_row("time per query, median", *times, f"{after.latency.pairs_per_second:.0f} documents/s")
    return table


def _agreement(scorer: Scorer, evaluation: Evaluation, queries: list[str]) -> Table:
    """Compare with what both frameworks return for the same documents."""
    table = Table("query", "rag_rerank's top 3", "LangChain", "LlamaIndex", title_justify="left", title_style="bold")
    table.title = "The same through the frameworks"
    for query in queries:
        text, expected = evaluation.collection.queries[query], evaluation.ranking(evaluation.systems[0], query)
        documents = {name: evaluation.collection.documents[name] for name in evaluation.candidates[query]}
        row = [escape(text), ", ".join(expected[:3])]
        for order in (_langchain_order, _llama_index_order):
            try:
                same = order(scorer, text, documents) == expected
                row.append(f"[green]same order, {len(expected)} of {len(expected)}[/]" if same else "[red]differs[/]")
            except ModuleNotFoundError as error:
                row.append(f"not installed: {error.name}")
        table.add_row(*row)
    return table


def _langchain_order(scorer: Scorer, query: str, documents: Mapping[str, str]) -> list[str]:
    """List document ids as a retriever's compressor returns them."""
    from langchain_core.documents import Document

    from langchain_rag_rerank import ScorerReranker

    candidates = [Document(id=name, page_content=text) for name, text in documents.items()]
    reranker = ScorerReranker(scorer=scorer, top_n=None)
    return [str(document.id) for document in reranker.compress_documents(candidates, query)]


def _llama_index_order(scorer: Scorer, query: str, documents: Mapping[str, str]) -> list[str]:
    """List node ids as a query engine's postprocessor returns them."""
    from llama_index.core.schema import NodeWithScore, TextNode

    from llama_index.postprocessor.rag_rerank import ScorerReranker

    nodes = [NodeWithScore(node=TextNode(id_=name, text=text)) for name, text in documents.items()]
    ranked = ScorerReranker(scorer=scorer, top_n=None).postprocess_nodes(nodes, query_str=query)
    return [node.node_id for node in ranked]
