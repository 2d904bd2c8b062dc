"""The files that collections come in: JSON Lines, lines of text, either gzipped, and Parquet; every row with its place.

All are read as streams: what a caller does not keep takes no memory.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from rag_rerank.errors import ConfigError
from rag_rerank.files.formats import import_arrow


def find(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files that the first pattern matches which matches any.

    Args:
        folder: Where to look.
        patterns: Names or globs below it, the usual one first.

    Raises:
        ConfigError: None matches.
    """
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found
    others = ", ".join(patterns[1:])
    raise ConfigError(f"{folder / patterns[0]} can't be read: no such file (nor any of {others})")


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of every line of a text file that is not blank; gzipped if its name ends in ``.gz``.

    Raises:
        ConfigError: It can't be read, or is not UTF-8.
    """
    try:
        # Lines end in \n only: JSON may hold U+2028 and others at which str.splitlines would cut.
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} can't be read: it is not UTF-8 ({error})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8-sig", newline="\n"))
    return path.open(encoding="utf-8-sig", newline="\n")


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row of a JSON Lines or Parquet file.

    Args:
        path: Parquet if its name ends in ``.parquet``, else JSON Lines, perhaps gzipped.
        columns: What is wanted. Other columns of Parquet (embeddings, say) are not read.

    Raises:
        ConfigError: It can't be read, or a line is no JSON object; for Parquet, pyarrow is not installed.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    for place, line in lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{place}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{place}: not an object with {' and '.join(columns)}")
        yield place, row


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    arrow = import_arrow(path)
    try:
        with arrow.parquet.ParquetFile(path) as file:
            number = 0
            wanted = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (OSError, arrow.ArrowException) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error
