"""The only module that knows httpx: sends requests.

Everything runs in an event loop: the caller's, or else that of one thread for the process, which costs a call 0.5 ms
more than httpx's client for threads. So deadlines hold whatever a server or a name lookup does (httpx times out single
reads only), and a call that is given up closes its connection at once, which makes vLLM stop working for it.
"""

import asyncio
import contextlib
import functools
import importlib
import os
import ssl
import time
import weakref
from collections.abc import AsyncGenerator, Coroutine, Generator, Sequence
from dataclasses import replace
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar
from urllib.request import getproxies

import anyio
import httpx

from rag_rerank.errors import ConfigError, DeadlineExceeded, RerankError
from rag_rerank.vllm.background import Background
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.exchange import Send
from rag_rerank.vllm.wire import Failure, Reply

# What httpx would import with its first request: a process that forks in that moment has a child that waits for ever.
for _name in ("httpcore", "anyio._backends._asyncio", "encodings.idna"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)

T = TypeVar("T")
_Lifetime = AsyncGenerator[None, None]
_Loop = asyncio.AbstractEventLoop
_Clients = dict[_Loop, tuple[httpx.AsyncClient, _Lifetime]]

# A compressed answer can grow a thousandfold when unpacked: ask for none, and read none (`_read`).
_HEADERS = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
_LONGEST_ERROR_PAGE = 64 << 10  # bytes; enough for a sentence
_CLOSED = "The scorer was closed while it was scoring."


_background = Background()
_closing: set[asyncio.Task[None]] = set()  # a loop keeps no hold on its tasks


class Transport:
    """Connections, for each event loop its own: an async connection dies with its loop. A pickle carries no key.

    The key None is read from the environment; an empty one is not sent. Raises ConfigError where no HTTP header can
    carry the key, or it would go unencrypted to another machine without `send_key_over_http`.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], api_key: str | None = None, *, send_key_over_http: bool = False
    ) -> None:
        self._remake = functools.partial(Transport, tuple(endpoints), send_key_over_http=send_key_over_http)
        key = os.environ.get("VLLM_API_KEY") if api_key is None else api_key
        if key and not (key.isascii() and key.isprintable() and key == key.strip()):
            raise ConfigError("api_key has characters that no HTTP header can carry; was a line break pasted with it?")
        for endpoint in endpoints if key and not send_key_over_http else ():
            if not endpoint.is_private:
                said = f"the key would go unencrypted to {endpoint.label}; use https, or pass send_key_over_http=True"
                raise ConfigError(f"{said} where the network in between is trusted")
        self._key = _Bearer(key) if key else None
        # Getting ready for https takes 20-40 ms of every event loop.
        self._encrypted = any(endpoint.root.startswith("https") for endpoint in endpoints)
        self._closed = False
        self._finalizer: weakref.finalize[..., Transport] | None = None
        self.start()

    def __reduce__(self) -> tuple[Any, ...]:
        return self._remake, ()

    @property
    def has_key(self) -> bool:
        """Whether a key is sent."""
        return self._key is not None

    def start(self) -> None:
        """Begin with no connection. Those of a parent process are not closed: they are still its own."""
        self._clients: _Clients = {}
        if self._finalizer is not None:
            self._finalizer.detach()
        self._finalizer = weakref.finalize(self, _close_soon, self._clients)  # adapters are dropped, not closed
        self._finalizer.atexit = False  # the process's end closes them, too

    def run(self, work: Coroutine[Any, Any, T], until: float | None = None) -> T:
        """Run `work` for a caller without an event loop; blocks, but not after `until`, whatever keeps it."""
        timeout = None if until is None else max(0.0, until - time.monotonic()) + 0.2
        try:
            return _background.run(work, timeout)
        except TimeoutError as error:
            if isinstance(error, RerankError):
                raise
            raise DeadlineExceeded("the deadline passed, and nothing else could be learned about the call") from None

    async def send(self, send: Send) -> Reply | Failure:
        """Send a request in this event loop; cancelling the task gives it up."""
        client, scope = await self._client(), anyio.CancelScope()
        # httpcore's clean-up is safe from anyio's cancellation, not from asyncio's: 1,000 calls that were given up
        # left 172 connections in its pool for ever. So it has a task of its own, which only the scope ends early.
        task = asyncio.ensure_future(self._send(client, scope, send))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            scope.cancel()
            await asyncio.wait([task])
            raise

    async def _send(self, client: httpx.AsyncClient, scope: anyio.CancelScope, send: Send) -> Reply | Failure:
        request, url = send.request, send.endpoint.root + send.request.path
        headers = _HEADERS if request.id is None else {**_HEADERS, "X-Request-Id": request.id}
        limits = httpx.Timeout(send.timeout, connect=send.connect_timeout)
        if send.timeout is not None:  # httpx times out single reads; this bounds the whole exchange
            scope.deadline = anyio.current_time() + send.timeout
        try:
            with scope:
                async with client.stream(
                    request.method, url, content=request.body, headers=headers, timeout=limits
                ) as response:
                    reply = await _read(response, request.reply_limit)
                    if isinstance(reply, Failure):
                        return reply
                    if self._key is not None:
                        reply = self._key.taken_out_of(reply)
                    if not send.judge(reply):
                        await response.extensions["network_stream"].aclose()
                    return reply
            return Failure("timeout", "timed out")
        except Exception as error:
            if self._closed:
                raise RerankError(_CLOSED) from error
            if not isinstance(error, httpx.HTTPError | httpx.InvalidURL | OSError):
                raise
            if isinstance(error, httpx.RequestError):  # it would carry the key and all documents
                error.request = httpx.Request(request.method, url)
            return _failure(error)

    async def _client(self) -> httpx.AsyncClient:
        # No lock: one held by another thread at a fork would never be released in the child.
        loop = asyncio.get_running_loop()
        if self._closed:
            raise RerankError(_CLOSED)
        if loop in self._clients:
            return self._clients[loop][0]
        for ended in [other for other in list(self._clients) if other.is_closed()]:
            self._clients.pop(ended, None)  # a loop closed by hand: nothing in it can be awaited any more
        client = httpx.AsyncClient(
            auth=self._key,
            verify=self._encrypted or bool(getproxies()),
            # A pool with fewer connections than callers would answer the last of them with PoolTimeout.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
            follow_redirects=False,  # a 307 would send every document, and the headers, to another host
            event_hooks={"response": [_forget_location]},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # one server's would go to another
        )
        lifetime = _until_the_loop_ends(loop, client, self._clients)
        self._clients[loop] = client, lifetime
        await anext(lifetime)
        if self._closed:  # once more: whoever closed it meanwhile may not have seen this client
            await lifetime.aclose()
            raise RerankError(_CLOSED)
        return client

    def close(self) -> None:
        """Close the connections; what is under way ends in an error. For event loops they are closed in the loop."""
        self._closed = True
        _close_soon(self._clients)

    async def aclose(self) -> None:
        """Close the connections; the running loop's are closed on return."""
        self.close()
        known = self._clients.get(asyncio.get_running_loop())
        if known is not None:
            await known[1].aclose()


