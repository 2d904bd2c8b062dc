"""What a run has finished, on the disk, so that the next one can go on."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rag_rerank.errors import ConfigError
from rag_rerank.files.formats import write_as

if sys.platform != "win32":
    import fcntl


@dataclass(frozen=True, slots=True)
class Tally:
    """How far a run is.

    Attributes:
        lines: Lines read, blank ones included.
        ranked: Lines reranked and written.
        rejected: Lines that are in the rejects.
        documents: Documents of the lines reranked.
        resumed: How many of `lines` an earlier run had done.
    """

    lines: int = 0
    ranked: int = 0
    rejected: int = 0
    documents: int = 0
    resumed: int = 0

    @property
    def blank(self) -> int:
        """Lines with nothing on them, which are passed over."""
        return self.lines - self.ranked - self.rejected


def partial_of(target: Path) -> Path:
    """Where the finished lines are while `target` is not complete."""
    return target.with_name(f"{target.name}.partial")


def rejects_of(target: Path) -> Path:
    """Where the lines are that could not be reranked: ``{"line": number, "error": why, "raw": the line}``."""
    return target.with_name(f"{target.name}.rejects.jsonl")


class Partial:
    """The finished lines of one run, which no other process can write meanwhile.

    Args:
        target: The output that they are to become.
        identity: What the run is made from, as JSON values.
        restart: Throw away what is there.
        patience: Seconds to wait for another process that writes it: one that was killed on another machine of a
            cluster may take a moment to end.

    Attributes:
        tally: How far the run is; at first what an earlier run of the same identity has left.

    Raises:
        ConfigError: What is there is of another identity, was changed, or another process writes it.
    """

    def __init__(self, target: Path, identity: dict[str, Any], *, restart: bool, patience: float = 0.0) -> None:
        self.tally = Tally()
        self._target, self._identity = target, identity
        self._path = partial_of(target)
        self._state = self._path.with_name(f"{self._path.name}.json")
        self._rejects_path = partial_of(rejects_of(target))
        begun = self._path.exists()
        self._ranked = self._path.open("a+b")
        try:
            self._lock(time.monotonic() + patience)
            # With some of them only, a run was killed when it had finished, between two of the last renamings.
            begun = begun and self._rejects_path.exists() and self._state.exists()
            self._rejects = self._rejects_path.open("a+b")
            if begun and not restart:
                self._resume()
            else:
                self._begin()
        except BaseException:
            self.close()
            raise

    def add(self, ranked: Sequence[bytes], rejects: Sequence[bytes], documents: int, *, lines: int) -> None:
        """Keep the results of a group, for good when this returns.

        Args:
            ranked: Lines for the output.
            rejects: Lines for the rejects.
            documents: Documents of the lines reranked.
            lines: The number of the group's last line.
        """
        for file, added in ((self._ranked, ranked), (self._rejects, rejects)):
            if added:
                file.writelines(added)
                _sync(file)
        done = self.tally
        self.tally = replace(
            done,
            lines=lines,
            ranked=done.ranked + len(ranked),
            rejected=done.rejected + len(rejects),
            documents=done.documents + documents,
        )
        sizes = {"bytes": self._ranked.tell(), "rejects_bytes": self._rejects.tell()}
        state = {"made_from": self._identity, **asdict(self.tally), **sizes}
        write_whole(self._state, json.dumps(state).encode())

    def finish(self, source: Path) -> None:
        """Put the output in its place, all at once, and the rejects, or remove those of an earlier output.

        Args:
            source: What it was made from.
        """
        self.close()
        made = self._path
        if self._target.suffix != ".jsonl":
            made = self._path.with_name(f"{self._path.name}.new")
            try:
                write_as(self._path, made, self._target.suffix, source)
                with made.open("rb+") as file:
                    _sync(file)
            except BaseException:
                made.unlink(missing_ok=True)
                raise
        if self.tally.rejected:
            self._rejects_path.replace(rejects_of(self._target))
        else:
            rejects_of(self._target).unlink(missing_ok=True)
        made.replace(self._target)
        self._remove()

    def close(self) -> None:
        """Give back the files. What is not kept for good goes when a run goes on or begins anew."""
        self._ranked.close()
        if hasattr(self, "_rejects"):
            self._rejects.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is not None and not self._state.exists():  # nothing was done: leave no empty files
            self._remove()

    def _remove(self) -> None:
        # The state first: without it, the others are thrown away by the next run, and never taken for unfinished.
        for path in (self._state, self._rejects_path, self._path):
            path.unlink(missing_ok=True)

    def _lock(self, until: float) -> None:
        """Keep other processes out until the file is closed, by whatever end of this one."""
        if not lock(self._ranked, self._path, until):
            raise ConfigError(f"{self._target} is being written by another process")

    def _begin(self) -> None:
        self._state.unlink(missing_ok=True)
        self._ranked.truncate(0)
        self._rejects.truncate(0)

    def _resume(self) -> None:
        """Go back to the last group that was kept, if it is as it was left."""
        try:
            state = json.loads(self._state.read_bytes())
            made_from, sizes = state.pop("made_from"), (state.pop("bytes"), state.pop("rejects_bytes"))
            tally = Tally(**state)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self._state} can't be read; --restart begins anew") from error
        if changed := differences(made_from, self._identity):
            raise ConfigError(f"{self._path} is of another run ({changed}); --restart throws it away")
        expected = tally.ranked, tally.rejected
        if (_lines_in(self._ranked, sizes[0]), _lines_in(self._rejects, sizes[1])) != expected:
            raise ConfigError(f"{self._path} or its rejects were changed since; --restart begins anew")
        self._ranked.truncate(sizes[0])
        self._rejects.truncate(sizes[1])
        self.tally = replace(tally, resumed=tally.lines)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a run is made from that an earlier one was not, in words; nothing where they are the same."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, and for good when this returns."""
    with (new := path.with_name(f"{path.name}.new")).open("wb") as file:
        file.write(data)
        _sync(file)
    new.replace(path)


def lock(file: IO[bytes], path: Path, until: float) -> bool:
    """Keep other processes out of a file until it is closed, by whatever end of this one.

    Args:
        file: The file.
        path: Where it is.
        until: When to give up, on the clock of `time.monotonic`.

    Returns:
        Whether it is locked. On Windows always, with nothing done.
    """
    if sys.platform == "win32":
        return True
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that finished between our opening and our locking may have renamed this very file.
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


def _lines_in(file: IO[bytes], size: int) -> int:
    """How many lines end in the first `size` bytes; -1 if there are fewer bytes."""
    file.seek(0)
    count = 0
    while size and (block := file.read(min(size, 1 << 20))):
        count += block.count(b"\n")
        size -= len(block)
    return -1 if size else count
