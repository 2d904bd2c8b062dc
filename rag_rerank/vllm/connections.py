"""Connections of our own, where neither a client of the user's nor a proxy is between: HTTP/1.1 by h11, as in httpx.

What httpx and httpcore do beside that takes 0.4 ms of each request.
"""

import asyncio
import select
import socket
import ssl
import time
import weakref
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any

import h11

LONGEST_IDLE, MOST_IDLE = 5.0, 32  # seconds that a connection is kept, and how many of a server
Address = tuple[str, int, bool]  # host, port, whether it is encrypted


class CantConnect(ConnectionError):
    """No connection could be made."""


class Connection(asyncio.Protocol):
    """A connection, on which one request follows the other; the methods of `asyncio.Protocol` tell what came."""

    transport: asyncio.Transport
    idle_since = 0.0

    def __init__(self) -> None:
        self._http, self._news = h11.Connection(h11.CLIENT, max_incomplete_event_size=100 << 10), asyncio.Event()
        self._end: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # noqa: D102
        self.transport = transport  # type: ignore[assignment]  # a stream's is a Transport

    def data_received(self, data: bytes) -> None:  # noqa: D102
        if self._http.our_state is h11.IDLE:  # nobody has asked
            self.transport.abort()
        else:
            self._http.receive_data(data)
            self._news.set()

    def eof_received(self) -> None:  # noqa: D102
        self.connection_lost(None)  # asyncio says so when all is sent, and this server may read no more

    def connection_lost(self, error: Exception | None) -> None:  # noqa: D102
        self._end = self._end or error or EOFError()
        self._news.set()

    @property
    def is_idle(self) -> bool:
        """Whether another request may follow: the last answer was read, and nothing came that nobody asked for."""
        return self._http.our_state is h11.IDLE and not self._http.trailing_data[0] and self.is_connected()

    def is_connected(self) -> bool:
        """Tell whether the server has left it open, and said nothing that the event loop has not read yet."""
        raw = self.transport.get_extra_info("socket")
        if self.transport.is_closing() or raw.fileno() < 0:
            return False
        if not hasattr(select, "poll"):  # Windows
            return not select.select([raw], [], [], 0)[0]
        poll = select.poll()
        poll.register(raw, select.POLLIN)
        return not poll.poll(0)

    async def ask(
        self, method: str, target: bytes, headers: dict[str, str], body: bytes | None
    ) -> tuple[int, dict[str, str]]:
        """Send a request; get the status and headers of its answer, with names in lower case."""
        if body is not None:
            headers["content-length"] = str(len(body))
        parts = [self._http.send(h11.Request(method=method, target=target, headers=list(headers.items())))]
        if body is not None:
            parts += self._http.send_with_data_passthrough(h11.Data(data=body)) or []
        self._http.send(h11.EndOfMessage())
        self.transport.writelines(parts)
        while isinstance(event := await self._event(), h11.InformationalResponse):
            continue
        if not isinstance(event, h11.Response):
            raise ConnectionError("the server wants to speak another protocol")
        return event.status_code, {name.decode(): value.decode("latin-1") for name, value in event.headers}

    async def chunks(self) -> AsyncIterator[bytes]:
        """Read the body of the answer."""
        while isinstance(event := await self._event(), h11.Data):
            yield event.data
        if self._http.our_state is self._http.their_state is h11.DONE:  # else the server ends the connection
            self._http.start_next_cycle()

    async def _event(self) -> object:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                if self._end is None:
                    self._news.clear()
                    await self._news.wait()
                elif isinstance(self._end, EOFError) and self._http.their_state is h11.SEND_BODY:
                    self._http.receive_data(b"")  # which ends an answer whose length was not told
                else:
                    raise ConnectionError(str(self._end) or "the server closed it without an answer")
        except h11.RemoteProtocolError as error:
            raise ConnectionError(str(error)) from error
        return event


class Connections:
    """The connections to some servers, of one event loop."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self._tls = tls
        self._idle: dict[Address, list[Connection]] = defaultdict(list)
        self._all: weakref.WeakSet[Connection] = weakref.WeakSet()

    async def get(self, address: Address, seconds: float) -> Connection:
        """Give the latest that is idle, or make one in so many seconds."""
        while self._idle[address]:
            connection = self._idle[address].pop()
            if connection.is_idle and time.monotonic() - connection.idle_since < LONGEST_IDLE:
                return connection
            connection.transport.abort()
        try:
            async with asyncio.timeout(seconds):
                connection = await self._connect(*address, seconds)
        except (OSError, UnicodeError, RuntimeError) as error:  # names that no lookup takes; no thread for one
            text = "timed out" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
            raise CantConnect(text) from error
        self._all.add(connection)
        return connection

    async def _connect(self, host: str, port: int, encrypted: bool, seconds: float) -> Connection:
        """Try the host's addresses, each for its share of the time: one that is silent must not hide the next.

        asyncio's own way to try several (``happy_eyeballs_delay``) loses connections where it is cancelled.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        tls: dict[str, Any] = {"ssl": self._tls, "server_hostname": host} if encrypted else {}
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for left, (*_, place) in zip(range(len(found), 0, -1), found, strict=True):
            try:
                async with asyncio.timeout((until - loop.time()) / left):
                    return (await loop.create_connection(Connection, str(place[0]), port, **tls))[1]
            except OSError:
                if left == 1:
                    raise
        raise OSError("the name has no address")

    def take_back(self, address: Address, connection: Connection, *, good: bool) -> None:
        """Keep it for another request; end it at once where the last went wrong, so that vLLM stops working for it."""
        connection.idle_since = time.monotonic()
        if good and connection.is_idle and len(self._idle[address]) < MOST_IDLE:
            self._idle[address].append(connection)
        else:
            connection.transport.abort()

    async def aclose(self) -> None:
        """End all, also those that are in use."""
        for connection in list(self._all):
            connection.transport.abort()
