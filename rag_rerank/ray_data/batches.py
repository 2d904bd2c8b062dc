"""A step of a pipeline in Ray Data: batches of rows, and the same with scores."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from rag_rerank.errors import ConfigError
from rag_rerank.files.formats import encoded
from rag_rerank.files.rows import parsed, rank
from rag_rerank.ray_data.pool import ANY, Share, import_ray, limit_threads, pool_options
from rag_rerank.scorer import Scorer
from rag_rerank.vllm import VLLMScorer

BATCH_SIZE = 256  # rows
PATIENCE = 300.0  # seconds for a call to a server: nobody waits for it, and a server may start again


class ScoreBatch:
    """Scores batches of a Ray Dataset: the class to give to ``map_batches``, of which each actor makes one.

    Batches are Arrow tables (``batch_format="pyarrow"``). Rows with a ``query`` and a list of ``documents`` get
    ``ranked``, a list of ``{index, score}``, best first. Pairs, a ``query`` and a ``document``, get ``score``. Both get
    ``score_error``: null, or what is wrong with the row, which has no score then. All other columns stay.

    Args:
        scorer: A `LocalScorer` loads its model in each actor, once. A `VLLMScorer` has connections of its own, and
            reads its key from ``VLLM_API_KEY`` on the actor's machine.
        top_n: How many to keep of each list; None keeps all.
        score_threshold: Keep only scores at or above it, of lists.
        deadline: Seconds that a batch may take; None: 300 on a server, no limit for a local model.

    Raises:
        ConfigError: The columns are not there, or the scorer can't work as configured.
        BackendError: No scores, and not through the fault of single rows.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
        deadline: float | None = None,
    ) -> None:
        scorer.rerank("", [], top_n=top_n, score_threshold=score_threshold)  # refuses wrong options before any work
        limit_threads()
        self._scorer = scorer
        self._options = {
            "top_n": top_n,
            "score_threshold": score_threshold,
            "deadline": patience(scorer) if deadline is None else deadline,
        }

    def __call__(self, batch: Any) -> Any:
        """The batch, a pyarrow.Table, with its new columns."""
        pyarrow: Any = import_module("pyarrow")  # Ray Data brings it

        names = _columns(batch.schema.names, self._options)
        rows = batch.select(names).to_pylist()
        # The rows go through JSON, so that a row means here what it means in a file.
        lines = [parsed(number, encoded(row)) for number, row in enumerate(rows, 1)]
        rank(self._scorer, [line for line in lines if line.error is None], self._options)
        errors = pyarrow.array([line.error for line in lines], pyarrow.string())
        if names[1] == "document":
            scores = [line.ranked[0].score if line.ranked else None for line in lines]
            added = {"score": pyarrow.array(scores, pyarrow.float64())}
        else:
            kind = pyarrow.list_(pyarrow.struct({"index": pyarrow.int64(), "score": pyarrow.float64()}))
            found = [
                None if line.ranked is None else [{"index": item.index, "score": item.score} for item in line.ranked]
                for line in lines
            ]
            added = {"ranked": pyarrow.array(found, kind)}
        for name, column in {**added, "score_error": errors}.items():
            if name in batch.schema.names:
                batch = batch.drop_columns([name])
            batch = batch.append_column(name, column)
        return batch


def score_dataset(
    dataset: Any,
    scorer: Scorer,
    *,
    share: Share = ANY,
    batch_size: int = BATCH_SIZE,
    top_n: int | None = None,
    score_threshold: float | None = None,
    deadline: float | None = None,
) -> Any:
    """Score a Ray Dataset over a pool of actors, as `ScoreBatch` does.

    Args:
        dataset: A ``ray.data.Dataset`` of rows or pairs.
        scorer: Goes to every actor by its settings alone; not loaded here.
        share: How many actors, and what each gets of the machines. One that dies is started again, and what it was at
            is done again.
        batch_size: Rows of one call to the scorer. In float32 a score depends on it in the seventh digit.
        top_n: As in `ScoreBatch`.
        score_threshold: As in `ScoreBatch`.
        deadline: As in `ScoreBatch`.

    Returns:
        The ``ray.data.Dataset`` with more columns; nothing has run yet.

    Raises:
        ConfigError: Ray is not installed, or the machines don't have what is asked for.
        TypeError, ValueError: As `Scorer.rerank`, for wrong options.
    """
    ray = import_ray()
    settings = {"top_n": top_n, "score_threshold": score_threshold}
    scorer.rerank("", [], **settings)  # type: ignore[arg-type]  # refuses wrong options before any work
    return dataset.map_batches(
        ScoreBatch,
        fn_constructor_args=(scorer,),
        fn_constructor_kwargs={**settings, "deadline": deadline},
        batch_size=batch_size,
        batch_format="pyarrow",
        **pool_options(ray, scorer, share),
    )


def patience(scorer: Scorer) -> float | None:
    """Seconds that a call may take where nobody waits for it."""
    return PATIENCE if isinstance(scorer, VLLMScorer) else None


def _columns(names: list[str], options: Mapping[str, Any]) -> list[str]:
    if "query" not in names or not {"documents", "document"} & set(names):
        raise ConfigError(f'there must be columns "query" and "documents" or "document"; there are {", ".join(names)}')
    if "documents" in names:
        return ["query", "documents"]
    if (options["top_n"], options["score_threshold"]) != (None, None):
        raise ConfigError('top_n and score_threshold are for rows with "documents"; these are pairs')
    return ["query", "document"]
