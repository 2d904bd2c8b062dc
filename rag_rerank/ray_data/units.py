"""The input cut into units: lines that one actor scores in one go, into a file of their own."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rag_rerank.errors import ConfigError
from rag_rerank.files.formats import ENDINGS, Part, check_name, rows_of


@dataclass(frozen=True, slots=True)
class Unit:
    """Lines of one file.

    Attributes:
        source: The file, as its path below the folder of the input.
        part: Which lines of it.
    """

    source: str
    part: Part

    @property
    def target(self) -> str:
        """The path of its output below the folder of the output: that of the file, with the first line's number."""
        path = Path(self.source)
        ending = ending_of(path)
        name = f"{path.name.removesuffix(ending)}-{self.part.first:012}{ending}"
        return path.with_name(name).as_posix()

    def as_text(self) -> str:
        """What `from_text` reads."""
        return json.dumps([self.source, self.part.first, self.part.lines, self.part.offset])

    @classmethod
    def from_text(cls, text: str) -> "Unit":
        """The unit that `as_text` has written."""
        source, *part = json.loads(text)
        return cls(source, Part(*part))


def ending_of(path: Path) -> str:
    """Which of the endings that can be read a file has."""
    return next(ending for ending in ENDINGS if path.name.endswith(ending))


def sources_in(source: Path) -> tuple[Path, list[str]]:
    """The folder of the input, and the paths of its files below it, in the order of their names.

    Args:
        source: A file, or a folder with files, also in folders inside. Names that begin with ``_`` or ``.`` are passed
            over, as by Spark and Arrow.

    Raises:
        ConfigError: There is nothing to read.
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


def cut(folder: Path, sources: list[str], lines: int) -> list[Unit]:
    """All lines of the files, each in one unit.

    Args:
        folder: Where the files are.
        sources: The paths of the files below it.
        lines: Lines of a unit; the last of a file may have fewer. A file packed by gzip is one unit, however long:
            nobody can begin in its middle.

    Raises:
        ConfigError: A file is damaged.
    """
    return [Unit(source, part) for source in sources for part in _parts(folder / source, lines)]


def _parts(path: Path, lines: int) -> Iterator[Part]:
    if path.suffix == ".gz":
        yield Part()
    elif path.suffix == ".parquet":
        rows = rows_of(path)
        yield from (Part(first, min(lines, rows - first)) for first in range(0, rows, lines))
    else:
        yield from _line_parts(path, lines)


def _line_parts(path: Path, lines: int) -> Iterator[Part]:
    """Where every so manieth line begins: the file is read once through, in blocks."""
    number = first = offset = position = 0
    ended = True
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            here, left = 0, block.count(b"\n")
            while number + left >= first + lines:
                for _ in range(wanted := first + lines - number):
                    here = block.index(b"\n", here) + 1
                yield Part(first, lines, offset)
                number, left = number + wanted, left - wanted
                first, offset = number, position + here
            number += left
            position += len(block)
            ended = block.endswith(b"\n")
    number += not ended
    if number > first:
        yield Part(first, number - first, offset)
