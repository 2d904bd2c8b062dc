"""What a run that was interrupted has kept, read as sqlite has it."""

import sqlite3
from contextlib import closing
from pathlib import Path


def record(path: Path) -> tuple[list[str], list[tuple[str, int, bytes, bytes]]]:
    """What and who it was begun from, and each group that is done: name, lines, output, rejects; else nothing."""
    if not path.exists() or not path.stat().st_size:
        return [], []
    with closing(sqlite3.connect(path)) as database:
        try:
            scorers = [text for (text,) in database.execute("SELECT identity FROM scorers ORDER BY number")]
            return scorers, database.execute("SELECT part, lines, output, rejects FROM done ORDER BY rowid").fetchall()
        except sqlite3.OperationalError:  # killed before it had tables
            return [], []


def output(path: Path) -> bytes:
    """The lines of the output."""
    return b"".join(lines for _, _, lines, _ in record(path)[1])


def lines(path: Path) -> int:
    """How many lines of the input are done."""
    return sum(count for _, count, _, _ in record(path)[1])
