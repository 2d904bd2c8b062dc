"""One request to one server, once: sent, its answer judged, what went wrong named."""

import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar

from rag_rerank.errors import (
    AuthError,
    BackendError,
    BackendRejected,
    BackendUnavailable,
    BadReply,
    DeadlineExceeded,
)
from rag_rerank.vllm import wire
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.servers import Server, Servers
from rag_rerank.vllm.wire import API, Failure, Reply, Request

T = TypeVar("T")
E = TypeVar("E", bound=BackendError)
Again = Literal["soon", "later", "elsewhere"]

_REMEDIES = {  # by the kind of a failure, or by the status of a refusal
    "local": "Allow more (ulimit -n), or make fewer calls at a time (max_waiting_calls=).",
    "certificate": "The certificate must be valid for that name; SSL_CERT_FILE names more authorities to trust.",
    "timeout": "Is it overloaded? See attempt_timeout= and timeout=.",
    401: "Pass api_key= or set VLLM_API_KEY.",
    403: "Pass api_key= or set VLLM_API_KEY.",
    404: "It has no score API there: vLLM offers it for a reranker with one label or an embedding model "
    "(--runner pooling), not for a model that generates text.",
    407: "Put user and password into the proxy's address: HTTP_PROXY=http://user:password@proxy:3128.",
    413: "Shorten it, or have the proxy take larger requests (nginx: client_max_body_size).",
}

NOBODY = ("connect", "certificate", "local")  # kinds of failures without a connection

# A broken connection is most often a kept one that the server had closed in that moment.
_AGAIN: dict[str, Again] = {"broken": "soon", "certificate": "elsewhere"}


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings of `VLLMScorer` that say how its requests go; see there."""

    chunk_size: int = 128
    max_concurrency: int = 4
    max_retries: int = 2
    connect_timeout: float = 2.0
    attempt_timeout: float | None = None


@dataclass(slots=True)
class Usage:
    """What a call takes.

    Attributes:
        requests: How many requests were sent, also those that failed or only asked something.
        prompt_tokens: How many tokens the server read, as far as it told.
    """

    requests: int = 0
    prompt_tokens: int = 0


@dataclass(eq=False)
class MayPass(Exception):
    """A failure that another try may not meet: at once on a new connection, after a pause, or with another server."""

    error: BackendError  # what the caller gets if there is no other try
    again: Again = "later"
    blames: bool = False  # its server, once another one has answered the same request
    kind: str | None = None  # of the `Failure`, where there was no reply
    answer: Any = None  # what the caller gets instead of the error: well-formed, with a score that is not finite


class ModelMissing(BackendRejected):
    """The server does not know the model's name."""


@dataclass(frozen=True, slots=True)
class Send:
    """A request on its way; None for no limit.

    Each reply goes to `judge`, before anything else goes over its connection. Where that is False the connection is
    closed: what comes next there may be another request's.
    """

    endpoint: Endpoint
    request: Request
    timeout: float | None  # seconds until the whole answer must be there
    connect_timeout: float  # seconds until there must be a connection, name lookup and TLS included
    judge: Callable[[Reply], bool]


