"""The fault matrix: whatever servers and networks do, a call ends in exact scores or in the error that it is, in time.

Rows (and R1 to R8) are those of the matrix and the rules that rag_rerank was designed by. The server is `FaultyServer`:
real sockets, and scores that are a hash of query and document, so "exact" means equal, for every document, in the
caller's order. Times are a tenth of a user's or less. Upper bounds leave room for a busy machine (`SLACK`); numbers of
requests do not.
"""

import asyncio
import contextlib
import copy
import functools
import gc
import itertools
import json
import logging
import multiprocessing
import pickle
import random
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from rag_rerank import (
    AuthError,
    BackendError,
    BackendRejected,
    BackendUnavailable,
    BadReply,
    DeadlineExceeded,
    DocumentRejected,
    FallbackScorer,
    Ranked,
    RerankError,
    Scorer,
    VLLMScorer,
    backoff,
)
from rag_rerank.vllm import exchange
from tests.faulty_server import (
    CLOSE,
    HANG,
    RESET,
    Behaviour,
    FaultyServer,
    Request,
    Steps,
    http,
    on_scores,
    oracle,
    refusal,
    right,
    scores,
)

QUERY = "Which one?"
DOCUMENTS = [f"document {number} " + "x" * (number * 37 % 61) for number in range(100)]  # lengths in no order
EXACT = [oracle(QUERY, document) for document in DOCUMENTS]
FIRST, CHUNKS = DOCUMENTS[0], 4  # FIRST is in one chunk of four
FEW = DOCUMENTS[:5]  # one chunk

PAUSES = 0.03  # seconds that the pauses between three tries take at most
REST = 0.3  # seconds of the first rest of a server that failed
SLACK = 0.5  # seconds by which a busy machine may be late
KEY = "canary-5ecret-k3y"
TLS = Path(__file__).parents[1] / "data" / "tls"  # an authority, its certificates for 127.0.0.1, and one by itself

Score = Callable[..., list[float]]
Serve = Callable[..., FaultyServer]
Connect = Callable[..., VLLMScorer]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "FIRST_PAUSE", PAUSES / 3)  # the second is twice as long
    monkeypatch.setattr(backoff, "FIRST_REST", REST)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers."""
    with contextlib.ExitStack() as servers:
        yield lambda *arguments, **options: servers.enter_context(FaultyServer(*arguments, **options))


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes scorers for servers or addresses."""
    with contextlib.ExitStack() as scorers:

        def make(*servers: FaultyServer | str, **settings) -> VLLMScorer:
            urls = [server if isinstance(server, str) else server.base_url for server in servers]
            usual = {"timeout": 10.0, "connect_timeout": 1.0, "chunk_size": 32, "max_concurrency": 4}
            return scorers.enter_context(VLLMScorer(urls, **usual | settings))

        yield make


@pytest.fixture(params=["sync", "async"])
def score(request: pytest.FixtureRequest) -> Iterator[Score]:
    """`score` and `ascore`, the latter in one event loop for the test."""
    if request.param == "sync":

        def run(scorer: Scorer, documents=DOCUMENTS, queries=QUERY, **options) -> list[float]:
            return scorer.score(queries, documents, **options)

        yield run
    else:
        with asyncio.Runner() as runner:

            def run(scorer: Scorer, documents=DOCUMENTS, queries=QUERY, **options) -> list[float]:
                return runner.run(scorer.ascore(queries, documents, **options))

            yield run


@contextlib.contextmanager
def within(seconds: float, *, at_least: float = 0.0) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert at_least <= time.monotonic() - began < seconds + SLACK


def soon(condition: Callable[[], bool], seconds: float = SLACK) -> bool:
    """Whether it comes true in that time."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    return condition()


def closed_port() -> str:
    """The address of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return f"127.0.0.1:{closed.getsockname()[1]}"


def hang(_: Request) -> Steps:
    return [HANG]


def reset(_: Request) -> Steps:
    return [RESET]


def drip(start: bytes, drop: bytes) -> Steps:
    """`start`, then a drop each 40 ms for ever."""
    return itertools.chain([start], itertools.cycle([drop, 0.04]))


def spoilt(change: Callable[[dict[str, Any]], Any]) -> Behaviour:
    """Right answers to which something is done; what `change` returns is sent, or what it changed."""

    def answer(request: Request) -> Steps:
        content = scores(request)
        return [http(change(content) or json.dumps(content))]

    return answer


