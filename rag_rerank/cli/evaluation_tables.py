"""What ``rag-rerank eval`` and ``rag-rerank calibrate`` show in a terminal, 80 columns wide."""

from itertools import groupby
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from rag_rerank.evaluation import Evaluation
from rag_rerank.evaluation.report import render

if TYPE_CHECKING:
    from rag_rerank.evaluation.calibrating import Calibrating


def show(found: "Evaluation | Calibrating", console: Console, file: str = "") -> None:
    """Print the report as text; its lines of cells between bars become tables."""
    text = render(found, "txt", escape=escape, file=repr(file))
    for is_table, lines in groupby(text.splitlines(), key=lambda line: line.startswith("│")):
        if not is_table:
            for line in lines:
                console.print(line, soft_wrap=line.startswith("--"))  # options, to be copied
            continue
        heads, *rows = ([cell[1:-1] for cell in line.split("│")[1:-1]] for line in lines)
        columns = [Column(head, justify="right" if place else "left", no_wrap=True) for place, head in enumerate(heads)]
        table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
