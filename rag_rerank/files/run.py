"""From one file to the other: lines in groups, groups to the scorer, results and rejects to the disk."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Unpack

from rag_rerank.errors import ConfigError
from rag_rerank.files.formats import WHOLE, Columns, Part, Reader, check_name, check_targets, compress
from rag_rerank.files.partial import START_OVER, Record, Tally, partial_of, refuse_changes, rejects_of, replacing
from rag_rerank.files.rows import GROUP, Line, Options, is_blank, parse, rank, results
from rag_rerank.identity import Identity
from rag_rerank.ranking import RankOptions
from rag_rerank.runs import Asker
from rag_rerank.scorer import Scorer

_GROUP_BYTES = 8 << 20  # a group ends here, too, so that this much of the input and one line are in memory


def rerank_file(
    scorer: Scorer,
    source: str | Path,
    target: str | Path,
    *,
    restart: bool = False,
    group: int = GROUP,
    part: Part = WHOLE,
    begun_by: Identity | None = None,
    lock_timeout: float = 0.0,
    progress: Callable[[Tally, float], None] = lambda tally, fraction: None,
    **ranking: Unpack[RankOptions],
) -> Tally:
    """Rerank every line of a file, or continue where an interrupted run of the same stopped.

    A run is continued only by the same scorer, as `Scorer.identity` tells, with the same options and the same input.
    While a server scores, a known query is part of each call; if its scores change, the server is asked anew who it is,
    and another model ends the run before the group is kept.

    Args:
        scorer: Does the reranking.
        source: Lines of ``{"query": str, "documents": [str or {"text": str, ...}], ...}``, as .jsonl or .jsonl.gz, or
            rows of the same as .parquet. Or pairs, with a ``"document"`` instead; they get a ``"score"``. For a model
            that reads images, a query or document may be ``{"content": [part, ...]}`` with images as data URLs, or as
            http(s) URLs, which the server fetches; no file is read for one.
        target: What to write, with such an ending, in the same order: the same objects with ``"ranked": [{"index",
            "score"}]``. An existing file is replaced at the end.
        restart: Discard what an interrupted run has left.
        group: Documents of one call to the scorer.
        part: Which lines of the input, to share a file between processes.
        begun_by: Who scores the other parts, by `Scorer.identity`; another scorer is refused. None: nobody yet.
        lock_timeout: Seconds to wait for another process that writes the same output to end.
        progress: Called at the start and after each group, with the fraction of the input that was read, 0 to 1.
        **ranking: As in `Scorer.rerank`, for each line: `top_n`, `score_threshold`, `min_precision`, `min_n`,
            `instruction`. The `deadline` is for each call to the scorer; without one, it is 300 s on a server.

    Returns:
        The count of everything: ``lines == ranked + rejected + blank``.

    Raises:
        TypeError, ValueError: As `Scorer.rerank`, for wrong options.
        ConfigError: A file can't be used as asked, what is left is of another run or scorer, or the scorer changed.
        BackendError: No scores, and not through the fault of single lines; what was finished stays for the next run.
        OSError: A file can't be read or written.
    """
    source, target = Path(source), Path(target)
    options = Options(group=group, **ranking)
    options.check(scorer)
    _check_files(source, target)
    before = input_facts(source)
    facts = before | options.facts()
    if part != WHOLE:
        facts["part"] = str(asdict(part))

    def identify() -> Identity:
        identity = scorer.identity()
        refuse_changes(target, begun_by or identity, identity)
        return identity

    with Record(partial_of(target), facts, identify, restart=restart, wait=lock_timeout) as record:
        asker = Asker(scorer, record.begun_by, options.deadline_of(scorer), options.instruction)
        reader = Reader(source, part)
        columns = Columns(target, source) if target.suffix == ".parquet" else None
        if columns is not None:
            columns.add(record.lines("output"))
        progress(record.tally, 0.0)
        for number, lines in _groups(islice(enumerate(reader, 1), record.tally.lines, None), group, part.first):
            for line in lines:
                if line.is_pair and line.error is None:
                    options.refuse_pair(f"line {line.number} is a pair")
            rank(asker, lines, options)
            ranked, rejects, documents = results(lines)
            if columns is not None:
                columns.add(ranked)  # if Parquet has no type for a column of these, nothing is kept of them
            done = Tally(number - record.tally.lines, len(ranked), len(rejects), documents)
            record.add(str(number), done, b"".join(ranked), b"".join(rejects))
            progress(record.tally, reader.fraction)
        if input_facts(source) != before:
            raise ConfigError(f"{source} was changed while it was read; {START_OVER}")
        _finish(record, target, columns)
    return record.tally


def _finish(record: Record, target: Path, columns: Columns | None) -> None:
    """Put the output in its place, all at once, and the rejects, or remove those of an earlier output."""
    with replacing(target) as file:
        if columns is not None:
            columns.write(record.lines("output"), file)
        elif target.suffix == ".gz":
            compress(record.lines("output"), file)
        else:
            file.writelines(record.lines("output"))
        if record.tally.rejected:
            with replacing(rejects_of(target)) as rejects:
                rejects.writelines(record.lines("rejects"))
        else:
            rejects_of(target).unlink(missing_ok=True)


def _check_files(source: Path, target: Path) -> None:
    check_name(source)
    check_name(target)
    if not source.is_file():
        raise ConfigError(f"{source} is no file" if source.exists() else f"there is no file {source}")
    check_targets(target)
    if any(made.exists() and made.samefile(source) for made in (target, rejects_of(target))):
        raise ConfigError(f"{source} would be replaced by its own result; name another output")


def input_facts(source: Path) -> dict[str, str]:
    """Tell an input from another: name, size, time of the last change."""
    stat = source.stat()
    return {"input": source.name, "size": str(stat.st_size), "mtime": str(stat.st_mtime_ns)}


def _groups(numbered: Iterable[tuple[int, bytes]], documents: int, before: int) -> Iterator[tuple[int, list[Line]]]:
    """Yield the number of the last line, and the lines that are not blank, about `documents` documents at a time.

    Where a group ends depends on nothing before it, so that a resumed run makes the same groups: in half precision, a
    score can depend on the batch. Line numbers count from 1 behind the `before` lines that the part leaves out.
    """
    group: list[Line] = []
    number = lines = texts = size = 0
    for number, raw in numbered:
        lines += 1
        if not is_blank(raw):
            group.append(parse(before + number, raw))
            texts += len(group[-1].documents)
            size += len(raw)
        if texts >= documents or size >= _GROUP_BYTES or lines >= documents:
            yield number, group
            group, lines, texts, size = [], 0, 0, 0
    if lines:
        yield number, group
