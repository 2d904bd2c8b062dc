"""What runs that take long share: a file that keeps what they have made, and one scorer that makes all of it."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rag_rerank.errors import (
    FAILED_STATUSES,
    AuthError,
    BackendUnavailable,
    ConfigError,
    DeadlineExceeded,
    DocumentRejected,
    RerankError,
)
from rag_rerank.identity import PROBES, Identity
from rag_rerank.scorer import Scorer

_PROBE = PROBES[0][0], [document for query, document in PROBES if query == PROBES[0][0]]


class Store:
    """A sqlite file; what one `transaction` writes is on the disk whole or not at all, however its process ends.

    A ConfigError says that it can't be used.

    Args:
        path: The file. None: in memory.
        tables: What a subclass keeps in it, as sqlite declares it, beside who has made it.
        wait: Seconds to wait for another process that is writing.
        alone: Keep other processes out until it is closed.
    """

    def __init__(self, path: Path | None, *tables: str, wait: float = 0.0, alone: bool = False) -> None:
        self.path = path
        is_new = False
        with self._explained():
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path or ":memory:", timeout=wait, isolation_level=None)
        self.close = self._database.close
        try:
            if alone:
                self.execute("PRAGMA locking_mode = EXCLUSIVE")
                with self.transaction():
                    pass  # waits for the lock, which is then kept
                self.execute("PRAGMA journal_mode = WAL")  # one sync a transaction instead of four
            with self.transaction():
                is_new = not self.execute("SELECT name FROM sqlite_master")
                ((page_size,),) = self.execute("PRAGMA page_size")
                # Of a file that was cut within a page sqlite reads zeros for what is missing, a score among them.
                if path is not None and path.stat().st_size % page_size:
                    raise self._unusable("it was cut off")  # noqa: TRY301 - the file is closed
                for table in ("scorers (number INTEGER PRIMARY KEY, identity TEXT NOT NULL)", *tables):
                    self.execute(f"CREATE TABLE IF NOT EXISTS {table}")
                self._begin()
        except BaseException:
            self.close()
            if path is not None and is_new:
                path.unlink(missing_ok=True)
            raise

    def _begin(self) -> None:
        """Read and write what there must be, or refuse the file."""

    @property
    def scorers(self) -> list[Identity]:
        """Who has made what is in it, the latest last."""
        try:
            rows = self.execute("SELECT identity FROM scorers ORDER BY number")
            return [Identity(**json.loads(text)) for (text,) in rows]
        except (json.JSONDecodeError, TypeError) as error:
            raise self._unusable(error) from error

    def add_scorer(self, identity: Identity) -> None:
        """Write down who makes what comes now."""
        self.write("scorers", [(None, json.dumps(asdict(identity)))])

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep what is written in this block, or nothing of it where an error ends it."""
        self.execute("BEGIN IMMEDIATE")  # not when it first writes: two that have read would then block
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # of a file that is damaged
                self._database.rollback()
            raise

    def execute(self, statement: str, *values: Any) -> list[Any]:
        """Execute a statement; returns the rows that it gives."""
        return list(self.each(statement, *values))

    def each(self, statement: str, *values: Any) -> Iterator[Any]:
        """Yield one row after the other."""
        with self._explained():
            yield from self._database.execute(statement, values)

    def write(self, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Write rows, in the place of those that are there under the same key."""
        if rows:
            marks = ", ".join("?" * len(rows[0]))
            with self._explained():
                self._database.executemany(f"REPLACE INTO {table} VALUES ({marks})", rows)  # noqa: S608 - marks

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if getattr(error, "sqlite_errorname", "") == "SQLITE_BUSY":
                raise ConfigError(f"{self.path} can't be used: another process is writing it") from error
            raise self._unusable(error) from error

    def _unusable(self, why: object) -> ConfigError:
        remedy = "If files may be made there, the disk has room, and no other process uses it, delete it to start over."
        return ConfigError(f"{self.path} can't be used: {why}. {remedy}")


class Asker:
    """Asks a scorer for what many queries need, and notices when another one answers in its place.

    While a server scores, a known query is part of each call; if its scores change, the server is asked anew who it is.

    Args:
        scorer: The scorer.
        identity: Who it was when the run began; another one is refused with a ConfigError.
        deadline: Seconds that a call may take.
        instruction: As in `Scorer.score`.
    """

    def __init__(
        self, scorer: Scorer, identity: Identity, deadline: float | None, instruction: str | None = None
    ) -> None:
        self._scorer, self._identity, self._deadline, self._instruction = scorer, identity, deadline, instruction
        self._probes = scorer.remote and identity.steady
        self._known = Identity({}, identity.probes[: len(_PROBE[1])])

    def ask(
        self, queries: Sequence[Any], documents: Sequence[Sequence[Any]], *, probe: bool = True
    ) -> list[list[float] | RerankError]:
        """Give each query the scores of its documents; or its error, if the scorer works but can't score these.

        Where another scorer answered this call, that is a ConfigError; without `probe`, only the next one tells.
        """
        # The probe's two documents in a call of 256 cost 0.8 %. In half precision their scores depend on the rest of
        # the call, so a difference alone proves nothing: `identity`, whose call is always the same, decides.
        probed = self._probes and probe
        outcomes = self._scorer.rerank_batch(
            [*queries, *[_PROBE[0]] * probed],
            [*documents, *[_PROBE[1]] * probed],
            instruction=self._instruction,
            deadline=self._deadline,
            on_error="return",
        )
        found = [outcome if isinstance(outcome, RerankError) else _scores(outcome) for outcome in outcomes]
        known = found.pop() if probed else []
        if isinstance(known, RerankError):
            raise known
        errors = [outcome for outcome in found if isinstance(outcome, RerankError)]
        for error in errors:
            # No query can cause these.
            unavailable = isinstance(error, BackendUnavailable) and error.status not in FAILED_STATUSES
            if unavailable or isinstance(error, AuthError | DeadlineExceeded) or getattr(error, "whole", False):
                raise error
        told = any(isinstance(error, DocumentRejected) for error in errors)
        if errors and not (told or known or any(isinstance(each, list) and each for each in found)):
            self._scorer.score(*PROBES[0], deadline=self._deadline)  # this raises if the queries are not to blame
        if known and (now := Identity({}, known)).differences(self._known):
            if changes := self._scorer.identity(deadline=self._deadline).differences(self._identity):
                became = f"{self._scorer.model_name} became another scorer during the run: {'; '.join(changes)}"
                raise ConfigError(f"{became}. Go on with the one that began, or start over (rerank: --restart)")
            self._known = now
        return found


def _scores(ranked: Iterable[Any]) -> list[float]:
    return [item.score for item in sorted(ranked, key=lambda item: item.index)]
