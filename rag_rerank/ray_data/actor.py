"""What an actor does: units, one after the other, each from its file to its file."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rag_rerank.errors import BackendError
from rag_rerank.files import Tally, rejects_of, rerank_file
from rag_rerank.files.partial import write_whole
from rag_rerank.ray_data.pool import limit_threads
from rag_rerank.ray_data.record import Layout
from rag_rerank.ray_data.units import Unit
from rag_rerank.scorer import Scorer

_DEATHS = 3
_HANDOVER = 60.0  # seconds in which a process that is being killed on another machine lets go of its unit's files


class ScoreUnits:
    """Scores units: the class that ``map_batches`` gets, of which each actor makes one.

    Args:
        scorer: Loads its model in the actor, with the first unit.
        layout: Where the files are.
        options: Of `rerank_file`.
    """

    def __init__(self, scorer: Scorer, layout: Layout, options: Mapping[str, Any]) -> None:
        limit_threads()
        self._scorer, self._layout, self._options = scorer, layout, options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Texts of units in the column ``item``; pickled outcomes, for `outcome_of`, in the column ``outcome``."""
        return {"outcome": [self._outcome(Unit.from_text(str(text))) for text in batch["item"]]}

    def _outcome(self, unit: Unit) -> bytes:
        """The unit's tally, or the error that ends the run: returned, since Ray would wrap it in several of its own."""
        try:
            return pickle.dumps(self._score(unit))
        except Exception as error:  # noqa: BLE001 - it is raised where the outcome is read
            try:
                pickle.loads(pickled := pickle.dumps(error))  # noqa: S301 - our own
            except Exception:  # noqa: BLE001 - what can't travel is told
                return pickle.dumps(BackendError(f"{unit.target} failed with {type(error).__name__}: {error}"))
            return pickled

    def _score(self, unit: Unit) -> Tally:
        """Make the unit's output, unless it is there: the actor before this one may have died a moment too late."""
        layout = self._layout
        output, work, rejects = layout.output(unit), layout.work(unit), layout.rejects(unit)
        if not output.exists():
            for path in (output, work, layout.tally(unit), layout.began(unit)):
                path.parent.mkdir(parents=True, exist_ok=True)
            if not work.exists():
                self._count_deaths(unit)
                rerank_file(
                    self._scorer,
                    layout.source / unit.source,
                    work,
                    **self._options,
                    part=unit.part,
                    patience=_HANDOVER,
                    # After the last group, too, before the output appears: with that, the tally is always there.
                    progress=lambda tally, share: layout.write_tally(unit, replace(tally, resumed=0)),
                )
            if rejects_of(work).exists():
                rejects.parent.mkdir(parents=True, exist_ok=True)
                rejects_of(work).replace(rejects)
            work.replace(output)
        return layout.tally_of(unit)

    def _count_deaths(self, unit: Unit) -> None:
        """Give up on lines of which several actors died, one after the other: Ray would begin anew without end."""
        path = self._layout.began(unit)
        done = self._layout.tally_of(unit).lines if self._layout.tally(unit).exists() else 0
        deaths = 0
        if path.exists():  # whoever wrote it has not come to the end of the unit
            before, deaths = json.loads(path.read_bytes())
            deaths = deaths + 1 if before == done else 1
        if deaths >= _DEATHS:
            line = unit.part.first + done
            raise BackendError(
                f"{deaths} actors died one after the other, at what follows line {line} of {unit.source}",
                remedy="Is there too little memory for so many models on a machine? The same command goes on there.",
            )
        write_whole(path, json.dumps([done, deaths]).encode())


def outcome_of(row: Mapping[str, Any]) -> Tally:
    """The tally that an actor has returned, or its error, raised."""
    outcome = pickle.loads(row["outcome"])  # noqa: S301 - our own
    if isinstance(outcome, Exception):
        raise outcome
    assert isinstance(outcome, Tally)  # noqa: S101
    return outcome
