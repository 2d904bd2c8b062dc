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
import inspect
import os
import ssl
import time
import weakref
import zlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
import httpx

from rag_rerank import __version__
from rag_rerank.errors import ConfigError, DeadlineExceeded, RerankError
from rag_rerank.vllm.background import Background
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.exchange import Send
from rag_rerank.vllm.keys import Key, Keys, portable
from rag_rerank.vllm.proxies import proxy_for
from rag_rerank.vllm.wire import Failure, Reply

# What httpx would import with its first request: a process that forks in that moment has a child that waits for ever.
for _name in ("httpcore", "anyio._backends._asyncio", "encodings.idna"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_name)

T = TypeVar("T")
_Lifetime = AsyncGenerator[None, None]
_Loop = asyncio.AbstractEventLoop
Factory = Callable[[], httpx.AsyncClient]
_Clients = dict[_Loop, tuple[httpx.AsyncClient, _Lifetime]]

# A compressed answer can grow a thousandfold when unpacked: ask for none, and read none (`_read`).
_HEADERS = {
    "Accept-Encoding": "identity",
    "Content-Type": "application/json",
    "User-Agent": f"rag-rerank/{__version__}",
}
_OK = 200
_LONGEST_ERROR_PAGE = 64 << 10  # bytes; enough for a sentence
_CLOSED = "The scorer was closed while it was scoring."


_background = Background()
_running: set[asyncio.Task[Any]] = set()  # a loop keeps no hold on its tasks


def limits_of(timeout: object) -> httpx.Timeout | None:
    """Give what bounds single tries, if it is that."""
    return timeout if isinstance(timeout, httpx.Timeout) else None


class Transport:
    """Connections, for each event loop its own: an async connection dies with its loop. A pickle carries no key.

    Args:
        endpoints: The servers.
        api_key: As in `VLLMScorer`, like `http_client`, `headers` (``default_headers``), `query` and `over_http`.
        limits: Bounds of each try, an `httpx.Timeout`; None leaves them to the caller.

    Raises:
        ConfigError: Something that can't be sent so, or a proxy that can't be used.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        api_key: Key | Mapping[str, Key] | None = None,
        *,
        http_client: Factory | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        limits: httpx.Timeout | None = None,
        over_http: bool = False,
    ) -> None:
        if http_client is not None and (isinstance(http_client, httpx.AsyncClient) or not callable(http_client)):
            said = "http_client must be a function that makes a new httpx.AsyncClient, one for each event loop"
            raise ConfigError(f"{said}, such as lambda: httpx.AsyncClient(verify=False)")
        self._keys = Keys(endpoints, api_key, headers or {}, query or {}, over_http=over_http)
        self._endpoints, self._factory, self._limits = tuple(endpoints), http_client, limits
        self._portable_key = api_key if inspect.isfunction(api_key) else None  # anything else may hold a key
        self._over_http = over_http
        # Of the user's client, its own proxies hold.
        proxies = {} if http_client else {endpoint: proxy_for(endpoint) for endpoint in endpoints}
        self._proxies = {endpoint: proxy for endpoint, proxy in proxies.items() if proxy is not None}
        self._closed = False
        self._finalizer: weakref.finalize[..., Transport] | None = None
        self.start()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._keys.has_secrets:
            said = "default_headers or default_query hold a secret, by its name, which no pickle carries"
            raise ConfigError(f"{said}; make the scorer in each process, or have http_client= send it")
        remake = functools.partial(
            Transport,
            self._endpoints,
            portable("api_key", self._portable_key),
            http_client=portable("http_client", self._factory),
            headers=self._keys.headers,
            query=self._keys.query,
            limits=self._limits,
            over_http=self._over_http,
        )
        return remake, ()

    @property
    def has_key(self) -> bool:
        """Whether a key is sent."""
        return bool(self._keys)

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

    async def _send(self, client: httpx.AsyncClient, ending: "_Ending", send: Send) -> Reply | Failure:
        request, key = send.request, _Bearer(self._keys.key(send.endpoint))
        url = send.endpoint.root + request.path
        headers = {**_HEADERS, **self._keys.headers}
        if request.id is not None:
            headers["X-Request-Id"] = request.id
        limits = self._limits or httpx.Timeout(send.timeout, connect=send.connect_timeout, pool=None)
        try:
            with ending.scope:
                async with client.stream(
                    request.method,
                    url,
                    params=self._keys.query or None,
                    content=request.body,
                    headers=headers,
                    timeout=limits,
                    auth=key if key.value else httpx.USE_CLIENT_DEFAULT,
                    extensions={"trace": ending.trace},
                    follow_redirects=False,  # a 307 would send every document, and the headers, to another host
                ) as response:
                    reply = await _read(response, request.reply_limit)
                    if isinstance(reply, Failure):
                        return reply
                    if reply.status != _OK:
                        reply = replace(reply, body=self._keys.scrub(reply.body, key.value))
                    stream = response.extensions.get("network_stream")
                    reply = reply if stream is None else replace(reply, connection=_Connection(stream))
                    if not send.judge(reply):
                        reply = replace(reply, body=self._keys.scrub(reply.body, key.value))
                        send.judge(reply)  # again: an error has words of it
                        if stream is not None and response.http_version != "HTTP/2":
                            await stream.aclose()  # in HTTP/2, answers have numbers
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
        client = self._own_client() if self._factory is None else self._users_client(self._factory)
        lifetime = _until_the_loop_ends(loop, client, self._clients)
        self._clients[loop] = client, lifetime
        await anext(lifetime)
        if self._closed:  # once more: whoever closed it meanwhile may not have seen this client
            await lifetime.aclose()
            raise RerankError(_CLOSED)
        return client

    def _own_client(self) -> httpx.AsyncClient:
        # Getting ready for https takes 20-40 ms of every event loop.
        encrypted = bool(self._proxies) or any(endpoint.root.startswith("https") for endpoint in self._endpoints)
        try:
            context: Any = httpx.create_ssl_context() if encrypted else False
        except (OSError, ssl.SSLError) as error:
            names = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE") if name in os.environ]
            raise ConfigError(f"{' or '.join(names) or 'the authorities to trust'} can't be used: {error}") from error
        # A pool with fewer connections than callers would answer the last of them with PoolTimeout.
        options: Any = {
            "verify": context,
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=32),
        }
        proxied = {
            f"all://{urlsplit(endpoint.root).netloc}": httpx.AsyncHTTPTransport(proxy=proxy, **options)
            for endpoint, proxy in self._proxies.items()
        }
        return httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(**options),  # so that httpx reads no proxies from the environment
            mounts=proxied,
            event_hooks={"response": [_forget_location]},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # one server's would go to another
        )

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
        """Close the connections; what is under way ends in an error. For event loops they are closed in the loop."""
        self._closed = True
        _close_soon(self._clients)

    async def aclose(self) -> None:
        """Close the connections; the running loop's are closed on return."""
        self.close()
        known = self._clients.get(asyncio.get_running_loop())
        if known is not None:
            await known[1].aclose()


