"""The only module that knows httpx: sends requests.

Everything runs in an event loop: the caller's, or else that of one thread for the process, which costs a call 0.5 ms
more than httpx's client for threads. So deadlines hold whatever a server or a name lookup does (httpx times out single
reads only), and a call that is given up closes its connection at once, which makes vLLM stop working for it.
"""

import asyncio
import contextlib
import errno
import functools
import importlib
import os
import ssl
import time
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import anyio
import httpx

from rag_rerank import __version__
from rag_rerank.errors import ConfigError, DeadlineExceeded, RerankError
from rag_rerank.vllm.background import Background
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.keys import Keys, portable
from rag_rerank.vllm.proxies import proxy_for
from rag_rerank.vllm.sending import Send
from rag_rerank.vllm.wire import Failure, Reply

# What httpx would import with its first request: a process that forks in that moment has a child that waits for ever.
for _name in ("httpcore", "anyio._backends._asyncio", "encodings.idna"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)

T = TypeVar("T")
_Lifetime = AsyncGenerator[None, None]
_Loop = asyncio.AbstractEventLoop
Factory = Callable[[], httpx.AsyncClient]
_Clients = dict[_Loop, tuple["httpx.AsyncClient | _Client", _Lifetime]]

# A compressed answer can grow a thousandfold when unpacked: ask for none, and read none (`_read`).
_HEADERS = {
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Content-Type": "application/json",
    "User-Agent": f"rag-rerank/{__version__}",
}
_OK = 200
_LONGEST_ERROR_PAGE = 64 << 10  # bytes; enough for a sentence
_CLOSED = "The scorer was closed while it was scoring."
_WBITS = {"gzip": 31, "deflate": 15}  # zlib's

_background = Background()
_running: set[asyncio.Task[Any]] = set()  # a loop keeps no hold on its tasks


