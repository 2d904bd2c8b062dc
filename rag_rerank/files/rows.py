"""One row of the input: read, ranked with others, written; and whose fault it is when the back end refuses some."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rag_rerank.errors import AuthError, BackendRejected, BadReply, DocumentRejected
from rag_rerank.files.formats import encoded
from rag_rerank.inputs.preparing import prepare
from rag_rerank.ranking import Ranked
from rag_rerank.scorer import Scorer

_HARMLESS = "what is a panda?", "a bear"  # what any back end in working order scores


@dataclass(slots=True)
class Line:
    """One line of the input, and what becomes of it: `ranked` or `error`.

    Attributes:
        number: Its number in the file, from 1.
        raw: As it was read.
        row: What it says; a query with "documents", or a pair: a query with one "document".
        query: As the scorer takes it: a text, or content with images, which have been read.
        documents: Its documents, likewise.
        ranked: How they rank.
        error: Why they don't.
    """

    number: int
    raw: bytes
    row: dict[str, Any]
    query: Any
    documents: list[Any]
    ranked: list[Ranked] | None = None
    error: str | None = None

    @property
    def is_pair(self) -> bool:
        """Whether it has one document, which gets a score and no rank."""
        return "documents" not in self.row

    def result(self, reorder: bool) -> bytes:
        """The line of the output."""
        ranked = self.ranked or []
        if self.is_pair:
            return encoded(self.row | {"score": ranked[0].score})
        added: dict[str, Any] = {"ranked": [{"index": item.index, "score": item.score} for item in ranked]}
        if reorder:
            added["documents"] = [self.row["documents"][item.index] for item in ranked]
        return encoded(self.row | added)

    def reject(self) -> bytes:
        """The line of the rejects."""
        # Bytes that are no UTF-8 stay, as lone surrogates: raw.encode(errors="surrogateescape") has them back.
        raw = self.raw.decode(errors="surrogateescape")
        return encoded({"line": self.number, "error": self.error, "raw": raw})


def parsed(number: int, raw: bytes) -> Line:
    """The line with this number of its file; with an `error` where it is none that can be scored."""
    raw = raw.rstrip(b"\r\n")
    try:
        row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        return Line(number, raw, row, *_contents(row))
    except json.JSONDecodeError as error:  # whose own text calls every line the first
        return Line(number, raw, {}, "", [], error=f"not JSON: {error.msg} (character {error.pos + 1})")
    except (ValueError, TypeError, RecursionError) as error:  # no UTF-8, no such object, a bad image, nested too deep
        return Line(number, raw, {}, "", [], error=str(error))


def _contents(row: Any) -> tuple[Any, list[Any]]:
    """A line's query and documents, or a ValueError or TypeError that says what is wrong with the line."""
    if isinstance(row, dict) and "document" in row and "documents" not in row:
        document = _content_of(row["document"], "document")
        query, _ = _contents({**row, "documents": []})
        return query, [document]
    if not isinstance(row, dict):
        raise ValueError(f'must be an object with "query" and "documents", got {type(row).__name__}')  # noqa: TRY004
    for name, kind in (("query", str), ("documents", list)):
        if not isinstance(row.get(name), kind) and not (name == "query" and _has_parts(row.get(name))):
            got = type(row[name]).__name__ if name in row else "nothing"
            raise ValueError(f'"{name}" must be {kind.__name__}, got {got}')
    documents = [_content_of(document, f"documents[{position}]") for position, document in enumerate(row["documents"])]
    return prepare(row["query"], "query"), documents


def _content_of(document: Any, name: str) -> Any:
    """What of a line's document is scored: its text, or its content with images."""
    content: Any = document.get("text") if isinstance(document, dict) else document
    if content is None and _has_parts(document):
        content = document
    if not isinstance(content, str) and not _has_parts(content):
        raise ValueError(f'{name} must be str or an object with a "text", got {type(document).__name__}')
    return prepare(content, name)


def _has_parts(value: Any) -> bool:
    """Whether it is content with images, as vLLM and OpenAI write it."""
    return isinstance(value, dict) and isinstance(value.get("content"), list)


def rank(scorer: Scorer, lines: list[Line], options: Mapping[str, Any]) -> None:
    """Give each line its `ranked`, or its `error` where the back end works but can't score that line."""
    if not lines:
        return
    try:
        found = scorer.rerank_batch([line.query for line in lines], [line.documents for line in lines], **options)
    except AuthError:
        raise
    except (BackendRejected, BadReply) as error:
        _blame(error, lines)
        if any(line.error is not None for line in lines):
            rank(scorer, [line for line in lines if line.error is None], options)
        elif len(lines) > 1:  # it doesn't say which
            rank(scorer, lines[: len(lines) // 2], options)
            rank(scorer, lines[len(lines) // 2 :], options)
        else:
            scorer.score(*_HARMLESS, deadline=options["deadline"])  # raises where it is not the line's fault
            lines[0].error = str(error)
    else:
        for line, ranked in zip(lines, found, strict=True):
            line.ranked = ranked


def _blame(error: BackendRejected | BadReply, lines: list[Line]) -> None:
    """Set the `error` of lines with documents that the error names; its positions count those of all lines."""
    rejected = set(error.indices) if isinstance(error, DocumentRejected) else set()
    reason = error.message.rpartition(" rejected: ")[2]  # without the positions
    start = 0
    for line in lines:
        positions = [position for position in range(len(line.documents)) if start + position in rejected]
        if positions:
            names = "document" if line.is_pair else ", ".join(f"documents[{position}]" for position in positions)
            line.error = f"{names} rejected: {reason}"
        start += len(line.documents)


def results(lines: list[Line], reorder: bool) -> tuple[list[bytes], list[bytes], int]:
    """Lines for the output, lines for the rejects, and how many documents the former had."""
    ranked: list[bytes] = []
    rejects: list[bytes] = []
    documents = 0
    for line in lines:
        if line.error is None:
            try:
                ranked.append(line.result(reorder))
                documents += len(line.documents)
                continue
            except RecursionError as error:  # nested as deep as could just be read
                line.error = str(error)
        rejects.append(line.reject())
    return ranked, rejects, documents