@dataclass(frozen=True, slots=True)
class _Connection:
    stream: Any  # httpcore's

    @property
    def is_open(self) -> bool:
        return not self.stream.get_extra_info("is_readable")  # with nothing asked, only its end can be read


class _Ending:
    """Ends an exchange early, when it can be.

    httpcore keeps what a cancelled request leaves behind for ever (172 connections after 1,000 calls), unless it is
    cancelled in anyio's way, and not between getting a connection and sending over it. So an exchange has a task of
    its own, and a connection that is being made is finished first; httpx bounds that.
    """

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()
        self._begun = self._sends = self._connects = False

    async def trace(self, event: str, _: Any) -> None:
        """Take note of what httpcore does."""
        if event.endswith(("send_request_headers.started", "connect_tcp.started", "start_tls.started")):
            self._sends = event.endswith("headers.started")
            self._connects = not self._sends
            if self._begun and self._sends:
                self.scope.cancel()

    async def of(self, task: "asyncio.Task[Any]") -> None:
        """End it and wait for that, unless a connection is being made: the loop may stop with the call."""
        self._begin()
        if not self._connects:
            await asyncio.wait([task], timeout=1.0)

    def _begin(self, turns: int = 20) -> None:
        """End it now, or when it sends; after some turns of the loop where nothing tells what it does."""
        self._begun = True
        if self._sends or not turns:
            self.scope.cancel()
        elif not self._connects:
            asyncio.get_running_loop().call_soon(self._begin, turns - 1)


def _over(task: "asyncio.Task[Reply | Failure]") -> None:
    _running.discard(task)
    if not task.cancelled():
        task.exception()  # nobody may be there any more to ask for it


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
    _running.add(task := loop.create_task(client.aclose()))
    task.add_done_callback(_running.discard)


async def _forget_location(response: httpx.Response) -> None:
    """Drop a redirect's address: httpx prepares that request even if it is not to be sent, and fails at odd ones."""
    response.headers.pop("location", None)


class _Bearer(httpx.Auth):
    """Sends the key. As text it would be a local variable of many frames, which some tracebacks show."""

    def __init__(self, key: str | None) -> None:
        self.value = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["Authorization"] = f"Bearer {self.value}"
        yield request


async def _read(response: httpx.Response, limit: int) -> Reply | Failure:
    """Read an answer, raw and within bounds; some gateways compress it although it was asked for plain."""
    headers = {name.lower(): value for name, value in response.headers.items()}
    good = response.status_code == _OK
    limit = limit if good else _LONGEST_ERROR_PAGE
    encoding = headers.get("content-encoding", "identity").lower()
    body, fault = bytearray(), ""
    unpack = zlib.decompressobj(wbits=31 if encoding == "gzip" else 15) if encoding in ("gzip", "deflate") else None
    if unpack is None and encoding != "identity":
        fault = f"the answer is compressed ({encoding[:20]!r}) although it was asked for plain"
    else:
        try:
            # Not aiter_raw, which at the end gives the connection to the next request, before this answer is judged.
            async for chunk in response.stream:  # type: ignore[union-attr]
                body += chunk if unpack is None else unpack.decompress(chunk, limit + 1 - len(body))
                if len(body) > limit:
                    packed = "" if unpack is None else f"compressed ({encoding}) and "
                    fault = f"the answer is {packed}longer than {limit} bytes"
                    break
        except zlib.error as error:
            fault = f"the answer is compressed ({encoding}) and can't be unpacked: {error}"
        if unpack is not None and not (unpack.eof or fault):
            fault = f"the answer is compressed ({encoding}) and incomplete"
    if fault and good:  # else the status tells enough
        return Failure("unread", fault)
    return Reply(response.status_code, bytes(body), headers)


def _failure(error: Exception) -> Failure:
    text = str(error) or type(error).__name__
    if any(isinstance(each, OSError) and each.errno in (errno.EMFILE, errno.ENFILE) for each in _causes(error)):
        return Failure("local", "this process has no file left for a connection (Too many open files)", error)
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


def _is_certificate(error: BaseException) -> bool:
    """Tell whether a certificate is behind it."""
    return any(isinstance(each, ssl.SSLCertVerificationError) for each in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """List an error and what it was raised from, all the way down."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
