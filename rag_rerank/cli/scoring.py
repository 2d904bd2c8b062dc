"""``rag-rerank score`` and ``rag-rerank rerank``."""

import json
import pprint
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rag_rerank.cli.options import (
    BaseURLOption,
    DeviceOption,
    DtypeOption,
    HostOption,
    JSONOption,
    KeyOverHTTPOption,
    LogitsOption,
    ModelOption,
    PortOption,
    make_scorer,
)
from rag_rerank.errors import ConfigError
from rag_rerank.scorer import Ranked, Scorer

QueryArgument = Annotated[str | None, typer.Argument(help="The query; without one, JSON Lines are read from stdin.")]
DocumentsArgument = Annotated[list[str] | None, typer.Argument(help="The documents.")]


def score(
    query: QueryArgument = None,
    documents: DocumentsArgument = None,
    example: Annotated[bool, typer.Option("--example", help="Show the three input patterns of the score API.")] = False,
    model: ModelOption = None,
    base_url: BaseURLOption = None,
    host: HostOption = None,
    port: PortOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    logits: LogitsOption = False,
    send_key_over_http: KeyOverHTTPOption = False,
    as_json: JSONOption = False,
) -> None:
    """Score documents against a query, in the order given.

    Without arguments, each line of stdin is {"query": ..., "documents": [...]} and becomes one line with "scores".
    """
    with make_scorer(model, base_url, host, port, device, dtype, logits, send_key_over_http) as scorer:
        if example:
            _show_example(scorer)
            return
        _answer(
            query,
            documents,
            as_json,
            lambda query, documents: {"scores": scorer.score(query, documents)},
            lambda query, documents: _score_table(query, documents, scorer.score(query, documents)),
        )


def rerank(
    query: QueryArgument = None,
    documents: DocumentsArgument = None,
    top_n: Annotated[int | None, typer.Option(help="Keep the best so many.")] = None,
    score_threshold: Annotated[float | None, typer.Option(help="Keep scores at or above it.")] = None,
    model: ModelOption = None,
    base_url: BaseURLOption = None,
    host: HostOption = None,
    port: PortOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    logits: LogitsOption = False,
    send_key_over_http: KeyOverHTTPOption = False,
    as_json: JSONOption = False,
) -> None:
    """Order documents by relevance to a query, best first.

    Without arguments, each line of stdin is {"query": ..., "documents": [...]} and becomes one line with "ranked".
    """

    def ranked(scorer: Scorer, query: str, documents: list[str]) -> list[Ranked]:
        return scorer.rerank(query, documents, top_n=top_n, score_threshold=score_threshold)

    with make_scorer(model, base_url, host, port, device, dtype, logits, send_key_over_http) as scorer:
        _answer(
            query,
            documents,
            as_json,
            lambda query, documents: {
                "ranked": [{"index": item.index, "score": item.score} for item in ranked(scorer, query, documents)]
            },
            lambda query, documents: _ranked_table(query, documents, ranked(scorer, query, documents)),
        )


def _answer(
    query: str | None,
    documents: list[str] | None,
    as_json: bool,
    as_object: Callable[[str, list[str]], dict[str, Any]],
    as_table: Callable[[str, list[str]], Table],
) -> None:
    """One table or object for the arguments, or one object for every line of stdin."""
    if query is not None and not documents:
        raise ConfigError("pass at least one document after the query, or nothing at all to read stdin")
    if query is not None and documents and not as_json:
        Console().print(as_table(query, documents))
        return
    for one_query, many_documents in [(query, documents)] if query is not None else _lines():
        typer.echo(json.dumps(as_object(str(one_query), list(many_documents or [])), ensure_ascii=False))


def _lines() -> Iterator[tuple[str, list[str]]]:
    """(query, documents) of every line of stdin."""
    if sys.stdin.isatty():
        raise ConfigError("pass a query and documents, or pipe JSON Lines in; --help tells more")
    for number, line in enumerate(sys.stdin, 1):
        try:
            row = json.loads(line)
            yield row["query"], row["documents"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'stdin, line {number}: not an object with "query" and "documents" ({error})') from error


def _score_table(query: str, documents: list[str], scores: list[float]) -> Table:
    return _ranked_table(query, documents, [Ranked(index, score) for index, score in enumerate(scores)])


def _ranked_table(query: str, documents: list[str], ranked: list[Ranked]) -> Table:
    table = Table(title=escape(query), title_justify="left", title_style="bold")
    table.add_column("index", justify="right")
    table.add_column("score", justify="right")
    table.add_column("document", no_wrap=True, overflow="ellipsis")
    for item in ranked:
        text = escape(" ".join(documents[item.index].split()))
        table.add_row(str(item.index), "" if item.score is None else f"{item.score:.6f}", text)
    return table


def _show_example(scorer: Scorer) -> None:
    """The three input patterns, printed as vLLM's own example client of the score API prints them."""
    brazil, france = "What is the capital of Brazil?", "What is the capital of France?"
    answers = ["The capital of Brazil is Brasilia.", "The capital of France is Paris."]
    patterns: list[tuple[str, str | list[str], str | list[str]]] = [
        ("text_1 and text_2 are both strings", brazil, answers[0]),
        ("text_1 is string and text_2 is a list", france, answers),
        ("text_1 and text_2 are both lists", [brazil, france], answers),
    ]
    for title, text_1, text_2 in patterns:
        scores = scorer.score(text_1, text_2)
        prompt = {"model": scorer.model_name, "text_1": text_1, "text_2": text_2}
        response = {"data": [{"index": index, "score": value} for index, value in enumerate(scores)]}
        typer.echo(f"\nPrompt when {title}:\n{pprint.pformat(prompt)}\n\nScore Response:\n{pprint.pformat(response)}")
