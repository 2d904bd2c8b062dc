"""What a run has finished, kept on disk so that the next run can continue."""

import io
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import IO, Literal, Self

from rag_rerank.errors import ConfigError
from rag_rerank.identity import Identity
from rag_rerank.runs import Store

START_OVER = "--restart (in Python restart=True) discards it and starts over"


@dataclass(frozen=True, slots=True)
class Tally:
    """The progress of a run, counted.

    Attributes:
        lines: Lines read, blank ones included.
        ranked: Lines reranked and written.
        rejected: Lines that are in the rejects.
        documents: Documents of the lines reranked.
        resumed: How many of `lines` an earlier run had finished.
    """

    lines: int = 0
    ranked: int = 0
    rejected: int = 0
    documents: int = 0
    resumed: int = 0

    @property
    def blank(self) -> int:
        """Lines with nothing on them, which are skipped."""
        return self.lines - self.ranked - self.rejected

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*map(operator.add, astuple(self), astuple(other)))


def partial_of(target: Path) -> Path:
    """Name the file that holds the finished lines until `target` is complete."""
    return target.with_name(f"{target.name}.partial")


def rejects_of(target: Path) -> Path:
    """Name the file of the lines that could not be reranked: ``{"line": number, "error": why, "raw": the line}``."""
    return target.with_name(f"{target.name}.rejects.jsonl")


_DONE = (
    "done (part TEXT PRIMARY KEY, lines INTEGER, ranked INTEGER, rejected INTEGER, documents INTEGER, "
    "output BLOB, rejects BLOB)"
)


class Record(Store):
    """What a run has done, kept from other processes; as a context manager, until there is nothing to continue.

    Args:
        path: The file of the record.
        facts: The input and the options of the run.
        identify: Tells who the scorer is; asked before anything is written. A ConfigError refuses another one than
            that which began the run, and other facts.
        restart: Discard what an earlier run has left.
        wait: Seconds to wait for another process that uses it.
    """

    def __init__(
        self, path: Path, facts: Mapping[str, str], identify: Callable[[], Identity], *, restart: bool, wait: float
    ) -> None:
        self._facts, self._identify, self._restart = Identity(facts), identify, restart
        super().__init__(path, _DONE, wait=wait, alone=True)

    def _begin(self) -> None:
        if self._restart:
            self._discard()
        begun = self.scorers  # the facts, then the scorer
        for facts in begun[:1]:
            refuse_changes(self.path, facts, self._facts)
        self.begun_by = self._identify()
        for scorer in begun[1:]:
            refuse_changes(self.path, scorer, self.begun_by)
            self.begun_by = scorer
        if not begun:
            self.add_scorer(self._facts)
            self.add_scorer(self.begun_by)
        done = sum(self.parts().values(), Tally())
        self.tally = replace(done, resumed=done.lines)

    def _discard(self) -> None:
        self.execute("DELETE FROM scorers")
        self.execute("DELETE FROM done")

    def parts(self) -> dict[str, Tally]:
        """Tell what is done."""
        rows = self.execute("SELECT part, lines, ranked, rejected, documents FROM done")
        return {part: Tally(*counts) for part, *counts in rows}

    def add(self, part: str, done: Tally, output: bytes = b"", rejects: bytes = b"") -> None:
        """Keep that a part is done, and its lines; they are on the disk when this returns."""
        with self.transaction():
            self.write("done", [(part, *astuple(done)[:-1], output, rejects)])
        self.tally += done

    def lines(self, kind: Literal["output", "rejects"]) -> Iterator[bytes]:
        """Yield the lines that are kept."""
        for (lines,) in self.each(f"SELECT {kind} FROM done ORDER BY rowid"):  # noqa: S608 - one of two
            yield from io.BytesIO(lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        self.close()
        if self.path is not None and not (failed and self.tally.lines):
            self.path.unlink(missing_ok=True)


def lines_kept(target: Path, wait: float) -> int:
    """Count the lines that a run which has not come to its end has finished."""
    with closing(Store(partial_of(target), _DONE, wait=wait, alone=True)) as store:
        return sum(lines for (lines,) in store.each("SELECT lines FROM done"))


def refuse_changes(path: Path | None, before: Identity, now: Identity) -> None:
    """Refuse to continue what another run or another scorer began, with a ConfigError that says what differs."""
    if changes := now.differences(before):
        raise ConfigError(f"{path} was begun by another run ({'; '.join(changes)}); {START_OVER}")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` once it is whole and on the disk, or never."""
    path = path.resolve()  # a link stays one
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk is told without
        raise
