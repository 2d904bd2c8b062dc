"""The score cache: one sqlite file, keyed by the scorer and the texts of query and document.

Several processes may use it at once, and one that is killed leaves it whole, with all in it that it had scored.
"""

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rag_rerank.errors import ConfigError
from rag_rerank.identity import Identity

_MOST_KEYS = 999  # of one statement, in any build of sqlite
_LOCK_TIMEOUT = 60.0  # seconds to wait for another process that is writing

_SCHEMA = """
CREATE TABLE IF NOT EXISTS scores (pair BLOB PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS times (call BLOB PRIMARY KEY, seconds REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scorers (number INTEGER PRIMARY KEY, model TEXT NOT NULL, identity TEXT NOT NULL);
"""

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """Name ``rag_rerank`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rag_rerank"


class ScoreCache:
    """The scores of one scorer, and how long its calls took; in memory without a folder.

    A ConfigError says that the file can't be used. Scorers that differ in anything that `Identity` compares never see
    scores of each other. Where one is new, a logged warning says in what it differs from the last one with its name.
    """

    def __init__(self, folder: str | Path | None, identity: Identity) -> None:
        self.path = None if folder is None else Path(folder) / "scores.sqlite"
        self._place = identity.place
        with self._explained():
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path or ":memory:", timeout=_LOCK_TIMEOUT, isolation_level=None)
            try:
                self._database.executescript(_SCHEMA)
                with self._transaction():
                    (page_size,) = self._database.execute("PRAGMA page_size").fetchone()
                    # Of a file that was cut within a page sqlite reads zeros for what is missing, a score among them.
                    if self.path is not None and self.path.stat().st_size % page_size:
                        raise sqlite3.DatabaseError("it was cut off")  # noqa: TRY301 - joins the other ways
                    self._salt = self._register(identity)
            except BaseException:
                self._database.close()
                raise

    def _register(self, identity: Identity) -> bytes:
        """Find the scorer among those that have scores here, or add it; its keys are hashed with what this returns.

        So they are lost with its entry, where a damaged file has lost that, and are never taken for another's.
        """
        model, text = identity.name or identity.facts.get("model", ""), json.dumps(identity.to_dict())
        entries = self._database.execute("SELECT identity, model FROM scorers ORDER BY number").fetchall()
        known = {entry: Identity.from_dict(json.loads(entry)) for entry, _ in entries}
        # Probes are compared within rounding, so that no hash of the identity finds the entry.
        same = next((entry for entry, other in known.items() if not identity.differences(other)), None)
        if same is None:
            self._database.execute("INSERT INTO scorers (model, identity) VALUES (?, ?)", (model, text))
            for before in [entry for entry, name in entries if name == model][-1:]:
                changes = "; ".join(identity.differences(known[before]))
                logger.warning("%s is not the scorer whose scores are cached; scored anew: %s", model, changes)
        return hashlib.sha256((same or text).encode()).digest()

    def scores(self, query: str, documents: Sequence[str]) -> list[float | None]:
        """Look up the score of each document, None where it is not known."""
        keys = [self._key(query, document) for document in documents]
        known: dict[bytes, float] = {}
        with self._explained():
            for start in range(0, len(keys), _MOST_KEYS):
                part = keys[start : start + _MOST_KEYS]
                marks = ", ".join("?" * len(part))
                statement = f"SELECT pair, score FROM scores WHERE pair IN ({marks})"  # noqa: S608 - question marks
                known |= self._database.execute(statement, part)
        return [known.get(key) for key in keys]

    def seconds(self, query: str, documents: Sequence[str]) -> float | None:
        """Look up how long a call with these very documents took in this place, None if there was none."""
        call = self._key(self._place, query, *documents)
        with self._explained():
            row = self._database.execute("SELECT seconds FROM times WHERE call = ?", (call,)).fetchone()
        return row and float(row[0])

    def keep(
        self, query: str, documents: Sequence[str], scores: Sequence[float | None], seconds: float | None = None
    ) -> None:
        """Write scores, but not None; and the time of the call, if it was one that is worth comparing.

        At once, in a transaction of its own, so that a kill loses one call: 1.7 ms for 100 scores.
        """
        pairs = zip(documents, scores, strict=True)
        new = [(self._key(query, text), score) for text, score in pairs if score is not None]
        with self._explained(), self._transaction():
            self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", new)
            if seconds is not None:
                call = self._key(self._place, query, *documents)
                self._database.execute("INSERT OR REPLACE INTO times VALUES (?, ?)", (call, seconds))

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._database:  # commits, or rolls back
            self._database.execute("BEGIN IMMEDIATE")  # not when it first writes: two that have read would then block
            yield

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, KeyError) as error:  # the latter two: of an entry that is damaged
            raise ConfigError(
                f"the cache {self.path} can't be used: {error}. Delete the file if no other process uses it, name "
                "another folder, or do without."
            ) from error

    def _key(self, *texts: str) -> bytes:
        """16 bytes that no other scorer or sequence of texts has."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        joined = b"".join(b"%d " % len(data) + data for data in encoded)
        return hashlib.blake2b(joined, digest_size=16, key=self._salt).digest()