def refusing(*bad: str, status: int = 400) -> Behaviour:
    """Refuses every request that has one of these documents in it."""
    return on_scores(lambda request: refusal(status, "too long") if set(bad) & set(request.documents) else None)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """At most 5 MiB more in use at any time."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 5 << 20


class TestConnections:
    """What goes wrong before there is an answer."""

    def test_a_healthy_server(self, serve: Serve, connect: Connect, score: Score):
        """No row: nothing more is sent than has to be."""
        server = serve()
        scorer = connect(server)
        assert score(scorer) == EXACT
        assert score(scorer) == EXACT
        assert [request.path for request in server.requests] == ["/version", "/v1/models"] + ["/v1/score"] * 2 * CHUNKS
        assert server.connections <= 4

    def test_nobody_listens(self, connect: Connect, score: Score):
        """Row 1: three tries; the error says where, how often and why."""
        label = closed_port()
        with within(PAUSES), pytest.raises(BackendUnavailable, match=f"{label}, 3 attempts") as caught:
            score(connect(f"http://{label}"))
        assert isinstance(caught.value.__cause__, httpx.ConnectError)

    @pytest.fixture
    def hanging_lookup(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """The address of a host whose name is looked up for as long as the test takes."""
        over = threading.Event()
        look_up = socket.getaddrinfo

        def hanging(host, *arguments, **options):
            if "reranker" in str(host) and over.wait(60):
                raise socket.gaierror(socket.EAI_AGAIN, "over")
            return look_up(host, *arguments, **options)

        monkeypatch.setattr(socket, "getaddrinfo", hanging)
        yield "http://reranker.test:8000"
        over.set()

    def test_a_name_lookup_that_hangs(self, connect: Connect, score: Score, hanging_lookup: str):
        """Row 2: it is part of connecting, so it ends with each try, and in any case with the call.

        (The matrix has only the deadline: it was written for a client that can't end a lookup.)
        """
        with within(0.3 + PAUSES, at_least=0.3), pytest.raises(BackendUnavailable, match="3 attempts"):
            score(connect(hanging_lookup, connect_timeout=0.1))
        with within(0.3, at_least=0.3), pytest.raises(DeadlineExceeded):
            score(connect(hanging_lookup, timeout=0.3))

    def test_nobody_accepts(self, connect: Connect, score: Score):
        """Row 3: a full backlog swallows the SYN; each try ends after connect_timeout."""
        with contextlib.ExitStack() as sockets:
            listener = sockets.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for _ in range(4):
                client = sockets.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(listener.getsockname())
            scorer = connect(f"http://127.0.0.1:{listener.getsockname()[1]}", connect_timeout=0.1)
            with within(0.3 + PAUSES, at_least=0.3), pytest.raises(BackendUnavailable, match="3 attempts"):
                score(scorer)

    @pytest.mark.parametrize("certificate", ["wrong_host", "expired", "self_signed"])
    def test_a_certificate_that_proves_nothing(
        self, serve: Serve, connect: Connect, score: Score, certificate: str, monkeypatch: pytest.MonkeyPatch
    ):
        """Row 4: one try, an error that names the certificate, and nothing sent."""
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "authority.pem"))
        server = serve(tls=server_side(certificate))
        with pytest.raises(BackendUnavailable, match=r"certificate.*1 attempt\b"):
            score(connect(server, api_key=KEY))
        assert (server.connections, server.requests) == (0, [])  # asyncio counts a connection after the handshake

    def test_a_certificate_of_a_trusted_authority(
        self, serve: Serve, connect: Connect, score: Score, monkeypatch: pytest.MonkeyPatch
    ):
        """Row 4, the other way round: SSL_CERT_FILE names more authorities."""
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "authority.pem"))
        assert score(connect(serve(tls=server_side("right")))) == EXACT

    def test_a_reset_before_the_answer(self, serve: Serve, connect: Connect, score: Score):
        """Row 5: one more request."""
        server = serve(on_scores(reset, times=1))
        assert score(connect(server)) == EXACT
        assert len(server.score_requests) == CHUNKS + 1

    def test_a_server_that_closes_idle_connections(self, serve: Serve, connect: Connect, score: Score):
        """Row 6: what is seen to be closed is not used again."""
        server = serve(lambda request: [*right(request), CLOSE])
        scorer = connect(server)
        for _ in range(3):
            assert score(scorer) == EXACT
            assert soon(lambda: server.open_connections == 0)
        assert len(server.score_requests) == 3 * CHUNKS
        assert server.connections == len(server.requests)

    @pytest.mark.parametrize("end", [CLOSE, RESET])
    def test_a_kept_connection_that_closes_as_it_is_used(
        self, serve: Serve, connect: Connect, score: Score, end, monkeypatch: pytest.MonkeyPatch
    ):
        """Row 6: one more request, at once."""
        monkeypatch.setattr(exchange, "FIRST_PAUSE", 1000.0)  # any back-off at all would show
        server = serve()
        scorer = connect(server)
        score(scorer, FEW)
        server.behave = lambda request: [end] if request.connection == 1 else None
        with within(0.0):
            assert score(scorer, FEW) == EXACT[:5]
        assert len(server.score_requests) == 3

    def test_a_restarted_server(self, serve: Serve, connect: Connect, score: Score):
        """Row 6: the end of all kept connections costs a call nothing."""
        server = serve()
        scorer = connect(server)
        score(scorer)
        server.kill()
        server.revive()
        assert score(scorer) == EXACT
        assert len(server.score_requests) == 2 * CHUNKS

    @pytest.mark.parametrize("kept", [0, 20, -1], ids=["no body", "20 bytes", "all but one byte"])
    def test_half_an_answer(self, serve: Serve, connect: Connect, score: Score, kept: int):
        """Row 7: one more request, and nothing of the half answer is used."""

        def half(request: Request) -> Steps:
            content = scores(request)
            for entry in content["data"]:
                entry["score"] = 2.0
            answer = http(json.dumps(content))
            body = answer.index(b"\r\n\r\n") + 4
            return [answer[: body + kept if kept >= 0 else kept], CLOSE]

        server = serve(on_scores(half, times=1))
        assert score(connect(server)) == EXACT
        assert len(server.score_requests) == CHUNKS + 1

    def test_a_longer_content_length_than_body(self, serve: Serve, connect: Connect, score: Score):
        """Row 7: the rest never comes, so the try is cut off and repeated."""
        server = serve(on_scores(lambda request: [http(json.dumps(scores(request)), Content_Length=9999)], times=1))
        with within(1.0, at_least=0.5):
            assert score(connect(server, attempt_timeout=0.5)) == EXACT
        assert len(server.score_requests) == CHUNKS + 1

    def test_no_answer_until_the_last_try(self, serve: Serve, connect: Connect, score: Score):
        """Row 8: each try is cut at attempt_timeout; the server sees that nobody waits any more.

        (DeadlineExceeded in the matrix; it is BackendUnavailable where the tries end before the deadline.)
        """
        server = serve(on_scores(hang))
        with within(0.6 + PAUSES, at_least=0.6), pytest.raises(BackendUnavailable, match="no answer within"):
            score(connect(server, attempt_timeout=0.2), FEW)
        assert len(server.score_requests) == 3
        assert soon(lambda: len(server.abandoned) == 3)

    @pytest.mark.parametrize("behave", [hang, on_scores(hang)], ids=["from the start", "for scores"])
    def test_no_answer_until_the_deadline(self, serve: Serve, connect: Connect, score: Score, behave: Behaviour):
        """Row 8: with one server, a try may take all of the call's time."""
        server = serve(behave)
        with within(0.4, at_least=0.4), pytest.raises(DeadlineExceeded):
            score(connect(server), deadline=0.4)
        assert len(server.score_requests) in {0, CHUNKS}
        assert soon(lambda: server.open_connections == 0)

    def test_one_request_without_an_answer_is_repeated(self, serve: Serve, connect: Connect, score: Score):
        """Row 8: once is not the end."""
        server = serve(on_scores(hang, times=1))
        with within(1.0, at_least=0.5):
            assert score(connect(server, attempt_timeout=0.5)) == EXACT
        assert len(server.score_requests) == CHUNKS + 1

    @pytest.mark.parametrize(
        ("start", "drop"),
        [(http("", Content_Length=1000), b" "), (b"HTTP/1.1 200 OK\r\n", b"X"), (b"", b"H")],
        ids=["body", "header", "status line"],
    )
    def test_a_drip(self, serve: Serve, connect: Connect, score: Score, start: bytes, drop: bytes):
        """Rows 9 and 10: a byte now and then keeps every single read alive; the deadline is for the whole."""
        server = serve(on_scores(lambda request: drip(start, drop)))
        with within(0.3, at_least=0.3), pytest.raises(DeadlineExceeded):
            score(connect(server), deadline=0.3)
        assert soon(lambda: server.open_connections == 0)

    def test_many_slow_requests(self, serve: Serve, connect: Connect, score: Score):
        """R2: a deadline is for all requests of a call together."""
        server = serve(on_scores(lambda request: [0.1, *right(request)]))
        with within(0.3, at_least=0.3), pytest.raises(DeadlineExceeded):
            score(connect(server, chunk_size=1), deadline=0.3)
        assert len(server.score_requests) <= 4 * 3


def server_side(certificate: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / f"{certificate}.pem")
    return context


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


class TestBusyServers:
    """Answers that say: not now."""

    def test_a_server_that_asks_for_a_second(self, serve: Serve, connect: Connect, score: Score):
        """Row 12: it gets one."""
        server = serve(on_scores(lambda request: refusal(429, Retry_After=1), times=1))
        assert score(connect(server), FEW) == EXACT[:5]
        refused, repeated = server.score_requests
        assert 1.0 <= repeated.arrived - refused.arrived < 1.3 + SLACK

    @pytest.mark.parametrize("status", [429, 503])
    @pytest.mark.parametrize(("asked", "deadline"), [(3600, 10), (121, 200)])
    def test_a_server_that_asks_for_long(
        self, serve: Serve, connect: Connect, score: Score, status: int, asked: int, deadline: int
    ):
        """Row 13: more than two minutes are the caller's decision."""
        server = serve(on_scores(lambda request: refusal(status, Retry_After=asked)))
        with within(0.2), pytest.raises(BackendUnavailable) as caught:
            score(connect(server), FEW, deadline=deadline)
        assert caught.value.retry_after == asked
        assert len(server.score_requests) == 1

    def test_a_server_that_asks_for_more_than_is_left(self, serve: Serve, connect: Connect, score: Score):
        """Row 13: waiting would be in vain."""
        server = serve(on_scores(lambda request: refusal(429, Retry_After=2)))
        with within(0.2), pytest.raises(BackendUnavailable) as caught:
            score(connect(server), FEW, deadline=1.5)
        assert caught.value.retry_after == 2
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
        with within(len(nonsense) * PAUSES):
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
        with within(PAUSES), pytest.raises(BackendUnavailable, match="503") as caught:
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
        with within(0.5), pytest.raises(BackendUnavailable, match="502") as caught:
            score(connect(server), FEW)
        assert str(caught.value).isprintable()
        assert len(caught.value.message) <= 340  # 300 of the server's
        assert len(server.score_requests) == 3
        assert sum(sent) < 3 * (16 << 20)  # what the sockets of three requests hold


class TestRefusals:
    """Answers that say: not this."""

    @pytest.mark.parametrize("status", [400, 422])
    @pytest.mark.parametrize("bad", [0, 57, 99])
    def test_a_bad_document(self, serve: Serve, connect: Connect, score: Score, bad: int, status: int):
        """Row 18: it is found with 12 requests, the others have their scores."""
        server = serve(refusing(DOCUMENTS[bad], status=status))
        with pytest.raises(DocumentRejected, match=rf"documents\[{bad}\].*too long") as caught:
            score(connect(server))
        assert caught.value.indices == (bad,)
        assert caught.value.status == status
        assert caught.value.scores == tuple(s if i != bad else None for i, s in enumerate(EXACT))
        assert len(server.score_requests) <= CHUNKS - 1 + 12

    def test_a_bad_document_is_ranked_last(self, serve: Serve, connect: Connect):
        """Row 18: where errors are passed through."""
        scorer = connect(serve(refusing(DOCUMENTS[57])))
        ranked = scorer.rerank(QUERY, DOCUMENTS, on_error="passthrough")
        assert ranked[-1] == Ranked(57, None)
        assert [(r.index, r.score) for r in ranked[:-1]] == sorted(
            ((i, s) for i, s in enumerate(EXACT) if i != 57), key=lambda pair: -pair[1]
        )

    def test_a_request_that_is_refused_with_any_document(self, serve: Serve, connect: Connect, score: Score):
        """Row 19: one request more tells that it is not the documents; the server says what it is."""
        server = serve(on_scores(lambda request: refusal(400, "the query is too long")))
        with pytest.raises(BackendRejected, match="400: the query is too long") as caught:
            score(connect(server), DOCUMENTS[:32])
        assert not isinstance(caught.value, DocumentRejected)
        assert [len(request.documents) for request in server.score_requests] == [32, 1]
        del server.requests[:]
        with pytest.raises(BackendRejected):
            score(connect(server))
        assert len(server.score_requests) <= 2 * CHUNKS

    def test_documents_that_are_all_bad(self, serve: Serve, connect: Connect, score: Score):
        """Row 19, where it is the documents after all: each has its index."""
        server = serve(refusing(*FEW))
        with pytest.raises(DocumentRejected) as caught:
            score(connect(server), FEW)
        assert caught.value.indices == (0, 1, 2, 3, 4)
        assert caught.value.scores == (None,) * 5
        assert len(server.score_requests) == 1 + 1 + 8  # the chunk, the probe, and the nodes of a tree of five leaves

    def test_three_bad_documents_in_three_chunks(self, serve: Serve, connect: Connect, score: Score):
        """Row 20: 97 scores with 37 requests."""
        server = serve(refusing(DOCUMENTS[5], DOCUMENTS[40], DOCUMENTS[99]))
        with pytest.raises(DocumentRejected, match=r"documents\[5\] and 2 more") as caught:
            score(connect(server))
        assert caught.value.indices == (5, 40, 99)
        assert caught.value.scores == tuple(None if i in {5, 40, 99} else s for i, s in enumerate(EXACT))
        assert len(server.score_requests) <= 37

    def test_a_bad_document_that_is_there_twice(self, serve: Serve, connect: Connect, score: Score):
        """Row 20: both places are named."""
        documents = [*FEW, DOCUMENTS[2]]
        with pytest.raises(DocumentRejected) as caught:
            score(connect(serve(refusing(DOCUMENTS[2]))), documents)
        assert caught.value.indices == (2, 5)

    @pytest.mark.parametrize("status", [401, 403])
    @pytest.mark.parametrize("at", ["/v1/models", "/v1/score"])
    def test_a_wrong_key(self, serve: Serve, connect: Connect, score: Score, status: int, at: str):
        """Row 21: no retry, and no key in what is shown."""
        server = serve(lambda request: refusal(status, "Unauthorized") if request.path == at else None)
        with pytest.raises(AuthError, match=f"{status}: Unauthorized") as caught:
            score(connect(server, api_key=KEY))
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
        assert len(server.score_requests) <= (CHUNKS if at == "/v1/score" else 0)
        assert sum(request.path == "/v1/models" for request in server.requests) == 1
        assert KEY not in "".join(traceback.format_exception(caught.value)) + repr(caught.value)

    @pytest.mark.parametrize("status", [400, 401, 503])
    def test_a_server_that_repeats_the_key(self, serve: Serve, connect: Connect, score: Score, status: int):
        """Row 21 and R6: gateways do, in their error messages."""
        server = serve(on_scores(lambda request: refusal(status, request.headers["authorization"])))
        with pytest.raises(BackendError, match=str(status)) as caught:
            score(connect(server, api_key=KEY), FEW)
        assert KEY not in "".join(traceback.format_exception(caught.value)) + repr(caught.value)

    def test_an_unknown_model(self, serve: Serve, connect: Connect, score: Score):
        """Row 22: no retry; the error names it, and what there is."""
        server = serve(
            on_scores(lambda request: refusal(404, f"The model `{request.content['model']}` does not exist."))
        )
        with pytest.raises(BackendRejected, match=r"'nosuch'.*serves: m\b"):
            score(connect(server, model="nosuch"), FEW)
        assert len(server.score_requests) == 1

    def test_a_request_that_is_too_large(self, serve: Serve, connect: Connect, score: Score):
        """Row 23: halved until it fits, with no probe; 413 tells enough."""
        server = serve(on_scores(lambda request: [http("", 413)] if len(request.documents) > 8 else None))
        assert score(connect(server), DOCUMENTS[:32]) == EXACT[:32]
        assert sorted(len(request.documents) for request in server.score_requests) == [8, 8, 8, 8, 16, 16, 32]

    def test_a_document_that_is_too_large(self, serve: Serve, connect: Connect, score: Score):
        """Row 23: what does not fit alone is rejected alone."""
        server = serve(on_scores(lambda request: [http("", 413)] if len(request.body) > 5000 else None))
        with pytest.raises(DocumentRejected) as caught:
            score(connect(server), [*FEW, "x" * 5000])
        assert caught.value.indices == (5,)
        assert caught.value.scores == (*EXACT[:5], None)

    @pytest.mark.parametrize("status", [301, 302, 307, 308])
    def test_a_redirect(self, serve: Serve, connect: Connect, score: Score, status: int):
        """Row 24: the other host never hears of the documents."""
        other = serve()
        server = serve(on_scores(lambda request: [http("", status, Location=f"{other.base_url}/v1/score")]))
        with pytest.raises(BackendRejected, match="never followed"):
            score(connect(server))
        assert len(server.score_requests) <= CHUNKS
        assert other.connections == 0


def entry(number: int, **changes: Any) -> Behaviour:
    """An answer in which one entry says something else; ... leaves a field out."""

    def change(content: dict[str, Any]) -> None:
        content["data"][number] |= changes
        content["data"][number] = {name: value for name, value in content["data"][number].items() if value is not ...}

    return spoilt(change)


def raw_score(text: str) -> Behaviour:
    """An answer in which the second score is written so."""
    return spoilt(lambda content: json.dumps(content).replace(str(content["data"][1]["score"]), text))


@functools.cache
def bomb(window_bits: int) -> bytes:
    """64 MiB in 64 KB."""
    packer = zlib.compressobj(level=1, wbits=window_bits)
    return b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(64)), packer.flush()])


