"""A folder of files in, a folder of files out: cut into shards, which go to actors; the next run does what is left.

In the output's folder, beside the finished files (which appear whole, under names that depend on the input alone), are
_rejects/, with a file for each shard that has lines that can't be scored, and _rag_rerank/, with the record of the run,
which its actors don't touch, and shards/, what they work at.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rag_rerank.errors import BackendError, ConfigError, RerankError
from rag_rerank.files import Tally, rejects_of, rerank_file
from rag_rerank.files.formats import ENDINGS, Part, check_name, count_rows
from rag_rerank.files.partial import START_OVER, Record, lines_kept
from rag_rerank.files.rows import Options
from rag_rerank.files.run import input_facts
from rag_rerank.identity import Identity
from rag_rerank.ray_data.pool import DEFAULT_POOL, Pool, connected
from rag_rerank.scorer import Scorer

SHARD_LINES = 16_384  # of pairs, some minutes' work on a CPU; an actor's death costs no more than the group it was at
_DEATHS = 3  # of actors at one shard that end the run
_OWN = "_rag_rerank"  # the folder in that of the output which a run keeps for itself
_LOCK_TIMEOUT = 60.0  # seconds in which a process that is being killed on another machine releases its shard's files
_REMEDY = "What was finished is kept: the same command continues behind it."
_DEATHS_REMEDY = f"Is there too little memory for so many models on a machine? {_REMEDY}"


class Shard(NamedTuple):
    """Lines of one file, which one actor scores into a file of their own."""

    source: Path
    part: Part
    name: str  # the path of their output below the folder of the output: the file's, with the first line's number


def rerank_folder(
    scorer: Scorer,
    source: str | Path,
    target: str | Path,
    *,
    pool: Pool = DEFAULT_POOL,
    restart: bool = False,
    shard_lines: int = SHARD_LINES,
    progress: Callable[[Tally, float], None] = lambda tally, fraction: None,
    **options: Any,
) -> Tally:
    """Rerank every line of a folder's files over a pool of Ray actors, or continue where an interrupted run stopped.

    The input is cut into shards. An actor streams a shard through `rag_rerank.files.rerank_file` into a file of its
    own, which appears when it is complete. An actor that dies is started again, and continues its shard behind the last
    group that was finished; three that die at one shard end the run. Shards and groups depend on the input alone: with
    one CPU for each actor, scores are the same to the last bit, however many actors there are and whichever of them
    die.

    Before each shard, an actor compares its scorer, as `Scorer.identity` tells, with the one that the run began with: a
    machine with other weights in its folder is refused, as is a later run with another model.

    Args:
        scorer: Goes to every actor by its settings alone; not loaded here. The actors' own `VLLMScorer` reads the key
            from ``VLLM_API_KEY`` on their machine.
        source: A file or a folder of files as `rerank_file` takes them, of rows or of pairs.
        target: The folder to write, with an output for each shard in the format of its input. Both must be on a file
            system that all machines see under the same path.
        pool: How many actors, and what each gets of the machines.
        restart: Discard what an earlier run has left or made.
        shard_lines: Lines of a shard.
        progress: Called at the start and after each shard, with the fraction of the shards that are finished.
        **options: Of `rerank_file`: what limits its results, `instruction`, `deadline`, `group`.

    Returns:
        The count of everything, as of `rerank_file`; `resumed` are lines of shards that earlier runs have finished.

    Raises:
        ConfigError: Ray is not installed, the machines don't have what is asked for, or as `rerank_file`.
        TypeError, ValueError, BackendError, OSError: As `rerank_file`.
    """
    source, target = Path(source), Path(target)
    ranking = Options(**options)
    ranking.check(scorer)
    if isinstance(shard_lines, bool) or not isinstance(shard_lines, int) or shard_lines < 1:
        raise ConfigError(f"shard_lines must be 1 or more, got {shard_lines!r}")
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target} is inside of the input; name a folder outside of it")
    files, target = files_in(source), target.absolute()
    facts = ranking.facts() | {"shard_lines": str(shard_lines)} | _facts(files)
    shards = cut(files, shard_lines)
    _check_target(target)
    with _actors(pool, len(shards), scorer, target, options) as (ray, actors):
        identity = ray.get(actors[0].identity.remote())
        with closing(_FolderRecord(target, facts, identity, restart=restart)) as record:
            done = record.parts()
            finished = [shard for shard in shards if shard.name in done and _place(target, shard)]
            tally = sum((done[shard.name] for shard in finished), Tally())
            tally = replace(tally, resumed=tally.lines)
            progress(tally, len(finished) / max(1, len(shards)))
            left = [shard for shard in shards if shard not in finished]
            for count, (shard, more) in enumerate(_scored(ray, actors, target, left, record.begun_by), 1):
                record.add(shard.name, more)
                _place(target, shard)
                tally += replace(more, resumed=0)
                progress(tally, (len(finished) + count) / len(shards))
    if _facts(files).items() - facts.items():
        raise ConfigError(f"{source} was changed while it was read; {START_OVER}")
    return tally


def rejects_in(target: Path) -> Path:
    """Name the folder of the lines that can't be scored: ``{"line": number, "error": why, "raw": the line}``.

    It has a file for each shard that has any. Arrow, Spark and Ray Data skip it when they read the output: its name
    begins with ``_``.
    """
    return target / "_rejects"


class ShardScorer:
    """Scores shards, one after the other, each from its file to its file; every actor is one."""

    def __init__(self, scorer: Scorer, target: Path, options: Mapping[str, Any]) -> None:
        self._scorer, self._target, self._options = scorer, target, options

    def identity(self) -> Identity:
        """Say who the scorer is on this machine."""
        return self._scorer.identity()

    def score(self, shard: Shard, begun_by: Identity) -> Tally:
        """Score a shard into a file among those that are worked at."""
        work = _work(self._target, shard)
        work.parent.mkdir(parents=True, exist_ok=True)
        options = {**self._options, "part": shard.part, "begun_by": begun_by, "lock_timeout": _LOCK_TIMEOUT}
        return rerank_file(self._scorer, shard.source, work, **options)


class _FolderRecord(Record):
    """The record of a folder's run."""

    def __init__(self, target: Path, facts: Mapping[str, str], identity: Identity, *, restart: bool) -> None:
        self._target = target
        super().__init__(_record(target), facts, lambda: identity, restart=restart, wait=0.0)

    def _discard(self) -> None:
        for name in self.parts():
            (self._target / name).unlink(missing_ok=True)
        for folder in (rejects_in(self._target), self._target / _OWN / "shards"):
            shutil.rmtree(folder, ignore_errors=True)
        super()._discard()


