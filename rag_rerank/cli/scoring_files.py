"""``rag-rerank rerank --in --out``: a bar while it runs, and what came of it."""

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from rag_rerank.cli.options import said_what_is_kept
from rag_rerank.files import Tally, partial_of, rejects_of, rerank_file
from rag_rerank.files.rows import likely_cause
from rag_rerank.ray_data import rejects_in, rerank_folder
from rag_rerank.scorer import Scorer


def rerank_files(
    scorer: Scorer, source: Path, target: Path, options: dict[str, Any], *, ray: bool, strict: bool
) -> None:
    """Rerank a file, or with Ray a folder; show a bar, and on stderr what came of it or how to continue."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    columns = TextColumn("{task.fields[done]}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0, done="starting")

        def show(tally: Tally, fraction: float) -> None:
            if tally.resumed == tally.lines > 0:
                console.print(f"{tally.lines:,} lines of {source} were finished before.")
            bar.update(task, completed=fraction, done=f"{tally.lines:,} lines, {tally.documents:,} documents")

        def kept() -> str:
            what, path = ("shards", target) if ray else ("lines", partial_of(target))
            told = f"The finished {what} are kept in {path}: the same command continues behind them.\n"
            return told if path.exists() else ""

        with said_what_is_kept(kept):
            tally = (rerank_folder if ray else rerank_file)(scorer, source, target, **options, progress=show)
    _summarise(console, tally, target, rejects_in(target) if ray else rejects_of(target), strict=strict)


def _summarise(console: Console, tally: Tally, target: Path, rejects: Path, *, strict: bool) -> None:
    """Say what became of every line; exit with 1 if all were rejected, or under `strict` any."""
    blank = f", {tally.blank:,} blank" if tally.blank else ""
    console.print(
        f"{tally.lines:,} lines: {tally.ranked:,} reranked ({tally.documents:,} documents), "
        f"{tally.rejected:,} rejected{blank}; written to {target}."
    )
    if not tally.rejected:
        return
    console.print(f"warning: {tally.rejected:,} rejected, see {rejects}", style="yellow")
    if not tally.ranked:
        first = min(path for path in rejects.rglob("*") if path.is_file()) if rejects.is_dir() else rejects
        with first.open("rb") as file:
            console.print(f"error: every line was rejected: {likely_cause(file.readline())}", style="red")
    if strict or not tally.ranked:
        raise typer.Exit(1)