NO_ANSWERS: dict[str, Behaviour] = {
    # row 25
    "html": lambda request: [http("<html>Welcome</html>", Content_Type="text/html")],
    "empty": lambda request: [http("")],
    "204": lambda request: [http("", 204)],
    # row 26
    "truncated JSON": spoilt(lambda content: json.dumps(content)[:-7]),
    "invalid UTF-8": spoilt(lambda content: json.dumps(content).encode().replace(b"list", b"\xff\xfe")),
    "deep": lambda request: [http("[" * 60_000)],
    "deeper": lambda request: [http("[" * 200_000)],
    "a score of 5,000 digits": raw_score("1" * 5000),
    # row 29
    "one result less": spoilt(lambda content: content["data"].pop() and None),
    "one result more": spoilt(lambda content: content["data"].append({"index": 5, "score": 0.5})),
    "no result": spoilt(lambda content: content["data"].clear()),
    "no list": spoilt(lambda content: content.pop("data") and None),
    # row 30
    "duplicate index": entry(1, index=0),
    # row 31
    **{f"index {json.dumps(i)}": entry(1, index=i) for i in (-1, 5, "1", 1.0, True, None, [1])},
    "no index": entry(1, index=...),
    # row 32
    **{f"score {json.dumps(x)}": entry(1, score=x) for x in (None, "0.9", True, [0.5], {"value": 0.5})},
    **{f"score {text}": raw_score(text) for text in ("NaN", "Infinity", "-Infinity", "1e999")},
    "no score": entry(1, score=...),
}


