"""What a call asks to be done, and what it is told: the language between the rules and the drivers.

A call is a generator. It yields a step and is told with ``send()`` what came of it; it returns its result or raises.
So `exchange` and `call` do no I/O: the transport runs them over real connections, tests over a list of replies and a
clock of their own. The pattern is that of httpx's authentication flow.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.wire import Reply, Request


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request; told a `Reply` or a `Failure`.

    Each reply goes to `judge`, before anything else goes over its connection. Where that is False the connection is
    closed: what comes next there may be another request's.
    """

    endpoint: Endpoint
    request: Request
    timeout: float | None  # seconds until the whole answer must be there
    connect_timeout: float  # seconds until there must be a connection, name lookup and TLS included
    judge: Callable[[Reply], bool]


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait; told None."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Together:
    """Run steps side by side; told None when all are done. The first error ends the others and is raised here."""

    branches: "Sequence[Steps[None]]"


@dataclass(frozen=True, slots=True)
class Failure:
    """No reply; ``unread`` if one came that must not be read (too large, compressed)."""

    kind: Literal["timeout", "connect", "certificate", "broken", "unread"]
    text: str  # one clause
    cause: Exception | None = None  # the HTTP library's


T = TypeVar("T")
Step = Send | Sleep | Together
Steps = Generator[Step, Any, T]