@contextmanager
def _actors(pool: Pool, most: int, *arguments: Any) -> Iterator[tuple[Any, list[Any]]]:
    """Start actors, at least one, no more than `most`; yield Ray and these, and raise what ended one of them."""
    with connected() as ray:
        count, resources = pool.fit(ray, arguments[0])
        # One that dies is started again, and its shard done again.
        remote = ray.remote(max_restarts=-1, max_task_retries=_DEATHS - 1, scheduling_strategy="SPREAD", **resources)
        actors = [remote(ShardScorer).remote(*arguments) for _ in range(min(count, max(1, most)))]
        try:
            yield ray, actors
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)  # what was raised in the actor
            if isinstance(cause, RerankError | OSError):
                raise cause from None
            raise BackendError(f"Ray gave up: {str(error).strip().splitlines()[-1]}", remedy=_REMEDY) from error
        finally:
            for actor in actors:
                ray.kill(actor)


def _scored(
    ray: Any, actors: Sequence[Any], target: Path, shards: Sequence[Shard], begun_by: Identity
) -> Iterator[tuple[Shard, Tally]]:
    """Have shards scored; yield each with its tally, as they finish."""
    idle, left, running = list(actors), list(reversed(shards)), dict[Any, tuple[Any, Shard]]()
    while left or running:
        while left and idle:
            actor, shard = idle.pop(), left.pop()
            running[actor.score.remote(shard, begun_by)] = actor, shard
        (done,), _ = ray.wait(list(running))
        actor, shard = running.pop(done)
        try:
            yield shard, ray.get(done)
        except ray.exceptions.RayActorError as error:
            line = shard.part.first + lines_kept(_work(target, shard), _LOCK_TIMEOUT)
            where = f"the last at what follows line {line} of {shard.source}"
            raise BackendError(f"{_DEATHS} actors died one after the other, {where}", remedy=_DEATHS_REMEDY) from error
        idle.append(actor)