NO_HTTP: dict[str, Behaviour] = {
    "another protocol": lambda request: [b"SSH-2.0-OpenSSH_9.2\r\n", CLOSE],
    "no status line": lambda request: [json.dumps(scores(request)).encode(), CLOSE],
    "HTTP/2": lambda request: [b"HTTP/2 200 OK\r\n\r\n", CLOSE],
    "status 99999": lambda request: [http("{}", 99999)],
    "status 101": lambda request: [http("", 101, Upgrade="websocket", Connection="Upgrade")],
    "negative length": lambda request: [http("{}", Content_Length=-1)],
    "two lengths": lambda request: [http("{}").replace(b"Content-Length", b"Content-Length: 5\r\nContent-Length")],
    "no chunk size": lambda request: [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", CLOSE],
    "NUL in a header": lambda request: [http("{}", X="a\0b")],
    "a header of 1 MB": lambda request: [http("{}", X="x" * 1_000_000)],
    "endless headers": lambda request: itertools.chain([b"HTTP/1.1 200 OK"], itertools.repeat(b"\r\nX: " + b"x" * 999)),
}


def cases(behaviours: dict[str, Behaviour]) -> list:
    return [pytest.param(behave, id=name) for name, behave in behaviours.items()]


class TestReplies:
    """Answers that are not one finite score per document."""

    @pytest.mark.parametrize("behave", cases(NO_ANSWERS))
    def test_no_answer(self, serve: Serve, connect: Connect, score: Score, behave: Behaviour):
        """Rows 25, 26, 29 to 32: three tries, then BadReply; never padded, never guessed. One good one is enough."""
        server = serve(on_scores(behave))
        scorer = connect(server)
        with pytest.raises(BadReply):
            score(scorer, FEW)
        assert len(server.score_requests) == 3
        server.behave = on_scores(behave, times=1)
        assert score(scorer, FEW) == EXACT[:5]
        assert len(server.score_requests) == 5

    @pytest.mark.parametrize("behave", cases(NO_HTTP))
    def test_no_http(self, serve: Serve, connect: Connect, score: Score, behave: Behaviour):
        """R1: what can't be read as HTTP is a broken connection."""
        server = serve(on_scores(behave))
        scorer = connect(server)
        with pytest.raises(BackendUnavailable, match="the connection broke"):
            score(scorer, FEW)
        assert len(server.score_requests) == 3
        server.behave = on_scores(behave, times=1)
        assert score(connect(server), FEW) == EXACT[:5]  # a new one: the old one takes the server for down
        assert len(server.score_requests) == 5

    def test_the_document_without_a_score_is_named(self, serve: Serve, connect: Connect, score: Score):
        """Row 32: by its place in the call, not in the request."""
        server = serve(on_scores(entry(1, score=None), having=DOCUMENTS[33]))  # the second of the second chunk
        with pytest.raises(BadReply, match=r"documents\[33\]"):
            score(connect(server))

    def test_an_endless_answer(self, serve: Serve, connect: Connect, score: Score):
        """Row 27: it is read up to 64 KiB and 256 bytes a document."""
        part = b" " * 10_000
        server = serve(
            on_scores(lambda request: itertools.chain([http("", Content_Length=10**12)], itertools.repeat(part)))
        )
        scorer = connect(server)
        with little_memory(), within(0.5), pytest.raises(BadReply, match=f"longer than {65536 + 256 * 5} bytes"):
            score(scorer, FEW)
        assert len(server.score_requests) == 3
        assert soon(lambda: server.open_connections == 0)

    @pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "deflate", "br", "zstd", "identity, gzip"])
    def test_a_compressed_answer(self, serve: Serve, connect: Connect, score: Score, encoding: str):
        """Row 28: a small one can unpack to a thousand times its size, so none is unpacked."""
        body = bomb(15 if encoding == "deflate" else 31)
        server = serve(on_scores(lambda request: [http(body, Content_Encoding=encoding)]))
        scorer = connect(server)
        with little_memory(), pytest.raises(BadReply, match="compressed"):
            score(scorer, FEW)
        assert len(server.score_requests) == 3
        assert {request.headers["accept-encoding"] for request in server.requests} == {"identity"}

    def test_another_order_and_unknown_fields(self, serve: Serve, connect: Connect, score: Score):
        """Row 33: an answer has its order in its indices, and newer servers say more."""

        def change(content: dict[str, Any]) -> None:
            random.Random(0).shuffle(content["data"])  # noqa: S311
            content["data"] = [result | {"text": "x", "new": [None]} for result in content["data"]]
            content["new"] = {"score": 1}

        assert score(connect(serve(on_scores(spoilt(change))))) == EXACT

    def test_the_answer_to_another_request(self, serve: Serve, connect: Connect, score: Score):
        """Row 34: its id gives it away; that connection is not used again, and the request is repeated."""
        server = serve()
        scorer = connect(server)
        score(scorer, FEW)
        stale = right(server.score_requests[0])  # as many scores, of the same query
        server.behave = on_scores(lambda request: stale, times=1)
        assert score(scorer, DOCUMENTS[5:10]) == EXACT[5:10]
        _, swapped, repeated = server.score_requests
        assert swapped.connection != repeated.connection
        server.behave = on_scores(lambda request: stale)
        with pytest.raises(BadReply, match="is for the request"):
            score(scorer, DOCUMENTS[5:10])
        assert len(server.score_requests) == 6

    def test_a_dropped_connection_is_nobody_elses(self, serve: Serve, connect: Connect, score: Score):
        """Row 34: the one that is dropped may not have another request on it already."""
        seen: set[str] = set()

        def first_wrong(request: Request) -> Steps:
            wrong = {} if request.documents[0] in seen else {"id": "score-rag-rerank-other"}
            seen.add(request.documents[0])
            return [http(json.dumps(scores(request) | wrong))]

        server = serve(on_scores(first_wrong))
        assert score(connect(server, chunk_size=1, max_concurrency=32)) == EXACT
        assert len(server.score_requests) == 2 * len(DOCUMENTS)

    def test_an_answer_that_nobody_asked_for(self, serve: Serve, connect: Connect, score: Score):
        """Row 34: it comes behind another and waits in the connection for the next request."""
        server = serve(on_scores(lambda request: [b"".join(right(request)) * 2], times=1))
        scorer = connect(server)
        assert score(scorer, FEW) == EXACT[:5]
        assert score(scorer, DOCUMENTS[5:10]) == EXACT[5:10]
        assert len(server.score_requests) <= 3

    def test_an_answer_without_an_id(self, serve: Serve, connect: Connect, score: Score):
        """Row 34: servers of other makes need not give it back."""
        assert score(connect(serve(on_scores(spoilt(lambda content: content.pop("id") and None))))) == EXACT
        assert score(connect(serve(on_scores(spoilt(lambda content: content.update(id="x-1")))))) == EXACT

    def test_cookies(self, serve: Serve, connect: Connect, score: Score):
        """R8: none are kept, for there is no bound on what a server may set."""
        server = serve(on_scores(lambda request: [http(json.dumps(scores(request)), Set_Cookie=f"n{request.nth}=x")]))
        scorer = connect(server)
        for _ in range(3):
            score(scorer, FEW)
        assert {request.headers.get("cookie") for request in server.requests} == {None}

    def test_answers_by_two_models(self, serve: Serve, connect: Connect, score: Score):
        """Row 35: their scores can't be compared."""

        def other(request: Request) -> Steps:
            return [http(json.dumps(scores(request) | {"model": "other"}))]

        with pytest.raises(BadReply, match="'m'.*'other'|'other'.*'m'"):
            score(connect(serve(on_scores(other, having=FIRST))))


