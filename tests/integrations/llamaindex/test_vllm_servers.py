"""On a real vLLM server."""

import asyncio
import re

import pytest
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.schema import NodeWithScore

from llama_index.postprocessor.rag_rerank import VLLMReranker
from rag_rerank import LocalScorer
from tests.integrations.llamaindex.support import (
    QUERY,
    engine,
    expected,
    found,
    ids,
    made_by,
    migrations,
    scores,
)
from tests.vllm_server import VLLMServer


def assert_answers_as(response: RESPONSE_TYPE, reference: LocalScorer) -> None:
    order, values = expected(reference)
    assert ids(response.source_nodes) == order
    assert scores(response.source_nodes) == pytest.approx(values, abs=1e-4)


def test_an_engine_ranks_with_a_served_bi_encoder(vllm_minilm: VLLMServer) -> None:
    """VLLMReranker gives the scores that the same bi-encoder has locally."""
    assert_served_as_local(vllm_minilm)


def test_an_engine_ranks_with_a_served_cross_encoder(vllm_cross_encoder: VLLMServer) -> None:
    """VLLMReranker gives the scores that the same cross-encoder has locally."""
    assert_served_as_local(vllm_cross_encoder)


def assert_served_as_local(server: VLLMServer) -> None:
    reranker = VLLMReranker(base_url=server.base_url, api_key=server.api_key, timeout=120)

    async def ask() -> RESPONSE_TYPE:
        async with reranker:
            return await engine(reranker).aquery(QUERY)

    with LocalScorer(server.folder, dtype="float32") as reference:
        assert_answers_as(engine(reranker).query(QUERY), reference)
        assert_answers_as(asyncio.run(ask()), reference)


def test_a_served_model_survives_its_event_loop(vllm_minilm: VLLMServer) -> None:
    """One VLLMReranker serves two `asyncio.run` in a row, each with its own connections."""
    with VLLMReranker(base_url=vllm_minilm.base_url, api_key=vllm_minilm.api_key, timeout=120) as reranker:
        first, second = (asyncio.run(reranker.apostprocess_nodes(found(), query_str=QUERY)) for _ in range(2))
    assert ids(first) == ids(second)


def test_a_served_model_can_be_called_inside_a_running_loop(vllm_minilm: VLLMServer) -> None:
    """The sync method works inside a running event loop, where ObjectRetriever calls it."""

    async def call(reranker: VLLMReranker) -> list[NodeWithScore]:
        return reranker.postprocess_nodes(found(), query_str=QUERY)

    with VLLMReranker(base_url=vllm_minilm.base_url, api_key=vllm_minilm.api_key, timeout=120) as reranker:
        assert len(asyncio.run(call(reranker))) == 5
        assert reranker.scorer.model_name == vllm_minilm.name


def test_fifty_queries_at_a_time_and_some_given_up(vllm_minilm: VLLMServer) -> None:
    """Those that stay are answered rightly, and so is one afterwards."""

    async def ask(reranker: VLLMReranker) -> list[list[str]]:
        queried = engine(reranker)
        tasks = [asyncio.create_task(queried.aquery(QUERY)) for _ in range(50)]
        await asyncio.sleep(0.05)
        for task in tasks[::5]:
            task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        kept = [answer for answer in answers if not isinstance(answer, asyncio.CancelledError)]
        return [ids(answer.source_nodes) for answer in [*kept, await queried.aquery(QUERY)]]

    with VLLMReranker(base_url=vllm_minilm.base_url, api_key=vllm_minilm.api_key, timeout=120) as reranker:
        (order,) = {tuple(order) for order in asyncio.run(ask(reranker))}
        assert list(order) == ids(reranker.postprocess_nodes(found(), query_str=QUERY))


def test_blank_nodes_and_kept_scores(vllm_minilm: VLLMServer) -> None:
    """A server is asked about text only."""
    reranker = VLLMReranker(
        base_url=vllm_minilm.base_url, api_key=vllm_minilm.api_key, timeout=120, keep_retrieval_score=True
    )
    with reranker:
        results = reranker.postprocess_nodes([*found([""], [0.3]), *found()], query_str=QUERY)
        reranker.top_n = None
        everything = reranker.postprocess_nodes([*found([""], [0.3]), *found()], query_str=QUERY)
    assert (len(results), len(everything)) == (5, 6)
    assert everything[-1].score is None
    assert everything[-1].metadata == {"retrieval_score": 0.3}


@pytest.mark.parametrize("other", ["CohereRerank", "TextEmbeddingInference", "XinferenceRerank"])
def test_what_the_readme_puts_in_the_place_of_others(
    vllm_minilm: VLLMServer, local: LocalScorer, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """It ranks, with the address and the model of a server that there is."""
    monkeypatch.setenv("RERANK_KEY", "k3y")
    code = re.sub(r'"http://localhost:\d+"', repr(vllm_minilm.base_url), migrations()[other][1])
    with made_by(code.replace('"bge-reranker-v2-m3"', repr(vllm_minilm.name))) as reranker:
        reranker.timeout = 120
        results = reranker.postprocess_nodes(found(), query_str=QUERY)
    order, values = expected(local)
    assert (ids(results), scores(results)) == (order[:3], pytest.approx(values[:3], abs=1e-4))
