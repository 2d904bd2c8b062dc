"""Several servers, and none at all."""

import asyncio
import itertools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rag_rerank import (
    BackendError,
    BackendRejected,
    BackendUnavailable,
    FallbackScorer,
    Ranked,
    Scorer,
    VLLMScorer,
    backoff,
)
from rag_rerank.vllm import exchange
from tests.faulty_server import (
    RESET,
    Behaviour,
    on_scores,
    oracle,
    refusal,
)
from tests.vllm.faults.common import (
    CHUNKS,
    DOCUMENTS,
    EXACT,
    FEW,
    QUERY,
    Connect,
    Score,
    Serve,
    closed_port,
    hang,
    reset,
    soon,
)


class TestSeveralServers:
    """One does what another can't."""

    @pytest.mark.parametrize("dead_first", [True, False])
    def test_one_that_is_dead(
        self, serve: Serve, connect: Connect, score: Score, dead_first: bool, monkeypatch: pytest.MonkeyPatch
    ):
        """Row 45: exact; it is asked at first, and not while it rests."""
        monkeypatch.setattr(backoff, "FIRST_REST", 30.0)
        dead, alive = serve(reset), serve()
        scorer = connect(*((dead, alive) if dead_first else (alive, dead)))
        assert score(scorer) == EXACT
        wasted = len(dead.requests)
        assert wasted <= 6  # two requests at once, and what each learns of it before
        for _ in range(20):
            assert score(scorer, FEW) == EXACT[:5]
        assert len(dead.requests) <= max(wasted, 1)
        assert len(alive.score_requests) >= CHUNKS + 20

    def test_one_where_nobody_listens(
        self, serve: Serve, connect: Connect, score: Score, monkeypatch: pytest.MonkeyPatch
    ):
        """Row 45: as one that breaks connections; nobody waits."""
        monkeypatch.setattr(exchange, "FIRST_PAUSE", 1e9)  # any pause at all would end the call
        scorer = connect(f"http://{closed_port()}", serve())
        for _ in range(5):
            assert score(scorer) == EXACT

    def test_one_that_hangs(self, serve: Serve, connect: Connect, score: Score):
        """Row 45: it costs a call its share of the time, once."""
        stuck, alive = serve(hang), serve()
        scorer = connect(stuck, alive, timeout=3.0)
        for _ in range(5):
            assert score(scorer) == EXACT
        assert len(stuck.requests) <= 4

    def test_one_that_is_killed(self, serve: Serve, connect: Connect):
        """Row 46: nobody notices."""
        servers = serve(), serve()
        scorer = connect(*servers)
        first_calls = threading.Event()

        def call(number: int) -> bool:
            if number == 200:
                first_calls.set()
            return scorer.score(str(number), FEW) == [oracle(str(number), document) for document in FEW]

        with ThreadPoolExecutor(8) as pool:
            exact = pool.map(call, range(800))
            assert first_calls.wait(30)
            servers[0].kill()
            killed_after = len(servers[0].score_requests)
            assert all(exact)
        assert killed_after > 50
        assert len(servers[1].score_requests) > 500

    def test_one_that_comes_back(self, serve: Serve, connect: Connect, score: Score):
        """Row 47: it gets its share again when it has rested."""
        servers = serve(), serve()
        scorer = connect(*servers)
        score(scorer)
        servers[0].kill()
        for _ in range(3):
            assert score(scorer) == EXACT
        servers[0].revive()
        before = len(servers[0].score_requests)

        def back() -> bool:
            assert score(scorer, FEW) == EXACT[:5]
            return len(servers[0].score_requests) > before

        assert soon(back)
        for _ in range(10):
            score(scorer, FEW)
        assert len(servers[0].score_requests) >= before + 5

    @pytest.mark.parametrize("status", [400, 401, 404, 422])
    def test_one_that_refuses(self, serve: Serve, connect: Connect, score: Score, status: int):
        """Row 48: it is alive, and asked again in its turn."""
        servers = serve(), serve()
        scorer = connect(*servers)
        score(scorer)
        for server in servers:
            server.behave = on_scores(lambda request: refusal(status))
        for _ in range(4):
            with pytest.raises(BackendRejected):
                score(scorer, FEW)
        for server in servers:
            server.behave = lambda request: None
        before = [len(server.score_requests) for server in servers]
        for _ in range(6):
            assert score(scorer, FEW) == EXACT[:5]
        # After a 404 the model may be another one: each is compared with the other again.
        compared = status == 404
        assert [len(server.score_requests) - n - compared for server, n in zip(servers, before, strict=True)] == [3, 3]

    def test_one_that_is_busy(self, serve: Serve, connect: Connect, score: Score):
        """Row 13: what it asks for concerns nobody while another can do it."""
        busy, free = serve(on_scores(lambda request: refusal(429, Retry_After=3600))), serve()
        scorer = connect(busy, free)
        for _ in range(3):
            assert score(scorer) == EXACT

    def test_both_serve_one_call(self, serve: Serve, connect: Connect, score: Score):
        """R5: which server takes a chunk never changes a score."""
        servers = serve(), serve()
        assert score(connect(*servers, chunk_size=10)) == EXACT
        assert all(len(server.score_requests) >= 3 for server in servers)


