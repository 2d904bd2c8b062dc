"""``rag-rerank score`` and ``rag-rerank rerank``."""

import json
import pprint
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rag_rerank.cli.options import ScorerOptions, console, progress, takes_scorer
from rag_rerank.display import Reranked, described, one_line
from rag_rerank.errors import ConfigError
from rag_rerank.files import Tally, partial_of, rejects_of, rerank_file
from rag_rerank.files.rows import Line, Options, is_blank, likely_cause, parse
from rag_rerank.inputs.content import Image, Input
from rag_rerank.ranking import Ranked, RankOptions
from rag_rerank.ray_data import Pool, rejects_in, rerank_folder
from rag_rerank.ray_data.run import SHARD_LINES
from rag_rerank.scorer import Scorer

_LONGEST = 1000  # characters of a text in a table
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_TEXTS = (".txt", ".md")
_UNDECODED = re.compile("[\udc80-\udcff]")  # what Python makes of an argument's bytes that are no text
_TEXT_HELP = f"Score the names of files ending in {', '.join(_TEXTS + _IMAGES)}, not the files."
_QUERY_HELP = "The query; without one, JSON Lines are read from stdin."
QueryArgument = Annotated[str | None, typer.Argument(help=_QUERY_HELP)]
_DOCUMENTS_HELP = "The documents: texts, text files, or image files."
DocumentsArgument = Annotated[list[str] | None, typer.Argument(help=_DOCUMENTS_HELP)]
TextOption = Annotated[bool, typer.Option("--text", help=_TEXT_HELP)]
JSONOption = Annotated[bool, typer.Option("--json", help="JSON Lines instead of a table.")]
_file_option = partial(typer.Option, rich_help_panel="Files (with --in and --out)")
_ray_option = partial(typer.Option, rich_help_panel="Many processes (with --engine ray)")
_OUT_HELP = 'The same with "ranked", in any of these formats.'
_PRECISION_HELP = "Keep as many as are relevant in this share, from 0 to 1; needs --calibration."
_IN_HELP = 'Lines of {"query", "documents"}: .jsonl, .jsonl.gz, .parquet.'


@takes_scorer()
def score(
    query: QueryArgument = None,
    documents: DocumentsArgument = None,
    text: TextOption = False,
    example: Annotated[bool, typer.Option("--example", help="Show the three input patterns of the score API.")] = False,
    *,
    chosen: ScorerOptions,
    as_json: JSONOption = False,
) -> None:
    """Score documents against a query, in the order given.

    Documents that name text or image files are read from them. Without arguments, each line of stdin is
    {"query": ..., "documents": [...]} and becomes one line with "scores", or {"query": ..., "document": ...} and gets
    a "score". There, images are {"content": [{"type": "image_url", "image_url": {"url": "data:..."}}]}, and no file
    is read.
    """
    with chosen.make() as scorer:
        if example:
            _show_example(scorer)
        else:
            answer = partial(_answer, scorer, query, _read(documents, as_text=text), Options(), as_json=as_json)
            answer(lambda query, documents: {"scores": scorer.score(query, documents)}, _score_table)


