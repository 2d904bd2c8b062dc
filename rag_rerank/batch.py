"""Several queries in as few calls to the back end as are good for it, and what comes of each."""

from collections.abc import Callable, Iterator
from typing import Any

from rag_rerank.errors import BackendError, ContentError, RerankError
from rag_rerank.inputs.multimodal import Prepared
from rag_rerank.inputs.preparing import is_one, is_slow, prepare, prepare_all
from rag_rerank.isolation import Outcome, failure, naming_query
from rag_rerank.ranking import Ranking, warn_of

MOST_DOCUMENTS = 1024
"""Of one call to the back end for a batch of queries: enough to keep any of them busy, few enough that ten thousand
queries need not be answered in the time that one call may take."""


class Batch:
    """The queries of a call, each with its documents, and what came of them.

    `alone` is the one query of `Scorer.rerank`, whose errors name no query.
    """

    def __init__(self, queries: Any, documents: Any, ranking: Ranking, *, alone: bool = False) -> None:
        if not alone:
            if is_one(queries) or is_one(documents):
                raise TypeError("queries and documents must be sequences, the latter of sequences; for one use rerank")
            queries, documents = list(queries), list(documents)
            if len(queries) != len(documents):
                raise ValueError(f"got {len(queries)} queries and documents for {len(documents)}: one list for each")
        for each in documents:
            if is_one(each):
                kind = type(each).__name__
                raise TypeError(f"documents must be a sequence of strings, got one {kind}; pass [document]")
        self._given = [
            (query, list(each) if isinstance(each, Iterator) else each)
            for query, each in zip(queries, documents, strict=True)
        ]
        self.ranking, self._alone = ranking, alone
        self._pairs: list[tuple[list[Prepared], list[Prepared]]] = []
        self._outcomes: list[list[Outcome]] = []
        self._positions: list[int] = []

    @property
    def is_slow(self) -> bool:
        """Whether `prepare` takes longer than an event loop may stand."""
        return len(self._given) > 100 or any(is_slow(query) or is_slow(each) for query, each in self._given)

    def prepare(self, until: float | None) -> None:
        """Check and read all inputs; those of a query that can't be read are its own failure where that is returned."""
        known: dict[int, tuple[Any, Prepared]] = {}
        for position, (query, documents) in enumerate(self._given):
            names = ("query", "documents") if self._alone else (f"queries[{position}]", f"documents[{position}]")
            try:
                pairs = [prepare(query, names[0])], prepare_all(documents, names[1], until, known)
                outcomes: list[Outcome] = []
            except (ContentError, BackendError) as error:
                if not isinstance(error, self.ranking.kept):
                    raise
                pairs, outcomes = ([], []), [error] * len(documents)
            self._pairs.append(pairs)
            self._outcomes.append(outcomes)

    def calls(self, listwise: Callable[[], bool]) -> Iterator[tuple[list[Prepared], list[Prepared]]]:
        """Yield queries and documents to ask about, whole queries at a time; `take` gets what came of them.

        Where the documents of a query are scored together (`listwise`), each query has a call of its own.
        """
        self._positions, count = [], 0
        for position, (_, documents) in enumerate(self._pairs):
            if not documents:
                continue
            if self._positions and (count + len(documents) > MOST_DOCUMENTS or listwise()):
                yield self._together()
                self._positions, count = [], 0
            self._positions.append(position)
            count += len(documents)
        if self._positions:
            yield self._together()

    def _together(self) -> tuple[list[Prepared], list[Prepared]]:
        pairs = [self._pairs[position] for position in self._positions]
        documents = [document for _, documents in pairs for document in documents]
        if len(pairs) == 1:
            return pairs[0][0], documents
        return [query for [query], documents in pairs for _ in documents], documents

    def take(self, outcomes: list[Outcome]) -> None:
        """Take the outcomes of one of the `calls`; raise what may be neither passed through nor returned."""
        start = 0
        errors: dict[int, RerankError | None] = {}
        for position in self._positions:
            end = start + len(self._pairs[position][1])
            self._outcomes[position] = outcomes[start:end]
            errors[position] = failure(outcomes[start:end])
            start = end
        for position, error in errors.items():
            if error is not None and not isinstance(error, self.ranking.kept):
                common = all(each is error for each in errors.values())
                raise error if self._alone or common else naming_query(error, position)

    def results(self) -> list[Any]:
        """Rank each query's documents, or put its error there where that is wanted."""
        results = [self.ranking.result(outcomes) for outcomes in self._outcomes]
        if self.ranking.on_error == "passthrough":
            warn_of([outcome for outcomes in self._outcomes for outcome in outcomes])
        return results
