"""Behind and as retrievers."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableField, RunnableLambda
from pydantic import ValidationError

from langchain_rag_rerank import RerankingRetriever, ScorerReranker
from rag_rerank import BackendUnavailable
from tests.integrations.langchain.common import (
    QUERY,
    AsyncRuns,
    BrokenScorer,
    Finds,
    KeywordScorer,
    NativeScorer,
    RetrieverRuns,
    assert_retrievers_rank_as,
    compressing,
    found,
    keywords,
    numbers,
)


def reranking(documents: list[Document] | None = None, **fields: Any) -> RerankingRetriever:
    return keywords(**fields).as_retriever(Finds(documents=found() if documents is None else documents))


def ask(retriever: BaseRetriever, asynchronously: bool, *given: Any, **kwargs: Any) -> list[Document]:
    if asynchronously:
        return asyncio.run(retriever.ainvoke(QUERY, *given, **kwargs))
    return retriever.invoke(QUERY, *given, **kwargs)


both_ways = pytest.mark.parametrize("asynchronously", [False, True], ids=["invoke", "ainvoke"])


class TestContextualCompression:
    """LangChain's own retriever that compresses."""

    def test_a_retriever_ranks_in_process(self, real, minilm: Path):
        """LocalReranker and ScorerReranker rank a retriever's documents as the scorer does."""
        assert_retrievers_rank_as(minilm, real)

    def test_a_batch_of_queries_comes_from_several_threads(self, in_process):
        """Its `batch` calls the reranker from each."""
        retriever = compressing(in_process)
        queries = ["baking", "bears", "a good night's rest", "fishing"] * 2
        expected = [numbers(retriever.invoke(query)) for query in queries]
        assert [numbers(result) for result in retriever.batch(queries)] == expected

    def test_a_pipeline_of_compressors_passes_documents_through(self):
        """DocumentCompressorPipeline calls later stages with nothing when an earlier one kept nothing."""
        some, none = keywords(top_n=2), keywords(score_threshold=99)
        assert numbers(DocumentCompressorPipeline(transformers=[some]).compress_documents(found(), QUERY)) == [1, 3]
        assert DocumentCompressorPipeline(transformers=[none, some]).compress_documents(found(), QUERY) == []


