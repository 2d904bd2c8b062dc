"""What a run over a folder is made from and how far it is, on the disk: where each file of it is, and whose it is."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rag_rerank.errors import ConfigError
from rag_rerank.files import Tally
from rag_rerank.files.partial import differences, lock, write_whole
from rag_rerank.files.run import identity_of
from rag_rerank.ray_data.units import Unit


def rejects_in(target: Path) -> Path:
    """The folder of the lines that can't be scored: ``{"line": number, "error": why, "raw": the line}``.

    A file for each unit that has any. Its name begins with ``_``, as does that of the run's own folder: Arrow, Spark
    and Ray Data pass them over where they read the output.
    """
    return target / "_rejects"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the files of a run are.

    Attributes:
        source: The folder of the input.
        target: The folder of the output.
    """

    source: Path
    target: Path

    @property
    def own(self) -> Path:
        """The folder that the run keeps for itself."""
        return self.target / "_rag_rerank"

    def output(self, unit: Unit) -> Path:
        """The output of a unit; it is there when the unit is finished, and complete."""
        return self.target / unit.target

    def rejects(self, unit: Unit) -> Path:
        """The rejects of a unit, if it has any."""
        return rejects_in(self.target) / f"{unit.target}.jsonl"

    def work(self, unit: Unit) -> Path:
        """What becomes the output of a unit, when it is complete."""
        return self.own / "work" / unit.target

    def began(self, unit: Unit) -> Path:
        """How many lines of a unit were finished when an actor last began with it, and how many had died there."""
        return self.own / "began" / f"{unit.target}.json"

    def tally(self, unit: Unit) -> Path:
        """How far a unit is."""
        return self.own / "tallies" / f"{unit.target}.json"

    def tally_of(self, unit: Unit) -> Tally:
        """How far a unit is, as it was written."""
        path = self.tally(unit)
        try:
            return Tally(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path} can't be read; --restart begins anew") from error

    def write_tally(self, unit: Unit, tally: Tally) -> None:
        """Say how far a unit is."""
        write_whole(self.tally(unit), json.dumps(asdict(tally)).encode())


class Record:
    """What one run is made from; no other run can write its folder meanwhile.

    Args:
        target: The folder of the output; it is made if need be.
        folder: The folder of the input.
        sources: The input's files, below that.
        identity: What else the run is made from, as JSON values.
        restart: Throw away what an earlier run has left or made.

    Attributes:
        layout: Where everything is.

    Raises:
        ConfigError: The folder holds something else, or what is there is of another run, or another run writes it.
    """

    def __init__(
        self, target: Path, folder: Path, sources: list[str], identity: dict[str, Any], *, restart: bool
    ) -> None:
        self.layout = Layout(folder, target)
        self._identity, self._sources = identity, sources
        self._restart = restart
        self._path = self.layout.own / "run.json"

    def __enter__(self) -> Self:
        layout = self.layout
        target = layout.target
        if not target.parent.is_dir():
            raise ConfigError(f"there is no folder {target.parent}")
        if target.exists() and not target.is_dir():
            raise ConfigError(f"{target} is a file; with several actors, the output is a folder")
        if target.is_dir() and not layout.own.is_dir() and any(target.iterdir()):
            raise ConfigError(f"{target} holds other files; name a folder that is new or empty")
        layout.own.mkdir(parents=True, exist_ok=True)
        self._lock = (layout.own / "lock").open("ab")
        if not lock(self._lock, layout.own / "lock", until=0.0):
            self._lock.close()
            raise ConfigError(f"{target} is being written by another run")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def units(self, cut: Callable[[], list[Unit]]) -> list[Unit]:
        """The units of this run: those that were written down, or new ones.

        Raises:
            ConfigError: What was written down is of another run, or can't be read.
        """
        if self._restart:
            self._remove()
        before = self._read()
        inputs = self._inputs()
        if before is None:
            units = cut()
            record = {"made_from": self._identity, "inputs": inputs, "units": [unit.as_text() for unit in units]}
            write_whole(self._path, json.dumps(record).encode())
            return units
        if changed := differences(before["made_from"], self._identity):
            raise ConfigError(f"{self.layout.target} is of another run ({changed}); --restart throws it away")
        self._compare(before["inputs"], inputs)
        shutil.rmtree(self.layout.own / "began", ignore_errors=True)
        return [Unit.from_text(text) for text in before["units"]]

    def finish(self) -> None:
        """Check that the input is what it was, and remove what only an unfinished run needs."""
        before = self._read()
        self._compare(before["inputs"] if before else {}, self._inputs())
        for name in ("work", "began"):
            shutil.rmtree(self.layout.own / name, ignore_errors=True)

    def _inputs(self) -> dict[str, Any]:
        return {source: identity_of(self.layout.source / source) for source in self._sources}

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for name in before | now:
            if before.get(name) != now.get(name):
                what = "is new" if name not in before else "is gone" if name not in now else "was changed"
                raise ConfigError(
                    f"{self.layout.source / name} {what} since this run began; --restart begins anew, another --out "
                    "keeps what there is"
                )

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._path.read_bytes())
            return {name: found[name] for name in ("made_from", "inputs", "units")}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self._path} can't be read; name another folder") from error

    def _remove(self) -> None:
        """Remove all that the run has written, and nothing else."""
        before = self._read()
        for text in before["units"] if before else ():
            unit = Unit.from_text(text)
            self.layout.output(unit).unlink(missing_ok=True)
            self.layout.rejects(unit).unlink(missing_ok=True)
        for name in ("work", "began", "tallies"):
            shutil.rmtree(self.layout.own / name, ignore_errors=True)
        self._path.unlink(missing_ok=True)