class Transport:
    """Connections, for each event loop its own: an async connection dies with its loop.

    Args:
        endpoints: The servers.
        keys: What goes with each request.
        http_client: As in `VLLMScorer`.
        timeout: Bounds of each try, as `limits`, where it is an `httpx.Timeout`; anything else concerns the caller.

    Raises:
        ConfigError: A client that can't be used, or a proxy.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        keys: Keys,
        http_client: Factory | None = None,
        timeout: object = None,
    ) -> None:
        if http_client is not None and (isinstance(http_client, httpx.AsyncClient) or not callable(http_client)):
            said = "http_client must be a function that makes a new httpx.AsyncClient, one for each event loop"
            raise ConfigError(f"{said}, such as lambda: httpx.AsyncClient(verify=False)")
        self._endpoints, self.keys, self._factory = tuple(endpoints), keys, http_client
        self.limits = timeout if isinstance(timeout, httpx.Timeout) else None
        # Of the user's client, its own proxies hold.
        self._proxies = {} if http_client else {endpoint.root: proxy_for(endpoint) for endpoint in endpoints}
        self._closed = False
        self._clients: _Clients = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Transport, (self._endpoints, self.keys, portable("http_client", self._factory), self.limits)

    def start(self) -> None:
        """Begin with no connection. Those of a parent process are kept: to be closed they are still its own."""
        self._clients, self._parents = {}, self._clients

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
        client, ending = await self._client(), _Ending()
        task = asyncio.create_task(self._send(client, ending, send))
        _running.add(task)
        task.add_done_callback(_over)
        try:
            # httpx times out single reads; this bounds the whole exchange.
            done, _ = await asyncio.wait([task], timeout=send.timeout)
        except asyncio.CancelledError:
            await ending.of(task)
            raise
        if not done:
            await ending.of(task)
            return Failure("timeout", "timed out")
        return task.result()

    async def _send(self, client: "httpx.AsyncClient | _Client", ending: "_Ending", send: Send) -> Reply | Failure:
        limits = self.limits or httpx.Timeout(send.timeout, connect=send.connect_timeout, pool=None)
        url, headers = _url(send.endpoint.root + send.request.path), _HEADERS | self.keys.headers
        if send.request.id is not None:
            headers["X-Request-Id"] = send.request.id
        try:
            request = client.build_request(
                send.request.method,
                url,
                params=self.keys.query or None,
                content=send.request.body,
                headers=headers,
                extensions={"timeout": limits.as_dict(), "trace": ending.trace},
            )
            own = client.auth is not None or "authorization" in request.headers
            if not (own and self.keys.is_default):  # what the user's client brings goes before VLLM_API_KEY
                self.keys.sign(request.headers, send.endpoint)
            auth = None if "authorization" in request.headers else httpx.USE_CLIENT_DEFAULT
            with ending.scope:
                # A redirect would send every document, and the headers, to another host.
                sending = client.send(request, stream=True, auth=auth, follow_redirects=False)
                async with contextlib.aclosing(await sending) as response:
                    reply = await _read(response, send.request.reply_limit)
                    if isinstance(reply, Failure):
                        return reply
                    stream = response.extensions.get("network_stream")
                    if stream is not None:  # with nothing asked, only its end can be read
                        reply = replace(reply, is_connected=lambda: not stream.get_extra_info("is_readable"))
                    judged = send.judge(reply)
                    if not judged and stream is not None and response.http_version != "HTTP/2":
                        await stream.aclose()  # in HTTP/2, answers have numbers
                    if judged and reply.status == _OK:
                        return reply
                    return replace(reply, body=self.keys.scrub(reply.body, request.headers))
            return Failure("timeout", "timed out")
        except Exception as error:
            if self._closed:
                raise RerankError(_CLOSED) from error
            if not isinstance(error, httpx.HTTPError | httpx.InvalidURL | OSError):
                raise
            if isinstance(error, httpx.RequestError):  # it would carry the key and all documents
                error.request = httpx.Request(send.request.method, url)
            return _failure(error)

    async def _client(self) -> "httpx.AsyncClient | _Client":
        # No lock: one held by another thread at a fork would never be released in the child.
        loop = asyncio.get_running_loop()
        if self._closed:
            raise RerankError(_CLOSED)
        if loop in self._clients:
            return self._clients[loop][0]
        for ended in [other for other in list(self._clients) if other.is_closed()]:
            self._clients.pop(ended, None)
        client = _Client(self._proxies) if self._factory is None else self._users_client(self._factory)
        lifetime = _closing(client)
        self._clients[loop] = client, lifetime
        await anext(lifetime)
        if self._closed:  # once more: whoever closed it meanwhile may not have seen this client
            await lifetime.aclose()
            raise RerankError(_CLOSED)
        return client

    def _users_client(self, make: Factory) -> httpx.AsyncClient:
        client = make()
        if not isinstance(client, httpx.AsyncClient):
            raise ConfigError(f"http_client must make an httpx.AsyncClient; it made {type(client).__name__}")
        if client.is_closed or any(client is other for other, _ in self._clients.values()):
            raise ConfigError("http_client must make a new client each time: an async client dies with its event loop")
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "response": [*hooks["response"], _forget_location]}
        return client

    def close(self) -> None:
        """Close the connections, each in its own event loop; what is under way ends in an error."""
        self._closed = True
        self._clients.clear()

    async def aclose(self) -> None:
        """Close the connections; the running loop's are closed on return."""
        known = self._clients.get(asyncio.get_running_loop())
        self.close()
        if known is not None:
            await known[1].aclose()


class _Client:
    """A client of our own: as httpx's, but for what is not needed here, which takes 0.07 ms a request.

    It knows no cookies (one server's would go to another), no redirects, and no proxies but those of its arguments, by
    the address of the server that they are for.
    """

    build_request = staticmethod(httpx.Request)
    auth = None

    def __init__(self, proxies: Mapping[str, str | None]) -> None:
        # Getting ready for https takes 20-40 ms of every event loop.
        encrypted = any(proxies.values()) or any(root.startswith("https") for root in proxies)
        try:
            context: Any = httpx.create_ssl_context() if encrypted else False
        except (OSError, ssl.SSLError) as error:
            names = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE") if name in os.environ]
            raise ConfigError(f"{' or '.join(names) or 'the authorities to trust'} can't be used: {error}") from error
        # A pool with fewer connections than callers would answer the last of them with PoolTimeout.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        transports = {
            proxy: httpx.AsyncHTTPTransport(verify=context, limits=limits, proxy=proxy) for proxy in proxies.values()
        }
        self.transports = {httpx.URL(root).netloc: transports[proxy] for root, proxy in proxies.items()}

    def send(self, request: httpx.Request, **_: Any) -> Awaitable[httpx.Response]:
        return self.transports[request.url.netloc].handle_async_request(request)

    async def aclose(self) -> None:
        for transport in self.transports.values():
            await transport.aclose()


