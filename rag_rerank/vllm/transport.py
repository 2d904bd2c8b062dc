"""The only module that knows httpx: sends requests, over connections of our own where none of httpx's are asked for.

Everything runs in an event loop: the caller's, or else that of one thread for the process, which costs a call 0.05 ms.
So deadlines hold whatever a server or a name lookup does (httpx times out single reads only), and a call that is given
up closes its connection at once, which makes vLLM stop working for it.
"""

import asyncio
import contextlib
import errno
import functools
import importlib
import os
import ssl
import sys
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Literal, TypeVar

import anyio
import httpx

from rag_rerank import __version__
from rag_rerank.errors import ConfigError, DeadlineExceeded, RerankError
from rag_rerank.vllm.background import Background
from rag_rerank.vllm.connections import Address, CantConnect, Connections
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.exchange import Send
from rag_rerank.vllm.keys import SECRET, Keys, causes, portable, without_frames
from rag_rerank.vllm.proxies import proxy_for
from rag_rerank.vllm.wire import Failure, Reply, printable

# What httpx would import with its first request: a process that forks in that moment has a child that waits for ever.
for _name in ("httpcore", "anyio._backends._asyncio", "encodings.idna"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)

T = TypeVar("T")
_Lifetime = AsyncGenerator[None, None]
_Loop = asyncio.AbstractEventLoop
Factory = Callable[[], httpx.AsyncClient]
_Clients = dict[_Loop, tuple[httpx.AsyncClient | Connections, _Lifetime]]

