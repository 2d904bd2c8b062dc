"""What the tests of faults share: texts and their scores, times, and small servers' habits.

The server is `FaultyServer`: real sockets, and scores that are a hash of query and document, so "exact" means equal,
for every document, in the caller's order. Times are a tenth of a user's or less. That nothing takes too long shows in
numbers of requests, and in which error ends a call; how long pauses are, tests/vllm/test_exchange.py says. Rows, and R1
to R8, are those of the matrix and the rules that rag_rerank was designed by.
"""

import contextlib
import itertools
import json
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rag_rerank import (
    VLLMScorer,
)
from tests.faulty_server import (
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
    scores,
)

QUERY = "Which one?"
DOCUMENTS = [f"document {number} " + "x" * (number * 37 % 61) for number in range(100)]  # lengths in no order
EXACT = [oracle(QUERY, document) for document in DOCUMENTS]
FIRST, CHUNKS = DOCUMENTS[0], 4  # FIRST is in one chunk of four
FEW = DOCUMENTS[:5]  # one chunk

PAUSES = 0.03  # seconds that the pauses between three tries take at most
REST = 0.3  # seconds of the first rest of a server that failed
KEY = "canary-5ecret-k3y"
TLS = Path(__file__).parents[2] / "data" / "tls"  # an authority, its certificates for 127.0.0.1, and one by itself

Score = Callable[..., list[float]]
Serve = Callable[..., FaultyServer]
Connect = Callable[..., VLLMScorer]


@contextlib.contextmanager
def at_least(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began >= seconds


def soon(condition: Callable[[], bool]) -> bool:
    """Whether it comes true: at once on a quiet machine."""
    until = time.monotonic() + 20
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
