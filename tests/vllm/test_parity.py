"""The same score here and there: LocalScorer in float32 against a real vLLM server, pair by pair."""

import asyncio
import itertools
from pathlib import Path

import pytest

from rag_rerank import AuthError, BackendRejected, LocalScorer, VLLMScorer
from tests.pairs import largest_difference, pairs
from tests.vllm_server import VLLMServer

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str]]:
    queries, documents = pairs()
    assert len(queries) == len(documents) == 60
    return queries, documents


class TestCrossEncoder:
    """A tiny BERT cross-encoder; its server wants a key."""

    @pytest.fixture
    def remote(self, vllm_cross_encoder: VLLMServer):
        with VLLMScorer(vllm_cross_encoder.base_url, api_key=vllm_cross_encoder.api_key) as scorer:
            yield scorer

    def test_scores_are_equal(self, remote: VLLMScorer, local_cross_encoder: LocalScorer, texts):
        """On 60 pairs, over-long ones included, with the model's own activation."""
        ours, theirs = local_cross_encoder.score(*texts), remote.score(*texts)
        assert largest_difference(ours, theirs) <= TOLERANCE
        assert max(ours) - min(ours) > 0.2  # or equality would say little

    def test_logits_are_equal(self, vllm_cross_encoder: VLLMServer, texts):
        """use_activation=False means the same on both sides."""
        server = vllm_cross_encoder
        with (
            LocalScorer(server.folder, dtype="float32", use_activation=False) as local,
            VLLMScorer(server.base_url, api_key=server.api_key, use_activation=False) as remote,
        ):
            ours, theirs = local.score(*texts), remote.score(*texts)
        assert largest_difference(ours, theirs) <= TOLERANCE
        assert max(ours) - min(ours) > 1

    def test_the_rerank_api_gives_the_same_scores(self, remote: VLLMScorer, vllm_cross_encoder: VLLMServer, texts):
        """For servers that have no other; one query and many, or one each."""
        server = vllm_cross_encoder
        queries, documents = texts[0][:5] * 2, texts[1][:10]
        with VLLMScorer(server.base_url, api_key=server.api_key, endpoint="rerank") as other:
            for query in (queries[0], queries):
                assert largest_difference(other.score(query, documents), remote.score(query, documents)) <= 1e-6

    def test_one_query_for_all_is_the_same_as_one_each(self, remote: VLLMScorer, texts):
        """1:N and N:N differ only on the wire."""
        query, documents = texts[0][0], texts[1]
        repeated = remote.score([query] * len(documents), documents)
        assert largest_difference(remote.score(query, documents), repeated) <= 1e-6

    def test_sync_and_async_are_the_same(self, remote: VLLMScorer, vllm_cross_encoder: VLLMServer, texts):
        """And several calls at once, which the server mixes into common batches."""
        server, query, documents = vllm_cross_encoder, texts[0][0], texts[1]

        async def at_once() -> list[list[float]]:
            async with VLLMScorer(server.base_url, api_key=server.api_key) as scorer:
                return await asyncio.gather(*(scorer.ascore(query, documents) for _ in range(4)))

        for scores in asyncio.run(at_once()):
            assert largest_difference(scores, remote.score(query, documents)) <= 1e-6

    def test_ranking_is_the_same(self, remote: VLLMScorer, local_cross_encoder: LocalScorer, texts):
        """The order that a user sees, where no two scores are nearer than the tolerance."""
        query, documents = texts[0][0], texts[1]
        ours, theirs = local_cross_encoder.rerank(query, documents), remote.rerank(query, documents)
        by_index = {item.index: item.score for item in ours}
        for above, below in itertools.pairwise(theirs):
            assert by_index[above.index] >= by_index[below.index] - TOLERANCE

    def test_a_missing_key_is_an_auth_error(self, vllm_cross_encoder: VLLMServer, monkeypatch: pytest.MonkeyPatch):
        """With the server's place and the two ways to pass one; the same for a wrong key, which is not repeated."""
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        with pytest.raises(AuthError, match=r"401.*127\.0\.0\.1.*VLLM_API_KEY"):
            VLLMScorer(vllm_cross_encoder.base_url).score("q", "d")
        with pytest.raises(AuthError) as caught:
            VLLMScorer(vllm_cross_encoder.base_url, api_key="wr0ng").score("q", "d")
        assert "wr0ng" not in str(caught.value)

    def test_a_wrong_model_name_is_answered_with_the_right_one(self, vllm_cross_encoder: VLLMServer):
        """From a real server's 404."""
        server = vllm_cross_encoder
        with pytest.raises(BackendRejected, match=f"'nope'.*127.0.0.1.*It serves: {server.name}"):
            VLLMScorer(server.base_url, model="nope", api_key=server.api_key).score("q", "d")

    def test_the_model_is_found_by_itself(self, remote: VLLMScorer, vllm_cross_encoder: VLLMServer):
        """From /v1/models, with the first call."""
        remote.score("q", "d")
        assert remote.model_name == vllm_cross_encoder.name

    def test_an_over_long_document_without_cutting_is_rejected_with_the_remedy(self, vllm_cross_encoder: VLLMServer):
        """vLLM then refuses the whole request."""
        server = vllm_cross_encoder
        scorer = VLLMScorer(server.base_url, api_key=server.api_key, truncate_prompt_tokens=None)
        with pytest.raises(BackendRejected, match="maximum context length.*max_tokens_per_doc="):
            scorer.score("q", ["word " * 3000])


class TestBiEncoder:
    """The real MiniLM."""

    @pytest.fixture
    def remote(self, vllm_minilm: VLLMServer):
        with VLLMScorer(vllm_minilm.base_url) as scorer:
            yield scorer

    def test_scores_are_equal(self, remote: VLLMScorer, local: LocalScorer, texts):
        """Cosines, over-long texts cut at 256 tokens on both sides."""
        ours, theirs = local.score(*texts), remote.score(*texts)
        assert largest_difference(ours, theirs) <= TOLERANCE
        assert max(ours) - min(ours) > 0.5

    def test_one_query_for_all(self, remote: VLLMScorer, local: LocalScorer, texts):
        """As a reranker asks."""
        query, documents = texts[0][1], texts[1]
        assert largest_difference(local.score(query, documents), remote.score(query, documents)) <= TOLERANCE

    def test_prompts_before_queries_and_documents(self, vllm_minilm: VLLMServer, minilm: Path, texts):
        """Which vLLM leaves to its clients."""
        prompts = {"query_prompt": "query: ", "document_prompt": "passage: "}
        with (
            LocalScorer(minilm, dtype="float32", **prompts) as local,
            VLLMScorer(vllm_minilm.base_url, **prompts) as remote,
        ):
            ours = local.score(*texts)
            assert largest_difference(ours, remote.score(*texts)) <= TOLERANCE
        with LocalScorer(minilm, dtype="float32") as plain:
            by_hand = plain.score([f"query: {text}" for text in texts[0]], [f"passage: {text}" for text in texts[1]])
            assert largest_difference(ours, by_hand) <= 1e-5