# A compressed answer can grow a thousandfold when unpacked: ask for none, and read none (`_read`).
_HEADERS = {
    "accept": "*/*",
    "accept-encoding": "identity",
    "content-type": "application/json",
    "user-agent": f"rag-rerank/{__version__}",
}
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
        for endpoint in endpoints:
            _check_url("base_url", endpoint.root)
            _check_url(f"the proxy that the environment names for {endpoint.label}", self._proxies.get(endpoint.root))
        self._is_direct = http_client is None and self.limits is None and not any(self._proxies.values())
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
        handled = sys.exception()
        try:
            outcome = await self._sent(send)
        except (RerankError, asyncio.CancelledError) as error:
            raise without_frames(error, handled) from error.__cause__
        if isinstance(outcome, Failure) and outcome.cause is not None:
            without_frames(outcome.cause, handled)
        return outcome

    async def _sent(self, send: Send) -> Reply | Failure:
        client = await self._client()
        headers = {**_HEADERS, **self.keys.headers}
        if send.request.id is not None:
            headers["x-request-id"] = send.request.id
        try:
            if isinstance(client, Connections):
                return await self._ask(client, headers, send)
            return await self._ask_client(client, headers, send)
        except Exception as error:
            if self._closed:
                raise RerankError(_CLOSED) from error
            if isinstance(error, httpx.RequestError):  # it would carry the key and all documents
                error.request = httpx.Request(send.request.method, send.endpoint.root)
            if isinstance(error, httpx.HTTPError | httpx.InvalidURL | OSError):
                failure = _failure(error, proxied=self._proxies.get(send.endpoint.root) is not None)
                said = printable(self.keys.scrub(failure.text, headers))  # h11 quotes what it can't read
                return failure if said == failure.text else replace(failure, text=said, cause=None)
            if self._factory is None or isinstance(error, RerankError):
                raise
            return Failure("broken", f"http_client= failed: {type(error).__name__}", error)  # its hooks, say

    async def _ask(self, connections: Connections, headers: dict[str, str], send: Send) -> Reply | Failure:
        """Ask over a connection of our own."""
        request = send.request
        address, host, target = _place(send.endpoint.root + request.path, tuple(self.keys.query.items()))
        headers["host"] = host
        self.keys.sign(headers, send.endpoint)
        connection, judged = None, False
        try:
            # This bounds the whole exchange, not single reads.
            async with asyncio.timeout(send.timeout):
                connection = await connections.get(address, send.connect_timeout)
                head = await connection.ask(request.method, target, headers, request.body)
                reply = await _read(*head, connection.chunks(), request.reply_limit)
            if isinstance(reply, Reply):
                reply, judged = self._judged(send, replace(reply, is_connected=connection.is_connected), headers)
            return reply
        finally:
            if connection is not None:
                connections.take_back(address, connection, good=judged)

    def _judged(self, send: Send, reply: Reply, headers: Mapping[str, str]) -> tuple[Reply, bool]:
        """Have a reply judged; one that is no good answer has no key in it then."""
        judged = send.judge(reply)
        if judged and reply.succeeded:
            return reply, True
        told = {name: self.keys.scrub(value, headers) for name, value in reply.headers.items()}
        body = self.keys.scrub(reply.body.decode("latin-1"), headers).encode("latin-1")
        return replace(reply, body=body, headers=told), judged

    async def _ask_client(self, client: httpx.AsyncClient, headers: dict[str, str], send: Send) -> Reply | Failure:
        """Ask by a client of httpx."""
        ending = _Ending()
        task = asyncio.create_task(self._exchange(client, ending, headers, send))
        _running.add(task)
        task.add_done_callback(_running.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be there to ask for it
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

    async def _exchange(
        self, client: httpx.AsyncClient, ending: "_Ending", headers: dict[str, str], send: Send
    ) -> Reply | Failure:
        limits = self.limits or httpx.Timeout(send.timeout, connect=send.connect_timeout, pool=None)
        request = client.build_request(
            send.request.method,
            send.endpoint.root + send.request.path,
            params=self.keys.query or None,
            content=send.request.body,
            headers=headers,
            extensions={"timeout": limits.as_dict(), "trace": ending.trace},
        )
        own = client.auth is not None or "authorization" in request.headers
        if not (own and self.keys.is_default):  # what the user's client brings goes before VLLM_API_KEY
            self.keys.sign(request.headers, send.endpoint)
        if any(map(SECRET.search, self.keys.query)):
            request.url = _Url(request.url)
        headers.update(request.headers)  # for `scrub`
        auth = None if "authorization" in request.headers else httpx.USE_CLIENT_DEFAULT
        with ending.scope:
            # A redirect would send every document, and the headers, to another host.
            sending = client.send(request, stream=True, auth=auth, follow_redirects=False)
            try:
                response = await sending
            except httpx.HTTPStatusError as error:  # a hook has called raise_for_status()
                response = error.response
            async with contextlib.aclosing(response):
                reply = await _read_response(response, send.request.reply_limit)
                if isinstance(reply, Failure):
                    return reply
                stream = response.extensions.get("network_stream")
                if stream is not None:  # with nothing asked, only its end can be read
                    reply = replace(reply, is_connected=lambda: not stream.get_extra_info("is_readable"))
                reply, judged = self._judged(send, reply, request.headers)
                # httpcore takes what came behind this answer for that to its next request, where no id tells. (Where a
                # hook has read this one, another request may have the connection by now.)
                tells = response.is_closed or (send.request.id or "").encode() in reply.body
                if not (judged and tells) and stream is not None and response.http_version != "HTTP/2":
                    await stream.aclose()  # in HTTP/2, answers have numbers
                return reply
        return Failure("timeout", "timed out")

    async def _client(self) -> httpx.AsyncClient | Connections:
        # No lock: one held by another thread at a fork would never be released in the child.
        loop = asyncio.get_running_loop()
        if self._closed:
            raise RerankError(_CLOSED)
        if loop in self._clients:
            return self._clients[loop][0]
        for ended in [other for other in list(self._clients) if other.is_closed()]:
            self._clients.pop(ended, None)
        client = Connections(_tls(self._proxies)) if self._is_direct else self._httpx_client()
        lifetime = _closing(client)
        self._clients[loop] = client, lifetime
        await anext(lifetime)
        if self._closed:  # once more: whoever closed it meanwhile may not have seen this client
            await lifetime.aclose()
            raise RerankError(_CLOSED)
        return client

    def _httpx_client(self) -> httpx.AsyncClient:
        if self._factory is None:
            return _proxying(self._proxies)
        try:
            client = self._factory()
        except Exception as error:
            said = f"http_client= is a function, which failed: {type(error).__name__}"
            if "@" in str(error):  # httpx quotes a proxy's address that it can't read, with its password
                raise ConfigError(said) from None
            raise ConfigError(f"{said}: {error}") from error
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


def _proxying(proxies: Mapping[str, str | None]) -> httpx.AsyncClient:
    """Make a client that asks each server through its proxy, and knows no cookies: one server's would go to another."""
    # A pool with fewer connections than callers would answer the last of them with PoolTimeout.
    options: dict[str, Any] = {"verify": _tls(["https:"]), "limits": httpx.Limits(max_connections=None)}
    mounts = {root: httpx.AsyncHTTPTransport(proxy=proxy, **options) for root, proxy in proxies.items()}
    client = httpx.AsyncClient(trust_env=False, mounts=mounts, **options)
    client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    return client


def _tls(roots: Iterable[str]) -> ssl.SSLContext | None:
    """Make what https needs, where an address does: it takes 20-40 ms of every event loop."""
    if not any(root.startswith("https") for root in roots):
        return None
    try:
        context = httpx.create_ssl_context()
    except (OSError, ssl.SSLError) as error:
        names = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE") if name in os.environ]
        raise ConfigError(f"{' or '.join(names) or 'the authorities to trust'} can't be used: {error}") from error
    context.set_alpn_protocols(["http/1.1"])
    return context


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


class _Url(httpx.URL):
    """An address that logs show without its query, where a key may be."""

    def __str__(self) -> str:
        return str(self.copy_with(query=None))


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


def _check_url(name: str, address: str | None) -> None:
    """Raise ConfigError for what no request can be sent to, such as a host that is no name."""
    try:
        httpx.URL(address or "").host  # noqa: B018 - read to be checked
    except (httpx.InvalidURL, ValueError) as error:  # idna's and Unicode's errors are ValueErrors
        raise ConfigError(f"{name} is not a URL: {error}") from None


@functools.lru_cache(256)
def _place(text: str, query: tuple[tuple[str, str], ...]) -> tuple[Address, str, bytes]:
    """Read a URL: where it leads, the header Host, and what stands behind the method."""
    url = httpx.URL(text).copy_merge_params(dict(query)) if query else httpx.URL(text)
    encrypted = url.scheme == "https"
    address = url.raw_host.decode(), url.port or (443 if encrypted else 80), encrypted
    return address, url.netloc.decode(), url.raw_path


async def _read_response(response: httpx.Response, limit: int) -> Reply | Failure:
    headers = {name.lower(): value for name, value in response.headers.items()}
    if not response.is_closed:
        # Not aiter_raw, which at the end gives the connection to the next request, before this answer is judged.
        return await _read(response.status_code, headers, response.stream, limit)  # type: ignore[arg-type]
    body = b""  # a hook of the user's client has read it, unpacked, or ended it by an error
    with contextlib.suppress(httpx.StreamError):
        body = response.content
    if len(body) > limit:
        return Failure("unread", f"the answer is longer than {limit} bytes")
    return Reply(response.status_code, body, headers)


async def _read(status: int, headers: dict[str, str], chunks: AsyncIterable[bytes], limit: int) -> Reply | Failure:
    """Read an answer within bounds."""
    reply, body = Reply(status, b"", headers), bytearray()
    limit = limit if reply.succeeded else _LONGEST_ERROR_PAGE
    fault = await _fill(body, chunks, headers.get("content-encoding", "").lower() or "identity", limit)
    if fault and reply.succeeded:  # else the status tells enough
        return Failure("unread", f"the answer is {fault}")
    return replace(reply, body=bytes(body))


async def _fill(body: bytearray, chunks: AsyncIterable[bytes], encoding: str, limit: int) -> str:
    """Read an answer's body, raw, and unpack what gateways pack although it was asked for plain; say what is wrong."""
    if encoding not in ("identity", *_WBITS):
        return "compressed although it was asked for plain"
    unpack = None if encoding == "identity" else zlib.decompressobj(_WBITS[encoding])
    try:
        async for chunk in chunks:
            body += chunk if unpack is None else unpack.decompress(chunk, limit + 1 - len(body))
            if len(body) > limit:
                return ("" if unpack is None else f"compressed ({encoding}) and ") + f"longer than {limit} bytes"
    except zlib.error as error:
        return f"compressed ({encoding}) and can't be unpacked: {error}"
    return "" if unpack is None or unpack.eof else f"compressed ({encoding}) and incomplete"


def _failure(error: Exception, *, proxied: bool) -> Failure:
    text, came_from = str(error) or type(error).__name__, list(causes(error))
    full = [each for each in came_from if isinstance(each, OSError) and each.errno in (errno.EMFILE, errno.ENFILE)]
    if full or any(isinstance(each, RuntimeError) for each in came_from):
        return Failure("local", f"this process has no file left for a connection, or no thread ({text})", error)
    if isinstance(error, CantConnect | httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError):
        if any(isinstance(each, ssl.SSLCertVerificationError) for each in came_from):
            return Failure("certificate", f"can't trust the server: {text}", error)
        there = " through the proxy that the environment names" if proxied else ""
        text = "timed out" if isinstance(error, httpx.ConnectTimeout) else text
        kind: Literal["tls", "connect"] = "tls" if any(isinstance(e, ssl.SSLError) for e in came_from) else "connect"
        return Failure(kind, f"can't connect{there}: {text}", error)
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return Failure("timeout", "timed out", error)
    return Failure("broken", f"the connection broke: {text}", error)
