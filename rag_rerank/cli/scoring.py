"""``rag-rerank score`` and ``rag-rerank rerank``."""

import json
import pprint
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

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
from rag_rerank.cli.scoring_files import rerank_file_shown
from rag_rerank.cli.scoring_with_ray import rerank_with_ray
from rag_rerank.display import Reranked, described
from rag_rerank.errors import ConfigError
from rag_rerank.inputs.content import Image, Input
from rag_rerank.ranking import Ranked
from rag_rerank.scorer import Scorer

QueryArgument = Annotated[str | None, typer.Argument(help="The query; without one, JSON Lines are read from stdin.")]
DocumentsArgument = Annotated[
    list[str] | None, typer.Argument(help="The documents: texts, or image files, for a model that sees.")
]
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TextOption = Annotated[
    bool,
    typer.Option("--text", help=f"Take documents for texts even if they name files ending in {', '.join(_IMAGES)}."),
]
_FILES = "Files (with --in and --out)"
InOption = Annotated[
    Path | None,
    typer.Option("--in", rich_help_panel=_FILES, help='Lines of {"query", "documents"}: .jsonl, .jsonl.gz, .parquet.'),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", rich_help_panel=_FILES, help='The same with "ranked", in any of these formats.')
]
ReorderOption = Annotated[
    bool, typer.Option("--reorder", rich_help_panel=_FILES, help="Put the documents themselves in the new order.")
]
RestartOption = Annotated[
    bool, typer.Option("--restart", rich_help_panel=_FILES, help="Throw away what an interrupted run has left.")
]
StrictOption = Annotated[
    bool, typer.Option("--strict", rich_help_panel=_FILES, help="Exit with 1 if lines were rejected.")
]
_RAY = "Many processes (with --engine ray)"
EngineOption = Annotated[
    Literal["local", "ray"],
    typer.Option("--engine", rich_help_panel=_RAY, help="ray: --in and --out may be folders; see the README."),
]
ActorsOption = Annotated[
    int | None, typer.Option("--num-actors", rich_help_panel=_RAY, help="Default: one for each GPU, or machine.")
]
CPUsOption = Annotated[
    float | None, typer.Option("--cpus-per-actor", rich_help_panel=_RAY, help="Default: an equal share of all.")
]
GPUsOption = Annotated[
    float | None, typer.Option("--gpus-per-actor", rich_help_panel=_RAY, help="Default: 1 where there are any.")
]
UnitOption = Annotated[
    int | None,
    typer.Option("--unit-lines", rich_help_panel=_RAY, help="Lines of one output file. Default: 16,384."),
]
_PATIENCE = 300.0  # seconds for a group of a file on a server: nobody waits for it, and a server may start again


