"""What collections need of files: which of several layouts is there, and the place of every row for errors."""

import json
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rag_rerank.errors import ConfigError
from rag_rerank.files.formats import Reader


def find(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Find the files that match the first of `patterns` which any file matches; a ConfigError where none does."""
    for pattern in patterns:
        if paths := sorted(folder.glob(pattern)):
            return paths
    raise ConfigError(f"{folder / patterns[0]} can't be read: no such file (nor any of {', '.join(patterns[1:])})")


def lines(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yield (place, line) of every line that is not blank; a ConfigError where `path` can't be read.

    Of Parquet, each row is the line of JSON that it would be, of `columns` only: embeddings, say, may be beside them.
    """
    kind = "row" if path.suffix == ".parquet" else "line"
    try:
        for number, line in enumerate(Reader(path, columns=columns), 1):
            text = (line.removeprefix(BOM_UTF8) if number == 1 else line).decode().rstrip("\r\n")
            if text.strip():
                yield f"{path}, {kind} {number}", text
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} can't be read: it is not UTF-8 ({error})") from error
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from error


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of every row of a JSON Lines or Parquet file; see `lines`."""
    for place, line in lines(path, columns):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{place}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{place}: not an object with {' and '.join(columns)}")
        yield place, row
