"""Calls that nobody waits for any more give everything back: descriptors, connections, places in the pool."""

import asyncio
import contextlib
import functools
import os
import random
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from rag_rerank import AuthError, RerankError, VLLMScorer
from rag_rerank.vllm.connections import Connections
from tests.faulty_server import FaultyServer, Request, Steps, on_scores, refusal, right
from tests.vllm.faults.common import EXACT, FEW, QUERY, TLS, Connect, Serve, soon

AT_ONCE = 40
COUNT = int(os.environ.get("ABANDONED_CALLS", "400"))  # `make soak` has 2,000


def later(request: Request) -> Steps:
    """The right answer within 10 ms."""
    return [0.01 * random.random(), *right(request)]  # noqa: S311


@pytest.fixture(params=["http", "https"])
def server(request: pytest.FixtureRequest, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    context = None
    if request.param == "https":
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "authority.pem"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(TLS / "right.pem")
    return serve(later, tls=context)


@pytest.fixture(params=[None, httpx.AsyncClient], ids=["ours", "httpx"])
def make(request: pytest.FixtureRequest, server: FaultyServer, connect: Connect) -> Callable[..., VLLMScorer]:
    """Scorers for the server, with connections of our own and by a client of httpx."""
    if request.param and server.base_url.startswith("https"):
        pytest.skip("httpcore keeps, now and then, a connection that was given up while TLS began")
    return functools.partial(connect, server, http_client=request.param)


def held(scorer: VLLMScorer) -> tuple[int, int]:
    """Requests in its pools, and connections that are neither idle nor closed."""
    clients = [client for client, _ in scorer.client.transport._clients.values()]
    ours = [client for client in clients if isinstance(client, Connections)]
    busy = sum(each.is_connected() and not each.is_idle for client in ours for each in client._all)
    pools = [client._transport._pool for client in clients if isinstance(client, httpx.AsyncClient)]
    busy += sum(not (each.is_idle() or each.is_closed()) for pool in pools for each in pool.connections)
    return sum(len(pool._requests) for pool in pools), busy


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def give_up(scorer: VLLMScorer, count: int, *, cancelled: bool) -> None:
    async def one() -> None:
        seconds = 0.001 + 0.012 * random.random()  # noqa: S311
        with contextlib.suppress(TimeoutError, RerankError):
            if cancelled:
                await asyncio.wait_for(scorer.ascore("q", ["d"]), seconds)
            else:
                await scorer.ascore("q", ["d"], deadline=seconds)

    for _ in range(count // AT_ONCE):
        await asyncio.gather(*(one() for _ in range(AT_ONCE)))


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "late"])
def test_in_an_event_loop(server: FaultyServer, make: Callable[..., VLLMScorer], cancelled: bool):
    """Each call is given up while it connects, sends, waits, reads or closes."""
    scorer = make()

    async def calls() -> None:
        await scorer.ascore(QUERY, FEW)
        before = descriptors() - 2 * server.open_connections
        await give_up(scorer, COUNT, cancelled=cancelled)
        assert await asyncio.to_thread(soon, lambda: held(scorer) == (0, 0))
        assert await scorer.ascore(QUERY, FEW) == EXACT[:5]
        # Both ends of a connection are in this process; idle ones are kept, 32 at most.
        assert await asyncio.to_thread(soon, lambda: descriptors() - 2 * server.open_connections <= before)
        assert await asyncio.to_thread(soon, lambda: server.open_connections <= 32)

    asyncio.run(calls())


def test_in_threads(server: FaultyServer, make: Callable[..., VLLMScorer]):
    """As in an event loop."""
    scorer = make()
    scorer.score(QUERY, FEW)
    before = descriptors() - 2 * server.open_connections

    def call(number: int) -> None:
        with contextlib.suppress(RerankError):
            scorer.score("q", ["d"], deadline=0.001 + 0.012 * number / COUNT)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(call, range(COUNT)))
    assert scorer.score(QUERY, FEW) == EXACT[:5]
    assert soon(lambda: held(scorer) == (0, 0))
    assert soon(lambda: descriptors() - 2 * server.open_connections <= before)
    assert soon(lambda: server.open_connections <= 32)


@pytest.mark.parametrize("in_threads", [False, True], ids=["async", "sync"])
def test_requests_beside_one_that_fails(server: FaultyServer, make: Callable[..., VLLMScorer], in_threads: bool):
    """Calls of four requests, one of which is refused while the others are under way."""
    scorer = make(chunk_size=1)
    documents = ["a", "b", "c", "d"]

    def call(_: int) -> None:
        with pytest.raises(AuthError):
            scorer.score("q", documents)

    async def at_once() -> None:
        errors = await asyncio.gather(*(scorer.ascore("q", documents) for _ in range(10)), return_exceptions=True)
        assert {type(error) for error in errors} == {AuthError}

    async def calls() -> None:
        await asyncio.gather(scorer.ascore(QUERY, FEW), asyncio.to_thread(scorer.score, QUERY, FEW))
        before = descriptors() - 2 * server.open_connections
        server.behave = on_scores(lambda request: refusal(401) if request.documents == ["d"] else later(request))
        if in_threads:
            with ThreadPoolExecutor(10) as pool:
                await asyncio.to_thread(lambda: list(pool.map(call, range(COUNT // 4))))
        else:
            for _ in range(COUNT // 40):
                await at_once()
        assert await asyncio.to_thread(soon, lambda: held(scorer) == (0, 0))
        assert await asyncio.to_thread(soon, lambda: descriptors() - 2 * server.open_connections <= before)

    asyncio.run(calls())
