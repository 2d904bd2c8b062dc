"""Scorers with no model, for testing what stands around one."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rag_rerank import LocalScorer, Scorer
from rag_rerank.errors import BackendUnavailable, DocumentRejected
from rag_rerank.identity import PROBES


def held(scorer: LocalScorer, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Load its model, which runs from now on only when the event is set: nobody who waits for it gets on before."""
    scorer.warmup()
    go, kind = threading.Event(), type(scorer._engine.model.score_type)
    run = kind.run

    def running(*arguments: object) -> object:
        assert go.wait(60)
        return run(*arguments)

    monkeypatch.setattr(kind, "run", running)
    return go


class WordOverlap(Scorer):
    """Scores a document by the share of the query's words that it has; counts its calls, without those of `identity`.

    Args:
        weight: What each score is multiplied by.
        stop_at: The call in which Ctrl-C is pressed, from 0.
        delay: Seconds that each call takes.
        remote: Whether it says that it is on another machine.
    """

    model_name = "word overlap"

    def __init__(
        self, *, weight: float = 1.0, stop_at: int | None = None, delay: float = 0.0, remote: bool = False
    ) -> None:
        self.calls: list[tuple[list[str], list[str], float | None]] = []
        self.weight, self.stop_at, self.delay, self.remote = weight, stop_at, delay, remote

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        if not is_probe(documents):
            if len(self.calls) == self.stop_at:
                raise KeyboardInterrupt
            self.calls.append((queries, documents, until))
            time.sleep(self.delay)
        rows = queries * len(documents) if len(queries) == 1 else queries
        return [self.weight * overlap(query, document) for query, document in zip(rows, documents, strict=True)]


class Answers(Scorer):
    """Gives whatever a function of the documents gives: wrong lengths, NaN, errors."""

    model_name = "answers"

    def __init__(self, answer: Callable[[list[str]], list[float]]) -> None:
        self._answer = answer

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        return self._answer(documents)


class Journal(WordOverlap):
    """Writes down each document that it scores; dies, refuses or is down where a document says so."""

    def __init__(self, path: Path, *, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
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
            raise DocumentRejected(f"documents{poisoned} rejected: odd", indices=poisoned, reason="odd")
        if not is_probe(documents):
            with self.path.open("a") as file:
                file.writelines(f"{document}\n" for document in documents)
        return super()._score(queries, documents, until)

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()


def is_probe(documents: Sequence[str]) -> bool:
    """Tell the calls of `Scorer.identity`."""
    return list(documents) == [document for _, document in PROBES]


def overlap(query: str, document: str) -> float:
    words = set(query.split())
    return len(words & set(document.split())) / max(1, len(words))
