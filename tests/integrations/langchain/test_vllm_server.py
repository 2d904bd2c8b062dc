"""VLLMReranker on a real vLLM server."""

import asyncio
import pickle
from typing import Any

import pytest

from langchain_rag_rerank import ScorerReranker, VLLMReranker
from langchain_rag_rerank.testing import RerankerUnitTests
from rag_rerank import AuthError, DocumentRejected, FallbackScorer, VLLMScorer
from tests.integrations.langchain.common import (
    QUERY,
    TEXTS,
    assert_retrievers_rank_as,
    found,
    numbers,
    scores,
)
from tests.integrations.langchain.test_serialisation import assert_copies_rank_alike
from tests.vllm_server import VLLMServer

QUERIES = ["baking bread", QUERY, "a good night's rest", "fish"]


def served(server: VLLMServer, **fields: Any) -> VLLMReranker:
    return VLLMReranker(base_url=server.base_url, api_key=server.api_key, top_n=None, timeout=120, **fields)


class TestStandard(RerankerUnitTests):
    """The package's standard tests for rerankers."""

    @pytest.fixture(autouse=True)
    def _server(self, vllm_minilm: VLLMServer) -> None:
        self.server = vllm_minilm

    @property
    def reranker_class(self) -> type[VLLMReranker]:
        return VLLMReranker

    @property
    def reranker_params(self) -> dict[str, Any]:
        return {"base_url": self.server.base_url, "timeout": 120}

    @property
    def secret_params(self) -> dict[str, str]:
        return {"api_key": "sk-canary"}


def test_a_retriever_ranks_with_a_served_bi_encoder(vllm_minilm: VLLMServer):
    """VLLMReranker gives the scores of the same model in this process."""
    assert_retrievers_rank_as(vllm_minilm.folder, served(vllm_minilm))


def test_a_retriever_ranks_with_a_served_cross_encoder(vllm_cross_encoder: VLLMServer):
    """So it does with a cross-encoder, on a server that wants a key."""
    assert_retrievers_rank_as(vllm_cross_encoder.folder, served(vllm_cross_encoder))


def test_one_served_reranker_outlives_its_event_loops(vllm_cross_encoder: VLLMServer):
    """A connection dies with its loop: the next loop opens its own."""
    with served(vllm_cross_encoder) as reranker:
        first, second = (asyncio.run(reranker.acompress_documents(found(), QUERY)) for _ in range(2))
    assert numbers(first) == numbers(second)


def test_how_documents_are_parted_changes_nothing(vllm_cross_encoder: VLLMServer):
    """Limits apply to the scores of all documents: by requests of 2, of 1, one after the other, in an event loop."""
    with served(vllm_cross_encoder) as reranker:
        expected = reranker.compress_documents(found(), QUERY)
    for sizes in ({"chunk_size": 2}, {"chunk_size": 1, "max_concurrency": 8}, {"chunk_size": 2, "max_concurrency": 1}):
        with served(vllm_cross_encoder, **sizes) as reranker:
            threshold = scores(expected)[3]
            limits = {"top_n": 3, "score_threshold": threshold - 1e-3}
            given = {"query": QUERY, "documents": found()}
            for results in (reranker.invoke(given, **limits), asyncio.run(reranker.ainvoke(given, **limits))):
                assert scores(results) == pytest.approx(scores(expected)[:3], abs=1e-4)


def test_a_batch_gives_what_single_calls_give(vllm_cross_encoder: VLLMServer):
    """By one call, sync and async."""
    inputs = [{"query": query, "documents": found()} for query in QUERIES]
    with served(vllm_cross_encoder) as reranker:
        expected = [scores(reranker.invoke(given)) for given in inputs]
        for results in (reranker.batch(inputs), asyncio.run(reranker.abatch(inputs))):
            assert [scores(result) for result in results] == [pytest.approx(each, abs=1e-4) for each in expected]


def test_a_document_that_a_server_rejects_concerns_only_its_query(vllm_cross_encoder: VLLMServer):
    """It is too long, and nothing may be cut."""
    inputs = [{"query": query, "documents": found()} for query in QUERIES]
    inputs[2] = {"query": QUERIES[2], "documents": found([*TEXTS, "bears " * 500])}
    with served(vllm_cross_encoder, truncate_prompt_tokens=None) as reranker:
        for results in (
            reranker.batch(inputs, return_exceptions=True),
            asyncio.run(reranker.abatch(inputs, return_exceptions=True)),
        ):
            assert [type(result) for result in results] == [list, list, DocumentRejected, list]
            assert results[2].indices == (5,)
        reranker.on_error = "passthrough"
        results = reranker.batch(inputs)
        assert [len(result) for result in results] == [5, 5, 6, 5]
        assert numbers(results[2])[-1] == 5
        assert "relevance_score" not in results[2][-1].metadata


def test_two_addresses_are_as_good_as_one(vllm_cross_encoder: VLLMServer):
    """One of them leads nowhere."""
    key = vllm_cross_encoder.api_key
    with served(vllm_cross_encoder) as alone:
        expected = numbers(alone.compress_documents(found(), QUERY))
    addresses = ["http://127.0.0.1:9", vllm_cross_encoder.base_url]
    with VLLMReranker(base_url=addresses, api_key=key, top_n=None) as reranker:
        assert numbers(reranker.compress_documents(found(), QUERY)) == expected
    scorer = FallbackScorer(*(VLLMScorer(each, api_key=key, max_retries=0) for each in addresses))
    with scorer, ScorerReranker(scorer=scorer, top_n=None) as reranker:
        assert numbers(reranker.compress_documents(found(), QUERY)) == expected


def test_copies_keep_the_key(vllm_cross_encoder: VLLMServer):
    """A copy, deep or not, is let in by the server that wants a key."""
    with served(vllm_cross_encoder) as reranker:
        assert_copies_rank_alike(reranker)


def test_a_pickled_reranker_takes_the_key_from_its_environment(
    vllm_cross_encoder: VLLMServer, monkeypatch: pytest.MonkeyPatch
):
    """The key does not travel: a process without it is refused, one that has it in VLLM_API_KEY is let in."""
    server = vllm_cross_encoder
    sent = pickle.dumps(served(server))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pickle.loads(sent) as reranker, pytest.raises(AuthError):  # noqa: S301
        reranker.compress_documents(found(), QUERY)
    monkeypatch.setenv("VLLM_API_KEY", server.api_key)
    with pickle.loads(sent) as reranker:  # noqa: S301
        assert len(reranker.compress_documents(found(), QUERY)) == 5
