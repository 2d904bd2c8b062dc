"""The formats of files: JSON Lines, gzipped JSON Lines, and Parquet, where pyarrow is installed."""

import gzip
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
        import_arrow(path)


def import_arrow(path: Path) -> Any:
    """pyarrow, which reads and writes `path`; a ConfigError where it is not installed."""
    try:
        import_module("pyarrow.parquet")
        return import_module("pyarrow")
    except ImportError as error:
        raise ConfigError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from error


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the lines of a file, one behind the other.

    Attributes:
        first: How many come before them.
        lines: How many they are; None: all that follow.
        offset: How many bytes come before them, where that is known; 0 has them read. Without meaning for Parquet.
    """

    first: int = 0
    lines: int | None = None
    offset: int = 0

    @property
    def end(self) -> int | None:
        """How many lines there are up to their end, for slices."""
        return None if self.lines is None else self.first + self.lines


WHOLE = Part()


class Reader:
    """The lines of a file as bytes; a row of Parquet is the line of JSON that it would be.

    Args:
        path: Its name says the format.
        part: Which of its lines.
        columns: The only columns of Parquet to read; None reads all.

    Attributes:
        share: How much of the file was read, 0 to 1; of a part, how much of the file up to where it is.
    """

    def __init__(self, path: Path, part: Part = WHOLE, *, columns: Sequence[str] | None = None) -> None:
        self._path, self._part, self._columns = path, part, columns
        self.share = 0.0

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
                    self.share = file.tell() / size  # gzip: of what is packed
                    yield line
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ConfigError(f"{self._path} is damaged: {error}") from error

    def _rows(self) -> Iterator[bytes]:
        arrow = import_arrow(self._path)
        try:
            with arrow.parquet.ParquetFile(self._path) as file:
                total = max(1, file.metadata.num_rows)
                number, groups = _row_groups(file.metadata, self._part)
                for batch in file.iter_batches(batch_size=64, row_groups=groups, columns=self._columns):
                    # What the part leaves out is not made into objects.
                    skipped = min(len(batch), max(0, self._part.first - number))
                    left = len(batch) if self._part.end is None else max(0, self._part.end - number)
                    number += skipped
                    for row in batch.slice(skipped, left - skipped).to_pylist():
                        number += 1
                        self.share = number / total
                        yield encoded(row)
                    if left < len(batch):
                        return
        except arrow.ArrowException as error:
            raise ConfigError(f"{self._path} is damaged: {error}") from error


def _row_groups(metadata: Any, part: Part) -> tuple[int, list[int]]:
    """How many rows come before the first row group that a part has rows of, and all such groups."""
    groups: list[int] = []
    before = number = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if number + rows > part.first and (part.end is None or number < part.end):
            groups.append(group)
        elif not groups:
            before += rows
        number += rows
    return before, groups


def rows_of(path: Path) -> int:
    """How many rows a Parquet file has."""
    arrow = import_arrow(path)
    try:
        return int(arrow.parquet.read_metadata(path).num_rows)
    except arrow.ArrowException as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


def encoded(row: object) -> bytes:
    """`row` as a line of JSON in UTF-8. What JSON has no word for, dates from Parquet for instance, is its text."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which JSON can only escape
        return json.dumps(row, default=str).encode() + b"\n"


def write_as(lines: Path, target: Path, ending: str, source: Path) -> None:
    """Write the JSON lines of one file into another in the format that `ending` names.

    Args:
        lines: The JSON lines.
        target: What to write.
        ending: ``".parquet"``, else it is packed by gzip.
        source: What the lines were made from: from Parquet to Parquet, columns keep their types, those that JSON has.

    Raises:
        ConfigError: Parquet has no type for a column, such as one of texts here and objects there.
    """
    if ending == ".parquet":
        _write_parquet(lines, target, source)
        return
    with (
        lines.open("rb") as unpacked,
        target.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,  # the same lines make the same file
    ):
        shutil.copyfileobj(unpacked, packed, 1 << 20)


def _write_parquet(lines: Path, target: Path, source: Path) -> None:
    """In two passes: the first finds out the columns and their types, of which any line may have more."""
    arrow = import_arrow(target)
    try:
        known = _kept_types(arrow, source)
        schema = arrow.schema(list(known.items()))
        for table in _tables(arrow, lines, known):
            schema = arrow.unify_schemas([schema, table.schema], promote_options="permissive")
        with arrow.parquet.ParquetWriter(target, schema) as writer:
            for table in _tables(arrow, lines, dict(zip(schema.names, schema.types, strict=True))):
                writer.write_table(table.select(schema.names))
    except arrow.ArrowException as error:
        raise ConfigError(f"{target.name}: no Parquet of these lines: {error}. Name a .jsonl file instead") from error


def _kept_types(arrow: Any, source: Path) -> dict[str, Any]:
    """The types of a Parquet file's columns whose values are the same after JSON, and of what is added to them.

    Files made from parts of one file have the same columns then, also where a part has nothing but nulls in one.
    """
    if source.suffix != ".parquet":
        return {}
    schema = arrow.parquet.read_schema(source)
    kept = {field.name: field.type for field in schema if _is_json(arrow.types, field.type)}
    if "documents" in schema.names:
        return kept | {"ranked": arrow.list_(arrow.struct({"index": arrow.int64(), "score": arrow.float64()}))}
    return kept | {"score": arrow.float64()}


def _is_json(types: Any, kind: Any) -> bool:
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_json(types, kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(types, field.type) for field in kind)
    tests = "is_boolean", "is_integer", "is_float32", "is_float64", "is_string", "is_large_string"
    return any(getattr(types, test)(kind) for test in tests)


def _tables(arrow: Any, lines: Path, types: Mapping[str, Any]) -> Iterator[Any]:
    """The lines as tables of about 4 MB, with these columns, and those that they have beside them."""
    with lines.open("rb") as file:
        while some := file.readlines(4 << 20):
            rows = [json.loads(line) for line in some]
            names = dict.fromkeys([*types, *(name for row in rows for name in row)])
            yield arrow.Table.from_arrays(
                [arrow.array([row.get(name) for row in rows], type=types.get(name)) for name in names],
                names=list(names),
            )