@takes_scorer()
def rerank(
    query: QueryArgument = None,
    documents: DocumentsArgument = None,
    text: TextOption = False,
    top_n: Annotated[int | None, typer.Option(help="How many to keep.")] = None,
    score_threshold: Annotated[float | None, typer.Option(help="Keep scores at or above it.")] = None,
    min_precision: Annotated[float | None, typer.Option(help=_PRECISION_HELP)] = None,
    *,
    chosen: ScorerOptions,
    as_json: JSONOption = False,
    source: Annotated[Path | None, _file_option("--in", help=_IN_HELP)] = None,
    target: Annotated[Path | None, _file_option("--out", help=_OUT_HELP)] = None,
    restart: Annotated[bool, _file_option("--restart", help="Discard what an interrupted run has left.")] = False,
    strict: Annotated[bool, _file_option("--strict", help="Exit with 1 if lines were rejected.")] = False,
    engine: Annotated[Literal["local", "ray"], _ray_option(help="ray: --in and --out may be folders.")] = "local",
    num_actors: Annotated[int | None, _ray_option(help="Default: one for each GPU, or machine.")] = None,
    cpus_per_actor: Annotated[float | None, _ray_option(help="Default: an equal share of all.")] = None,
    gpus_per_actor: Annotated[float | None, _ray_option(help="Default: 1 where there are any.")] = None,
    shard_lines: Annotated[int, _ray_option(help="Lines of one output file.")] = SHARD_LINES,
) -> None:
    """Order documents by relevance to a query, best first.

    Arguments, and lines of stdin, are read as by score; a line becomes one with "ranked", or with the "score" of its
    one "document".

    With --in and --out, each line of a file is itself with its "ranked" or "score". A run that was interrupted
    continues where it stopped, if model, options and input are the same.
    """
    limits: RankOptions = {"top_n": top_n, "score_threshold": score_threshold, "min_precision": min_precision}
    options = Options(**limits)
    if (num_actors, cpus_per_actor, gpus_per_actor, shard_lines) != (None, None, None, SHARD_LINES) and engine != "ray":
        raise ConfigError("--num-actors, --cpus-per-actor, --gpus-per-actor and --shard-lines go with --engine ray")
    if source is None and target is None and not (restart or strict or engine == "ray"):
        with chosen.make() as scorer:
            rank = partial(scorer.rerank, **limits)
            answer = partial(_answer, scorer, query, _read(documents, as_text=text), options, as_json=as_json)
            answer(lambda query, documents: {"ranked": list(map(asdict, rank(query, documents)))}, _ranked_table)
        return
    if source is None or target is None:
        raise ConfigError("pass both --in and --out; --restart, --strict and --engine ray go with them only")
    if query is not None or as_json:
        raise ConfigError("pass either a query and documents, or --in and --out, which write JSON by themselves")
    more: dict[str, Any] = {**limits, "restart": restart}
    if engine == "ray":
        gpus = 0.0 if chosen.device == "cpu" and gpus_per_actor is None else gpus_per_actor
        more |= {"pool": Pool(num_actors, cpus_per_actor, gpus), "shard_lines": shard_lines}
    with chosen.make() as scorer:
        _rerank_files(scorer, source, target, more, ray=engine == "ray", strict=strict)


def _read(documents: list[str] | None, *, as_text: bool) -> list[Input] | None:
    """Read those documents of the command line that name files."""
    if documents is None:
        return None
    return [_content_of(document) if not as_text and _is_file(document) else document for document in documents]


def _is_file(document: str) -> bool:
    is_read = document.lower().endswith(_TEXTS + _IMAGES)
    try:
        found = Path(document).is_file()
    except OSError:  # a text, too long for a name
        return False
    if found and not is_read:
        typer.echo(f"note: the file {document} is not read: its name is scored as a text", err=True)
    elif is_read and not found and " " not in document:
        typer.echo(f"note: there is no file {document}: it is scored as a text", err=True)
    return found and is_read


def _content_of(document: str) -> Input:
    if document.lower().endswith(_IMAGES):
        return Image(Path(document))
    try:
        return Path(document).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{document} is not text in UTF-8 ({error}); --text scores its name") from error


def _answer(
    scorer: Scorer,
    query: str | None,
    documents: list[Input] | None,
    options: Options,
    ask: Callable[[Input, list[Input]], dict[str, Any]],
    table: Callable[..., Table],
    *,
    as_json: bool,
) -> None:
    """Print what `ask` gives for the arguments, as a table or as JSON; or as JSON for every line of stdin."""
    if query is None:
        for line in _lines():
            if line.is_pair:
                options.refuse_pair(f"stdin, line {line.number} is a pair")
                _print_json({"score": scorer.score(line.query, line.documents)[0]})
            else:
                _print_json(ask(line.query, line.documents))
    elif not documents:
        raise ConfigError("pass at least one document after the query, or nothing at all to read stdin")
    elif odd := [each for each in (query, *documents) if isinstance(each, str) and _UNDECODED.search(each)]:
        raise ConfigError(f"the argument {odd[0]!a} is no text in {sys.getfilesystemencoding()}")
    elif as_json:
        _print_json(ask(query, documents))
    else:
        console().print(table(query, documents, **ask(query, documents)))


