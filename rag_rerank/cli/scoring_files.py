"""``rag-rerank rerank --in --out``: a bar while it runs, and what came of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from rag_rerank.errors import BackendError, ConfigError
from rag_rerank.files import Tally, partial_of, rejects_of, rerank_file
from rag_rerank.scorer import Scorer


def rerank_file_shown(scorer: Scorer, source: Path, target: Path, options: dict[str, Any], *, strict: bool) -> None:
    """Rerank a file, with a bar on a terminal, and say on stderr what came of it or how to go on."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    kept = partial_of(target)
    hint = f"The finished lines are kept in {kept}: the same command goes on behind them."
    with bar_on(console) as bar:
        task = bar.add_task("", total=1.0, done="")

        def progress(tally: Tally, share: float) -> None:
            if tally.resumed == tally.lines > 0:
                console.print(Text(f"Going on behind line {tally.lines:,} of {source}."))
            bar.update(task, completed=share, done=f"{tally.lines:,} lines, {tally.documents:,} documents")

        with ending_told(console, target, lambda: hint if kept.exists() else None):
            tally = rerank_file(scorer, source, target, **options, progress=progress)
    summarise(console, tally, target, rejects_of(target), strict=strict)


def bar_on(console: Console) -> Progress:
    """A bar for tasks with a field ``done``, nothing where the console is no terminal."""
    columns = (
        TextColumn("{task.fields[done]}"),
        BarColumn(),
        TaskProgressColumn(show_speed=False),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def ending_told(console: Console, target: Path, hint: Callable[[], str | None]) -> Iterator[None]:
    """Around what can go on later: where it ends early, say how, by `hint`; after Ctrl-C, with exit code 130."""
    try:
        yield
    except (KeyboardInterrupt, BackendError) as error:
        if (text := hint()) is not None:
            console.print(Text(text))
        if isinstance(error, KeyboardInterrupt):
            raise typer.Exit(130) from None
        raise
    except OSError as error:  # a full disk; behind BackendError, of which one is a TimeoutError, too
        raise ConfigError(f"{error.filename or target}: {error.strerror or error}") from error


def summarise(console: Console, tally: Tally, target: Path, rejects: Path, *, strict: bool) -> None:
    """What became of every line; what was rejected comes last, where it is seen; under `strict` with exit code 1."""
    blank = f", {tally.blank:,} blank" if tally.blank else ""
    console.print(
        Text(
            f"{tally.lines:,} lines: {tally.ranked:,} reranked ({tally.documents:,} documents), "
            f"{tally.rejected:,} rejected{blank}; written to {target}."
        )
    )
    if tally.rejected:
        console.print(Text(f"warning: {tally.rejected:,} rejected, see {rejects}", style="yellow"))
    if strict and tally.rejected:
        raise typer.Exit(1)
