"""Judgments and runs, in the layouts of BEIR and TREC; and the place of every line for errors."""

import gzip
import json
import math
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rag_rerank.errors import ConfigError
from rag_rerank.files.formats import Reader

_HUGE = 1e38  # single precision ends at 3.4e38
_COLUMNS = {"query-id": str | int, "corpus-id": str | int, "score": str | int | float}


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


def rows(path: Path, columns: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Yield the place and `columns` of every row of a JSON Lines or Parquet file, with values of these types."""
    for place, line in lines(path, list(columns)):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{place}: not JSON ({error})") from error
        values = [row.get(name) for name in columns] if isinstance(row, dict) else []
        if not (values and all(map(isinstance, values, columns.values()))):
            told = ", ".join(f"{name} ({getattr(kind, '__name__', kind)})" for name, kind in columns.items())
            raise ConfigError(f"{place}: not an object with {told}")
        yield place, *values


def read_judgments(*paths: str | Path) -> dict[str, dict[str, int]]:
    """Read judgments ("qrels"): query id to document id to grade.

    The files have three columns with tabs between and a header (BEIR), four with spaces between (TREC: query, 0,
    document, grade), or ``query-id``, ``corpus-id`` and ``score`` as JSON Lines or Parquet; text may be gzipped. A
    ConfigError has the number of a line that is not as it should be or contradicts another one.
    """
    return graded(judged for path in paths for judged in _judgments(Path(path)))


def graded(judged: Iterable[tuple[Any, ...]]) -> dict[str, dict[str, int]]:
    """Collect grades from (place, query, document, grade); a ConfigError for one that contradicts another."""
    judgments: dict[str, dict[str, int]] = {}
    for place, query, document, value in judged:
        try:
            grade = float(value)
        except ValueError as error:
            raise ConfigError(f"{place}: not query, document and grade ({error})") from error
        if not grade.is_integer():
            raise ConfigError(f"{place}: the grade {value} is no whole number, which the measures need")
        if judgments.setdefault(query, {}).setdefault(document, int(grade)) != grade:
            raise ConfigError(f"{place}: the document {document!r} has another grade for {query!r} further up")
    return judgments


def _judgments(path: Path) -> Iterator[tuple[str, str, str, Any]]:
    if path.suffix == ".parquet" or path.name.removesuffix(".gz").endswith(".jsonl"):
        for place, query, document, grade in rows(path, _COLUMNS):
            yield place, str(query), str(document), grade
        return
    for position, (place, line) in enumerate(lines(path)):
        fields = line.split("\t" if line.count("\t") == 2 else None)
        if position == 0 and len(fields) == 3 and not any(map(str.isdigit, fields[-1])):
            continue  # BEIR's header
        if len(fields) not in (3, 4):
            raise ConfigError(f"{place}: not query, document and grade ({len(fields)} columns)")
        yield place, fields[0], fields[-2], fields[-1]


def read_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Read a retriever's run: query id to document id to score, best first.

    Lines are query, ``Q0``, document, rank, score and tag; perhaps gzipped. As in trec_eval, the score alone decides
    the order, and the greater document id goes first where scores are equal. A ConfigError has the number of a line
    that is not as it should be or repeats a document.
    """
    run: dict[str, dict[str, float]] = {}
    for place, line in lines(Path(path)):
        try:
            query, _, document, _, score_text, _ = line.split(maxsplit=5)
            score = float(score_text)
        except ValueError as error:
            raise ConfigError(f"{place}: not query, Q0, document, rank, score and tag ({error})") from error
        if not math.isfinite(score):
            raise ConfigError(f"{place}: the score is {score_text}")
        if document in run.setdefault(query, {}):
            raise ConfigError(f"{place}: the document {document!r} is there twice for {query!r}")
        run[query][document] = score
    return {query: best_first(scores) for query, scores in run.items()}


def best_first(scores: Mapping[str, float]) -> dict[str, float]:
    """Order `scores` as trec_eval: by score, equal ones by document id, the greater first."""
    return dict(sorted(sorted(scores.items(), reverse=True), key=lambda item: -item[1]))


def write_run(
    path: str | Path, rankings: Mapping[str, Sequence[tuple[str, float | None]]], *, tag: str = "rag_rerank"
) -> None:
    """Write rankings so that trec_eval, which looks at scores only, finds the documents in this very order.

    Args:
        path: Gzipped if it ends in ``.gz``; a ConfigError if it can't be written, or an id has a space in it.
        rankings: Query id to (document id, score), best first. Scores are written in single precision, which is what
            trec_eval reads; one that is no smaller than the one before becomes the next smaller number, and documents
            without a score follow in steps of 1.
        tag: The last column, the system's name.
    """
    path, tag = Path(path), "_".join(tag.split()) or "-"
    zipped = path.suffix == ".gz"
    try:
        with gzip.open(path, "wt", encoding="utf-8") if zipped else path.open("w", encoding="utf-8") as file:
            for query, ranking in rankings.items():
                scores = _falling(score for _, score in ranking)
                for rank, ((document, _), score) in enumerate(zip(ranking, scores, strict=True), 1):
                    if wrong := [name for name in (query, document) if name.split() != [name]]:
                        raise ConfigError(f"the id {wrong[0]!r} can't stand in a TREC run: it has spaces or no letters")
                    file.write(f"{query} Q0 {document} {rank} {score} {tag}\n")
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror or error}") from error


def _falling(scores: Iterable[float | None]) -> Iterator[str]:
    """`scores`, in single precision, each smaller than the one before."""
    last = np.float32(np.inf)
    for score in scores:
        below = np.float32(0) if np.isinf(last) else last - np.float32(1)
        wanted = below if score is None else np.float32(min(max(score, -_HUGE), _HUGE))
        last = min(wanted, np.nextafter(last, np.float32(-np.inf)))
        yield str(last)