class Local(Scorer):
    """Stands for a model in this process; its scores can be told from a server's."""

    model_name = "local"

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        return [-oracle(queries[0], document) for document in documents]


class TestTotalOutage:
    """No server answers."""

    @pytest.fixture
    def down(self, connect: Connect) -> VLLMScorer:
        return connect(*(f"http://{closed_port()}" for _ in range(2)))

    def test_another_scorer_takes_over(self, down: VLLMScorer, score: Score, caplog: pytest.LogCaptureFixture):
        """Row 49: the whole call, with one warning."""
        fallback = FallbackScorer(down, Local())
        assert score(fallback) == [-s for s in EXACT]
        assert fallback.model_name == "local"
        assert [record.levelno for record in caplog.records] == [logging.WARNING]

    def test_scores_are_never_mixed(self, serve: Serve, connect: Connect, score: Score):
        """Row 49: a server that fails one request in nine fails about every other call, and in its midst."""
        numbers = itertools.count()
        remote = connect(serve(on_scores(lambda request: None if next(numbers) % 9 else [RESET])), max_retries=0)
        answered = {"m": 0, "local": 0}
        for _ in range(100):
            fallback = FallbackScorer(remote, Local())  # one that remembered the failure would pass over the server
            answer = score(fallback)
            answered[fallback.model_name] += 1
            assert answer == (EXACT if fallback.model_name == "m" else [-s for s in EXACT])
        assert min(answered.values()) > 20

    def test_retrieval_order_is_kept(self, down: VLLMScorer, caplog: pytest.LogCaptureFixture):
        """Row 50: every document once, with no score and one warning."""
        kept = [Ranked(index, None) for index in range(100)]
        assert down.rerank(QUERY, DOCUMENTS, on_error="passthrough") == kept
        assert asyncio.run(down.arerank(QUERY, DOCUMENTS, on_error="passthrough")) == kept
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2

    @pytest.mark.parametrize("behave", [reset, lambda request: refusal(503)], ids=["reset", "503"])
    def test_what_is_down_is_not_asked_three_times(
        self, serve: Serve, connect: Connect, score: Score, behave: Behaviour
    ):
        """Row 51: three requests for the first call, then one for each."""
        server = serve()
        scorer = connect(server)
        score(scorer, FEW)
        server.behave = behave
        del server.requests[:]
        for _ in range(100):
            with pytest.raises(BackendUnavailable):
                score(scorer, FEW)
        assert len(server.requests) <= 120
        server.behave = lambda request: None
        assert score(scorer) == EXACT

    def test_many_chunks(self, serve: Serve, connect: Connect, score: Score):
        """Row 51: at most three requests for each chunk even where all fail at once."""
        server = serve()
        scorer = connect(server)
        score(scorer, FEW)
        server.behave = on_scores(lambda request: refusal(503))
        del server.requests[:]
        with pytest.raises(BackendError):
            score(scorer)
        assert len(server.score_requests) <= 3 * CHUNKS
