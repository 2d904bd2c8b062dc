"""The input, one file or a folder of them, cut into shards."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rag_rerank.errors import ConfigError
from rag_rerank.files.formats import ENDINGS, Part, check_name, count_rows


class Shard(NamedTuple):
    """Lines of one file, which one actor scores into a file of their own."""

    source: Path
    part: Part
    name: str  # the path of their output below the folder of the output: the file's, with the first line's number


def files_in(source: Path) -> dict[str, Path]:
    """Find the files of the input, by their paths below its folder, in the order of these.

    Names that begin with ``_`` or ``.`` are skipped, as by Spark and Arrow.
    """
    if not source.exists():
        raise ConfigError(f"there is no file or folder {source}")
    found = {source.name: source.absolute()} if source.is_file() else {}
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if path.name.endswith(ENDINGS) and path.is_file() and not any(part[0] in "_." for part in inside.parts):
            found[inside.as_posix()] = path.absolute()
    if not found:
        raise ConfigError(f"{source} has no files that end in {', '.join(ENDINGS)}")
    for path in found.values():
        check_name(path)
    return found


def cut(files: Mapping[str, Path], lines: int) -> list[Shard]:
    """Cut files into shards of so many lines; a gzipped file is one, since it can't be read from its middle."""
    return [Shard(path, part, _name(name, part)) for name, path in files.items() for part in _parts(path, lines)]


def _name(file: str, part: Part) -> str:
    ending = next(ending for ending in ENDINGS if file.endswith(ending))
    return f"{file.removesuffix(ending)}-{part.first:012}{ending}"


def _parts(path: Path, lines: int) -> Iterator[Part]:
    if path.suffix == ".gz":
        yield Part()
    elif path.suffix == ".parquet":
        rows = count_rows(path)
        yield from (Part(first, min(lines, rows - first)) for first in range(0, rows, lines))
    else:
        first = offset = 0
        with path.open("rb") as file:  # read once, to find where each part begins
            while sizes := list(map(len, islice(file, lines))):
                yield Part(first, len(sizes), offset)
                first, offset = first + len(sizes), offset + sum(sizes)