class TestInput:
    """What callers pass."""

    def test_no_documents(self, serve: Serve, connect: Connect, score: Score):
        """Row 36: nothing is sent."""
        server = serve()
        assert score(connect(server), []) == []
        assert server.connections == 0

    @pytest.mark.parametrize(
        "documents",
        [
            ["one"],
            [f"{number}" for number in range(10_000)],
            ["same", "other", "same", "same"] * 10,
            ["", "a", "", " "],
            ["a\0b", "\0", "a"],
            ["x" * 10_000_000, "short"],
        ],
        ids=["one", "10,000", "duplicates", "empty", "NUL", "10 MB"],
    )
    def test_unusual_documents(self, serve: Serve, connect: Connect, score: Score, documents: list[str]):
        """Row 36: each has its own score."""
        server = serve()
        assert score(connect(server), documents) == [oracle(QUERY, document) for document in documents]
        requests = [request for request in server.score_requests if request.documents != ["a"]]  # that one measures
        assert len(requests) == -(-len(documents) // 32)

    def test_a_query_for_each_document(self, serve: Serve, connect: Connect, score: Score):
        """Row 36: queries are cut into chunks with their documents."""
        queries = [f"query {number}" for number in range(100)]
        expected = [oracle(*pair) for pair in zip(queries, DOCUMENTS, strict=True)]
        assert score(connect(serve()), DOCUMENTS, queries) == expected

    def test_a_lone_surrogate(self, serve: Serve, connect: Connect, score: Score):
        """Row 37: U+FFFD in its place."""
        assert score(connect(serve()), ["a\ud800b"], "q\udc00") == [oracle("q\ufffd", "a\ufffdb")]

    @pytest.mark.parametrize(
        ("queries", "documents", "place"),
        [(QUERY, ["a", 1], "documents[1]"), (QUERY, ["a", b"b"], "documents[1]"), (None, ["a"], "queries")],
    )
    def test_what_is_no_text(self, serve: Serve, connect: Connect, score: Score, queries, documents, place: str):
        """Row 38: its place is named before anything is sent."""
        server = serve()
        with pytest.raises(TypeError) as caught:
            score(connect(server), documents, queries)
        assert place in str(caught.value)
        assert server.connections == 0

    def test_a_generator(self, serve: Serve, connect: Connect, score: Score):
        """Row 38: it is read once."""
        assert score(connect(serve()), (document for document in DOCUMENTS)) == EXACT


INTERRUPTED = """
import os, signal, sys, threading, time
from rag_rerank import VLLMScorer
from tests.faulty_server import HANG, FaultyServer, on_scores, oracle

server = FaultyServer(on_scores(lambda request: [HANG]))
scorer = VLLMScorer(server.base_url, chunk_size=1)

def interrupt():
    while len(server.score_requests) < 2:
        time.sleep(0.005)
    global sent
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    scorer.score("q", ["a", "b"])
except KeyboardInterrupt:
    print(time.monotonic() - sent)
until = time.monotonic() + 1
while server.open_connections and time.monotonic() < until:
    time.sleep(0.005)
print(len(server.abandoned), server.open_connections)
server.behave = lambda request: None
print(scorer.score("q", ["a", "b"]) == [oracle("q", "a"), oracle("q", "b")])
"""


class TestInterruption:
    """Calls that are given up."""

    def test_a_cancelled_task(self, serve: Serve, connect: Connect):
        """Row 39: at once; the server sees that nobody waits any more, and the scorer goes on."""
        server = serve(on_scores(hang))
        scorer = connect(server)

        async def cancel_then_call() -> list[float]:
            task = asyncio.create_task(scorer.ascore(QUERY, DOCUMENTS))
            await asyncio.to_thread(soon, lambda: len(server.score_requests) == CHUNKS, 5)
            task.cancel()
            with within(0.05), pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(soon, lambda: len(server.abandoned) == CHUNKS)
            assert server.open_connections == 0
            server.behave = lambda request: None
            return await scorer.ascore(QUERY, DOCUMENTS)

        assert asyncio.run(cancel_then_call()) == EXACT

    def test_ctrl_c(self):
        """Row 40: at once, as with a task; in a process of its own, so that pytest does not end."""
        run = subprocess.run(
            [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=20, check=True
        )
        took, left, exact = run.stdout.splitlines()
        assert float(took) < 0.3 + SLACK
        assert run.stderr == ""
        assert (left, exact) == ("2 0", "True")

    def test_a_closed_scorer(self, serve: Serve, connect: Connect, score: Score):
        """R7: it says that it is closed; closing it again is harmless."""
        server = serve()
        scorer = connect(server)
        score(scorer, FEW)
        scorer.close()
        scorer.close()
        asyncio.run(scorer.aclose())
        with pytest.raises(RerankError, match="closed"):
            score(scorer, FEW)
        assert len(server.score_requests) == 1

    def test_closing_closes_connections(self, serve: Serve, connect: Connect):
        """R7: of `close` and of `aclose`."""
        server = serve()
        scorer = connect(server)
        scorer.score(QUERY, FEW)
        scorer.close()
        assert soon(lambda: server.open_connections == 0)

        async def call() -> None:
            async with connect(server) as other:
                await other.ascore(QUERY, FEW)
                assert server.open_connections == 1
            assert await asyncio.to_thread(soon, lambda: server.open_connections == 0)

        asyncio.run(call())

    def test_closing_while_threads_wait(self, serve: Serve, connect: Connect):
        """R7: their calls end in an error of ours, and soon."""
        server = serve(on_scores(hang))
        scorer = connect(server)
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(scorer.score, QUERY, DOCUMENTS) for _ in range(2)]
            assert soon(lambda: len(server.score_requests) == 2 * CHUNKS, 5)
            with within(0.0):
                scorer.close()
                assert all(isinstance(call.exception(timeout=5), RerankError) for call in calls)
        assert soon(lambda: server.open_connections == 0)

    def test_closing_while_tasks_wait(self, serve: Serve, connect: Connect):
        """R7: as with threads."""
        server = serve(on_scores(hang))
        scorer = connect(server)

        async def close_during_calls() -> list[object]:
            calls = [asyncio.create_task(scorer.ascore(QUERY, DOCUMENTS)) for _ in range(2)]
            await asyncio.to_thread(soon, lambda: len(server.score_requests) == 2 * CHUNKS, 5)
            with within(0.0):
                await scorer.aclose()
                return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)

        assert [isinstance(error, RerankError) for error in asyncio.run(close_during_calls())] == [True, True]
        assert soon(lambda: server.open_connections == 0)


