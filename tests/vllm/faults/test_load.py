"""Many callers at once, and servers that say they have too many."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from rag_rerank import (
    BackendUnavailable,
)
from tests.faulty_server import (
    HANG,
    Behaviour,
    Request,
    Steps,
    http,
    on_scores,
    oracle,
    refusal,
    right,
)
from tests.vllm.faults.common import (
    CHUNKS,
    DOCUMENTS,
    EXACT,
    FEW,
    FIRST,
    QUERY,
    Connect,
    Score,
    Serve,
    soon,
)


class TestConcurrency:
    """Many calls at once, and many requests of one call."""

    @pytest.mark.parametrize("limit", [1, 3])
    def test_the_requests_of_a_call_that_are_under_way(self, serve: Serve, connect: Connect, score: Score, limit: int):
        """No row: they are at most max_concurrency, and at least once as many."""
        under_way: set[int] = set()
        counts: list[int] = []

        def slow(request: Request) -> Steps:
            under_way.add(id(request))
            counts.append(len(under_way))
            yield 0.03
            under_way.discard(id(request))
            yield from right(request)

        server = serve(on_scores(slow))
        assert score(connect(server, chunk_size=10, max_concurrency=limit)) == EXACT
        assert (len(counts), max(counts)) == (10, limit)

    def test_64_threads(self, serve: Serve, connect: Connect):
        """Row 11: nobody waits for a place in a pool."""
        scorer = connect(serve(on_scores(lambda request: [0.02, *right(request)])))
        with ThreadPoolExecutor(64) as pool:
            assert list(pool.map(lambda _: scorer.score(QUERY, DOCUMENTS), range(64))) == [EXACT] * 64

    def test_64_tasks(self, serve: Serve, connect: Connect):
        """Row 11: as with threads."""
        scorer = connect(serve(on_scores(lambda request: [0.02, *right(request)])))

        async def call() -> list[list[float]]:
            return await asyncio.gather(*(scorer.ascore(QUERY, DOCUMENTS) for _ in range(64)))

        assert asyncio.run(call()) == [EXACT] * 64

    def test_many_calls_on_few_connections(self, serve: Serve, connect: Connect):
        """Row 42: each thread gets its own answers."""
        server = serve()
        scorer = connect(server)

        def call(number: int) -> bool:
            documents = DOCUMENTS[number % 60 :][:40]  # two chunks
            return scorer.score(str(number), documents) == [oracle(str(number), document) for document in documents]

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(call, range(800)))
        assert len(server.score_requests) == 1600
        assert server.connections <= 4 * 16

    def test_work_that_waits_its_turn(self, serve: Serve, connect: Connect):
        """No row: two servers that do one request at a time answer 18 calls at once, and get no request twice."""
        servers = serve(), serve()

        def one_at_a_time() -> Behaviour:
            busy: list[int] = []

            def slow(request: Request) -> Steps:
                busy.append(id(request))
                while busy[0] != id(request):
                    yield 0.005
                yield 0.3
                busy.pop(0)
                yield from right(request)

            return on_scores(slow)

        for server in servers:
            server.behave = one_at_a_time()
        scorer = connect(*servers, timeout=7.5)  # of which each try had a third; the last answers take 2.7 s
        with ThreadPoolExecutor(18) as pool:
            assert list(pool.map(lambda _: scorer.score(QUERY, FEW), range(18))) == [EXACT[:5]] * 18
        assert sum(len(server.score_requests) for server in servers) == 18 + 2  # by which the servers are compared


class TestBusyServers:
    """Answers that say: not now."""

    def test_a_server_that_asks_for_a_second(self, serve: Serve, connect: Connect, score: Score):
        """Row 12: it gets one."""
        server = serve(on_scores(lambda request: refusal(429, Retry_After=1), times=1))
        assert score(connect(server), FEW) == EXACT[:5]
        refused, repeated = server.score_requests
        assert repeated.arrived - refused.arrived >= 1.0

    @pytest.mark.parametrize("status", [429, 503])
    @pytest.mark.parametrize(("asked", "deadline"), [(3600, 10), (121, 200)])
    def test_a_server_that_asks_for_long(
        self, serve: Serve, connect: Connect, score: Score, status: int, asked: int, deadline: int
    ):
        """Row 13: more than two minutes are the caller's decision."""
        server = serve(on_scores(lambda request: refusal(status, Retry_After=asked)))
        with pytest.raises(BackendUnavailable) as caught:
            score(connect(server), FEW, deadline=deadline)
        assert caught.value.retry_after == asked
        assert len(server.score_requests) == 1

    def test_a_server_that_asks_for_more_than_is_left(self, serve: Serve, connect: Connect, score: Score):
        """Row 13: waiting would be in vain."""
        server = serve(on_scores(lambda request: refusal(429, Retry_After=60)))
        with pytest.raises(BackendUnavailable) as caught:
            score(connect(server), FEW, deadline=30)
        assert caught.value.retry_after == 60
        assert len(server.score_requests) == 1

    def test_a_server_that_asks_for_nonsense(self, serve: Serve, connect: Connect, score: Score):
        """Row 14: ordinary back-off."""
        nonsense = [
            "nan",
            "NaN",
            "inf",
            "-inf",
            "Infinity",
            "-5",
            "-0.1",
            "1e35",
            "9" * 400,
            "1e999",
            "",
            "soon",
            "5 s",
        ]
        nonsense += [
            "0x10",
            "1,5",
            "--",
            "Wed, 21 Oct 2015 07:28:00 GMT",
            "Thu, 32 Foo 2026 07:28:00 GMT",
            "Wed, 21 Oct",
        ]
        nonsense += ["Fri, 31 Dec 99999 23:59:59 GMT", "Sat, 01 Jan 100000 00:00:00 GMT", "2026-10-21T07:28:00Z"]
        server = serve()
        scorer = connect(server)
        for value in nonsense:
            server.behave = on_scores(lambda request: refusal(429, Retry_After=value), times=1)  # noqa: B023
            assert score(scorer, FEW) == EXACT[:5], value
        assert len(server.score_requests) == 2 * len(nonsense)

    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
    def test_two_failures_and_an_answer(self, serve: Serve, connect: Connect, score: Score, status: int):
        """Row 15: three requests for that chunk, one for each of the others."""
        server = serve(on_scores(lambda request: refusal(status), times=2, having=FIRST))
        assert score(connect(server)) == EXACT
        assert len(server.score_requests) == CHUNKS + 2

    def test_a_server_that_is_never_there(self, serve: Serve, connect: Connect, score: Score):
        """Row 16: three requests for that chunk; then the others are given up, too."""
        server = serve(on_scores(lambda request: refusal(503) if FIRST in request.documents else [HANG]))
        with pytest.raises(BackendUnavailable, match="503") as caught:
            score(connect(server))
        assert caught.value.retry_after is None
        assert sum(FIRST in request.documents for request in server.score_requests) == 3
        assert len(server.score_requests) == CHUNKS + 2
        assert soon(lambda: len(server.abandoned) == CHUNKS - 1)

    def test_a_large_error_page(self, serve: Serve, connect: Connect, score: Score):
        """Row 17: 100 MB of HTML in place of a sentence; little of it is read, and less is shown."""
        part = b"<html>\x1b[31m\r\n<h1>\xff\x00 Bad gateway</h1>" * 1000
        sent = []

        def page(_: Request) -> Steps:
            yield http("", 502, Content_Type="text/html", Content_Length=100_000_000)
            while True:
                sent.append(len(part))
                yield part

        server = serve(on_scores(page))
        with pytest.raises(BackendUnavailable, match="502") as caught:
            score(connect(server), FEW)
        assert str(caught.value).isprintable()
        assert len(caught.value.message) <= 340  # 300 of the server's
        assert len(server.score_requests) == 3
        assert sum(sent) < 3 * (16 << 20)  # what the sockets of three requests hold
