"""The input cut into shards, and where the files of a run are in the folder of its output."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from rag_rerank.errors import ConfigError
from rag_rerank.files import Tally
from rag_rerank.files.formats import ENDINGS, Part, check_name, count_rows
from rag_rerank.files.partial import START_OVER, lock, refuse_changes, write_whole
from rag_rerank.files.run import input_facts
from rag_rerank.identity import Identity


@dataclass(frozen=True, slots=True)
class Shard:
    """Lines of one file, by its path below the folder of the input; one actor scores them into a file of their own."""

    source: str
    part: Part

    @property
    def name(self) -> str:
        """The path of its output below the folder of the output: that of the file, with the first line's number."""
        path = Path(self.source)
        ending = next(ending for ending in ENDINGS if path.name.endswith(ending))
        return path.with_name(f"{path.name.removesuffix(ending)}-{self.part.first:012}{ending}").as_posix()


def rejects_in(target: Path) -> Path:
    """Name the folder of the lines that can't be scored: ``{"line": number, "error": why, "raw": the line}``.

    It has a file for each shard that has any. Its name begins with ``_``, as does that of the run's own folder: Arrow,
    Spark and Ray Data skip them when they read the output.
    """
    return target / "_rejects"


class Folders:
    """Where the files of a run are, from the folder of the input and that of the output."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self.own = target / "_rag_rerank"  # the run keeps it for itself
        self.scorer = self.own / "scorer.json"  # who the scorer is: the first actor writes it, all others compare

    def output(self, shard: Shard) -> Path:
        """Name the output of a shard; it exists when the shard is finished, and is complete."""
        return self.target / shard.name

    def rejects(self, shard: Shard) -> Path:
        """Name the rejects of a shard, if it has any."""
        return rejects_in(self.target) / f"{shard.name}.jsonl"

    def progress(self, shard: Shard) -> Path:
        """Name the file that says how far a shard is, and how many actors have died at it."""
        return self.own / "progress" / f"{shard.name}.json"

    def tally(self, shard: Shard) -> Tally:
        """Read how far a shard is."""
        path = self.progress(shard)
        try:
            return Tally(**json.loads(path.read_bytes())["tally"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} can't be read; {START_OVER}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder of the output, if it can be used, and keep other runs out of it."""
        target = self.target
        if not target.parent.is_dir():
            raise ConfigError(f"there is no folder {target.parent}")
        if target.exists() and not target.is_dir():
            raise ConfigError(f"{target} is a file; with several actors, the output is a folder")
        if target.is_dir() and not self.own.is_dir() and any(target.iterdir()):
            raise ConfigError(f"{target} holds other files; name a folder that is new or empty")
        self.own.mkdir(parents=True, exist_ok=True)
        with (self.own / "lock").open("ab") as file:
            if not lock(file, self.own / "lock", until=0.0):
                raise ConfigError(f"{target} is being written by another run")
            yield

    def begin(self, sources: list[str], options: Mapping[str, str], shard_lines: int, *, restart: bool) -> list[Shard]:
        """Find the shards of this run: those that an earlier run of the same wrote down, or new ones."""
        path, facts = self.own / "run.json", self._facts(sources, options)
        shards, begun = [], None
        try:
            if path.exists():
                before = json.loads(path.read_bytes())
                shards = [Shard(source, Part(**part)) for source, part in before["shards"]]
                begun = Identity(dict(before["facts"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} can't be read; name another folder") from error
        if begun is not None and not restart:
            refuse_changes(self.target, begun, Identity(facts))
            return shards
        for shard in shards:
            self.output(shard).unlink(missing_ok=True)
            self.rejects(shard).unlink(missing_ok=True)
        for name in ("work", "progress"):
            shutil.rmtree(self.own / name, ignore_errors=True)
        # When there is no output left that could be taken for one of another scorer.
        self.scorer.unlink(missing_ok=True)
        shards = cut(self.source, sources, shard_lines)
        record = {"facts": facts, "shards": [(shard.source, asdict(shard.part)) for shard in shards]}
        write_whole(path, json.dumps(record).encode())
        return shards

    def finish(self, sources: list[str], options: Mapping[str, str]) -> None:
        """Check that the input is what it was, and remove what only an unfinished run needs."""
        begun = json.loads((self.own / "run.json").read_bytes())
        refuse_changes(self.target, Identity(begun["facts"]), Identity(self._facts(sources, options)))
        shutil.rmtree(self.own / "work", ignore_errors=True)

    def _facts(self, sources: list[str], options: Mapping[str, str]) -> dict[str, str]:
        files = {source: input_facts(self.source / source) for source in sources}
        return dict(options) | {name: f"{facts['size']} bytes of {facts['mtime']}" for name, facts in files.items()}


def sources_in(source: Path) -> tuple[Path, list[str]]:
    """Find the folder of the input, and the paths of its files below it, in the order of their names.

    Names that begin with ``_`` or ``.`` are skipped, as by Spark and Arrow.
    """
    if source.is_file():
        check_name(source)
        return source.parent, [source.name]
    if not source.is_dir():
        raise ConfigError(f"there is no file or folder {source}")
    found = []
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if path.name.endswith(ENDINGS) and path.is_file() and not any(part[0] in "_." for part in inside.parts):
            check_name(path)
            found.append(inside.as_posix())
    if not found:
        raise ConfigError(f"{source} has no files that end in {', '.join(ENDINGS)}")
    return source, found


def cut(folder: Path, sources: list[str], lines: int) -> list[Shard]:
    """Cut files into shards of so many lines; a gzipped file is one, since it can't be read from its middle."""
    return [Shard(source, part) for source in sources for part in _parts(folder / source, lines)]


def _parts(path: Path, lines: int) -> Iterator[Part]:
    if path.suffix == ".gz":
        yield Part()
    elif path.suffix == ".parquet":
        rows = count_rows(path)
        yield from (Part(first, min(lines, rows - first)) for first in range(0, rows, lines))
    else:
        first = offset = 0
        with path.open("rb") as file:  # it is read once, to find where each part begins
            while sizes := list(map(len, islice(file, lines))):
                yield Part(first, len(sizes), offset)
                first, offset = first + len(sizes), offset + sum(sizes)