def hundred_calls(scorer: VLLMScorer, name: str, results) -> None:
    """In a forked child: half of the calls from a thread, half from an event loop."""

    def exact(number: int) -> tuple[str, list[str], list[float]]:
        query, documents = f"{name} {number}", DOCUMENTS[number:][:3]
        return query, documents, [oracle(query, document) for document in documents]

    right_ones = 0
    for query, documents, expected in map(exact, range(50)):
        right_ones += scorer.score(query, documents) == expected

    async def calls() -> int:
        return sum(
            [await scorer.ascore(query, documents) == expected for query, documents, expected in map(exact, range(50))]
        )

    results.put(right_ones + asyncio.run(calls()))


FIRST_CALL = """
import sys
from rag_rerank import VLLMScorer
from tests.faulty_server import FaultyServer

with FaultyServer() as server, VLLMScorer(server.base_url) as scorer:
    before = set(sys.modules)
    scorer.score("q", ["a"])
    print(sorted(set(sys.modules) - before))
"""


class TestSharing:
    """Processes and event loops may share one scorer (threads: TestConcurrency)."""

    def test_forked_children(self, serve: Serve, connect: Connect):
        """Row 41: with the parent's connections, in use as it forks, they would get each other's answers."""
        scorer = connect(serve())
        scorer.score(QUERY, FEW)
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        children = [
            context.Process(target=hundred_calls, args=(scorer, str(name), results), daemon=True) for name in range(4)
        ]
        with ThreadPoolExecutor(2) as pool:
            calls = pool.map(lambda _: scorer.score(QUERY, DOCUMENTS), range(50))
            for child in children:
                child.start()
            assert list(calls) == [EXACT] * 50
        assert [results.get(timeout=30) for _ in children] == [100] * 4
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 4
        assert scorer.score(QUERY, DOCUMENTS) == EXACT

    def test_a_first_call_imports_nothing(self):
        """Row 41: a child that is forked while another thread imports waits for that import for ever."""
        run = subprocess.run([sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, timeout=20, check=True)
        assert run.stdout == "[]\n"

    def test_event_loops(self, serve: Serve, connect: Connect):
        """Row 43: one after another, side by side, and none of the caller's (Jupyter); nothing is left open."""
        server = serve()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scorer = connect(server)
            assert [asyncio.run(scorer.ascore(QUERY, DOCUMENTS)) for _ in range(3)] == [EXACT] * 3
            with ThreadPoolExecutor(2) as pool:
                answers = pool.map(lambda _: asyncio.run(scorer.ascore(QUERY, DOCUMENTS)), range(2))
                assert list(answers) == [EXACT] * 2

            async def in_a_notebook() -> list[float]:
                return scorer.score(QUERY, DOCUMENTS)

            assert asyncio.run(in_a_notebook()) == EXACT
            scorer.close()
            assert soon(lambda: server.open_connections == 0)
            gc.collect()
        assert [str(warning.message) for warning in caught] == []

    @pytest.mark.parametrize("remake", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy, copy.copy])  # noqa: S301
    def test_copies(self, serve: Serve, connect: Connect, score: Score, remake, monkeypatch: pytest.MonkeyPatch):
        """Row 44: a copy works and has a key: the same scorer's, or the environment's."""
        server = serve()
        scorer = connect(server, api_key=KEY)
        score(scorer, FEW)
        monkeypatch.setenv("VLLM_API_KEY", "from-env")
        with remake(scorer) as copied:
            assert score(copied) == EXACT
        key = KEY if copied is scorer else "from-env"
        assert server.requests[-1].headers["authorization"] == f"Bearer {key}"

    def test_pickles_have_no_key(self, connect: Connect):
        """Row 44: they are read by whoever has the file."""
        assert KEY.encode() not in pickle.dumps(connect("http://localhost", api_key=KEY))

    def test_spawned_process(self, serve: Serve, connect: Connect):
        """Row 44: the scorer goes there as a pickle."""
        scorer = connect(serve())
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(scorer.score, QUERY, DOCUMENTS).result(timeout=30) == EXACT