@both_ways
class TestReranking:
    """RerankingRetriever, which `as_retriever` makes."""

    def test_it_ranks_what_the_other_finds(self, asynchronously: bool):
        """As the compressing one does."""
        expected = ask(compressing(keywords()), asynchronously)
        assert ask(reranking(), asynchronously) == expected
        assert numbers(expected) == [1, 3, 2]

    def test_a_call_has_its_own_limits(self, asynchronously: bool):
        """For the reranker, None included; the next call has the fields again."""
        retriever = reranking(top_n=1)
        assert len(ask(retriever, asynchronously, top_n=None)) == 5
        assert numbers(ask(retriever, asynchronously, top_n=None, score_threshold=2)) == [1, 3, 2]
        assert len(ask(retriever, asynchronously)) == 1
        with pytest.raises(ValueError, match="top_n must be at least 1"):
            ask(retriever, asynchronously, top_n=0)

    def test_other_arguments_go_to_the_base_retriever(self, asynchronously: bool):
        """Whatever it takes."""
        assert numbers(ask(reranking(), asynchronously, k=2, top_n=1)) == [1]
        assert numbers(ask(reranking(top_n=None), asynchronously, k=1)) == [0]
        with pytest.raises(TypeError, match="top_k"):
            ask(reranking(), asynchronously, top_k=2)

    def test_the_base_retriever_may_be_any_runnable(self, asynchronously: bool):
        """From a query to documents."""
        retriever = keywords(top_n=1).as_retriever(RunnableLambda(lambda query: found([query, "bears"])))
        assert numbers(ask(retriever, asynchronously)) == [0]

    def test_the_base_retriever_is_configured_as_the_call_says(self, asynchronously: bool):
        """Such as one that searches in a user's own documents: LangChain's compressing retriever drops that."""
        base = Finds(documents=found()).configurable_fields(documents=ConfigurableField(id="of_user"))
        retriever = keywords().as_retriever(base)
        assert numbers(ask(retriever, asynchronously, {"configurable": {"of_user": found()[:1]}})) == [0]
        assert len(ask(retriever, asynchronously)) == 3

    def test_both_steps_are_children_of_its_run(self, asynchronously: bool):
        """With their own names and ids; tags and metadata are handed down."""
        runs = RetrieverRuns()
        config = {"callbacks": [runs], "run_name": "Search", "tags": ["t"], "metadata": {"user": "u1"}}
        ask(reranking(name="Ranking"), asynchronously, config)
        whole, search, ranking = runs.starts
        assert runs.names == ["Search", "Finds", "Ranking"]
        assert whole["parent_run_id"] is None
        assert search["parent_run_id"] == ranking["parent_run_id"] == whole["run_id"]
        assert len({start["run_id"] for start in runs.starts}) == 3
        assert all(start["tags"] == ["t"] and start["metadata"]["user"] == "u1" for start in runs.starts)

    def test_in_a_chain_it_belongs_to_the_chains_run(self, asynchronously: bool):
        """Called with no config of its own, it finds that of the chain."""
        runs = RetrieverRuns()
        chain = RunnableLambda(lambda query: query) | reranking()
        ask(chain, asynchronously, {"callbacks": [runs]})
        by_name = {start["name"]: start for start in runs.starts}
        retriever = by_name["RerankingRetriever"]
        assert retriever["parent_run_id"] == by_name["RunnableSequence"]["run_id"]
        assert by_name["ScorerReranker"]["parent_run_id"] == by_name["Finds"]["parent_run_id"] == retriever["run_id"]

    def test_nothing_found_is_nothing_ranked(self, asynchronously: bool):
        """No run, no model, no request."""
        scorer, runs = KeywordScorer(), RetrieverRuns()
        retriever = ScorerReranker(scorer=scorer).as_retriever(Finds(documents=[]))
        assert ask(retriever, asynchronously, {"callbacks": [runs]}) == []
        assert scorer.calls == 0
        assert runs.names == ["RerankingRetriever", "Finds"]

    def test_a_failure_reaches_the_caller(self, asynchronously: bool):
        """Never an empty list."""
        retriever = ScorerReranker(scorer=BrokenScorer()).as_retriever(Finds(documents=found()))
        with pytest.raises(BackendUnavailable):
            ask(retriever, asynchronously)


class TestRerankingOtherwise:
    """What doesn't come in two ways."""

    def test_async_calls_need_no_thread(self):
        """For the ranking; a base retriever without an async way of its own gets one from LangChain."""
        retriever = ScorerReranker(scorer=NativeScorer()).as_retriever(RunnableLambda(lambda _: found()))
        assert numbers(asyncio.run(retriever.ainvoke(QUERY))) == [1, 3, 2]

    def test_async_handlers_are_told_too(self):
        """Handlers whose methods are coroutines see the ranking's run."""
        runs = AsyncRuns()
        asyncio.run(reranking().ainvoke(QUERY, {"callbacks": [runs]}))
        assert runs.names == ["ScorerReranker"]

    def test_fields_beside_the_two(self):
        """As other retrievers have them; others are refused, and nothing is repeated of their values."""
        retriever = keywords().as_retriever(Finds(documents=[]), name="Mine", tags=["t"], metadata={"a": 1})
        assert (retriever.name, retriever.tags, retriever.metadata) == ("Mine", ["t"], {"a": 1})
        with pytest.raises(ValidationError, match=r"top_n\n  Extra inputs are not permitted"):
            keywords().as_retriever(Finds(documents=[]), top_n=3)
        with pytest.raises(ValidationError, match=r"did you mean base_retriever\?"):
            RerankingRetriever(reranker=keywords(), base_retriver="canary")
        with pytest.raises(ValidationError) as caught:
            RerankingRetriever(reranker="canary", base_retriever=Finds(documents=[]))
        assert "canary" not in str(caught.value)

    def test_a_batch_of_queries(self):
        """In the order of the queries."""
        assert [numbers(result) for result in reranking().batch([QUERY, "bread"])] == [[1, 3, 2], [0, 1, 2]]
        assert [numbers(each) for each in asyncio.run(reranking().abatch([QUERY, "bread"]))] == [[1, 3, 2], [0, 1, 2]]
