"""The only module that knows httpx: sends what the policy wants sent, once for threads and once for event loops."""

import asyncio
import os
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Mapping
from typing import TypedDict, TypeVar

import httpx

from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.policy import Failure, Send, Sleep, Steps
from rag_rerank.vllm.wire import Reply

T = TypeVar("T")
_Lifetime = AsyncGenerator[None, None]

# A pool with fewer connections than callers would answer the last of them with PoolTimeout.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=32)
# A 307 would send every document, and the headers, to another host. False is httpx's default; here it is a rule.
_FOLLOW_REDIRECTS = False


class Transport:
    """Connections to one endpoint.

    They are kept per process, for a connection that two processes share after a fork gives one the other's answers, and
    per event loop, for an async connection dies with its loop.

    Args:
        endpoint: Where to.
        headers: Sent with every request.
    """

    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str]) -> None:
        self._endpoint = endpoint
        # A compressed answer can grow a thousandfold when unpacked: ask for none, and read none (`_Answer`).
        self._headers = {"Accept-Encoding": "identity", "Content-Type": "application/json", **headers}
        self._lock = threading.Lock()
        self._client: tuple[int, httpx.Client] | None = None
        self._async_clients: dict[asyncio.AbstractEventLoop, tuple[httpx.AsyncClient, _Lifetime]] = {}

    def run(self, steps: Steps[T]) -> T:
        """Do what `steps` yields, in this thread."""
        outcome: Reply | Failure | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as finished:
                result: T = finished.value
                return result
            if isinstance(step, Sleep):
                time.sleep(step.seconds)
                outcome = None
            else:
                outcome = self._send(step)

    async def arun(self, steps: Steps[T]) -> T:
        """Do what `steps` yields, in this event loop."""
        outcome: Reply | Failure | None = None
        while True:
            try:
                step = steps.send(outcome)
            except StopIteration as finished:
                result: T = finished.value
                return result
            if isinstance(step, Sleep):
                await asyncio.sleep(step.seconds)
                outcome = None
            else:
                outcome = await self._asend(step)

    def _send(self, step: Send) -> Reply | Failure:
        until = None if step.timeout is None else time.monotonic() + step.timeout
        try:
            with self._sync_client().stream(**self._request(step)) as response:
                answer = _Answer(response, step.request.reply_limit, until)
                for chunk in response.iter_raw():
                    answer.add(chunk)
                return answer.reply()
        except (httpx.TransportError, _Unread, TimeoutError) as error:
            return _failure(error)

    async def _asend(self, step: Send) -> Reply | Failure:
        try:
            # httpx times out single reads; this bounds the whole exchange.
            async with asyncio.timeout(step.timeout):
                async with (await self._async_client()).stream(**self._request(step)) as response:
                    answer = _Answer(response, step.request.reply_limit, None)
                    async for chunk in response.aiter_raw():
                        answer.add(chunk)
                    return answer.reply()
        except (httpx.TransportError, _Unread, TimeoutError) as error:
            return _failure(error)

    def _request(self, step: Send) -> "_Arguments":
        return {
            "method": step.request.method,
            "url": self._endpoint.root + step.request.path,
            "content": step.request.body,
            "headers": self._headers,
            "timeout": step.timeout,
        }

    def _sync_client(self) -> httpx.Client:
        with self._lock:
            if self._client is None or self._client[0] != os.getpid():
                client = httpx.Client(limits=_LIMITS, follow_redirects=_FOLLOW_REDIRECTS)
                self._client = os.getpid(), client
                weakref.finalize(self, client.close)  # adapters are dropped more often than closed
            return self._client[1]

    async def _async_client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        with self._lock:
            known = self._async_clients.get(loop)
            for closed in [other for other in self._async_clients if other.is_closed()]:
                del self._async_clients[closed]  # a loop closed by hand: nothing in it can be awaited any more
        if known is not None:
            return known[0]
        client = httpx.AsyncClient(limits=_LIMITS, follow_redirects=_FOLLOW_REDIRECTS)
        lifetime = self._until_the_loop_ends(loop, client)
        with self._lock:
            self._async_clients[loop] = client, lifetime
        await anext(lifetime)
        return client

    async def _until_the_loop_ends(self, loop: asyncio.AbstractEventLoop, client: httpx.AsyncClient) -> "_Lifetime":
        """Close `client` while its loop can still do it.

        A loop knows its unfinished async generators, and `asyncio.run` closes them before the loop. Without this, each
        ``asyncio.run(scorer.ascore(...))`` left one connection open for the life of the process (20 of 20, measured).
        """
        try:
            yield
        finally:
            with self._lock:
                self._async_clients.pop(loop, None)
            await client.aclose()

    def close(self) -> None:
        """Close this process's connections. Those of event loops are closed in them: by `aclose`, or as they end."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None and client[0] == os.getpid():
            client[1].close()

    async def aclose(self) -> None:
        """As `close`, and the running loop's connections too."""
        self.close()
        with self._lock:
            known = self._async_clients.get(asyncio.get_running_loop())
        if known is not None:
            await known[1].aclose()


class _Arguments(TypedDict):
    """What httpx's ``stream`` is called with."""

    method: str
    url: str
    content: bytes | None
    headers: Mapping[str, str]
    timeout: float | None


class _Unread(Exception):
    """An answer that must not be read any further."""


class _Answer:
    """Collects a body as it comes, within bounds of size and time.

    Args:
        limit: Most bytes.
        until: When it must be complete, on the monotonic clock. httpx times out single reads, so a server that sends a
            byte now and then would be read for ever.
    """

    def __init__(self, response: httpx.Response, limit: int, until: float | None) -> None:
        encoding = response.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise _Unread(f"the answer is compressed ({encoding[:20]!r}) although it was asked for plain")
        self._response = response
        self._limit = limit
        self._until = until
        self._body = bytearray()

    def add(self, chunk: bytes) -> None:
        self._body += chunk
        if len(self._body) > self._limit:
            raise _Unread(f"the answer is longer than {self._limit} bytes")
        if self._until is not None and time.monotonic() > self._until:
            raise TimeoutError

    def reply(self) -> Reply:
        headers = {name.lower(): value for name, value in self._response.headers.items()}
        return Reply(self._response.status_code, bytes(self._body), headers)


def _failure(error: Exception) -> Failure:
    text = str(error) or type(error).__name__
    match error:
        case httpx.TimeoutException() | TimeoutError():
            return Failure("timeout", "timed out", error)
        case httpx.ConnectError():
            return Failure("connect", f"can't connect: {text}", error)
        case _Unread():
            return Failure("unread", text)
        case _:
            return Failure("broken", f"the connection broke: {text}", error)
