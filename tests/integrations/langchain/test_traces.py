"""What handlers are told."""

import asyncio

import pytest
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.runnables import RunnableLambda

from langchain_rag_rerank import ScorerReranker
from rag_rerank import BackendUnavailable
from tests.integrations.langchain.common import (
    QUERY,
    TEXTS,
    AsyncRuns,
    BrokenScorer,
    RetrieverRuns,
    Runs,
    compressing,
    found,
    keywords,
)


def test_a_call_is_one_run():
    """One run named after the class has what went in, what came out, and which model ranked."""
    for call in ("compress_documents", "acompress_documents"):
        runs = Runs()
        result = getattr(keywords(top_n=2), call)(found(), QUERY, callbacks=[runs])
        result = asyncio.run(result) if call.startswith("a") else result
        [start] = runs.starts
        assert start["name"] == "ScorerReranker"
        assert start["inputs"] == {"query": QUERY, "documents": found()}
        assert runs.outputs == [result]
        expected = {
            "ls_provider": "rag_rerank",
            "ls_model_name": "keywords",
            "rerank_top_n": 2,
            "rerank_num_documents": 5,
        }
        assert expected.items() <= start["metadata"].items()


def test_the_run_says_what_the_call_said():
    """A limit of one call stands in its run."""
    runs = Runs()
    keywords(top_n=2).invoke({"query": QUERY, "documents": found()}, {"callbacks": [runs]}, top_n=4)
    assert runs.starts[0]["metadata"]["rerank_top_n"] == 4


def test_the_run_belongs_to_the_retriever_that_called():
    """Under ContextualCompressionRetriever, sync and async, the rerank is a child of the retriever's run."""
    retriever = compressing(keywords(name="Ranking"))
    for invoke in (retriever.invoke, lambda *given: asyncio.run(retriever.ainvoke(*given))):
        runs = RetrieverRuns()
        invoke(QUERY, {"callbacks": [runs], "metadata": {"user": "u1"}})
        [start] = [start for start in runs.starts if start["name"] == "Ranking"]
        assert start["parent_run_id"] == runs.starts[0]["run_id"]
        assert start["metadata"]["user"] == "u1"


def test_each_stage_of_a_pipeline_is_a_run():
    """A pipeline hands its callbacks to each stage."""
    runs = Runs()
    stages = [keywords(name="Coarse", top_n=3), keywords(name="Fine", top_n=1)]
    DocumentCompressorPipeline(transformers=stages).compress_documents(found(), QUERY, callbacks=[runs])
    assert runs.names == ["Coarse", "Fine"]


@pytest.mark.parametrize("name", ["compress_documents", "rerank"])
def test_inside_of_a_function_the_run_is_found(name: str):
    """A function in a chain calls the reranker without a word of callbacks."""
    runs = Runs()
    reranker = keywords()
    given = {"compress_documents": found(), "rerank": TEXTS}[name]
    chain = RunnableLambda(lambda query: getattr(reranker, name)(given, query), name="Function")
    chain.invoke(QUERY, {"callbacks": [runs]})
    assert runs.names == ["Function", "ScorerReranker"]
    assert runs.starts[1]["parent_run_id"] == runs.starts[0]["run_id"]
    assert runs.starts[1]["inputs"]["query"] == QUERY


def test_async_handlers_are_told_too():
    """Handlers whose methods are coroutines see the run of an async call."""
    runs = AsyncRuns()
    asyncio.run(compressing(keywords()).ainvoke(QUERY, {"callbacks": [runs]}))
    assert runs.names == ["ScorerReranker"]


def test_a_failed_call_is_a_failed_run():
    """The error that the caller gets stands in the trace as well."""
    reranker = ScorerReranker(scorer=BrokenScorer())

    def acompress(*given, callbacks):
        return asyncio.run(reranker.acompress_documents(*given, callbacks=callbacks))

    for call in (reranker.compress_documents, acompress):
        runs = Runs()
        with pytest.raises(BackendUnavailable) as caught:
            call(found(), QUERY, callbacks=[runs])
        assert runs.errors == [caught.value]
        assert runs.outputs == []


def test_events_can_be_listened_to():
    """astream_events, which user interfaces listen to, sees the ranking."""

    async def listen() -> list[str]:
        events = keywords().astream_events({"query": QUERY, "documents": found()}, version="v2")
        return [event["event"] async for event in events]

    assert asyncio.run(listen()) == ["on_chain_start", "on_chain_end"]
