"""A folder of files in, a folder of files out: cut into units, which go to actors; what is left, the next run does.

In the output's folder, beside the finished files (which appear whole, under names that depend on the input alone):

    _rejects/           the lines that can't be scored, a file for each unit that has any
    _rag_rerank/        run.json, what the run is made from; and while it runs, what its actors are at
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rag_rerank.errors import BackendError, ConfigError
from rag_rerank.files import Tally
from rag_rerank.files.run import GROUP
from rag_rerank.ray_data.actor import ScoreUnits, outcome_of
from rag_rerank.ray_data.batches import patience
from rag_rerank.ray_data.pool import ANY, Share, connected, pool_options, quiet
from rag_rerank.ray_data.record import Layout, Record
from rag_rerank.ray_data.units import Unit, cut, sources_in
from rag_rerank.scorer import Scorer

UNIT_LINES = 16_384  # of pairs, some minutes' work on a CPU; an actor's death costs no more than the group it was at


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        units: How many units there are.
        finished: How many are finished, by this run or earlier ones.
        tally: The lines of the finished ones; `resumed` are those that earlier runs have finished.
    """

    units: int
    finished: int
    tally: Tally


def rerank_folder(
    scorer: Scorer,
    source: Path,
    target: Path,
    *,
    share: Share = ANY,
    top_n: int | None = None,
    score_threshold: float | None = None,
    reorder: bool = False,
    deadline: float | None = None,
    settings: Mapping[str, Any] | None = None,
    restart: bool = False,
    unit_lines: int = UNIT_LINES,
    group: int = GROUP,
    progress: Callable[[Progress], None] = lambda now: None,
) -> Tally:
    """Rerank every line of a folder's files over a pool of Ray actors, or go on where an interrupted run stopped.

    The input is cut into units of so many lines. An actor streams a unit through `rag_rerank.files.rerank_file` into a
    file of its own, which appears when it is complete. An actor that dies is started again, and goes on in its unit
    behind the last group that was finished; lines of which three actors die, one after the other, end the run. Units
    and groups depend on the input alone: with one CPU for each actor, scores are the same to the last bit, however many
    actors there are and whichever of them die.

    Args:
        scorer: Goes to every actor by its settings alone; not loaded here. The actors' own `VLLMScorer` reads the key
            from ``VLLM_API_KEY`` on their machine.
        source: A file or a folder of files as `rerank_file` takes them, of rows or of pairs.
        target: The folder to write, with an output for each unit in the format of its input. Both must be on a file
            system that all machines see under the same path.
        share: How many actors, and what each gets of the machines.
        top_n: As in `rerank_file`.
        score_threshold: As in `rerank_file`.
        reorder: As in `rerank_file`.
        deadline: Seconds that a call to the scorer may take; None: 300 on a server, no limit for a local model.
        settings: What else decides about the result, such as the model; JSON values. None: what the scorer is shown as.
            Runs that differ in them, or in the input's files, don't go on from each other.
        restart: Throw away what an earlier run has left or made.
        unit_lines: Lines of a unit.
        group: Documents of one call to the scorer.
        progress: Called at the start and after each unit.

    Returns:
        The count of everything: ``lines == ranked + rejected + blank``.

    Raises:
        TypeError, ValueError: As `Scorer.rerank`, for wrong options.
        ConfigError: Ray is not installed, the machines don't have what is asked for, a file can't be used as asked, or
            another run is in the way.
        BackendError: No scores, and not through the fault of single lines; what was finished stays for the next run.
        OSError: A file can't be read or written.
    """
    options: dict[str, Any] = {"top_n": top_n, "score_threshold": score_threshold}
    scorer.rerank("", [], **options)  # refuses wrong options before any work
    if isinstance(unit_lines, bool) or not isinstance(unit_lines, int) or unit_lines < 1:
        raise ConfigError(f"unit_lines must be 1 or more, got {unit_lines!r}")
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target} is inside of the input; name a folder outside of it")
    folder, sources = sources_in(source.absolute())
    options |= {"reorder": reorder, "group": group}
    identity = {**options, "unit_lines": unit_lines, **({"scorer": repr(scorer)} if settings is None else settings)}
    with Record(target.absolute(), folder, sources, json.loads(json.dumps(identity)), restart=restart) as record:
        units = record.units(lambda: cut(folder, sources, unit_lines))
        left = [unit for unit in units if not record.layout.output(unit).exists()]
        finished = set(units) - set(left)
        tally = _sum(record.layout.tally_of(unit) for unit in finished)
        now = Progress(len(units), len(finished), replace(tally, resumed=tally.lines))
        progress(now)
        options["deadline"] = patience(scorer) if deadline is None else deadline
        for tally in _run(scorer, record.layout, options, left, share):
            now = Progress(len(units), now.finished + 1, _sum((now.tally, tally)))
            progress(now)
        if now.finished < now.units:  # blocks that fail are passed over where DataContext.max_errored_blocks says so
            raise BackendError(
                f"{now.units - now.finished} of {now.units} units were not finished; the same call goes on"
            )
        record.finish()
    return now.tally


def _run(scorer: Scorer, layout: Layout, options: dict[str, Any], units: list[Unit], share: Share) -> Iterator[Tally]:
    """Have the units scored by a pool of actors; the tally of each, as they finish."""
    if not units:
        return
    with connected() as ray, quiet(ray):
        items = ray.data.from_items([unit.as_text() for unit in units], override_num_blocks=len(units))
        outcomes = items.map_batches(
            ScoreUnits,
            fn_constructor_args=(scorer, layout, options),
            batch_size=1,
            batch_format="numpy",
            **pool_options(ray, scorer, share, len(units)),
        )
        try:
            for row in outcomes.iter_rows():
                yield outcome_of(row)
        except ray.exceptions.RayError as error:
            raise BackendError(
                f"Ray gave up: {str(error).strip().splitlines()[-1]}",
                remedy="What was finished is kept: the same command goes on behind it.",
            ) from error


def _sum(tallies: Iterable[Tally]) -> Tally:
    counts = [[getattr(tally, field.name) for field in fields(Tally)] for tally in tallies]
    return Tally(*map(sum, zip(*counts, strict=True)))
