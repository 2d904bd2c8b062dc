"""A fake vLLM server on real sockets, for every fault that a real one can't be made to show.

`FaultyServer` asks a function what to do about each request. None means the right answer; anything else is a series of
steps (`Steps`), carried out one by one, so that faults are put together from few parts:

    FaultyServer()                                                   answers rightly
    FaultyServer(lambda request: [1.5, *right(request)])             waits 1.5 s first
    FaultyServer(on_scores(lambda request: [RESET]))                 resets the connection, but for scores only
    FaultyServer(on_scores(lambda request: [HANG], times=2))         never answers the first two requests for scores
    FaultyServer(on_scores(lambda request: [*right(request), CLOSE]))    closes each connection behind an answer

Scores are a hash of query and document (`oracle`): one that was mixed up, padded or made up is never equal.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, Self


class End(Enum):
    """How a connection ends: with FIN, or with RST, which throws away what was not read yet."""

    CLOSE = "close"
    RESET = "reset"


CLOSE, RESET = End.CLOSE, End.RESET
HANG = math.inf

Steps = Iterable[bytes | float | End]
"""What is done about a request: bytes are sent, a number is that many seconds of waiting, `CLOSE` and `RESET` end the
connection. After the last step the connection is ready for the next request. Steps may be endless: they stop when the
client goes."""


@dataclass(frozen=True)
class Request:
    """A request as it came.

    Attributes:
        headers: Names in lower case.
        connection: Which connection of the server it came on, from 1.
        nth: Which request of its connection it is, from 1.
        arrived: When it was complete, on the clock of `time.monotonic`.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int
    nth: int
    arrived: float = field(default_factory=time.monotonic)

    @property
    def wants_scores(self) -> bool:
        return self.method == "POST"

    @cached_property
    def content(self) -> dict[str, Any]:
        return json.loads(self.body)

    @cached_property
    def documents(self) -> list[str]:
        return self.content["text_2"]

    @cached_property
    def queries(self) -> list[str]:
        queries = self.content["text_1"]
        return queries if isinstance(queries, list) else [queries] * len(self.documents)


Behaviour = Callable[[Request], Steps | None]


