"""From one file to the other: lines in groups, groups to the scorer, results and rejects to the disk."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from rag_rerank.errors import ConfigError
from rag_rerank.files.formats import WHOLE, Part, Reader, check_name
from rag_rerank.files.partial import Partial, Tally
from rag_rerank.files.rows import Line, parsed, rank, results
from rag_rerank.scorer import Scorer

GROUP = 256  # documents of one call to the scorer: enough to fill its batches, soon enough done to lose little
_GROUP_BYTES = 8 << 20  # fewer where they are long: this much of the input is in memory, and one line


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
    part: Part = WHOLE,
    patience: float = 0.0,
    progress: Callable[[Tally, float], None] = lambda tally, share: None,
) -> Tally:
    """Rerank every line of a file, or go on where an interrupted run of the same stopped.

    Args:
        scorer: Does the reranking.
        source: Lines of ``{"query": str, "documents": [str or {"text": str, ...}], ...}``, as .jsonl or .jsonl.gz, or
            rows of the same as .parquet. Or pairs, with a ``"document"`` instead; they get a ``"score"``. For a model
            that sees, a query or document may be ``{"content": [part, ...]}`` with images as data URLs, or as http(s)
            URLs, which the server fetches; no file is read for one.
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
        part: Which lines of the input, to share a file between processes.
        patience: Seconds to wait for another process that writes the same output to end.
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
    found = identity_of(source)
    identity = {**found, **options, "reorder": reorder, "group": group, **(settings or {})}
    if part != WHOLE:
        identity["part"] = asdict(part)
    with Partial(target, json.loads(json.dumps(identity)), restart=restart, patience=patience) as partial:
        reader = Reader(source, part)
        progress(partial.tally, 0.0)
        for number, lines in _groups(islice(enumerate(reader, 1), partial.tally.lines, None), group, part.first):
            _check_pairs(lines, top_n, score_threshold, reorder)
            rank(scorer, [line for line in lines if line.error is None], {**options, "deadline": deadline})
            partial.add(*results(lines, reorder), lines=number)
            progress(partial.tally, reader.share)
        if identity_of(source) != found:
            raise ConfigError(f"{source} was changed while it was read; --restart begins anew")
        partial.finish(source)
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


def identity_of(source: Path) -> dict[str, Any]:
    """What tells an input from another: name, size, time of the last change."""
    stat = source.stat()
    return {"input": source.name, "size": stat.st_size, "mtime": stat.st_mtime_ns}


def _check_pairs(lines: list[Line], top_n: int | None, score_threshold: float | None, reorder: bool) -> None:
    if (top_n, score_threshold, reorder) == (None, None, False):
        return
    for line in lines:
        if line.is_pair and line.error is None:
            raise ConfigError(
                f"line {line.number} is a pair of a query and a document: top_n, score_threshold and reorder are for "
                'lines with "documents"'
            )


def _groups(numbered: Iterable[tuple[int, bytes]], documents: int, before: int) -> Iterator[tuple[int, list[Line]]]:
    """(number of the last line, lines that are not blank), some `documents` at a time; `before` lines aren't counted.

    Where a group ends depends on nothing before it, so that a resumed run makes the same groups: in half precision, a
    score can depend on the batch.
    """
    group: list[Line] = []
    number = count = texts = size = 0
    for number, raw in numbered:
        count += 1
        if raw.strip():
            group.append(parsed(before + number, raw))
            texts += len(group[-1].documents)
            size += len(raw)
        if texts >= documents or size >= _GROUP_BYTES or count >= documents:
            yield number, group
            group, count, texts, size = [], 0, 0, 0
    if count:
        yield number, group
