"""What a run has finished, kept on disk so that the next run can continue."""

import json
import operator
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Self, TypeVar

from rag_rerank.errors import ConfigError
from rag_rerank.files.formats import Columns, compress
from rag_rerank.identity import Identity

if sys.platform != "win32":
    import fcntl

T = TypeVar("T")
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


class Record(NamedTuple):
    """What and who a run was made from, and how far it is."""

    facts: Identity
    scorer: Identity
    tally: Tally = Tally()

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read what `write` has written, or raise a ConfigError."""

        def made(found: Any) -> Record:
            return cls(Identity(dict(found["facts"])), Identity.from_dict(found["scorer"]), Tally(**found["tally"]))

        return read_whole(path, made)

    def write(self, path: Path) -> None:
        """Write it whole or not at all."""
        facts, scorer = dict(self.facts.facts), self.scorer.to_dict()
        write_whole(path, {"facts": facts, "scorer": scorer, "tally": asdict(self.tally)})


def partial_of(target: Path) -> Path:
    """Name the file that holds the finished lines until `target` is complete."""
    return target.with_name(f"{target.name}.partial")


def rejects_of(target: Path) -> Path:
    """Name the file of the lines that could not be reranked: ``{"line": number, "error": why, "raw": the line}``."""
    return target.with_name(f"{target.name}.rejects.jsonl")


def _state_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial.json")


def lines_kept(target: Path) -> int:
    """Count the lines that a run which has not come to its end has finished."""
    state = _state_of(target)
    return Record.read(state).tally.lines if state.exists() else 0


class Partial:
    """The finished lines of one run over `source`, which are to become `target`; locked against other processes.

    `facts` are the input and the options of the run. `identify` tells who the scorer is; it is asked before anything on
    disk is changed. `record` begins as that of an earlier run with the same facts and the same scorer.
    """

    def __init__(
        self,
        target: Path,
        source: Path,
        facts: Mapping[str, str],
        identify: Callable[[], Identity],
        *,
        restart: bool,
        lock_timeout: float = 0.0,
    ) -> None:
        self._target = target
        self.record: Record
        self._path, self._state = partial_of(target), _state_of(target)
        self._rejects_path = partial_of(rejects_of(target))
        self._columns = Columns(target, source) if target.suffix == ".parquet" else None
        begun = self._path.exists()
        self._ranked = self._path.open("a+b")
        if not lock(self._ranked, self._path, time.monotonic() + lock_timeout):
            self._ranked.close()
            raise ConfigError(f"{target} is being written by another process")
        # With some of the three only, a run was killed when it had finished, between two of the last renamings.
        begun = begun and self._rejects_path.exists() and self._state.exists()
        if not begun:  # before there are three again, which the next run would continue if this one is killed
            self._state.unlink(missing_ok=True)
        self._rejects = self._rejects_path.open("a+b")
        try:
            record = Record.read(self._state) if begun and not restart else None
            if record is not None:
                refuse_changes(self._path, record.facts, Identity(facts))
            identity = identify()
            if record is None:
                self._state.unlink(missing_ok=True)
                record = Record(Identity(facts), identity)
            refuse_changes(self._path, record.scorer, identity)
            self._resume(record)
        except BaseException:
            self._close(keep=begun)
            raise

    def add(self, ranked: Sequence[bytes], rejects: Sequence[bytes], documents: int, *, lines: int) -> None:
        """Keep the results of a group up to this line; they are on disk when this returns."""
        if self._columns is not None:
            self._columns.add(ranked)  # if Parquet has no type for a column of these, nothing is kept of them
        for file, added in ((self._ranked, ranked), (self._rejects, rejects)):
            if added:
                file.writelines(added)
                _sync(file)
        new = Tally(lines - self.record.tally.lines, len(ranked), len(rejects), documents)
        self.record = self.record._replace(tally=self.record.tally + new)
        self.record.write(self._state)

    def finish(self) -> None:
        """Put the output in its place, all at once, and the rejects, or remove those of an earlier output."""
        self._close(keep=True)
        finished = self._path
        if self._target.suffix != ".jsonl":
            finished = self._path.with_name(f"{self._path.name}.new")
            try:
                if self._columns is None:
                    compress(self._path, finished)
                else:
                    self._columns.write(self._path, finished)
                with finished.open("rb+") as file:
                    _sync(file)
            except BaseException:
                finished.unlink(missing_ok=True)
                raise
        if self.record.tally.rejected:
            self._rejects_path.replace(rejects_of(self._target))
        else:
            rejects_of(self._target).unlink(missing_ok=True)
        finished.replace(self._target)
        self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close(keep=self._ranked.closed or self.record.tally.lines > 0)

    def _close(self, *, keep: bool) -> None:
        if not keep:  # while it is locked, so that these files are no other process's
            self._remove()
        self._ranked.close()
        self._rejects.close()

    def _remove(self) -> None:
        # The state first: without it, the next run takes the others for nothing that it could continue.
        for path in (self._state, self._rejects_path, self._path):
            path.unlink(missing_ok=True)

    def _resume(self, record: Record) -> None:
        """Go back to the end of the last group that was kept, if the files are as they were then."""
        for file, lines in ((self._ranked, record.tally.ranked), (self._rejects, record.tally.rejected)):
            file.seek(0)
            if sum(line.endswith(b"\n") for line in islice(file, lines)) != lines:
                raise ConfigError(f"{self._path} or its rejects were changed since; {START_OVER}")
        for file in (self._ranked, self._rejects):
            file.truncate()  # behind these lines
        self.record = record._replace(tally=replace(record.tally, resumed=record.tally.lines))
        if self._columns is not None:
            self._columns.add_file(self._path)


def refuse_changes(path: Path, before: Identity, now: Identity) -> None:
    """Refuse to continue what another run or another scorer began, with a ConfigError that says what differs."""
    if changes := now.differences(before):
        raise ConfigError(f"{path} was begun by another run ({'; '.join(changes)}); {START_OVER}")


def write_whole(path: Path, values: object) -> None:
    """Write JSON to a file so that it is there whole or not at all; it is on disk when this returns."""
    with (new := path.with_name(f"{path.name}.new")).open("wb") as file:
        file.write(json.dumps(values).encode())
        _sync(file)
    new.replace(path)


def read_whole(path: Path, made: Callable[[Any], T]) -> T:
    """Make something of a file of JSON, or raise a ConfigError."""
    try:
        return made(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} can't be read; {START_OVER}") from error


def lock(file: IO[bytes], path: Path, until: float) -> bool:
    """Keep other processes out of a file until it is closed, however this process ends; on Windows, do nothing.

    Tell whether it was locked until then, on the clock of `time.monotonic`.
    """
    if sys.platform == "win32":
        return True
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A process that finished between our opening and our locking may have renamed this very file.
            return os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            return False
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.1)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
