"""``rag-rerank rerank --engine ray``."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rag_rerank.cli.scoring_files import bar_on, ending_told, summarise
from rag_rerank.ray_data import Progress as Now
from rag_rerank.ray_data import Share, rejects_in, rerank_folder
from rag_rerank.scorer import Scorer


def rerank_with_ray(
    scorer: Scorer,
    source: Path,
    target: Path,
    options: dict[str, Any],
    share: tuple[int | None, float | None, float | None],
    *,
    strict: bool,
) -> None:
    """Rerank files over a pool of actors; a bar on a terminal, and on stderr what came of it or how to go on."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    options = {name: value for name, value in options.items() if name != "unit_lines" or value is not None}
    began, at_first = time.monotonic(), 0
    hint = f"What is finished is kept in {target}: the same command goes on behind it."
    with bar_on(console) as bar:
        task = bar.add_task("", total=None, done="starting")

        def progress(now: Now) -> None:
            nonlocal began, at_first
            tally = now.tally
            if tally.lines == tally.resumed:  # the first time
                began, at_first = time.monotonic(), tally.documents
                if now.finished:
                    console.print(Text(f"{now.finished:,} of {now.units:,} units were finished before."))
            speed = (tally.documents - at_first) / max(1e-3, time.monotonic() - began)
            done = f"{now.finished:,} of {now.units:,} units, {tally.documents:,} documents, {speed:,.0f}/s"
            bar.update(task, total=now.units, completed=now.finished, done=done)

        with ending_told(console, target, lambda: hint):
            tally = rerank_folder(scorer, source, target, **options, share=Share(*share), progress=progress)
    summarise(console, tally, target, rejects_in(target), strict=strict)
