"""In LlamaIndex's own engines, tools and workflows, each in its sync and its async form; offline, with mock models."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks import CallbackManager
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.indices.vector_store import VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.memory import VectorMemoryBlock
from llama_index.core.objects import ObjectIndex
from llama_index.core.query_engine import CitationQueryEngine, RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.tools import QueryEngineTool, RetrieverTool
from llama_index.core.vector_stores.types import BasePydanticVectorStore, VectorStoreQueryResult
from llama_index.core.workflow import StartEvent, StopEvent, Workflow, step

from llama_index.postprocessor.rag_rerank import LocalReranker, ScorerReranker, VLLMReranker
from rag_rerank import LocalScorer, Scorer
from tests.integrations.llamaindex.support import (
    ORDER,
    QUERY,
    TEXTS,
    Found,
    KeywordScorer,
    engine,
    expected,
    found,
    ids,
    scores,
)

MOCK = MockEmbedding(embed_dim=4)


def held() -> list[NodeWithScore]:
    """Nodes with metadata that everybody may read, held by their retriever from query to query."""
    nodes = found()
    for node in nodes:
        node.node.metadata["paper"] = "Zoo News"
    return nodes


@pytest.fixture
def reranker(scorer: KeywordScorer) -> ScorerReranker:
    return ScorerReranker(scorer=scorer, top_n=3, keep_retrieval_score=True)


def assert_answers_as(response: RESPONSE_TYPE, reference: Scorer) -> None:
    order, values = expected(reference)
    assert ids(response.source_nodes) == order
    assert scores(response.source_nodes) == pytest.approx(values, abs=1e-4)


def assert_reranked(nodes: list[NodeWithScore]) -> None:
    """The best three of `held`, which know their retrieval scores."""
    texts = [node.node.get_content().strip()[-24:] for node in nodes]
    assert texts == [TEXTS[int(name[1])][-24:] for name in ORDER[:3]]
    assert [node.metadata["retrieval_score"] for node in nodes] == [0.6, 0.8, 0.9]


def assert_read_texts_only(answer: Any, scorer: KeywordScorer, metadata: bool = True) -> None:
    """The mock model repeats its prompt: nodes in their order, with their own metadata, and no retrieval score."""
    prompt = str(answer)
    positions = [prompt.index(TEXTS[int(name[1])]) for name in ORDER[:3]]
    assert positions == sorted(positions)
    assert ("Zoo News" in prompt) is metadata
    assert "retrieval_score" not in prompt
    assert scorer.seen
    assert all(sorted(seen) == sorted(scorer.seen[0]) for seen in scorer.seen)
    assert not any("retrieval_score" in text for seen in scorer.seen for text in seen)


class TestRetrieverQueryEngine:
    """The engine behind `index.as_query_engine`."""

    def test_it_ranks_as_the_scorer_does(self, scorer: KeywordScorer) -> None:
        """The order and the scores of `query` and `aquery` are those of `Scorer.rerank`."""
        queried = engine(ScorerReranker(scorer=scorer))
        assert_answers_as(queried.query(QUERY), scorer)
        assert_answers_as(asyncio.run(queried.aquery(QUERY)), scorer)

    def test_it_ranks_with_a_local_model(self, minilm: Path, local: LocalScorer) -> None:
        """LocalReranker gives the scores of a LocalScorer with the same settings."""
        with LocalReranker(model=minilm, dtype="float32") as reranker:
            queried = engine(reranker)
            assert_answers_as(queried.query(QUERY), local)
            assert_answers_as(asyncio.run(queried.aquery(QUERY)), local)

    def test_it_may_set_the_callback_manager(self) -> None:
        """Engines assign `callback_manager`; the scorer in use stays the same."""
        manager = CallbackManager([])
        reranker = VLLMReranker()
        before = reranker.scorer
        engine(reranker, callback_manager=manager)
        assert reranker.callback_manager is manager
        assert reranker.scorer is before

    def test_the_model_reads_no_retrieval_score(self, reranker: ScorerReranker, scorer: KeywordScorer) -> None:
        """Neither the language model nor, with nodes that are found again, the reranker."""
        queried = RetrieverQueryEngine.from_args(
            Found(held()), llm=MockLLM(), response_mode="compact", node_postprocessors=[reranker]
        )
        for response in (queried.query(QUERY), asyncio.run(queried.aquery(QUERY)), queried.query(QUERY)):
            assert_read_texts_only(response, scorer)
            assert_reranked(response.source_nodes)

    def test_a_second_reranker_reads_no_score_of_the_first(self, reranker: ScorerReranker) -> None:
        """Whatever metadata it reads."""
        second = KeywordScorer()
        last = ScorerReranker(scorer=second, metadata_mode="all", top_n=2, keep_retrieval_score=True)
        queried = RetrieverQueryEngine.from_args(
            Found(held()), llm=MockLLM(), response_mode="compact", node_postprocessors=[reranker, last]
        )
        for response in (queried.query(QUERY), asyncio.run(queried.aquery(QUERY))):
            assert "retrieval_score" not in str(response)
            assert ids(response.source_nodes) == ORDER[:2]
        assert second.seen == [[f"paper: Zoo News\n\n{TEXTS[int(name[1])]}" for name in ORDER[:3]]] * 2

    def test_nothing_left_is_an_empty_response(self, scorer: KeywordScorer) -> None:
        """A threshold may leave no node."""
        strict = ScorerReranker(scorer=scorer, score_threshold=2.0)
        queried = RetrieverQueryEngine.from_args(
            Found(held()), llm=MockLLM(), response_mode="compact", node_postprocessors=[strict]
        )
        for response in (queried.query(QUERY), asyncio.run(queried.aquery(QUERY))):
            assert (str(response), response.source_nodes) == ("Empty Response", [])

    def test_it_is_a_tool_of_agents(self, reranker: ScorerReranker, scorer: KeywordScorer) -> None:
        """They call its engine."""
        queried = RetrieverQueryEngine.from_args(
            Found(held()), llm=MockLLM(), response_mode="compact", node_postprocessors=[reranker]
        )
        tool = QueryEngineTool.from_defaults(queried)
        for output in (tool.call(QUERY), asyncio.run(tool.acall(QUERY))):
            assert_read_texts_only(output, scorer)


def test_a_citation_query_engine(reranker: ScorerReranker, scorer: KeywordScorer) -> None:
    """It makes new nodes of the ranked ones."""
    queried = CitationQueryEngine(Found(held()), llm=MockLLM(), node_postprocessors=[reranker])
    for response in (queried.query(QUERY), asyncio.run(queried.aquery(QUERY))):
        assert "Source 1:\n" + TEXTS[4] in str(response)
        assert_read_texts_only(response, scorer)
        assert_reranked(response.source_nodes)


@pytest.mark.parametrize("kind", [ContextChatEngine, CondensePlusContextChatEngine])
def test_chat_engines(kind: Any, reranker: ScorerReranker, scorer: KeywordScorer) -> None:
    """In all their four ways to answer."""

    async def streamed() -> Any:
        response = await kind.from_defaults(**settings).astream_chat(QUERY)
        async for _ in response.async_response_gen():
            pass
        return response

    settings = {"retriever": Found(held()), "llm": MockLLM(), "node_postprocessors": [reranker]}
    stream = kind.from_defaults(**settings).stream_chat(QUERY)
    assert "".join(stream.response_gen)
    responses = [
        kind.from_defaults(**settings).chat(QUERY),
        asyncio.run(kind.from_defaults(**settings).achat(QUERY)),
        stream,
        asyncio.run(streamed()),
    ]
    for response in responses:
        assert_read_texts_only(response, scorer)
        assert_reranked(response.source_nodes)


def test_a_retriever_tool(reranker: ScorerReranker, scorer: KeywordScorer) -> None:
    """Its output goes to a language model."""
    tool = RetrieverTool.from_defaults(Found(held()), node_postprocessors=[reranker])
    for output in (tool.call(QUERY), asyncio.run(tool.acall(QUERY))):
        assert_read_texts_only(output, scorer)
        assert_reranked(output.raw_output)


def test_an_object_retriever(scorer: KeywordScorer) -> None:
    """Its async form calls the sync method inside the running loop."""
    index = ObjectIndex.from_objects(TEXTS, index_cls=VectorStoreIndex, embed_model=MOCK)
    reranker = ScorerReranker(scorer=scorer, top_n=3)
    retriever = index.as_retriever(similarity_top_k=5, node_postprocessors=[reranker])
    best = [TEXTS[int(name[1])] for name in ORDER[:3]]
    assert retriever.retrieve(QUERY) == best
    assert asyncio.run(retriever.aretrieve(QUERY)) == best


def test_a_retriever_evaluator(reranker: ScorerReranker) -> None:
    """The right node, found fourth, is ranked first."""
    plain = RetrieverEvaluator.from_metric_names(["mrr"], retriever=Found(held()))
    reranked = RetrieverEvaluator.from_metric_names(["mrr"], retriever=Found(held()), node_postprocessors=[reranker])
    assert asyncio.run(plain.aevaluate(QUERY, ["n4"])).metric_vals_dict == {"mrr": 0.2}
    assert asyncio.run(reranked.aevaluate(QUERY, ["n4"])).metric_vals_dict == {"mrr": 1.0}
    assert reranked.evaluate(QUERY, ["n4"]).metric_vals_dict == {"mrr": 1.0}


class Remembered(BasePydanticVectorStore):
    """Finds the same nodes for every query."""

    stores_text: bool = True

    @property
    def client(self) -> None:
        return None

    def add(self, nodes: list[TextNode], **_: Any) -> list[str]:
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **_: Any) -> None: ...

    def query(self, query: Any, **_: Any) -> VectorStoreQueryResult:
        nodes = held()
        return VectorStoreQueryResult([node.node for node in nodes], scores(nodes), ids(nodes))


def test_a_memory_block(reranker: ScorerReranker, scorer: KeywordScorer) -> None:
    """It passes the query as a string."""
    block = VectorMemoryBlock(vector_store=Remembered(), embed_model=MOCK, node_postprocessors=[reranker])
    for _ in range(2):
        text = asyncio.run(block.aget([ChatMessage(QUERY)]))
        assert_read_texts_only(text, scorer, metadata=False)
        assert text == "\n\n".join(TEXTS[int(name[1])] for name in ORDER[:3])


class Async(Workflow):
    """Reranks in the event loop."""

    @step
    async def rerank(self, event: StartEvent) -> StopEvent:
        return StopEvent(result=await event.reranker.apostprocess_nodes(held(), query_str=QUERY))


class Sync(Workflow):
    """Reranks in a thread of LlamaIndex's."""

    @step
    def rerank(self, event: StartEvent) -> StopEvent:
        return StopEvent(result=event.reranker.postprocess_nodes(held(), query_str=QUERY))


@pytest.mark.parametrize("kind", [Async, Sync])
def test_a_workflow_step(kind: type[Workflow], reranker: ScorerReranker) -> None:
    """The reranker is called by its own methods."""

    async def run() -> list[NodeWithScore]:
        return await kind(timeout=30).run(reranker=reranker)

    assert_reranked(asyncio.run(run()))
