"""A folder of files in, a folder of files out: cut into shards, which go to actors; the next run does what is left.

In the output's folder, beside the finished files (which appear whole, under names that depend on the input alone), are
_rejects/, with a file for each shard that has lines that can't be scored, and _rag_rerank/, with run.json and
scorer.json, what and who the run is made from, and what its actors work at.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from rag_rerank.errors import BackendError, ConfigError
from rag_rerank.files import Tally
from rag_rerank.files.rows import Options
from rag_rerank.files.run import GROUP
from rag_rerank.ray_data.actor import ScoreShards, outcome_of
from rag_rerank.ray_data.pool import DEFAULT_POOL, Pool, connected, pool_options, quiet
from rag_rerank.ray_data.shards import Folders, Shard, sources_in
from rag_rerank.scorer import Scorer

SHARD_LINES = 16_384  # of pairs, some minutes' work on a CPU; an actor's death costs no more than the group it was at


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run.

    Attributes:
        shards: How many shards there are.
        finished: How many are finished, by this run or earlier ones.
        tally: The lines of the finished ones; `resumed` are those that earlier runs have finished.
    """

    shards: int
    finished: int
    tally: Tally


def rerank_folder(
    scorer: Scorer,
    source: Path,
    target: Path,
    *,
    pool: Pool = DEFAULT_POOL,
    top_n: int | None = None,
    score_threshold: float | None = None,
    instruction: str | None = None,
    reorder: bool = False,
    deadline: float | None = None,
    restart: bool = False,
    shard_lines: int = SHARD_LINES,
    group: int = GROUP,
    progress: Callable[[Progress], None] = lambda now: None,
) -> Tally:
    """Rerank every line of a folder's files over a pool of Ray actors, or continue where an interrupted run stopped.

    The input is cut into shards of so many lines. An actor streams a shard through `rag_rerank.files.rerank_file` into
    a file of its own, which appears when it is complete. An actor that dies is started again, and continues its shard
    behind the last group that was finished; lines at which three actors die, one after the other, end the run. Shards
    and groups depend on the input alone: with one CPU for each actor, scores are the same to the last bit, however many
    actors there are and whichever of them die.

    Every actor compares its scorer, as `Scorer.identity` tells, with the one that the run began with, before each
    shard: a machine with other weights in its folder is refused, as is a later run with another model.

    Args:
        scorer: Goes to every actor by its settings alone; not loaded here. The actors' own `VLLMScorer` reads the key
            from ``VLLM_API_KEY`` on their machine.
        source: A file or a folder of files as `rerank_file` takes them, of rows or of pairs.
        target: The folder to write, with an output for each shard in the format of its input. Both must be on a file
            system that all machines see under the same path.
        pool: How many actors, and what each gets of the machines.
        top_n: As in `rerank_file`, like `score_threshold`, `instruction`, `reorder`, `deadline` and `group`.
        score_threshold: See `top_n`.
        instruction: See `top_n`.
        reorder: See `top_n`.
        deadline: See `top_n`.
        restart: Discard what an earlier run has left or made.
        shard_lines: Lines of a shard.
        group: See `top_n`.
        progress: Called at the start and after each shard.

    Returns:
        The count of everything: ``lines == ranked + rejected + blank``.

    Raises:
        TypeError, ValueError: As `Scorer.rerank`, for wrong options.
        ConfigError: Ray is not installed, the machines don't have what is asked for, a file can't be used as asked, or
            another run or scorer began what is there.
        BackendError: No scores, and not through the fault of single lines; what was finished stays for the next run.
        OSError: A file can't be read or written.
    """
    options = Options(top_n, score_threshold, instruction, reorder, deadline)
    options.check(scorer)
    if isinstance(shard_lines, bool) or not isinstance(shard_lines, int) or shard_lines < 1:
        raise ConfigError(f"shard_lines must be 1 or more, got {shard_lines!r}")
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target} is inside of the input; name a folder outside of it")
    folder, sources = sources_in(source.absolute())
    folders = Folders(folder, target.absolute())
    facts = options.facts() | {"group": str(group), "shard_lines": str(shard_lines)}
    with folders.locked():
        shards = folders.begin(sources, facts, shard_lines, restart=restart)
        left = [position for position, shard in enumerate(shards) if not folders.output(shard).exists()]
        tally = _sum(folders.tally(shard) for shard in shards if folders.output(shard).exists())
        now = Progress(len(shards), len(shards) - len(left), replace(tally, resumed=tally.lines))
        progress(now)
        arguments = asdict(options) | {"group": group}
        # Also with nothing left to do, an actor says whether the scorer is still the same.
        for tally in _run(scorer, folders, shards, arguments, left or [-1], pool):
            now = Progress(len(shards), now.finished + bool(left), _sum((now.tally, tally)))
            progress(now)
        if now.finished < now.shards:  # Ray skips blocks that fail where DataContext.max_errored_blocks says so
            left_over = f"{now.shards - now.finished} of {now.shards} shards were not finished"
            raise BackendError(f"{left_over}; the same call continues")
        folders.finish(sources, facts)
    return now.tally


def _run(
    scorer: Scorer, folders: Folders, shards: list[Shard], options: dict[str, Any], positions: list[int], pool: Pool
) -> Iterator[Tally]:
    """Have the shards at these positions scored by a pool of actors; yield the tally of each, as they finish."""
    with connected() as ray, quiet(ray):
        items = ray.data.from_items(positions, override_num_blocks=len(positions))
        outcomes = items.map_batches(
            ScoreShards,
            fn_constructor_args=(scorer, folders, shards, options, uuid4().hex),
            batch_size=1,
            batch_format="numpy",
            **pool_options(ray, scorer, pool, len(positions)),
        )
        try:
            for row in outcomes.iter_rows():
                yield outcome_of(row)
        except ray.exceptions.RayError as error:
            remedy = "What was finished is kept: the same command continues behind it."
            raise BackendError(f"Ray gave up: {str(error).strip().splitlines()[-1]}", remedy=remedy) from error


def _sum(tallies: Iterable[Tally]) -> Tally:
    return Tally(*map(sum, zip(*map(astuple, tallies), strict=True)))