@dataclass(eq=False)
class Sending:
    """The sending of one call's requests. Tests replace what tells time."""

    send: Callable[[Send], Awaitable[Reply | Failure]]  # `Transport.send`, or a test's
    servers: Servers
    rules: Rules
    _: KW_ONLY
    until: float | None  # when the call must be over, on `clock`
    model: str | None = None  # None takes the only one that is served
    api: API | Literal["auto"] = "score"
    usage: Usage = field(default_factory=Usage)
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self._began = self.clock()

    def left(self) -> float:
        """Tell the seconds that are left for the call."""
        return math.inf if self.until is None else self.until - self.clock()

    def error(
        self, kind: type[E], message: str, remedy: str | None = None, server: Server | None = None, **facts: Any
    ) -> E:
        """Make an error of one server or all, with how many attempts and how long; `facts` are more attributes."""
        told = {"endpoint": (server or self.servers).label, "attempts": self.usage.requests, "remedy": remedy}
        return kind(message, told | {"elapsed": self.clock() - self._began} | facts)

    async def once(self, server: Server, request: Request, read: Callable[[bytes], T], *, optional: bool = False) -> T:
        """Send a request and read its answer, or raise; nothing is held against a server that need not answer.

        It gets a third of the time for that: some gateways let such a request hang.
        """
        if self.left() <= 0:
            raise self.error(DeadlineExceeded, "the deadline passed", server=server)
        timeout = min(self.left() / 3 if optional else self.left(), self.rules.attempt_timeout or math.inf)
        answers: list[T] = []

        def judge(reply: Reply) -> bool:
            if not reply.succeeded:
                return True
            with contextlib.suppress(BadReply):
                answers.append(read(reply.body))
            return bool(answers)

        limits = None if timeout == math.inf else timeout, min(self.rules.connect_timeout, timeout)
        sent = self.clock()
        reply = await self.send(Send(server.endpoint, request, *limits, judge))
        self.usage.requests += 1
        if isinstance(reply, Failure):
            may_fail = optional and reply.kind not in NOBODY
            raise self._failed(server, reply, None if may_fail else sent) from reply.cause
        if not reply.succeeded:
            raise self._refused(server, reply, request, None if optional else sent)
        if answers:
            self._answered(server)
            server.is_connected = reply.is_connected
            if request.body is not None:
                server.gave_scores(sent, self.clock())
            return answers[0]
        try:
            return read(reply.body)  # its fault once more, now without keys
        except BadReply as fault:
            facts = _told(reply, request) | {"whole": fault.whole, "__cause__": fault}
            raise MayPass(
                self.error(BadReply, fault.message, "Is it a vLLM server?", server, **facts), blames=True
            ) from None

    def _failed(self, server: Server, failure: Failure, sent: float | None) -> Exception:
        """Make the error for no answer."""
        cause = {"__cause__": failure.cause}
        if self.left() < 0.001:  # the caller's time was up, which says nothing about the server
            text = "the server had not answered when the deadline passed"
            remedy = "Allow more time (deadline= or timeout=) or pass fewer documents."
            return self.error(DeadlineExceeded, text, remedy, server, **cause)
        if failure.kind == "unread":
            return MayPass(self.error(BadReply, failure.text, None, server, whole=True), blames=True, kind="unread")
        if failure.kind != "local" and sent is not None:
            server.failed(sent, gone=failure.kind == "connect")
        text = failure.text
        if failure.kind == "timeout":
            limit = self.rules.attempt_timeout
            text = f"no answer within {'the time for a try' if limit is None else f'{limit:.3g} s'}"
        remedy = _REMEDIES.get(failure.kind, "Is the vLLM server running there, and has it finished loading?")
        error = self.error(BackendUnavailable, text, remedy, server, **cause)
        return MayPass(error, _AGAIN.get(failure.kind, "later"), kind=failure.kind)

    def _refused(self, server: Server, reply: Reply, request: Request, sent: float | None) -> Exception:
        """Make the error for a status that is no success."""
        status, said, facts = reply.status, wire.error_text(reply.body), _told(reply, request)
        message = f"the server answered {status}" + (f": {said}" if said else "")
        if (status >= 500 and status not in (501, 505)) or status in (408, 409, 425, 429):
            after = _retry_after(reply.headers.get("retry-after", ""), self.now())
            if sent is not None:
                if status in (502, 503, 504):
                    server.failed(sent)
                if after is not None:
                    server.asked(after, self.clock())
            unavailable = self.error(BackendUnavailable, message, None, server, retry_after=after, **facts)
            return MayPass(unavailable, blames=status >= 500)
        self._answered(server)
        kind: type[BackendRejected] = AuthError if status in (401, 403) else BackendRejected
        remedy = _REMEDIES.get(status)
        if 300 <= status < 400:
            message = f"the server answered {status}, a redirect, which is never followed"
            remedy = "Pass the address that it redirects to as base_url."
        elif status == 404 and request.method == "POST" and wire.is_model_missing(reply.body):
            kind, remedy = ModelMissing, None
        elif "maximum context length" in said:
            remedy = "Set max_tokens_per_doc= to have over-long documents cut."
        # `call` looks for a document that is to blame.
        return self.error(kind, message, remedy, server, whole=True, **facts)

    def _answered(self, server: Server) -> None:
        server.worked()
        self.servers.down = False


def _told(reply: Reply, request: Request) -> dict[str, Any]:
    """Give what an error notes of a reply: status, id, the beginning of the body."""
    body = reply.body[:2000].decode("utf-8", "replace")
    return {"status": reply.status, "body": body, "request_id": reply.headers.get("x-request-id") or request.id}


def _retry_after(value: str, now: float) -> float | None:
    """Read the seconds that a Retry-After header (RFC 9110, 10.2.3) asks for; None where it makes no sense."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
            seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now
        except (ValueError, TypeError, OverflowError, OSError):
            return None
    # A year is beyond any meaning that it may have.
    return seconds if 0 <= seconds < 366 * 86400 else None
