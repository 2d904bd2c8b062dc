"""Many queries in few calls to the back end, and what to do where such a call fails.

I/O-free: the reranker asks, in a thread or in an event loop, and tells what came of it.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from langchain_core.documents import Document

from langchain_rag_rerank.documents import RerankInput, in_order
from rag_rerank import BackendError, BadReply, ContentError, DocumentRejected, Ranked

# Documents in one call: enough to keep any back end busy, few enough that ten thousand queries don't have to be
# answered in the time that one call may take.
MOST_DOCUMENTS = 1024

Result = list[Document] | Exception


class Batch:
    """Which queries to ask for together, and what came of each.

    Iterating gives one call after the other: its queries and each query's texts. What came of it is told by `succeeded`
    or `failed` before the next one is taken.

    Args:
        inputs: The queries with their documents, none without.
        texts_of: What is scored of a query's documents.
        most_queries: How many queries a call may have; None for any number.
    """

    def __init__(
        self,
        inputs: Sequence[RerankInput],
        texts_of: Callable[[Sequence[Document]], list[Any]],
        most_queries: int | None,
    ) -> None:
        self._inputs = inputs
        self._outcomes: list[list[Ranked] | Exception] = [[] for _ in inputs]
        self._texts: list[list[Any]] = []
        for position, given in enumerate(inputs):
            try:
                self._texts.append(texts_of(given["documents"]))
            except Exception as error:  # noqa: BLE001 - whatever a user's formatter raises concerns its own query
                self._texts.append([])
                self._outcomes[position] = error
        self._waiting = deque(self._calls(most_queries))
        self._asked: list[int] = []

    def _calls(self, most_queries: int | None) -> Iterator[list[int]]:
        call: list[int] = []
        documents = 0
        for position, texts in enumerate(self._texts):
            if not texts:
                continue
            documents += len(texts)
            if call and (documents > MOST_DOCUMENTS or len(call) == most_queries):
                yield call
                call, documents = [], len(texts)
            call.append(position)
        if call:
            yield call

    def __iter__(self) -> Iterator[tuple[list[Any], list[list[Any]]]]:
        while self._waiting:
            self._asked = self._waiting.popleft()
            yield [self._inputs[n]["query"] for n in self._asked], [self._texts[n] for n in self._asked]

    def succeeded(self, ranked: Sequence[list[Ranked]]) -> None:
        """The call has brought these, one for each of its queries."""
        for position, places in zip(self._asked, ranked, strict=True):
            self._outcomes[position] = places

    def failed(self, error: BackendError | ContentError) -> None:
        """The call has failed. Queries that may be to blame will be asked alone, the others once more together."""
        suspects = self._suspects(error) if len(self._asked) > 1 else set()
        self._waiting.extend([position] for position in sorted(suspects))
        others = [position for position in self._asked if position not in suspects]
        if suspects and others:
            self._waiting.append(others)
        elif not suspects:
            for position in others:
                self._outcomes[position] = error

    def _suspects(self, error: BackendError | ContentError) -> set[int]:
        # None where a server is down or wants another key: asking for each query alone would fail as often.
        if isinstance(error, DocumentRejected) and error.indices:
            ends = list(accumulate(len(self._texts[position]) for position in self._asked))
            return {self._asked[bisect_right(ends, index)] for index in error.indices if index < ends[-1]}
        return set(self._asked) if isinstance(error, BadReply | ContentError) else set()

    def results(self, score_key: str) -> list[Result]:
        """Each query's documents, or its error."""
        return [
            outcome if isinstance(outcome, Exception) else in_order(given["documents"], outcome, score_key)
            for given, outcome in zip(self._inputs, self._outcomes, strict=True)
        ]


def merged(results: Sequence[Any], ranked: Sequence[Any]) -> list[list[Document]]:
    """The results of a batch, each None among them replaced by the next of those that had to be ranked.

    Raises:
        BaseException: LangChain returns whatever ended a batch, even that somebody cancelled it.
    """
    for result in ranked:
        if isinstance(result, BaseException) and not isinstance(result, Exception):
            raise result
    following = iter(ranked)
    return [next(following) if result is None else result for result in results]