def score(
    query: QueryArgument = None,
    documents: DocumentsArgument = None,
    text: TextOption = False,
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

    Documents that are image files are read as images. Without arguments, each line of stdin is
    {"query": ..., "documents": [...]} and becomes one line with "scores"; there, images are
    {"content": [{"type": "image_url", "image_url": {"url": "data:..."}}]}, and no text is taken for a file.
    """
    with make_scorer(model, base_url, host, port, device, dtype, logits, send_key_over_http) as scorer:
        if example:
            _show_example(scorer)
            return
        _answer(
            query,
            _read(documents, as_text=text),
            as_json,
            lambda query, documents: {"scores": scorer.score(query, documents)},
            lambda query, documents: _score_table(query, documents, scorer.score(query, documents)),
        )


def rerank(
    query: QueryArgument = None,
    documents: DocumentsArgument = None,
    text: TextOption = False,
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
    source: InOption = None,
    target: OutOption = None,
    reorder: ReorderOption = False,
    restart: RestartOption = False,
    strict: StrictOption = False,
    engine: EngineOption = "local",
    num_actors: ActorsOption = None,
    cpus_per_actor: CPUsOption = None,
    gpus_per_actor: GPUsOption = None,
    unit_lines: UnitOption = None,
) -> None:
    """Order documents by relevance to a query, best first.

    Documents that are image files are read as images. Without arguments, each line of stdin is
    {"query": ..., "documents": [...]} and becomes one line with "ranked"; there, images are
    {"content": [{"type": "image_url", "image_url": {"url": "data:..."}}]}, and no text is taken for a file.
    With --in and --out, so does each line of a file, and each line of {"query": ..., "document": ...} gets a "score";
    a run that was interrupted goes on where it stopped.
    """
    options: dict[str, Any] = {"top_n": top_n, "score_threshold": score_threshold}

    def ranked(query: Input, documents: list[Input]) -> list[Ranked]:
        return scorer.rerank(query, documents, **options)

    given = [value for value in (num_actors, cpus_per_actor, gpus_per_actor, unit_lines) if value is not None]
    if given and engine != "ray":
        raise ConfigError("--num-actors, --cpus-per-actor, --gpus-per-actor and --unit-lines go with --engine ray")
    paths = _paths(source, target, query is None and not as_json, reorder or restart or strict or engine == "ray")
    with make_scorer(model, base_url, host, port, device, dtype, logits, send_key_over_http) as scorer:
        if paths:
            where = base_url or ((host or port) and [f"{host}:{port}"])
            options |= _unattended(model, where or None, dtype, logits)
            if engine == "ray":
                gpus = 0.0 if device == "cpu" and gpus_per_actor is None else gpus_per_actor
                options |= {"reorder": reorder, "restart": restart, "unit_lines": unit_lines}
                rerank_with_ray(scorer, *paths, options, (num_actors, cpus_per_actor, gpus), strict=strict)
                return
            rerank_file_shown(scorer, *paths, options | {"reorder": reorder, "restart": restart}, strict=strict)
            return
        _answer(
            query,
            _read(documents, as_text=text),
            as_json,
            lambda query, documents: {"ranked": [asdict(item) for item in ranked(query, documents)]},
            lambda query, documents: Reranked(query, documents, ranked(query, documents), rows=None).__rich__(),
        )


def _paths(source: Path | None, target: Path | None, alone: bool, other: bool) -> tuple[Path, Path] | None:
    """From where to where, or None where no files are asked for.

    Args:
        source: --in.
        target: --out.
        alone: Whether nothing is asked for that does not go with files.
        other: Whether something is asked for that goes with files only.
    """
    if source is None and target is None and not other:
        return None
    if source is None or target is None:
        raise ConfigError("pass both --in and --out; --reorder, --restart, --strict and --engine ray go with them only")
    if not alone:
        raise ConfigError("pass either a query and documents, or --in and --out, which write JSON by themselves")
    return source, target


def _unattended(model: str | None, where: list[str] | None, dtype: str, logits: bool) -> dict[str, Any]:
    """How long a call may take, and by what a later run is known as the same.

    On which server a model runs does not matter to its scores; it only has to where nothing else says which model.
    """
    settings = {"model": model or where, "dtype": dtype, "logits": logits}
    return {"settings": settings, "deadline": _PATIENCE if where else None}


def _read(documents: list[str] | None, *, as_text: bool) -> list[Input] | None:
    """The documents of the command line, those that are image files as images."""
    if documents is None or as_text:
        return None if documents is None else list(documents)
    return [Image(Path(document)) if _is_image_file(document) else document for document in documents]


def _is_image_file(document: str) -> bool:
    if not document.lower().endswith(_IMAGES):
        return False
    try:
        found = Path(document).is_file()
    except OSError:  # a text, too long for a name
        return False
    if not found and " " not in document:
        typer.echo(f"note: there is no file {document}: it is scored as a text", err=True)
    return found


def _answer(
    query: str | None,
    documents: list[Input] | None,
    as_json: bool,
    as_object: Callable[[Input, list[Input]], dict[str, Any]],
    as_table: Callable[[Input, list[Input]], Table],
) -> None:
    """One table or object for the arguments, or one object for every line of stdin."""
    if query is not None and not documents:
        raise ConfigError("pass at least one document after the query, or nothing at all to read stdin")
    if query is not None and documents and not as_json:
        Console().print(as_table(query, documents))
        return
    asked: Iterable[tuple[Input, list[Input]]] = _lines() if query is None else [(query, documents or [])]
    for one_query, many_documents in asked:
        typer.echo(json.dumps(as_object(one_query, many_documents), ensure_ascii=False))


def _lines() -> Iterator[tuple[Input, list[Input]]]:
    """(query, documents) of every line of stdin."""
    if sys.stdin.isatty():
        raise ConfigError("pass a query and documents, or pipe JSON Lines in; --help tells more")
    for number, line in enumerate(sys.stdin, 1):
        try:
            row = json.loads(line)
            yield row["query"], row["documents"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'stdin, line {number}: not an object with "query" and "documents" ({error})') from error


def _score_table(query: Input, documents: list[Input], scores: list[float]) -> Table:
    table = Table(title=escape(described(query)), title_justify="left", title_style="bold")
    table.add_column("index", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("document")
    for index, (document, value) in enumerate(zip(documents, scores, strict=True)):
        # The cell is cut, not the column: that would be given its width before the numbers.
        text = Text(" ".join(described(document).split()), no_wrap=True, overflow="ellipsis")
        table.add_row(str(index), f"{value:.6f}", text)
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
