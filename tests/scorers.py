"""Scorers with no model, for testing what stands around one."""

from collections.abc import Callable

from rag_rerank import Scorer


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


def overlap(query: str, document: str) -> float:
    words = set(query.split())
    return len(words & set(document.split())) / max(1, len(words))
