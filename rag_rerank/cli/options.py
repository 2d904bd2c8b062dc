"""Options that several commands have, and the scorer that they ask for."""

import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from itertools import chain, groupby
from pathlib import Path
from typing import Annotated, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from typer import Option

from rag_rerank.display import printable
from rag_rerank.embedded import minilm_folder
from rag_rerank.errors import BackendError, ConfigError
from rag_rerank.scorer import Scorer

JSONFileOption = Annotated[Path | None, Option("--json", help="Write all figures to this file.")]
_ENDPOINT_HELP = "How the server is asked: score (vLLM), rerank (most others), tei, or auto, which finds out."
_MODEL_HELP = 'Hub id or folder (a MiniLM cross-encoder if none), "embedded", or the name on the server.'
_URL_HELP = "A vLLM server; may be repeated for several. The key is read from VLLM_API_KEY."
_HEADER_HELP = 'A header for a server, such as "X-Tenant: search"; may be repeated.'
_KEY_HELP = "Allow the key to be sent unencrypted to another machine."
_TEMPLATE_HELP = "Score template, rendered here: a file, or a name of rag-rerank template list."
_LOCAL = ("device", "dtype", "max_length", "long_documents")
_REMOTE = ("endpoint", "timeout", "header", "send_key_over_http")


@dataclass(frozen=True, slots=True)
class ScorerOptions:
    """The options that say what scores, in the order of ``--help``."""

    model: Annotated[str | None, Option(help=_MODEL_HELP)] = None
    base_url: Annotated[list[str] | None, Option(help=_URL_HELP)] = None
    host: Annotated[str | None, Option(help="The vLLM server's host, instead of --base-url.")] = None
    port: Annotated[int | None, Option(min=1, max=65535, help="The vLLM server's port, instead of --base-url.")] = None
    endpoint: Annotated[str, Option(help=_ENDPOINT_HELP)] = "score"
    timeout: Annotated[float | None, Option(help="Seconds that a call to a server may take; 30 if none.")] = None
    header: Annotated[list[str] | None, Option(help=_HEADER_HELP)] = None
    send_key_over_http: Annotated[bool, Option("--send-key-over-http", help=_KEY_HELP)] = False
    device: Annotated[str | None, Option(help="Local only: cuda, cuda:1, mps, cpu.")] = None
    dtype: Annotated[str, Option(help="Local only: auto, float32, bfloat16, float16.")] = "auto"
    max_length: Annotated[int | None, Option(help="Local only: tokens of query and document; the rest is cut.")] = None
    long_documents: Annotated[str, Option(help="Local only: truncate, or max-passage, the best part.")] = "truncate"
    template: Annotated[str | None, Option(help=_TEMPLATE_HELP)] = None
    instruction: Annotated[str | None, Option(help="The task, for a model whose template has a place for it.")] = None
    logits: Annotated[bool, Option("--logits", help="Raw logits instead of the model's own scale.")] = False
    calibration: Annotated[Path | None, Option(help="A file of rag-rerank calibrate, for probabilities.")] = None

    def make(self, *, beside_others: bool = False) -> Scorer:
        """Make the scorer that they ask for: remote as soon as one of them says where.

        Where it is made `beside_others`, options that are not for its kind are for theirs.
        """
        from rag_rerank import Calibrated, LocalScorer, VLLMScorer

        urls, names_host = self.base_url, self.host is not None or self.port is not None
        if urls and names_host:
            raise ConfigError("pass either --base-url or --host and --port")
        if names_host:
            urls = [f"http://{self.host or 'localhost'}:{self.port or 8000}"]
        given: dict[str, Any] = {
            each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default
        }
        others = [name for name in (_LOCAL if urls else _REMOTE) if given.pop(name, None) is not None]
        if others and not beside_others:
            wrong = [f"--{name.replace('_', '-')}" for name in others]
            place = "local models; a server has chosen its own" if urls else "a server: pass --base-url"
            raise ConfigError(f"{' and '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} for {place}")
        for name in ("base_url", "host", "port", "calibration"):
            given.pop(name, None)
        if given.pop("logits", False):
            given["use_activation"] = False
        if given.get("model") == "embedded" and not urls:
            given["model"] = minilm_folder()
        if "header" in given:
            given["default_headers"] = dict(map(_header, given.pop("header")))
        scorer = VLLMScorer(urls, **given) if urls else LocalScorer(**given)
        return scorer if self.calibration is None else Calibrated(scorer, self.calibration)


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon:
        raise ConfigError("--header takes a name and a value: --header 'Name: value'")
    return name.strip(), value.strip()


def console() -> Console:
    """Make a console on stdout whose tables are cut to a terminal's width, but not where they are piped or kept."""
    on = Console(highlight=False)
    # Below 40, and where a terminal that has no size says 0, columns would vanish.
    on.width = max(40, on.width) if on.file.isatty() or os.environ.get("COLUMNS") else 1000
    return on


def show(found: Any, file: str = "", *, on: Console | None = None) -> None:
    """Print an `Evaluation` or a `Calibrating` as text; lines of cells between bars become tables.

    Args:
        found: What is shown.
        file: Where the calibration was written.
        on: Where to print; stdout if none.
    """
    from rag_rerank.evaluation.report import render

    on = on or console()
    text = render(found, "txt", escape=lambda name: escape(printable(name)).replace("│", "|"), file=repr(file))
    for is_table, lines in groupby(text.splitlines(), key=lambda line: line.startswith("│")):
        if not is_table:
            for line in lines:
                on.print(line, soft_wrap=line.startswith("--"))  # options, to be copied
            continue
        heads, *rows = ([cell[1:-1] for cell in line.split("│")[1:-1]] for line in lines)
        columns = [Column(head, justify="right" if place else "left", no_wrap=True) for place, head in enumerate(heads)]
        table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for row in rows:
            table.add_row(*row)
        on.print(table)


def write_json(path: Path | None, figures: Any) -> None:
    """Write all figures, if there is a file for them."""
    if path is not None:
        path.write_text(json.dumps(figures.as_json(), allow_nan=False, indent=1) + "\n", encoding="utf-8")


@contextmanager
def progress(kept: Callable[[], str] = str) -> Iterator[tuple[Console, Callable[..., None]]]:
    """Yield a console on stderr, and what moves a bar there: name, done, total, and perhaps other words for the name.

    A block that ends early says what is `kept` for the next run, if anything; after Ctrl-C, the exit code is 130, as in
    shells.
    """
    on = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    tasks: dict[str, TaskID] = {}

    def move(name: str, done: float, total: float, words: str | None = None) -> None:
        if name not in tasks:
            tasks[name] = bar.add_task(printable(name))
        bar.update(tasks[name], completed=done, total=total, description=words)

    try:
        with Progress(*columns, console=on, transient=True, disable=not on.is_terminal) as bar:
            yield on, move
    except (KeyboardInterrupt, BackendError, OSError) as error:
        if told := kept():
            on.print(told)
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(130) from None
        raise


def takes_scorer(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of `ScorerOptions` but those left out as options, instead of its argument `chosen`."""
    offered = [each for name, each in inspect.signature(ScorerOptions).parameters.items() if name not in left_out]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def flat(**given: Any) -> None:
            command(chosen=ScorerOptions(**{each.name: given.pop(each.name) for each in offered}), **given)

        signature = inspect.signature(command)
        own = (offered if each.name == "chosen" else [each] for each in signature.parameters.values())
        flat.__signature__ = signature.replace(parameters=list(chain(*own)))  # type: ignore[attr-defined]
        return flat

    return decorate