class _Ending:
    """Ends an exchange early, when it can be.

    httpcore keeps what a cancelled request leaves behind for ever (172 connections after 1,000 calls), unless it is
    cancelled in anyio's way, and not between getting a connection and sending over it. So an exchange has a task of
    its own, and a connection that is being made is finished first; httpx bounds that.
    """

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self._begun = self._sends = self._told = False

    async def trace(self, event: str, _: Any) -> None:
        """Take note of what httpcore does; TLS begins after a proxy was sent a request."""
        self._told = True
        if event.endswith(("send_request_headers.started", "start_tls.started")):
            self._sends = not event.endswith("tls.started")
            if self._begun and self._sends:
                self.scope.cancel()

    async def of(self, task: "asyncio.Task[Any]") -> None:
        """End it and wait for that; or have it ended when it can be: the loop may stop with the call."""
        self._begun = True
        if self._sends:
            self.scope.cancel()
            await asyncio.wait([task], timeout=1.0)
        else:
            asyncio.get_running_loop().call_later(0.1, self._end_silent)

    def _end_silent(self) -> None:
        """End what does not tell what it does: a user's transport that is not httpcore's."""
        if not self._told:
            self.scope.cancel()


def _over(task: "asyncio.Task[Reply | Failure]") -> None:
    _running.discard(task)
    if not task.cancelled():
        task.exception()  # nobody may be there any more to ask for it


async def _closing(client: Any) -> _Lifetime:
    """Close a client in its event loop, when that ends or when nobody holds this any more: adapters are only dropped.

    `asyncio.run` closes unfinished async generators before the loop, and a loop closes those that are let go in any
    thread. Without this, each ``asyncio.run(scorer.ascore(...))`` left one connection open (20 of 20, measured).
    """
    try:
        yield
    finally:
        await client.aclose()


async def _forget_location(response: httpx.Response) -> None:
    """Drop a redirect's address: httpx prepares that request even if it is not to be sent, and fails at odd ones."""
    response.headers.pop("location", None)


@functools.lru_cache(256)
def _url(text: str) -> httpx.URL:
    return httpx.URL(text)


async def _read(response: httpx.Response, limit: int) -> Reply | Failure:
    """Read an answer within bounds."""
    good, body = response.status_code == _OK, bytearray()
    fault = await _fill(body, response, limit if good else _LONGEST_ERROR_PAGE)
    if fault and good:  # else the status tells enough
        return Failure("unread", f"the answer is {fault}")
    return Reply(response.status_code, bytes(body), {name.lower(): value for name, value in response.headers.items()})


async def _fill(body: bytearray, response: httpx.Response, limit: int) -> str:
    """Read an answer's body, raw, and unpack what gateways pack although it was asked for plain; say what is wrong."""
    encoding = response.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", *_WBITS):
        return f"compressed ({encoding[:20]!r}) although it was asked for plain"
    unpack = None if encoding == "identity" else zlib.decompressobj(_WBITS[encoding])
    try:
        # Not aiter_raw, which at the end gives the connection to the next request, before this answer is judged.
        async for chunk in response.stream:  # type: ignore[union-attr]
            body += chunk if unpack is None else unpack.decompress(chunk, limit + 1 - len(body))
            if len(body) > limit:
                return ("" if unpack is None else f"compressed ({encoding}) and ") + f"longer than {limit} bytes"
    except zlib.error as error:
        return f"compressed ({encoding}) and can't be unpacked: {error}"
    return "" if unpack is None or unpack.eof else f"compressed ({encoding}) and incomplete"


def _failure(error: Exception) -> Failure:
    text = str(error) or type(error).__name__
    causes = list(_causes(error))
    if any(isinstance(each, OSError) and each.errno in (errno.EMFILE, errno.ENFILE) for each in causes):
        return Failure("local", "this process has no file left for a connection (Too many open files)", error)
    match error:
        case httpx.ConnectTimeout():
            return Failure("connect", "can't connect: timed out", error)
        case httpx.TimeoutException() | TimeoutError():
            return Failure("timeout", "timed out", error)
        case httpx.ConnectError() if any(isinstance(each, ssl.SSLCertVerificationError) for each in causes):
            return Failure("certificate", f"can't trust the server: {text}", error)
        case httpx.ConnectError():
            return Failure("connect", f"can't connect: {text}", error)
        case _:
            return Failure("broken", f"the connection broke: {text}", error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """List an error and what it was raised from, all the way down."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
