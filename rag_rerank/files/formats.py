"""The formats of files: JSON Lines, gzipped JSON Lines, and Parquet, where pyarrow is installed."""

import gzip
import json
import shutil
import zlib
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from rag_rerank.errors import ConfigError

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


def check_name(path: Path) -> None:
    """Refuse a file whose name has another ending, or whose format needs what is not installed, with a ConfigError."""
    if not path.name.endswith(ENDINGS):
        raise ConfigError(f"{path} must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if path.suffix == ".parquet":
        _arrow(path)


def _arrow(path: Path) -> Any:
    try:
        import_module("pyarrow.parquet")
        return import_module("pyarrow")
    except ImportError as error:
        raise ConfigError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from error


class Reader:
    """The lines of a file as bytes; a row of Parquet is the line of JSON that it would be.

    Args:
        path: Its name says the format.

    Attributes:
        share: How much of the file was read, 0 to 1.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.share = 0.0

    def __iter__(self) -> Iterator[bytes]:
        return self._rows() if self._path.suffix == ".parquet" else self._lines()

    def _lines(self) -> Iterator[bytes]:
        size = max(1, self._path.stat().st_size)
        with self._path.open("rb") as file:
            lines = cast("IO[bytes]", gzip.GzipFile(fileobj=file)) if self._path.suffix == ".gz" else file
            try:
                for line in lines:
                    self.share = file.tell() / size  # gzip: of what is packed
                    yield line
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ConfigError(f"{self._path} is damaged: {error}") from error

    def _rows(self) -> Iterator[bytes]:
        arrow = _arrow(self._path)
        try:
            with arrow.parquet.ParquetFile(self._path) as file:
                total, number = max(1, file.metadata.num_rows), 0
                for batch in file.iter_batches(batch_size=64):
                    for row in batch.to_pylist():
                        number += 1
                        self.share = number / total
                        yield encoded(row)
        except arrow.ArrowException as error:
            raise ConfigError(f"{self._path} is damaged: {error}") from error


def encoded(row: object) -> bytes:
    """`row` as a line of JSON in UTF-8. What JSON has no word for, dates from Parquet for instance, is its text."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which JSON can only escape
        return json.dumps(row, default=str).encode() + b"\n"


def write_as(lines: Path, target: Path, ending: str) -> None:
    """Write the JSON lines of one file into another in the format that `ending` names.

    Raises:
        ConfigError: Parquet has no type for a column, such as one of texts here and objects there.
    """
    if ending == ".parquet":
        _write_parquet(lines, target)
        return
    with (
        lines.open("rb") as source,
        target.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,  # the same lines make the same file
    ):
        shutil.copyfileobj(source, packed, 1 << 20)


def _write_parquet(lines: Path, target: Path) -> None:
    """In two passes: the first finds out the columns and their types, of which any line may have more."""
    arrow = _arrow(target)
    try:
        schema = arrow.schema([])
        for table in _tables(arrow, lines, None):
            schema = arrow.unify_schemas([schema, table.schema], promote_options="permissive")
        with arrow.parquet.ParquetWriter(target, schema) as writer:
            for table in _tables(arrow, lines, schema):
                writer.write_table(table)
    except arrow.ArrowException as error:
        raise ConfigError(f"{target.name}: no Parquet of these lines: {error}. Name a .jsonl file instead") from error


def _tables(arrow: Any, lines: Path, schema: Any) -> Iterator[Any]:
    with lines.open("rb") as file:
        while rows := [json.loads(line) for line in islice(file, 256)]:
            names = schema.names if schema is not None else dict.fromkeys(name for row in rows for name in row)
            yield arrow.Table.from_pydict({name: [row.get(name) for row in rows] for name in names}, schema=schema)
