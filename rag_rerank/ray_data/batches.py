"""A step of a pipeline in Ray Data: batches of rows, and the same with scores."""

from importlib import import_module
from typing import Any

from rag_rerank.errors import ConfigError
from rag_rerank.files.formats import added_column, encode
from rag_rerank.files.rows import GROUP, Options, parse, rank
from rag_rerank.identity import Identity
from rag_rerank.ray_data.pool import DEFAULT_POOL, Pool, import_ray
from rag_rerank.runs import Asker
from rag_rerank.scorer import Scorer


class ScoreBatch:
    """Scores batches of a Ray Dataset, as Arrow tables; each actor of `score_dataset` makes one."""

    def __init__(self, scorer: Scorer, **options: Any) -> None:
        self._options = Options(**options)
        self._options.check(scorer)
        deadline, instruction = self._options.deadline_of(scorer), self._options.instruction
        self._asker = Asker(scorer, Identity({}, steady=False), deadline, instruction)  # whoever it is

    def __call__(self, batch: Any) -> Any:
        """Score a pyarrow.Table; returns it with its new columns."""
        pyarrow: Any = import_module("pyarrow")  # Ray Data brings it
        names = batch.schema.names
        kind = "documents" if "documents" in names else "document"
        if not {"query", kind} <= set(names):
            there = ", ".join(names)
            raise ConfigError(f'there must be columns "query" and "documents" or "document"; there are {there}')
        if kind == "document":
            self._options.refuse_pair("each row is a pair")
        # The rows go through JSON, so that a row means here what it means in a file.
        rows = batch.select(["query", kind]).to_pylist()
        lines = [parse(number, encode(row)) for number, row in enumerate(rows, 1)]
        rank(self._asker, lines, self._options)
        name, made = added_column(pyarrow, pairs=kind == "document")
        values = [None if line.ranked is None else line.added()[name] for line in lines]
        added = {name: (values, made), "score_error": ([line.error for line in lines], pyarrow.string())}
        batch = batch.drop_columns([name for name in added if name in names])
        for name, (values, made) in added.items():
            batch = batch.append_column(name, pyarrow.array(values, made))
        return batch


def score_dataset(
    dataset: Any, scorer: Scorer, *, pool: Pool = DEFAULT_POOL, batch_size: int = GROUP, **options: Any
) -> Any:
    """Score a Ray Dataset over a pool of actors.

    Rows with a ``query`` and a list of ``documents`` get ``ranked``, a list of ``{index, score}``, best first. Pairs, a
    ``query`` and a ``document``, get ``score``. Both get ``score_error``: null, or what is wrong with the row, which
    has no score then. All other columns stay.

    Args:
        dataset: A ``ray.data.Dataset`` of rows or pairs.
        scorer: Goes to every actor by its settings alone; not loaded here.
        pool: How many actors, and what each gets of the machines. One that dies is started again, and its batch is
            scored again.
        batch_size: Rows of one call to the scorer. In float32 a score depends on it in the seventh digit.
        **options: Of `rag_rerank.files.rerank_file`: what limits its results, `instruction`, `deadline` of a batch.

    Returns:
        The ``ray.data.Dataset`` with more columns; nothing has run yet.

    Raises:
        ConfigError: Ray is not installed, or the machines don't have what is asked for; from an actor, the columns are
            not there, or the scorer can't work as configured.
        TypeError, ValueError: As `Scorer.rerank`, for wrong options.
        BackendError: From an actor: no scores, and not through the fault of single rows.
    """
    data = import_ray("ray.data")
    ScoreBatch(scorer, **options)  # refuses wrong options before any work
    actors, resources = pool.fit(import_ray(), scorer)
    return dataset.map_batches(
        ScoreBatch,
        fn_constructor_args=(scorer,),
        fn_constructor_kwargs=options,
        batch_size=batch_size,
        batch_format="pyarrow",
        # One batch at a time: what waits at one actor, an idle one can't take.
        compute=data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        **resources,
    )