def _check_target(target: Path) -> None:
    """Refuse what can't be the folder of the output."""
    if not target.parent.is_dir():
        raise ConfigError(f"there is no folder {target.parent}")
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; with several actors, the output is a folder")
    others = target.is_dir() and not _record(target).exists() and any(path.name != _OWN for path in target.iterdir())
    if others:
        raise ConfigError(f"{target} holds other files; name a folder that is new or empty")


def _record(target: Path) -> Path:
    return target / _OWN / "run.sqlite"


def _work(target: Path, shard: Shard) -> Path:
    """Name the output of a shard until it has its place."""
    return target / _OWN / "shards" / shard.name


def _place(target: Path, shard: Shard) -> bool:
    """Put the output of a shard that is done in its place, and its rejects; tell whether it is there."""
    work, output, rejects = _work(target, shard), target / shard.name, rejects_in(target) / f"{shard.name}.jsonl"
    for made, place in ((rejects_of(work), rejects), (work, output)):
        if made.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            made.replace(place)
    return output.exists()


def _facts(files: Mapping[str, Path]) -> dict[str, str]:
    """Tell an input from another."""
    facts = {name: input_facts(path) for name, path in files.items()}
    return {name: f"{found['size']} bytes of {found['mtime']}" for name, found in facts.items()}


def files_in(source: Path) -> dict[str, Path]:
    """Find the files of the input, by their paths below its folder, in the order of these.

    Names that begin with ``_`` or ``.`` are skipped, as by Spark and Arrow.
    """
    if not source.exists():
        raise ConfigError(f"there is no file or folder {source}")
    found = {source.name: source.absolute()} if source.is_file() else {}
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if path.name.endswith(ENDINGS) and path.is_file() and not any(part[0] in "_." for part in inside.parts):
            found[inside.as_posix()] = path.absolute()
    if not found:
        raise ConfigError(f"{source} has no files that end in {', '.join(ENDINGS)}")
    for path in found.values():
        check_name(path)
    return found


def cut(files: Mapping[str, Path], lines: int) -> list[Shard]:
    """Cut files into shards of so many lines; a gzipped file is one, since it can't be read from its middle."""
    return [Shard(path, part, _name(name, part)) for name, path in files.items() for part in _parts(path, lines)]


def _name(file: str, part: Part) -> str:
    ending = next(ending for ending in ENDINGS if file.endswith(ending))
    return f"{file.removesuffix(ending)}-{part.first:012}{ending}"


def _parts(path: Path, lines: int) -> Iterator[Part]:
    if path.suffix == ".gz":
        yield Part()
    elif path.suffix == ".parquet":
        rows = count_rows(path)
        yield from (Part(first, min(lines, rows - first)) for first in range(0, rows, lines))
    else:
        first = offset = 0
        with path.open("rb") as file:  # read once, to find where each part begins
            while sizes := list(map(len, islice(file, lines))):
                yield Part(first, len(sizes), offset)
                first, offset = first + len(sizes), offset + sum(sizes)
