"""From one file to the other: lines in groups, groups to the scorer, results and rejects to the disk."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rag_rerank.errors import AuthError, BackendRejected, BadReply, ConfigError, DocumentRejected
from rag_rerank.files.formats import Reader, check_name, encoded
from rag_rerank.files.partial import Partial, Tally
from rag_rerank.scorer import Ranked, Scorer, prepared

GROUP = 256  # documents of one call to the scorer: enough to fill its batches, soon enough done to lose little
_GROUP_BYTES = 8 << 20  # fewer where they are long: this much of the input is in memory, and one line
_HARMLESS = "what is a panda?", "a bear"  # what any back end in working order scores


def rerank_file(
    scorer: Scorer,
    source: Path,
    target: Path,
    *,
    top_n: int | None = None,
    score_threshold: float | None = None,
    reorder: bool = False,
    deadline: float | None = None,
    settings: Mapping[str, Any] | None = None,
    restart: bool = False,
    group: int = GROUP,
    progress: Callable[[Tally, float], None] = lambda tally, share: None,
) -> Tally:
    """Rerank every line of a file, or go on where an interrupted run of the same stopped.

    Args:
        scorer: Does the reranking.
        source: Lines of ``{"query": str, "documents": [str or {"text": str, ...}], ...}``, as .jsonl or .jsonl.gz, or
            rows of the same as .parquet. For a model that sees, a query or document may be ``{"content": [part, ...]}``
            with images as data URLs, or as http(s) URLs, which the server fetches; no file is read for one.
        target: What to write, with such an ending, in the same order: the same objects with ``"ranked": [{"index",
            "score"}]``. Where it is there already, it is replaced at the end.
        top_n: How many to keep of each line; None keeps all.
        score_threshold: Keep only scores at or above it.
        reorder: Put the documents themselves in the order of ``ranked``, those that it has; its ``index`` still
            counts the documents of the input.
        deadline: Seconds that a call to the scorer may take.
        settings: What else decides about the result, such as the model; JSON values. Runs that differ in them, or in
            the input's name, size or time, don't go on from each other.
        restart: Throw away what an interrupted run has left.
        group: Documents of one call to the scorer.
        progress: Called at the start and after each group, with the share of the input that was read, 0 to 1.

    Returns:
        The count of everything: ``lines == ranked + rejected + blank``.

    Raises:
        TypeError, ValueError: As `Scorer.rerank`, for wrong options.
        ConfigError: A file can't be used as asked, or what is left of another run is in the way.
        BackendError: No scores, and not through the fault of single lines; what was finished stays for the next run.
        OSError: A file can't be read or written.
    """
    options = {"top_n": top_n, "score_threshold": score_threshold}
    scorer.rerank("", [], **options)  # type: ignore[arg-type]  # refuses wrong options before any work
    _check_files(source, target)
    found = _identity(source)
    identity = {**found, **options, "reorder": reorder, "group": group, **(settings or {})}
    with Partial(target, json.loads(json.dumps(identity)), restart=restart) as partial:
        reader = Reader(source)
        progress(partial.tally, 0.0)
        for number, lines in _groups(islice(enumerate(reader, 1), partial.tally.lines, None), group):
            _rank(scorer, [line for line in lines if line.error is None], {**options, "deadline": deadline})
            partial.add(*_results(lines, reorder), lines=number)
            progress(partial.tally, reader.share)
        if _identity(source) != found:
            raise ConfigError(f"{source} was changed while it was read; --restart begins anew")
        partial.finish()
    return partial.tally


def _check_files(source: Path, target: Path) -> None:
    check_name(source)
    check_name(target)
    if not source.is_file():
        raise ConfigError(f"{source} is no file" if source.exists() else f"there is no file {source}")
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder {target.parent}")
    if target.is_dir():
        raise ConfigError(f"{target} is a folder")
    if target.exists() and target.samefile(source):
        raise ConfigError(f"{source} would be replaced by its own result; name another output")


def _identity(source: Path) -> dict[str, Any]:
    stat = source.stat()
    return {"input": source.name, "size": stat.st_size, "mtime": stat.st_mtime_ns}


@dataclass(slots=True)
class _Line:
    """One line of the input, and what becomes of it: `ranked` or `error`."""

    number: int
    raw: bytes
    row: dict[str, Any]
    query: Any  # as the scorer takes it: a text, or content with images, read already
    texts: list[Any]
    ranked: list[Ranked] | None = None
    error: str | None = None

    def result(self, reorder: bool) -> bytes:
        """The line of the output."""
        ranked = self.ranked or []
        added: dict[str, Any] = {"ranked": [{"index": item.index, "score": item.score} for item in ranked]}
        if reorder:
            added["documents"] = [self.row["documents"][item.index] for item in ranked]
        return encoded(self.row | added)

    def reject(self) -> bytes:
        """The line of the rejects."""
        # Bytes that are no UTF-8 stay, as lone surrogates: raw.encode(errors="surrogateescape") has them back.
        raw = self.raw.decode(errors="surrogateescape")
        return encoded({"line": self.number, "error": self.error, "raw": raw})


def _groups(numbered: Iterable[tuple[int, bytes]], documents: int) -> Iterator[tuple[int, list[_Line]]]:
    """(number of the last line, lines that are not blank), some `documents` at a time.

    Where a group ends depends on nothing before it, so that a resumed run makes the same groups: in half precision, a
    score can depend on the batch.
    """
    group: list[_Line] = []
    number = count = texts = size = 0
    for number, raw in numbered:
        count += 1
        if raw.strip():
            group.append(_parsed(number, raw))
            texts += len(group[-1].texts)
            size += len(raw)
        if texts >= documents or size >= _GROUP_BYTES or count >= documents:
            yield number, group
            group, count, texts, size = [], 0, 0, 0
    if count:
        yield number, group


def _parsed(number: int, raw: bytes) -> _Line:
    raw = raw.rstrip(b"\r\n")
    try:
        row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        return _Line(number, raw, row, *_contents(row))
    except json.JSONDecodeError as error:  # whose own text calls every line the first
        return _Line(number, raw, {}, "", [], error=f"not JSON: {error.msg} (character {error.pos + 1})")
    except (ValueError, TypeError, RecursionError) as error:  # no UTF-8, no such object, a bad image, nested too deep
        return _Line(number, raw, {}, "", [], error=str(error))


def _contents(row: Any) -> tuple[Any, list[Any]]:
    """A line's query and documents, or a ValueError or TypeError that says what is wrong with the line."""
    if not isinstance(row, dict):
        raise ValueError(f'must be an object with "query" and "documents", got {type(row).__name__}')  # noqa: TRY004
    for name, kind in (("query", str), ("documents", list)):
        if not isinstance(row.get(name), kind) and not (name == "query" and _has_parts(row.get(name))):
            got = type(row[name]).__name__ if name in row else "nothing"
            raise ValueError(f'"{name}" must be {kind.__name__}, got {got}')
    contents: list[Any] = []
    for position, document in enumerate(row["documents"]):
        content: Any = document.get("text") if isinstance(document, dict) else document
        if content is None and _has_parts(document):
            content = document
        if not isinstance(content, str) and not _has_parts(content):
            got = type(content).__name__
            raise ValueError(f'documents[{position}] must be str or an object with a "text", got {got}')
        contents.append(prepared(content, f"documents[{position}]"))
    return prepared(row["query"], "query"), contents