def _print_json(answer: dict[str, Any]) -> None:
    typer.echo(json.dumps(answer, ensure_ascii=False))


def _lines() -> Iterator[Line]:
    """Read the lines of stdin as those of a file; what a file's rejects would have ends the command."""
    if sys.stdin is None or sys.stdin.isatty():  # None: closed by the shell
        raise ConfigError("pass a query and documents, or pipe JSON Lines in; --help tells more")
    for number, raw in enumerate(sys.stdin.buffer, 1):
        if not is_blank(raw):
            line = parse(number, raw)
            if line.error is not None:
                told = likely_cause(line.reject()) if number == 1 else f"line {number}: {line.error}"
                raise ConfigError(f"stdin, {told}")
            yield line


def _score_table(query: Input, documents: list[Input], scores: list[float]) -> Table:
    table = Table(title=Text(one_line(described(query), _LONGEST)), title_justify="left", title_style="bold")
    for name in ("index", "score"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("document")
    for index, (document, value) in enumerate(zip(documents, scores, strict=True)):
        # The cell is cut, not the column: that would be given its width before the numbers.
        text = Text(one_line(described(document), _LONGEST), no_wrap=True, overflow="ellipsis")
        table.add_row(str(index), f"{value:.6f}", text)
    return table


def _ranked_table(query: Input, documents: list[Input], ranked: list[dict[str, Any]]) -> Table:
    return Reranked(query, documents, [Ranked(**item) for item in ranked], rows=None).__rich__()


def _show_example(scorer: Scorer) -> None:
    """Print the three input patterns as vLLM's own example client of the score API prints them."""
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


def _rerank_files(
    scorer: Scorer, source: Path, target: Path, options: dict[str, Any], *, ray: bool, strict: bool
) -> None:
    """Rerank a file, or with Ray a folder; show a bar, and on stderr what came of it or how to continue."""

    def kept() -> str:
        what, path = ("shards", target) if ray else ("lines", partial_of(target))
        told = f"The finished {what} are kept in {path}: the same command continues behind them."
        return told if path.exists() else ""

    with progress(kept) as (on, move):

        def show(tally: Tally, fraction: float) -> None:
            if tally.resumed == tally.lines > 0:
                on.print(f"{tally.lines:,} lines of {source} were finished before.")
            move("", fraction, 1.0, f"{tally.lines:,} lines, {tally.documents:,} documents")

        tally = (rerank_folder if ray else rerank_file)(scorer, source, target, **options, progress=show)
    _summarise(on, tally, target, rejects_in(target) if ray else rejects_of(target), strict=strict)


def _summarise(on: Console, tally: Tally, target: Path, rejects: Path, *, strict: bool) -> None:
    """Say what became of every line; exit with 1 if all were rejected, or under `strict` any."""
    blank = f", {tally.blank:,} blank" if tally.blank else ""
    on.print(
        f"{tally.lines:,} lines: {tally.ranked:,} reranked ({tally.documents:,} documents), "
        f"{tally.rejected:,} rejected{blank}; written to {target}."
    )
    if not tally.rejected:
        return
    on.print(f"warning: {tally.rejected:,} rejected, see {rejects}", style="yellow")
    if not tally.ranked:
        first = min(path for path in rejects.rglob("*") if path.is_file()) if rejects.is_dir() else rejects
        with first.open("rb") as file:
            on.print(f"error: every line was rejected: {likely_cause(file.readline())}", style="red")
    if strict or not tally.ranked:
        raise typer.Exit(1)
