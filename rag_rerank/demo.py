"""What `rag-rerank demo` shows: what reranking does to one question, then what it gains over many.

This is where everything comes together, so it is the one module of the package that names LangChain and LlamaIndex; it
imports them where it shows that they return what `Scorer.rerank` returns.
"""

import time
from collections.abc import Mapping
from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from rag_rerank.embedded import collection_folder
from rag_rerank.evaluation import BM25, Collection, Evaluation, evaluate
from rag_rerank.evaluation.measures import mean
from rag_rerank.scorer import Scorer

DEPTH = 20  # candidates for each question
SHOWN = 3  # of these
LENGTH = 600  # characters of a section that the reranker reads: no small model has to cut them
QUESTIONS = 25
EXAMPLE = "How do I get documentation on Python?"


def run_demo(scorer: Scorer, console: Console, *, model: str, queries: int = QUESTIONS) -> Evaluation:
    """Rerank passages of the embedded collection, for one question and then for `queries` of its 170, and show it."""
    whole = Collection.load(collection_folder())
    bm25 = BM25(whole.documents)
    whole = replace(whole, documents={name: text[:LENGTH] for name, text in whole.documents.items()})
    console.print(
        f"{len(whole.documents)} sections of the Python documentation. For a question, BM25, which counts common "
        f"words, finds {DEPTH} of them. The reranker, [bold]{escape(model)}[/], reads the first {LENGTH} characters of "
        "each of these and puts them in a new order.\n"
    )
    seconds = _show_example(scorer, console, whole, bm25)
    chosen = _every_nth(whole, queries)
    console.print(
        f"\n[bold]Was that luck? {len(chosen.queries)} questions[/], one right answer each. This takes about "
        f"{_duration(seconds * len(chosen.queries))} ..."
    )
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("")
        evaluation = evaluate(
            chosen,
            {"Reranking": scorer},
            run={name: bm25.retrieve(text, DEPTH) for name, text in chosen.queries.items()},
            depths=[DEPTH],
            measures=["nDCG@10", "P@1"],
            cache=False,
            progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
        )
    _show_gains(evaluation, console)
    if len(chosen.queries) < len(whole.queries):
        console.print(
            f"All {len(whole.queries)} questions take about {_duration(seconds * len(whole.queries))}: "
            f"the same command with [bold]--queries {len(whole.queries)}[/]."
        )
    return evaluation


def _every_nth(whole: Collection, count: int) -> Collection:
    """Keep `count` questions from all over the collection."""
    names, count = list(whole.queries), min(count, len(whole.queries))
    names = [names[number * len(names) // count] for number in range(count)]
    return replace(
        whole,
        queries={name: whole.queries[name] for name in names},
        judgments={name: whole.judgments[name] for name in names},
    )


def _show_example(scorer: Scorer, console: Console, collection: Collection, bm25: BM25) -> float:
    """Show what becomes of one question's candidates; return the seconds that it took."""
    [query] = [name for name, text in collection.queries.items() if text == EXAMPLE]
    [answer] = collection.judgments[query]
    found = {name: collection.documents[name] for name in bm25.retrieve(EXAMPLE, DEPTH)}
    scorer.score(EXAMPLE, EXAMPLE)  # loads the model, which is in no question's time
    began = time.perf_counter()
    ranked = scorer.rerank(EXAMPLE, list(found.values()))
    seconds = time.perf_counter() - began
    order = [list(found)[item.index] for item in ranked]
    console.print(f"[bold]{EXAMPLE}[/]")
    for title, ranking in (("BM25", list(found)), ("reranked", order)):
        console.print(f"\n{title}", style="dim")
        for place, name in enumerate(ranking, 1):
            if place <= SHOWN or name == answer:
                text = " ".join(found[name].split())
                line = f"{place:2} {'✓' if name == answer else ' '} {text}"
                console.print(line, markup=False, highlight=False, no_wrap=True, overflow="ellipsis")
    console.print(f"\n✓ is the right answer: place {[*found].index(answer) + 1} before, {order.index(answer) + 1} now.")
    for framework, reorder in (("LangChain", _langchain_order), ("LlamaIndex", _llama_index_order)):
        try:
            same = reorder(scorer, EXAMPLE, found) == order
            console.print(f"{framework}: {'[green]the same order[/]' if same else '[red]another order[/]'}")
        except ModuleNotFoundError as error:
            console.print(f"{framework}: {error.name} is not installed")
    return seconds


def _show_gains(evaluation: Evaluation, console: Console) -> None:
    after = evaluation.systems[0].deepest
    table = Table("", *(f"{name:>8}" for name in ("BM25", "reranked", "change")), "95 % interval")
    for measure, label in (("nDCG@10", "nDCG@10"), ("P@1", "right answer on top")):
        gain = after.gains[measure]
        table.add_row(
            label,
            f"{mean(evaluation.before[measure]):8.3f}",
            f"{after.mean(measure):8.3f}",
            f"{gain.gain:+8.3f}",
            f"{gain.low:+.3f} … {gain.high:+.3f}",
        )
    console.print(table)
    gain = after.gains["nDCG@10"]
    console.print(
        "nDCG@10 is 1 where the right answer is at the top, less further down, 0 where it is not among the first ten.\n"
        f"It rose for {gain.wins} questions and fell for {gain.losses}: reranking "
        f"{'makes ' if gain.verdict == 'no clear difference' else ''}[bold]{gain.verdict}[/] here."
    )
    if after.latency:
        console.print(f"{DEPTH} passages take {_duration(after.latency.p50)}.")


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"


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
