"""How one request gets its answer: from which server, in how many tries, in what time, and what is no answer.

A generator (`rag_rerank.vllm.steps`): no socket and no clock of its own.
"""

import math
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Literal, TypeVar

from rag_rerank.errors import (
    AuthError,
    BackendError,
    BackendRejected,
    BackendUnavailable,
    BadReply,
    ConfigError,
    DeadlineExceeded,
)
from rag_rerank.vllm.nodes import Node, Nodes
from rag_rerank.vllm.steps import Failure, Send, Sleep, Steps
from rag_rerank.vllm.wire import (
    Answer,
    Card,
    Reply,
    Request,
    Server,
    error_text,
    is_model_missing,
    printable,
    read_models,
    read_version,
)

T = TypeVar("T")
E = TypeVar("E", bound=BackendError)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds
LONGEST_RETRY_AFTER = 120.0
"""Seconds that a server may ask for; what asks for more is told to the caller at once, as openai's client does."""
ID_PREFIX = "rag-rerank-"
"""By which a reply to another request of ours is known even on servers that we haven't seen echo an id."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings of `VLLMScorer` that say how its requests go; see there."""

    chunk_size: int = 128
    max_concurrency: int = 4
    max_retries: int = 2
    connect_timeout: float = 2.0
    attempt_timeout: float | None = None


class _MayPass(Exception):
    """A failure that another try may not meet.

    Attributes:
        error: What the caller gets if there is no other try.
        again: ``soon``: at once, on a new connection; ``later``: after a pause; ``elsewhere``: not with this server.
        after: Seconds that the server wants to be left alone.
    """

    def __init__(
        self, error: BackendError, again: Literal["soon", "later", "elsewhere"] = "later", after: float | None = None
    ) -> None:
        self.error = error
        self.again = again
        self.after = after


class _ModelMissing(BackendRejected):
    """The server does not know the model's name."""


