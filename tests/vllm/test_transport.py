"""Connections and keys, over real sockets; what goes wrong with connections: tests/vllm/faults."""

import asyncio
import gc

import pytest

from rag_rerank import VLLMScorer
from rag_rerank.vllm import connections
from tests.faulty_server import FaultyServer, oracle
from tests.vllm.faults.common import soon

EXACT = [oracle("q", "a")]


class TestConnections:
    """Each event loop has its own, and none is left behind."""

    def test_one_event_loop_after_another(self):
        """An async connection dies with its loop; the scorer, which nobody closes, lives on."""
        with FaultyServer() as server:
            scorer = VLLMScorer(server.base_url)
            assert [asyncio.run(scorer.ascore("q", ["a"])) for _ in range(5)] == [EXACT] * 5
            assert soon(lambda: server.open_connections == 0)
            assert server.connections == 5

    def test_one_loop_keeps_its_connection(self):
        """Calls in one event loop reuse it."""

        async def calls(scorer: VLLMScorer) -> None:
            for _ in range(3):
                await scorer.ascore("q", ["a"])

        with FaultyServer() as server:
            asyncio.run(calls(VLLMScorer(server.base_url)))
            assert server.connections == 1

    def test_one_that_was_idle_for_long_is_closed(self, monkeypatch: pytest.MonkeyPatch):
        """The server may close it in the moment of its use."""
        monkeypatch.setattr(connections, "LONGEST_IDLE", 0.0)
        with FaultyServer() as server, VLLMScorer(server.base_url) as scorer:
            assert scorer.score("q", ["a"]) == scorer.score("q", ["a"]) == EXACT
            assert server.connections == len(server.requests)
            assert soon(lambda: server.open_connections == 1)

    def test_a_scorer_that_is_dropped_closes_its_connections(self):
        """Nobody closes a retriever's compressor."""
        with FaultyServer() as server:
            assert VLLMScorer(server.base_url).score("q", ["a"]) == EXACT
            gc.collect()
            assert soon(lambda: server.open_connections == 0)
            assert server.connections == 1


class TestKey:
    """Sent as bearer token."""

    @pytest.mark.parametrize(
        ("environment", "given", "sent"),
        [(None, None, None), ("env", None, "env"), ("env", "given", "given"), ("env", "", None), ("", None, None)],
    )
    def test_where_it_comes_from(
        self, environment: str | None, given: str | None, sent: str | None, monkeypatch: pytest.MonkeyPatch
    ):
        """From the argument, else from VLLM_API_KEY, and from no other variable; an empty one is none."""
        monkeypatch.setenv("OPENAI_API_KEY", "another service's")
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        if environment is not None:
            monkeypatch.setenv("VLLM_API_KEY", environment)
        with FaultyServer() as server, VLLMScorer(server.base_url, api_key=given) as scorer:
            assert scorer.score("q", ["a"]) == EXACT
            tokens = {request.headers.get("authorization") for request in server.requests}
        assert tokens == {None if sent is None else f"Bearer {sent}"}

    @pytest.mark.parametrize("key", ["line\nbreak", "ключ", " padded "])
    def test_one_that_no_header_can_carry_is_refused_and_not_repeated(self, key: str):
        """At construction."""
        with pytest.raises(ValueError, match="api_key") as caught:
            VLLMScorer(api_key=key)
        assert key not in str(caught.value)
