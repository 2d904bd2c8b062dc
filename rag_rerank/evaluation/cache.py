"""The score cache: one sqlite file for each scorer, keyed by the texts of query and document.

Several processes may use one file at once, and a process that is killed leaves it whole, with all in it that it had
scored.
"""

import hashlib
import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Self

from rag_rerank.errors import ConfigError
from rag_rerank.identity import Identity

_FORMAT = 2
_LOCK_TIMEOUT = 60.0  # seconds to wait for another process that is writing
_KEYS_PER_QUERY = 500  # sqlite before 3.32 takes 999

_SCHEMA = """
CREATE TABLE IF NOT EXISTS scores (pair BLOB PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS times (call BLOB PRIMARY KEY, seconds REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """Name ``rag_rerank`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rag_rerank"


class ScoreCache:
    """The scores of one scorer, and how long its calls took.

    Scorers that differ in anything that `Identity` compares have files of their own. Where a file is new, one logged
    warning says in what the scorer differs from the last one of the same name.

    Args:
        folder: Where the file is, or is to be made.
        identity: Whose scores.

    Raises:
        ConfigError: The file can't be made, read or written, here and in all methods.
    """

    def __init__(self, folder: str | Path, identity: Identity) -> None:
        model = identity.facts.get("model", "")
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name)[:60] or "scorer"
        facts = json.dumps([_FORMAT, dict(identity.facts)], sort_keys=True)
        name = f"{slug}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
        self._place = identity.place
        # The name tells the facts, but probes are compared within rounding: the file says whose it is.
        for number in count():
            self.path = Path(folder) / f"{name}{f'-{number}' if number else ''}.sqlite"
            is_new, owner = self._open(identity)
            if not identity.differences(owner):
                break
            self.close()
        others = self.path.parent.glob(f"{slug}-{'[0-9a-f]' * 16}*.sqlite") if is_new else ()
        for other in sorted(others, key=_modified, reverse=True):
            before = None if other == self.path else _owner(other)
            if before is not None:
                changes = "; ".join(identity.differences(before))
                logger.warning("%s is not the scorer whose scores are cached; scored anew: %s", model, changes)
                break

    def _open(self, identity: Identity) -> tuple[bool, Identity]:
        """Open the file at `path`, made where there is none, and tell whether it is new and whose it is."""
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=_LOCK_TIMEOUT, isolation_level=None)
            try:
                self._database.executescript(_SCHEMA)
                text = json.dumps(identity.to_dict())
                made = self._database.execute("INSERT OR IGNORE INTO about VALUES ('identity', ?)", (text,))
                return made.rowcount == 1, _read_owner(self._database)
            except BaseException:
                self._database.close()
                raise

    def scores(self, query: str, documents: Sequence[str]) -> list[float | None]:
        """Look up the score of each document, None where it is not known."""
        keys = [_key(query, document) for document in documents]
        known = self._look_up("SELECT pair, score FROM scores WHERE pair IN ({})", keys)
        return [known.get(key) for key in keys]

    def seconds(self, query: str, calls: Sequence[Sequence[str]]) -> list[float | None]:
        """Look up how long a call with each of these lists of documents took in this place, None if there was none."""
        keys = [_key(self._place, query, *documents) for documents in calls]
        known = self._look_up("SELECT call, seconds FROM times WHERE call IN ({})", keys)
        return [known.get(key) for key in keys]

    def _look_up(self, statement: str, keys: Sequence[bytes]) -> dict[bytes, float]:
        values: dict[bytes, float] = {}
        with self._explained():
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                part = keys[start : start + _KEYS_PER_QUERY]
                values.update(self._database.execute(statement.format(",".join("?" * len(part))), part))
        return values

    def keep(
        self, query: str, documents: Sequence[str], scores: Sequence[float | None], seconds: float | None = None
    ) -> None:
        """Write scores, but not None; and the time of the call, if it was one that is worth comparing.

        At once, in a transaction of its own, so that a kill loses one call: 1.7 ms for 100 scores.
        """
        new = [(_key(query, text), score) for text, score in zip(documents, scores, strict=True) if score is not None]
        with self._explained(), self._transaction():
            self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", new)
            if seconds is not None:
                call = _key(self._place, query, *documents)
                self._database.execute("INSERT OR REPLACE INTO times VALUES (?, ?)", (call, seconds))

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
                f"the cache {self.path} can't be used: {error}. Delete the file if no other process uses it, name "
                "another folder, or do without."
            ) from error


def _read_owner(database: sqlite3.Connection) -> Identity:
    try:
        (text,) = database.execute("SELECT value FROM about WHERE name = 'identity'").fetchone()
        return Identity.from_dict(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise sqlite3.DataError("it does not say whose scores it has") from error


def _owner(path: Path) -> Identity | None:
    """Whose scores a file has; None where it does not say."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", timeout=0, uri=True)) as database:
            return _read_owner(database)
    except sqlite3.Error:  # damaged, busy, or of an older version
        return None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # deleted meanwhile
        return 0.0


def _key(*texts: str) -> bytes:
    """16 bytes that no other sequence of texts has."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d " % len(data) + data)
    return digest.digest()