class Exchange:
    """The requests of one call.

    Args:
        nodes: The servers.
        rules: How requests go.
        until: When the call must be over, on `clock`; None for no limit.
        model: The name to ask for; None takes the only one that is served.
        clock, now, jitter, new_id: Monotonic seconds, the date, a number in [0, 1), a request's id; replaced in tests.
    """

    def __init__(
        self,
        nodes: Nodes,
        rules: Rules,
        *,
        until: float | None,
        model: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,  # noqa: S311 - spreads retries, guards nothing
        new_id: Callable[[], str] = lambda: ID_PREFIX + uuid.uuid4().hex,
    ) -> None:
        self.rules = rules
        self.nodes = nodes
        self._model = model
        self._clock, self._now, self._jitter, self._new_id = clock, now, jitter, new_id
        self._began = clock()
        self._until = math.inf if until is None else until
        self._attempts = 0
        self._answered_by: str | None = None
        self._attempt_timeout = rules.attempt_timeout or math.inf
        if rules.attempt_timeout is None and len(nodes) > 1:
            # A server that hangs (vLLM does after SIGTERM) must leave time for the next one.
            self._attempt_timeout = max(0.001, self._left() / (1 + rules.max_retries))

    @property
    def model_name(self) -> str:
        """What is asked, as far as that is known."""
        known = self.nodes.known
        return self._model or ("the model" if known is None else known.model)

    def describe(self) -> Steps[Server]:
        """What one of the servers tells about itself; asked once."""
        return self.nodes.known or (yield from self._try(self._described))

    def ask(
        self, make: Callable[[Server, str], Request], read: Callable[[bytes], Answer], *, aside: bool = False
    ) -> Steps[Answer]:
        """Get a request answered.

        Args:
            make: The request to a server, with this id.
            read: The answer in a body; raises BadReply.
            aside: Whether it is a small one, which takes no server's turn.
        """

        def attempt(node: Node) -> Steps[Answer]:
            server = yield from self._described(node)
            sent_id = self._new_id()
            request = make(server, sent_id)
            try:
                return (yield from self._once(node, request, lambda body: self._own(node, read(body), sent_id)))
            except _ModelMissing:
                pass
            node.server = None  # it was started again with another model
            missing = yield from self._missing(node, server.model)
            raise missing if self._model is not None else _MayPass(missing, "soon")

        return (yield from self._try(attempt, aside=aside))

    def error(self, kind: type[E], message: str, remedy: str | None = None) -> E:
        """An error that concerns the whole call, with where, how many attempts and how long."""
        elapsed = self._clock() - self._began
        return kind(message, endpoint=self.nodes.label, attempts=self._attempts, elapsed=elapsed, remedy=remedy)

    def _missing(self, node: Node, model: str) -> Steps[BackendRejected]:
        """The error for a model that is not served, with those that are."""
        remedy = "Pass the name that it serves as model=."
        try:
            cards = yield from self._once(node, Request("GET", "/v1/models"), read_models)
            remedy = f"It serves: {_names(cards)}. Pass one of them as model=."
        except BackendRejected:  # a gateway that lists none
            pass
        error = self._error(node, BackendRejected, f"the server does not serve the model {model!r}", remedy)
        error.status = 404
        return error

    def _try(self, attempt: Callable[[Node], Steps[T]], *, aside: bool = False) -> Steps[T]:
        """Attempt until it works or finally fails, or no try or no time is left."""
        tries = 1 + self.rules.max_retries
        if self.nodes.down:
            tries = min(tries, len(self.nodes))
        tried: list[Node] = []
        left_alone: dict[Node, float] = {}  # until when
        while True:
            now = self._clock()
            busy = [node for node, until in left_alone.items() if until > now]
            node = self.nodes.choose(tried, busy, aside=aside)
            tried.append(node)
            try:
                return (yield from attempt(node))
            except _MayPass as failure:
                pause = self._pause(failure, tried)
                if len(tried) >= tries or pause >= self._left():
                    raise failure.error from failure.error.__cause__
                left_alone[node] = self._clock() + (failure.after or 0.0)
            if pause > 0:
                yield Sleep(pause)

    def _pause(self, failure: _MayPass, tried: list[Node]) -> float:
        """Seconds until the next try; infinite if there must be none."""
        if self.nodes.others_answer(tried):
            return 0.0
        if failure.after is not None:
            return failure.after if failure.after <= LONGEST_RETRY_AFTER else math.inf
        if failure.again == "elsewhere":
            return math.inf
        if failure.again == "soon" and len(tried) == 1:
            return 0.0
        bound: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (len(tried) - 1))
        return self._jitter() * bound  # full jitter: callers that failed together do not come back together

    def _once(self, node: Node, request: Request, read: Callable[[bytes], T]) -> Steps[T]:
        """Send a request and read its answer, or raise."""
        left = self._left()
        if left <= 0:
            raise self._error(node, DeadlineExceeded, "the deadline passed")
        timeout = min(left, self._attempt_timeout)
        results: list[T] = []
        faults: list[BadReply] = []

        def judge(reply: Reply) -> bool:
            try:
                if 200 <= reply.status < 300:
                    results.append(read(reply.body))  # where the status is 204, say, this is no answer either
            except BadReply as fault:
                faults.append(fault)
            return not faults

        outcome: Reply | Failure = yield Send(
            node.endpoint,
            request,
            None if timeout == math.inf else timeout,
            min(self.rules.connect_timeout, timeout),
            judge,
        )
        self._attempts += 1
        if isinstance(outcome, Failure):
            raise self._failed(node, outcome)
        if not 200 <= outcome.status < 300:
            raise self._refused(node, outcome, request)
        node.back_off.worked()
        if results:
            return results[0]
        error = self._error(node, BadReply, faults[0].message, "Is it a vLLM server?")
        error.__cause__ = faults[0]
        raise _MayPass(error)

    def _failed(self, node: Node, failure: Failure) -> Exception:
        """The error for no answer."""
        if self._left() < 0.001:  # the caller's time was up, which says nothing about the server
            message = "the server had not answered when the deadline passed"
            remedy = "Allow more time (deadline= or timeout=) or pass fewer documents."
            error: BackendError = self._error(node, DeadlineExceeded, message, remedy)
            error.__cause__ = failure.cause
            return error
        if failure.kind == "unread":
            return _MayPass(self._error(node, BadReply, failure.text))
        node.failed(gone=failure.kind == "connect")
        again: Literal["soon", "later", "elsewhere"] = "later"
        remedy = "Is the vLLM server running there, and has it finished loading?"
        text = failure.text
        if failure.kind == "broken":
            again = "soon"  # most often a kept connection that the server had closed in that moment
        elif failure.kind == "certificate":
            again = "elsewhere"
            remedy = "The certificate must be valid for that name; SSL_CERT_FILE names more authorities to trust."
        elif failure.kind == "timeout":
            text, remedy = f"no answer within {self._attempt_timeout:.3g} s", "Is it overloaded? See attempt_timeout=."
        error = self._error(node, BackendUnavailable, text, remedy)
        error.__cause__ = failure.cause
        return _MayPass(error, again)

    def _refused(self, node: Node, reply: Reply, request: Request) -> Exception:
        """The error for a status that is no success."""
        status, said = reply.status, error_text(reply.body)
        message = f"the server answered {status}" + (f": {said}" if said else "")
        if status >= 500 or status in (408, 429):
            if status in (502, 503, 504):
                node.failed(gone=False)
            after = _retry_after(reply.headers.get("retry-after", ""), self._now())
            unavailable = self._error(node, BackendUnavailable, message)
            unavailable.retry_after, unavailable.status = after, status
            return _MayPass(unavailable, after=after)
        node.back_off.worked()
        kind: type[BackendRejected] = BackendRejected
        remedy = None
        if status in (401, 403):
            kind, remedy = AuthError, "Pass api_key= or set VLLM_API_KEY."
        elif 300 <= status < 400:
            message = f"the server answered {status}, a redirect, which is never followed"
            remedy = "Pass the address that it redirects to as base_url."
        elif status == 404 and request.method == "POST" and is_model_missing(reply.body):
            kind = _ModelMissing
        elif status == 404:
            remedy = (
                "It has no score API there: vLLM offers it for a reranker with one label or an embedding model "
                "(--runner pooling), not for a model that generates text."
            )
        elif "maximum context length" in said:
            remedy = "Set truncate_prompt_tokens=-1 to have over-long documents cut."
        error = self._error(node, kind, message, remedy)
        error.status = status
        return error

    def _described(self, node: Node) -> Steps[Server]:
        """What a server tells about itself, asked if it is not known."""
        known = node.server
        if known is not None:
            return known
        try:
            version = yield from self._once(node, Request("GET", "/version"), read_version)
        except BackendRejected:  # a gateway that forwards only /v1
            version = None
        try:
            cards = yield from self._once(node, Request("GET", "/v1/models"), self._cards)
        except BackendRejected:
            if self._model is None:
                raise
            cards = []
        node.server = self._server(node, version, cards)
        return node.server

    def _cards(self, body: bytes) -> list[Card]:
        """The models that are served; where one is named, a server need not tell."""
        try:
            return read_models(body)
        except BadReply:
            if self._model is None:
                raise
            return []

    def _server(self, node: Node, version: tuple[int, int] | None, cards: list[Card]) -> Server:
        label = node.endpoint.label
        if self._model is not None:
            card = next((card for card in cards if card.name == self._model), None)
            return Server(version, self._model) if card is None else Server(version, card.name, card.root, card.window)
        if len({card.root for card in cards}) != 1:
            raise ConfigError(f"{label} serves {len(cards)} models; pass model=. It serves: {_names(cards)}.")
        known = self.nodes.known
        if known is not None and known.model != cards[0].name:
            raise ConfigError(f"{label} serves {cards[0].name!r}, another one {known.model!r}; pass model=.")
        return Server(version, cards[0].name, cards[0].root, cards[0].window)

    def _own(self, node: Node, answer: Answer, sent_id: str) -> Answer:
        """The answer, if it is the one to this request, by the model that gave the call's other answers."""
        if answer.id is not None and answer.id.endswith(sent_id):
            node.echoes_ids = True
        elif node.echoes_ids or ID_PREFIX in (answer.id or ""):
            raise BadReply(f"the answer is for the request {printable(answer.id or '')!r}, not for {sent_id!r}")
        if self._answered_by is None:
            self._answered_by = answer.model
        elif answer.model != self._answered_by:
            first, other = printable(self._answered_by), printable(str(answer.model))
            raise BadReply(f"parts of one call were answered by {first!r} and by {other!r}")
        return answer

    def _error(self, node: Node, kind: type[E], message: str, remedy: str | None = None) -> E:
        error = self.error(kind, message, remedy)
        error.endpoint = node.endpoint.label
        return error

    def _left(self) -> float:
        """Seconds left for the call."""
        return self._until - self._clock()


def _names(cards: list[Card]) -> str:
    return printable(", ".join(card.name for card in cards))


def _retry_after(value: str, now: float) -> float | None:
    """Seconds that a Retry-After header (RFC 9110, 10.2.3) asks for; None where it makes no sense."""
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