def _has_parts(value: Any) -> bool:
    """Whether it is content with images, as vLLM and OpenAI write it."""
    return isinstance(value, dict) and isinstance(value.get("content"), list)


def _rank(scorer: Scorer, lines: list[_Line], options: Mapping[str, Any]) -> None:
    """Give each line its `ranked`, or its `error` where the back end works but can't score that line."""
    if not lines:
        return
    try:
        found = scorer.rerank_batch([line.query for line in lines], [line.texts for line in lines], **options)
    except AuthError:
        raise
    except (BackendRejected, BadReply) as error:
        _blame(error, lines)
        if any(line.error is not None for line in lines):
            _rank(scorer, [line for line in lines if line.error is None], options)
        elif len(lines) > 1:  # it doesn't say which
            _rank(scorer, lines[: len(lines) // 2], options)
            _rank(scorer, lines[len(lines) // 2 :], options)
        else:
            scorer.score(*_HARMLESS, deadline=options["deadline"])  # raises where it is not the line's fault
            lines[0].error = str(error)
    else:
        for line, ranked in zip(lines, found, strict=True):
            line.ranked = ranked


def _blame(error: BackendRejected | BadReply, lines: list[_Line]) -> None:
    """Set the `error` of lines with documents that the error names; its positions count those of all lines."""
    rejected = set(error.indices) if isinstance(error, DocumentRejected) else set()
    reason = error.message.rpartition(" rejected: ")[2]  # without the positions
    start = 0
    for line in lines:
        positions = [position for position in range(len(line.texts)) if start + position in rejected]
        if positions:
            line.error = f"{', '.join(f'documents[{position}]' for position in positions)} rejected: {reason}"
        start += len(line.texts)


def _results(lines: list[_Line], reorder: bool) -> tuple[list[bytes], list[bytes], int]:
    """Lines for the output, lines for the rejects, and how many documents the former had."""
    ranked: list[bytes] = []
    rejects: list[bytes] = []
    documents = 0
    for line in lines:
        if line.error is None:
            try:
                ranked.append(line.result(reorder))
                documents += len(line.texts)
                continue
            except RecursionError as error:  # nested as deep as could just be read
                line.error = str(error)
        rejects.append(line.reject())
    return ranked, rejects, documents