def oracle(query: str, document: str) -> float:
    """The right score of a pair, in [0, 1); it survives JSON unchanged."""
    digest = hashlib.blake2b(f"{len(query)} {query}{document}".encode(), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def spelled(value: str | dict[str, Any]) -> str:
    """A query or document as `oracle` takes it: one with pictures is its JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def http(body: bytes | str, status: int = 200, **headers: str | int) -> bytes:
    """An answer; ``Retry_After=1`` is the header ``Retry-After: 1``. Its Content-Length is right unless given."""
    content = body.encode() if isinstance(body, str) else body
    headers = {"Content_Type": "application/json", "Content_Length": len(content)} | headers
    lines = [f"HTTP/1.1 {status} Status", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + content


def refusal(status: int, message: str = "no", **headers: str | int) -> Steps:
    """An error in the words of vLLM."""
    return [http(json.dumps({"error": {"message": message, "type": "Error", "code": status}}), status, **headers)]


def scores(request: Request) -> dict[str, Any]:
    """What the right answer to a request for scores says; to be spoilt by tests."""
    pairs = zip(request.queries, request.documents, strict=True)
    data = [{"index": i, "object": "score", "score": oracle(*map(spelled, pair))} for i, pair in enumerate(pairs)]
    return {
        "id": f"score-{request.content.get('request_id') or request.headers.get('x-request-id')}",
        "object": "list",
        "model": request.content["model"],
        "data": data,
        "usage": {"prompt_tokens": len(data), "total_tokens": len(data)},
    }


def right(request: Request) -> Steps:
    """The right answer to any request that a client of vLLM's score API sends."""
    if request.wants_scores:
        return [http(json.dumps(scores(request)))]
    if request.path == "/version":
        return [http('{"version": "0.32.0"}')]
    if request.path == "/v1/models":
        return [http('{"object": "list", "data": [{"id": "m", "root": "m", "max_model_len": 1000000}]}')]
    return [http('{"detail": "Not Found"}', 404)]


def on_scores(behave: Behaviour, *, times: float = math.inf, having: str | None = None) -> Behaviour:
    """`behave` for the first so many requests to score (that document); what else comes is answered rightly."""
    seen = 0

    def behave_on_scores(request: Request) -> Steps | None:
        nonlocal seen
        if not request.wants_scores or (having is not None and having not in request.documents):
            return None
        seen += 1
        return behave(request) if seen <= times else None

    return behave_on_scores


class FaultyServer:
    """The server, in a thread of its own; a context manager.

    Args:
        behave: Says what to do about a request, None for the right answer. It runs in the server's event loop, so it
            must not block; where something is to be waited for, steps from a generator can do it.
        tls: The server's side of TLS, for https.

    Attributes:
        behave: The argument; it may be changed at any time.
        requests: All complete requests, in order of arrival.
        abandoned: Those whose connection was gone before the answer was complete.
        connections: How many were opened so far.
    """

    def __init__(self, behave: Behaviour = lambda request: None, *, tls: ssl.SSLContext | None = None) -> None:
        self.behave = behave
        self.requests: list[Request] = []
        self.abandoned: list[Request] = []
        self.connections = 0
        self._tls = tls
        self._open: set[asyncio.StreamWriter] = set()
        self._listener: asyncio.Server | None = None
        self._port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty server", daemon=True)
        self._thread.start()
        self.revive()

    @property
    def base_url(self) -> str:
        return f"http{'s' if self._tls else ''}://{self.label}"

    @property
    def label(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def open_connections(self) -> int:
        return len(self._open)

    @property
    def score_requests(self) -> list[Request]:
        return [request for request in self.requests if request.wants_scores]

    def revive(self) -> None:
        """Listen, after `kill` on the same port as before."""

        async def listen() -> None:
            self._listener = await asyncio.start_server(
                self._serve, "127.0.0.1", self._port, ssl=self._tls, backlog=256
            )
            self._port = self._listener.sockets[0].getsockname()[1]

        self._run(listen())

    def kill(self) -> None:
        """As SIGKILL would: refuse new connections and reset the open ones."""

        async def die() -> None:
            self._listener.close()
            for writer in self._open:
                _reset(writer)

        self._run(die())

    def close(self) -> None:
        """End the server and its thread."""

        async def end() -> None:
            self._listener.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, request by request."""
        self.connections += 1
        self._open.add(writer)
        connection = self.connections
        following = asyncio.create_task(self._read(reader, connection, 1))
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while request := await following:
                # Reading on while answering tells when the client goes.
                following = asyncio.create_task(self._read(reader, connection, request.nth + 1))
                if not await self._answer(request, writer, following):
                    break
        following.cancel()
        self._open.discard(writer)
        writer.close()

    async def _answer(self, request: Request, writer: asyncio.StreamWriter, following: asyncio.Task) -> bool:
        """Take the steps for a request, as long as the client is there; whether the connection goes on."""
        steps = self.behave(request)
        reaction = asyncio.create_task(_do(right(request) if steps is None else steps, writer))
        await asyncio.wait({reaction, following}, return_when=asyncio.FIRST_COMPLETED)
        if not reaction.done() and following.result() is None:
            reaction.cancel()
        try:
            return await reaction
        except (OSError, asyncio.CancelledError):
            self.abandoned.append(request)
            raise

    async def _read(self, reader: asyncio.StreamReader, connection: int, nth: int) -> Request | None:
        """The next request; None where the client has gone instead."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines if line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            method, path, _ = first.split(" ")
            request = Request(method, path, headers, body, connection, nth)
            self.requests.append(request)
            return request
        return None


async def _do(steps: Steps, writer: asyncio.StreamWriter) -> bool:
    """Take the steps; whether the connection goes on."""
    for step in steps:
        if step is CLOSE:
            return False
        if step is RESET:
            _reset(writer)
            return False
        if isinstance(step, bytes):
            writer.write(step)
            await writer.drain()
        else:
            await asyncio.sleep(step)
    return True


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST: that is what closing does where SO_LINGER is on with a time of 0."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
