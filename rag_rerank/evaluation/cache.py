"""The score cache: one sqlite file, keyed by the scorer and the texts of query and document.

Several processes may use it at once, and one that is killed leaves it whole, with all in it that it had scored.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rag_rerank.identity import Identity
from rag_rerank.runs import Store

_LOCK_TIMEOUT = 60.0  # seconds to wait for another process that is writing
_TABLES = (
    "scores (pair BLOB PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID",
    "times (call BLOB PRIMARY KEY, seconds REAL NOT NULL) WITHOUT ROWID",
)

logger = logging.getLogger(__name__)


def default_folder() -> Path:
    """Name ``rag_rerank`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rag_rerank"


class ScoreCache(Store):
    """The scores of one scorer, and how long its calls took; in memory without a folder.

    Scorers that differ in anything that `Identity` compares never see scores of each other. Where one is new, a logged
    warning says in what it differs from the last one with its name.
    """

    def __init__(self, folder: str | Path | None, identity: Identity) -> None:
        path = None if folder is None else Path(folder) / "scores.sqlite"
        self._identity = identity
        super().__init__(path, *_TABLES, wait=_LOCK_TIMEOUT)

    def _begin(self) -> None:
        known = self.scorers
        # Probes are compared within rounding, so that no hash of the identity finds the entry.
        same = next((each for each in known if not self._identity.differences(each)), None)
        if same is None:
            self.add_scorer(self._identity)
            name = _name(self._identity)
            for before in [each for each in known if _name(each) == name][-1:]:
                changes = "; ".join(self._identity.differences(before))
                logger.warning("%s is not the scorer whose scores are cached; scored anew: %s", name, changes)
        # Keys are hashed with this: they are lost with the entry, where a damaged file has lost that, and are never
        # taken for another's.
        self._salt = hashlib.sha256(json.dumps(asdict(same or self._identity)).encode()).digest()

    def scores(self, query: str, documents: Sequence[str]) -> list[float | None]:
        """Look up the score of each document, None where it is not known."""
        return [self._known("SELECT score FROM scores WHERE pair = ?", query, text) for text in documents]

    def seconds(self, query: str, documents: Sequence[str]) -> float | None:
        """Look up how long a call with these very documents took in this place, None if there was none."""
        return self._known("SELECT seconds FROM times WHERE call = ?", self._identity.place, query, *documents)

    def _known(self, statement: str, *texts: str) -> float | None:
        return next((value for (value,) in self.execute(statement, self._key(*texts))), None)

    def keep(
        self, query: str, documents: Sequence[str], scores: Sequence[float | None], seconds: float | None = None
    ) -> None:
        """Write scores, but not None; and the time of the call, if it was one that is worth comparing.

        At once, in a transaction of its own, so that a kill loses one call: 1.7 ms for 100 scores.
        """
        pairs = zip(documents, scores, strict=True)
        with self.transaction():
            self.write("scores", [(self._key(query, text), score) for text, score in pairs if score is not None])
            if seconds is not None:
                self.write("times", [(self._key(self._identity.place, query, *documents), seconds)])

    def _key(self, *texts: str) -> bytes:
        """16 bytes that no other scorer or sequence of texts has."""
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        joined = b"".join(b"%d " % len(data) + data for data in encoded)
        return hashlib.blake2b(joined, digest_size=16, key=self._salt).digest()


def _name(identity: Identity) -> str:
    return identity.name or identity.facts.get("model", "")
