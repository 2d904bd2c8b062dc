"""What an actor does: shards, one after the other, each from its file to its file."""

import json
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any
from uuid import uuid4

from rag_rerank.errors import BackendError
from rag_rerank.files import Tally, rejects_of, rerank_file
from rag_rerank.files.partial import refuse_changes, write_whole
from rag_rerank.identity import Identity
from rag_rerank.ray_data.pool import limit_threads
from rag_rerank.ray_data.shards import Folders, Shard
from rag_rerank.scorer import Scorer

_DEATHS = 3
_DEATHS_REMEDY = "Is there too little memory for so many models on a machine? The same command continues there."
_LOCK_TIMEOUT = 60.0  # seconds in which a process that is being killed on another machine releases its shard's files


class ScoreShards:
    """Scores shards with the options of `rerank_file`: the class that ``map_batches`` gets; each actor makes one."""

    def __init__(
        self, scorer: Scorer, folders: Folders, shards: Sequence[Shard], options: Mapping[str, Any], run: str
    ) -> None:
        limit_threads()
        self._scorer, self._folders, self._shards, self._options = scorer, folders, shards, options
        self._run = run  # tells the actors of this run from those of earlier ones

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score the shards whose positions are in the column ``item``; pickled outcomes go to ``outcome``."""
        return {"outcome": [self._outcome(int(position)) for position in batch["item"]]}

    def _outcome(self, position: int) -> bytes:
        """Pickle the shard's tally, or the error that ends the run, which Ray would wrap in several of its own."""
        try:
            self._check_scorer()
            return pickle.dumps(Tally() if position < 0 else self._score(self._shards[position]))
        except Exception as error:  # noqa: BLE001 - it is raised where the outcome is read
            try:
                pickle.loads(pickled := pickle.dumps(error))  # noqa: S301 - our own
            except Exception:  # noqa: BLE001 - an error that can't be pickled is described
                return pickle.dumps(BackendError(f"an actor failed with {type(error).__name__}: {error}"))
            return pickled

    def _check_scorer(self) -> None:
        """Refuse a scorer that is not the one that the run began with; the first actor writes down who that is."""
        identity, path = self._scorer.identity(), self._folders.scorer
        if not path.exists():
            write_whole(new := path.with_name(f"{uuid4()}.json"), json.dumps(identity.to_dict()).encode())
            try:
                os.link(new, path)  # unlike a renaming, it fails where another actor was faster
            except FileExistsError:
                pass
            finally:
                new.unlink()
        refuse_changes(self._folders.target, Identity.from_dict(json.loads(path.read_bytes())), identity)

    def _score(self, shard: Shard) -> Tally:
        """Make the shard's output, unless it exists: the actor before this one may have died a moment too late."""
        folders = self._folders
        output, work, rejects = folders.output(shard), folders.own / "work" / shard.name, folders.rejects(shard)
        if not output.exists():
            for path in (output, work, rejects, folders.progress(shard)):
                path.parent.mkdir(parents=True, exist_ok=True)
            if not work.exists():
                options = {**self._options, "part": shard.part, "lock_timeout": _LOCK_TIMEOUT}
                source = folders.source / shard.source
                rerank_file(self._scorer, source, work, **options, progress=self._record(shard))
            if rejects_of(work).exists():
                rejects_of(work).replace(rejects)
            work.replace(output)
        return folders.tally(shard)

    def _record(self, shard: Shard) -> Callable[[Tally, float], None]:
        """Record the progress of a shard, and give up on lines at which several actors died: Ray never would."""
        path = self._folders.progress(shard)
        before = json.loads(path.read_bytes()) if path.exists() else {}
        start: list[int] = []  # how many lines were finished when this actor began
        deaths = 0

        def record(tally: Tally, fraction: float) -> None:
            nonlocal deaths
            if not start:
                start.append(tally.lines)
                if before.get("run") == self._run:  # whoever wrote it has not come to the end of the shard
                    deaths = before["deaths"] + 1 if before["start"] == tally.lines else 1
                if deaths >= _DEATHS:
                    where = f"at what follows line {shard.part.first + tally.lines} of {shard.source}"
                    raise BackendError(f"{deaths} actors died one after the other, {where}", remedy=_DEATHS_REMEDY)
            # After the last group, too, before the output appears: an output always has its tally.
            state = {"run": self._run, "start": start[0], "deaths": deaths, "tally": asdict(replace(tally, resumed=0))}
            write_whole(path, json.dumps(state).encode())

        return record


def outcome_of(row: Mapping[str, Any]) -> Tally:
    """Read the tally that an actor has returned, or raise its error."""
    outcome: Tally | Exception = pickle.loads(row["outcome"])  # noqa: S301 - our own
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
