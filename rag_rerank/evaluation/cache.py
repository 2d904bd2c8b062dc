"""Scores that are known already: one sqlite file for each scorer, keyed by the texts of query and document.

Several processes may use one file at once, and a process that is killed leaves it whole, with all in it that it had
scored.
"""

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from rag_rerank.errors import ConfigError
from rag_rerank.evaluation.identity import Identity

_FORMAT = 1
_PATIENCE = 60.0  # seconds to wait for another process that is writing
_KEYS_AT_A_TIME = 500  # sqlite before 3.32 takes 999

_SCHEMA = """
CREATE TABLE IF NOT EXISTS scores (pair BLOB PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS times (call BLOB PRIMARY KEY, seconds REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


def default_folder() -> Path:
    """``rag_rerank`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rag_rerank"


class ScoreCache:
    """Scores of one scorer, and how long its calls took.

    Args:
        folder: Where the file is, or is to be made.
        identity: Whose scores.

    Raises:
        ConfigError: The file can't be made, read or written, here and in all methods.
    """

    def __init__(self, folder: str | Path, identity: Identity) -> None:
        text = f"{_FORMAT} {identity.text()}"
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(identity.model).name)[:60] or "scorer"
        self.path = (
            Path(folder) / f"{slug}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.sqlite"
        )
        self._place = identity.place
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)
            try:
                self._database.executescript(_SCHEMA)
                self._database.execute("INSERT OR IGNORE INTO about VALUES ('scorer', ?)", (identity.text(),))
            except sqlite3.Error:
                self._database.close()
                raise

    def scores(self, query: str, documents: Sequence[str]) -> list[float | None]:
        """The score of each document, None where it is not known."""
        keys = [_key(query, document) for document in documents]
        known = self._look_up("SELECT pair, score FROM scores WHERE pair IN ({})", keys)
        return [known.get(key) for key in keys]

    def seconds(self, query: str, calls: Sequence[Sequence[str]]) -> list[float | None]:
        """How long scoring each of the lists of documents in one call once took in this place, None if it never was."""
        keys = [_key(self._place, query, *documents) for documents in calls]
        known = self._look_up("SELECT call, seconds FROM times WHERE call IN ({})", keys)
        return [known.get(key) for key in keys]

    def _look_up(self, statement: str, keys: Sequence[bytes]) -> dict[bytes, float]:
        found: dict[bytes, float] = {}
        with self._explained():
            for start in range(0, len(keys), _KEYS_AT_A_TIME):
                part = keys[start : start + _KEYS_AT_A_TIME]
                found.update(self._database.execute(statement.format(",".join("?" * len(part))), part))
        return found

    def keep(
        self, query: str, documents: Sequence[str], scores: Sequence[float | None], seconds: float | None = None
    ) -> None:
        """Write scores, but not None; and the time of the call, if it was one that is worth comparing.

        At once, in a transaction of its own, so that nothing is ever scored twice: 1.7 ms for 100 scores.
        """
        new = [(_key(query, text), score) for text, score in zip(documents, scores, strict=True) if score is not None]
        with self._explained(), self._transaction():
            self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", new)
            if seconds is not None:
                call = _key(self._place, query, *documents)
                self._database.execute("INSERT OR REPLACE INTO times VALUES (?, ?)", (call, seconds))

    def verify(self, probe: Sequence[float]) -> bool:
        """Whether the scorer still scores as it did; if not, all that is known of it is forgotten.

        Args:
            probe: What it now gives for pairs that are always the same. They may differ by 0.01, or 1 %, as scores of
                half precision do.
        """
        with self._explained(), self._transaction():
            row = self._database.execute("SELECT value FROM about WHERE name = 'probe'").fetchone()
            before = [] if row is None else json.loads(row[0])
            same = row is None or (
                len(before) == len(probe)
                and all(abs(new - old) <= 0.01 * max(1.0, abs(old)) for new, old in zip(probe, before, strict=True))
            )
            if not same:
                self._database.execute("DELETE FROM scores")
                self._database.execute("DELETE FROM times")
            if row is None or not same:
                self._database.execute("INSERT OR REPLACE INTO about VALUES ('probe', ?)", (json.dumps(list(probe)),))
        return same

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")  # not when it first writes: two that have read would then block
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"the cache {self.path} can't be used: {error}. Delete the file, name another folder, or do without."
            ) from error


def _key(*texts: str) -> bytes:
    """16 bytes that no other sequence of texts has."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d " % len(data) + data)
    return digest.digest()
