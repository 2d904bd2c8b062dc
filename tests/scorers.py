"""Scorers with no model, for testing what stands around one."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from rag_rerank import Scorer
from rag_rerank.errors import BackendUnavailable, DocumentRejected


class WordOverlap(Scorer):
    """Scores a document by the share of the query's words that it has; counts its calls."""

    model_name = "word overlap"

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[str], float | None]] = []

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        self.calls.append((queries, documents, until))
        rows = queries * len(documents) if len(queries) == 1 else queries
        return [overlap(query, document) for query, document in zip(rows, documents, strict=True)]


class Answers(Scorer):
    """Gives whatever a function of the documents gives: wrong lengths, NaN, errors."""

    model_name = "answers"

    def __init__(self, answer: Callable[[list[str]], list[float]]) -> None:
        self._answer = answer

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        return self._answer(documents)


class Journal(WordOverlap):
    """Writes down each document that it scores; dies, refuses or is down where a document says so."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        for document in documents:
            died = self.path.with_name("died")
            if "deadly" in document or ("mortal" in document and not died.exists()):
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if "down" in document and not self.path.with_name("up").exists():
                raise BackendUnavailable("nobody there", attempts=3)
        poisoned = [index for index, document in enumerate(documents) if "poison" in document]
        if poisoned:
            raise DocumentRejected(f"documents{poisoned} rejected: odd", indices=poisoned)
        with self.path.open("a") as file:
            file.writelines(f"{document}\n" for document in documents)
        return super()._score(queries, documents, until)

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()


def overlap(query: str, document: str) -> float:
    words = set(query.split())
    return len(words & set(document.split())) / max(1, len(words))
