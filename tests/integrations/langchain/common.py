"""What the tests of the LangChain rerankers share: documents, scorers without a model, and a look at the runs."""

import asyncio
from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from langchain_rag_rerank import ScorerReranker
from rag_rerank import BackendUnavailable, LocalScorer, Scorer

QUERY = "how do bears sleep in winter"
TEXTS = [
    "a recipe for bread",
    "bears sleep in winter",
    "how to sleep well",
    "bears sleep in winter",
    "bears eat fish",
]
BEST_FIRST = [1, 3, 2, 4, 0]  # by words shared with QUERY: 4, 4, 2, 1, 0


class KeywordScorer(Scorer):
    """Counts the words that query and document share."""

    model_name = "keywords"

    def __init__(self):
        self.calls = 0

    def _score(self, queries, documents, until):
        self.calls += 1
        rows = queries * len(documents) if len(queries) == 1 else queries
        pairs = zip(rows, documents, strict=True)
        return [float(len(set(query.split()) & set(document.split()))) for query, document in pairs]


class Instructed(KeywordScorer):
    """Notes the instruction of each call."""

    accepts_instruction = True

    def __init__(self):
        super().__init__()
        self.instructions: list[str | None] = []

    def _score(self, queries, documents, until, instruction=None):
        self.instructions.append(instruction)
        return super()._score(queries, documents, until)


class NativeScorer(KeywordScorer):
    """A scorer whose async way is its own; the sync one must not be used behind its back."""

    async def _ascore(self, queries, documents, until):
        await asyncio.sleep(0)
        return super()._score(queries, documents, until)

    def _score(self, queries, documents, until):
        raise AssertionError("scored in a thread")


class BrokenScorer(KeywordScorer):
    """A server that is down."""

    model_name = "broken"

    def _score(self, queries, documents, until):
        self.calls += 1
        raise BackendUnavailable("nobody answers", endpoint="localhost:1")


class Finds(BaseRetriever):
    """A retriever that finds always the same, the first `k` of it where a call says so."""

    documents: list[Document]

    def _get_relevant_documents(self, query, *, run_manager, k=None):
        return self.documents[:k]

    async def _aget_relevant_documents(self, query, *, run_manager, k=None):
        return self.documents[:k]


class Runs(BaseCallbackHandler):
    """Notes how runs begin and end."""

    def __init__(self):
        self.starts: list[dict[str, Any]] = []
        self.outputs: list[Any] = []
        self.errors: list[BaseException] = []

    def on_chain_start(self, serialized, inputs, **rest):
        self.starts.append({"inputs": inputs, **rest})

    def on_chain_end(self, outputs, **rest):
        self.outputs.append(outputs)

    def on_chain_error(self, error, **rest):
        self.errors.append(error)

    @property
    def names(self):
        return [start["name"] for start in self.starts]


class RetrieverRuns(Runs):
    """Notes the runs of retrievers, too."""

    def on_retriever_start(self, serialized, query, **rest):
        self.starts.append({"inputs": query, **rest})


class AsyncRuns(AsyncCallbackHandler):
    """As Runs, for handlers that are awaited."""

    def __init__(self):
        self.names: list[str] = []

    async def on_chain_start(self, serialized, inputs, **rest):
        self.names.append(rest["name"])


def found(texts=TEXTS):
    return [Document(text, id=f"d{n}", metadata={"n": n}) for n, text in enumerate(texts)]


def numbers(documents):
    return [document.metadata["n"] for document in documents]


def scores(documents):
    return [document.metadata["relevance_score"] for document in documents]


def compressing(reranker, documents=None):
    return ContextualCompressionRetriever(
        base_compressor=reranker, base_retriever=Finds(documents=found() if documents is None else documents)
    )


def keywords(**fields):
    return ScorerReranker(scorer=KeywordScorer(), **fields)


def assert_retrievers_rank_as(folder, reranker):
    """Behind both retrievers, sync and async, order and scores are those of Scorer.rerank."""
    with LocalScorer(folder, dtype="float32") as scorer:
        expected = scorer.rerank(QUERY, TEXTS)
    retrievers = [compressing(reranker), reranker.as_retriever(Finds(documents=found()))]

    async def ask_all():
        # The last calls: what a loop has opened is closed in it.
        results = [await retriever.ainvoke(QUERY) for retriever in retrievers]
        await reranker.aclose()
        return results

    for documents in [*(retriever.invoke(QUERY) for retriever in retrievers), *asyncio.run(ask_all())]:
        assert scores(documents) == pytest.approx([place.score for place in expected], abs=1e-4)
        assert [TEXTS[n] for n in numbers(documents)] == [TEXTS[place.index] for place in expected]