async def _until_the_loop_ends(loop: _Loop, client: httpx.AsyncClient, clients: _Clients) -> _Lifetime:
    """Close `client` while its loop can still do it. Knows no transport: it would keep that alive.

    `asyncio.run` closes unfinished async generators before the loop. Without this, each
    ``asyncio.run(scorer.ascore(...))`` left one connection open for the life of the process (20 of 20, measured).
    """
    try:
        yield
    finally:
        clients.pop(loop, None)
        await client.aclose()


def _close_soon(clients: _Clients) -> None:
    """Have each client closed by its own loop, from whatever thread this is."""
    for loop, (client, _) in list(clients.items()):
        with contextlib.suppress(RuntimeError):  # the loop is closed, and its connections with it
            loop.call_soon_threadsafe(_close_in, loop, client)


def _close_in(loop: _Loop, client: httpx.AsyncClient) -> None:
    _closing.add(task := loop.create_task(client.aclose()))
    task.add_done_callback(_closing.discard)


async def _forget_location(response: httpx.Response) -> None:
    """Drop a redirect's address: httpx prepares that request even if it is not to be sent, and fails at odd ones."""
    response.headers.pop("location", None)


class _Bearer(httpx.Auth):
    """Sends the key. Among the headers it would be a local variable of many frames, which some tracebacks show."""

    def __init__(self, key: str) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._key}"
        yield request

    def taken_out_of(self, reply: Reply) -> Reply:
        """Make the reply without the key: some gateways repeat the key that they refuse."""
        return replace(reply, body=reply.body.replace(self._key.encode(), b"[key]"))


async def _read(response: httpx.Response, limit: int) -> Reply | Failure:
    """Read an answer, raw and within bounds."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    good = response.status_code == 200
    encoding = headers.get("content-encoding", "identity").lower()
    body, fault = bytearray(), f"the answer is compressed ({encoding[:20]!r}) although it was asked for plain"
    if encoding == "identity":
        fault = ""
        # Not aiter_raw, which at the end gives the connection to the next request, before this answer is judged.
        async for chunk in response.stream:  # type: ignore[union-attr]
            body += chunk
            if len(body) > (limit if good else _LONGEST_ERROR_PAGE):
                fault = f"the answer is longer than {limit} bytes"
                break
    if fault and good:  # else the status tells enough
        return Failure("unread", fault)
    return Reply(response.status_code, bytes(body), headers)


def _failure(error: Exception) -> Failure:
    text = str(error) or type(error).__name__
    match error:
        case httpx.ConnectTimeout():
            return Failure("connect", "can't connect: timed out", error)
        case httpx.TimeoutException() | TimeoutError():
            return Failure("timeout", "timed out", error)
        case httpx.ConnectError() if _is_certificate(error):
            return Failure("certificate", f"can't trust the server: {text}", error)
        case httpx.ConnectError():
            return Failure("connect", f"can't connect: {text}", error)
        case _:
            return Failure("broken", f"the connection broke: {text}", error)


def _is_certificate(error: BaseException | None) -> bool:
    """Tell whether a certificate is behind it: what it was raised from, all the way down."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False