class TestSeveralServers:
    """One does what another can't."""

    @pytest.mark.parametrize("dead_first", [True, False])
    def test_one_that_is_dead(self, serve: Serve, connect: Connect, score: Score, dead_first: bool):
        """Row 45: exact; it is asked at first, and once when it has rested."""
        dead, alive = serve(reset), serve()
        scorer = connect(*((dead, alive) if dead_first else (alive, dead)))
        assert score(scorer) == EXACT
        wasted = len(dead.requests)
        assert wasted <= 4
        began = time.monotonic()
        while time.monotonic() < began + 2 * REST:  # the second rest is twice as long
            assert score(scorer, FEW) == EXACT[:5]
        assert len(dead.requests) <= max(wasted, 1) + 1
        assert len(alive.score_requests) > 20

    def test_one_where_nobody_listens(self, serve: Serve, connect: Connect, score: Score):
        """Row 45: as one that breaks connections."""
        scorer = connect(f"http://{closed_port()}", serve())
        with within(0.3):
            for _ in range(5):
                assert score(scorer) == EXACT

    def test_one_that_hangs(self, serve: Serve, connect: Connect, score: Score):
        """Row 45: it costs a call its share of the time, once."""
        stuck, alive = serve(hang), serve()
        scorer = connect(stuck, alive, timeout=1.5)
        with within(0.5):
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

        assert soon(back, REST + SLACK)
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
        assert [len(server.score_requests) - n for server, n in zip(servers, before, strict=True)] == [3, 3]

    def test_one_that_is_busy(self, serve: Serve, connect: Connect, score: Score):
        """Row 13: what it asks for concerns nobody while another can do it."""
        busy, free = serve(on_scores(lambda request: refusal(429, Retry_After=3600))), serve()
        scorer = connect(busy, free)
        with within(0.3):
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
