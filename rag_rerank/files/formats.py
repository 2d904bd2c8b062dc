"""The formats of files: JSON Lines, gzipped JSON Lines, and Parquet, where pyarrow is installed."""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from rag_rerank.errors import ConfigError

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
_BLOCK = 4 << 20  # bytes of lines that are made into one Parquet row group


def check_name(path: Path) -> None:
    """Refuse a file with another ending, or of a format that needs what is not installed."""
    if not path.name.endswith(ENDINGS):
        raise ConfigError(f"{path} must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if path.suffix == ".parquet":
        import_arrow(path)


def check_targets(*paths: Path | None) -> None:
    """Refuse, before hours of scoring, files that could not be written after them."""
    named = list(filter(None, paths))
    if len(set(map(Path.resolve, named))) < len(named):
        raise ConfigError(f"of {', '.join(map(str, named))}, one would replace the other; give each a name of its own")
    for path in named:
        folder = path.resolve().parent
        if path.is_dir() or not folder.is_dir():
            raise ConfigError(f"{path} can't be written: {'it is a' if path.is_dir() else 'there is no such'} folder")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise ConfigError(f"{path} can't be written: permission denied")


def import_arrow(path: Path) -> Any:
    """Import pyarrow, which reads and writes `path`; a ConfigError where it is not installed."""
    try:
        import_module("pyarrow.parquet")
        return import_module("pyarrow")
    except ImportError as error:
        raise ConfigError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from error


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive lines of a file."""

    first: int = 0  # how many lines come before them
    lines: int | None = None  # how many they are; None: all that follow
    offset: int = 0  # how many bytes come before them; 0: unknown, so that the lines before are read. Not for Parquet


WHOLE = Part()


class Reader:
    """The lines of a file as bytes; a row of Parquet becomes the line of JSON that it would be.

    Of Parquet, only these columns are read; None reads all.
    """

    def __init__(self, path: Path, part: Part = WHOLE, *, columns: Sequence[str] | None = None) -> None:
        self._path, self._part, self._columns = path, part, columns
        self.fraction = 0.0  # how much of the file was read, 0 to 1; of a part, up to where it is in the file

    def __iter__(self) -> Iterator[bytes]:
        return self._rows() if self._path.suffix == ".parquet" else self._lines()

    def _lines(self) -> Iterator[bytes]:
        size = max(1, self._path.stat().st_size)
        with self._path.open("rb") as file:
            lines = cast("IO[bytes]", gzip.GzipFile(fileobj=file)) if self._path.suffix == ".gz" else file
            first, count = self._part.first, self._part.lines
            try:
                if self._part.offset:
                    lines.seek(self._part.offset)
                    first = 0
                for line in islice(lines, first, None if count is None else first + count):
                    self.fraction = file.tell() / size  # gzip: of the compressed bytes
                    yield line
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ConfigError(f"{self._path} is damaged: {error}") from error

    def _rows(self) -> Iterator[bytes]:
        arrow = import_arrow(self._path)
        part = self._part
        try:
            with arrow.parquet.ParquetFile(self._path) as file:
                total = file.metadata.num_rows
                end = total if part.lines is None else min(total, part.first + part.lines)
                number = 0
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    if number + rows <= part.first or number >= end:
                        number += rows
                        continue
                    for batch in file.iter_batches(64, row_groups=[group], columns=self._columns):
                        skipped = min(len(batch), max(0, part.first - number))
                        # Rows outside of the part are not made into Python objects.
                        wanted = batch.slice(skipped, max(0, end - number - skipped))
                        for position, row in enumerate(wanted.to_pylist(), number + skipped + 1):
                            self.fraction = position / total
                            yield encode(row)
                        number += len(batch)
        except arrow.ArrowException as error:
            raise ConfigError(f"{self._path} is damaged: {error}") from error


def count_rows(path: Path) -> int:
    """Count the rows of a Parquet file."""
    arrow = import_arrow(path)
    try:
        return int(arrow.parquet.read_metadata(path).num_rows)
    except arrow.ArrowException as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


def encode(row: object) -> bytes:
    """Write `row` as a line of JSON in UTF-8. Values that JSON lacks, such as dates from Parquet, become text."""
    try:
        return json.dumps(row, ensure_ascii=False, default=_text).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which JSON can only escape
        return json.dumps(row, default=_text).encode() + b"\n"


def _text(value: object) -> str:
    # Some writers write texts as bytes; what is no UTF-8 in them becomes U+FFFD, as half a character does.
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def compress(lines: Iterable[bytes], file: IO[bytes]) -> None:
    """Write lines to a file, gzipped; the same lines make the same bytes."""
    with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
        packed.writelines(lines)


class Columns:
    """The columns of a Parquet file, found out from its lines before it is written.

    From Parquet to Parquet, columns keep those types that JSON has, too.
    """

    def __init__(self, target: Path, source: Path) -> None:
        self._arrow, self._target = import_arrow(target), target
        self._errors = self._arrow.ArrowException, OverflowError, UnicodeError
        self._kept = _kept_types(self._arrow, source)
        self._schema = self._arrow.schema(list(self._kept.items()))

    def add(self, lines: Iterable[bytes]) -> None:
        """Take the columns of more lines; a ConfigError where Parquet has no type for one."""
        try:
            for block in _blocks(lines):
                schemas = [self._schema, self._table(block, self._kept).schema]
                self._schema = self._arrow.unify_schemas(schemas, promote_options="permissive")
            # The writer alone knows what has a schema and can't be written: objects that have no fields.
            self._arrow.parquet.write_table(self._schema.empty_table(), io.BytesIO())
        except self._errors as error:
            raise self._refusal(error) from error

    def write(self, lines: Iterable[bytes], file: IO[bytes]) -> None:
        """Write lines, all of which were added, as Parquet."""
        types = dict(zip(self._schema.names, self._schema.types, strict=True))
        try:
            with self._arrow.parquet.ParquetWriter(file, self._schema) as writer:
                for block in _blocks(lines):
                    writer.write_table(self._table(block, types).select(self._schema.names))
        except self._errors as error:
            raise self._refusal(error) from error

    def _table(self, lines: Iterable[bytes], types: Mapping[str, Any]) -> Any:
        rows = [json.loads(line) for line in lines]
        columns = {}
        for name in dict.fromkeys([*types, *(name for row in rows for name in row)]):
            try:
                columns[name] = self._arrow.array([row.get(name) for row in rows], type=types.get(name))
            except self._errors as error:
                raise self._refusal(f"column {name}: {error}") from error
        return self._arrow.table(columns)

    def _refusal(self, error: object) -> ConfigError:
        return ConfigError(f"{self._target.name}: no Parquet of these lines: {error}. Name a .jsonl file instead")


def _blocks(lines: Iterable[bytes]) -> Iterator[list[bytes]]:
    block, size = list[bytes](), 0
    for line in lines:
        block.append(line)
        size += len(line)
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _kept_types(arrow: Any, source: Path) -> dict[str, Any]:
    """Find the types of a Parquet file's columns that JSON has, too, and of the columns that are added."""
    # Files made from parts of one file then have the same columns, also where a part has only nulls in one.
    if source.suffix != ".parquet":
        return {}
    schema = arrow.parquet.read_schema(source)
    kept = {field.name: field.type for field in schema if _is_json(arrow.types, field.type)}
    return kept | dict([added_column(arrow, pairs="documents" not in schema.names)])


def added_column(arrow: Any, *, pairs: bool) -> tuple[str, Any]:
    """Give the name and the type of the column that a result adds."""
    item = arrow.struct({"index": arrow.int64(), "score": arrow.float64()})
    return ("score", arrow.float64()) if pairs else ("ranked", arrow.list_(item))


def _is_json(types: Any, kind: Any) -> bool:
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_json(types, kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(types, field.type) for field in kind)
    tests = "is_boolean", "is_integer", "is_float32", "is_float64", "is_string", "is_large_string"
    return any(getattr(types, test)(kind) for test in tests)
