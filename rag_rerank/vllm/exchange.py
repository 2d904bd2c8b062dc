"""How one request gets its answer: from which server, in how many tries, in what time, and what is no answer."""

import asyncio
import functools
import math
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass, replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Literal, Protocol, TypeVar

from rag_rerank.errors import (
    AuthError,
    BackendError,
    BackendRejected,
    BackendUnavailable,
    BadReply,
    ConfigError,
    DeadlineExceeded,
)
from rag_rerank.inputs import NEUTRAL
from rag_rerank.vllm import wire
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.servers import Server, Servers
from rag_rerank.vllm.wire import API, Answer, Card, Failure, Form, Options, Reply, Request, ServerFacts, printable

T = TypeVar("T")
E = TypeVar("E", bound=BackendError)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds
# Seconds that a server may ask for; what asks for more is told to the caller at once, as openai's client does.
LONGEST_RETRY_AFTER = 120.0
# By which a reply to another request of ours is known, also on servers that have not echoed an id yet.
ID_PREFIX = "rag-rerank-"


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings of `VLLMScorer` that say how its requests go; see there."""

    chunk_size: int = 128
    max_concurrency: int = 4
    max_retries: int = 2
    connect_timeout: float = 2.0
    attempt_timeout: float | None = None


@dataclass(eq=False)
class _MayPass(Exception):
    """A failure that another try may not meet: at once on a new connection, after a pause, or with another server."""

    error: BackendError  # what the caller gets if there is no other try
    again: Literal["soon", "later", "elsewhere"] = "later"
    after: float | None = None  # seconds that the server wants to be left alone
    answer: Any = None  # what the caller gets instead of the error: well-formed, with a score that is not finite


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


class Sender(Protocol):
    """What sends requests: `Transport`, or a test's."""

    async def send(self, send: Send) -> Reply | Failure:
        """Send a request in this event loop; cancelling the task gives it up."""


class _ModelMissing(BackendRejected):
    """The server does not know the model's name."""


@dataclass(eq=False)
class Exchange:
    """The requests of one call. Tests replace what tells time, chance and ids."""

    transport: Sender
    servers: Servers
    rules: Rules
    _: KW_ONLY
    until: float | None  # when the call must be over, on `clock`
    model: str | None = None  # None takes the only one that is served
    api: API | Literal["auto"] = "score"
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: Callable[[], float] = random.random  # noqa: S311 - in [0, 1); spreads retries, guards nothing
    new_id: Callable[[], str] = lambda: ID_PREFIX + uuid.uuid4().hex

    def __post_init__(self) -> None:
        self._began = self.clock()
        self._attempts = 0
        self._answered_by: str | None = None
        self._attempt_timeout = self.rules.attempt_timeout or math.inf
        if self.rules.attempt_timeout is None and len(self.servers) > 1:
            # A server that hangs (vLLM does after SIGTERM) must leave time for the next one.
            self._attempt_timeout = max(0.001, self._left() / (1 + self.rules.max_retries))

    @property
    def model_name(self) -> str:
        """What is asked, as far as that is known."""
        facts = self.servers.facts
        return self.model or ("the model" if facts is None else facts.model)

    async def describe(self) -> ServerFacts:
        """Learn what one of the servers tells about itself; asked once."""
        facts = self.servers.facts
        return await self._try(self._described, takes_turn=False) if facts is None else facts

    async def ask(
        self, make: Callable[[ServerFacts, str], Request], read: Callable[[bytes], Answer], *, takes_turn: bool = True
    ) -> Answer:
        """Get a request answered; with scores that are not finite only if it had such in the last try."""

        async def attempt(server: Server) -> Answer:
            facts = await self._described(server)
            sent_id = self.new_id()
            request = make(facts, sent_id)
            try:
                answer = await self._once(server, request, lambda body: self._own(server, read(body), sent_id))
            except _ModelMissing:
                server.facts = None  # it was started again with another model
                missing = await self._missing(server, facts.model)
                raise missing if self.model is not None else _MayPass(missing, "soon") from None
            if not all(map(math.isfinite, answer.scores)):
                raise _MayPass(self.error(BadReply, "a score is not finite", server=server), answer=answer)
            return answer

        return await self._try(attempt, takes_turn=takes_turn)

    def error(
        self,
        kind: type[E],
        message: str,
        remedy: str | None = None,
        *,
        server: Server | None = None,
        cause: Exception | None = None,
        whole: bool = False,
    ) -> E:
        """Make an error of one server or all, with how many attempts and how long."""
        where, elapsed = self.servers.label if server is None else server.endpoint.label, self.clock() - self._began
        error = kind(message, endpoint=where, attempts=self._attempts, elapsed=elapsed, remedy=remedy)
        error.whole = whole
        if cause is not None:
            error.__cause__ = cause
        return error

    async def _missing(self, server: Server, model: str) -> BackendRejected:
        """Make the error for a model that is not served, with those that are."""
        remedy = "Pass the name that it serves as model=."
        try:
            cards = await self._once(server, Request("GET", "/v1/models"), wire.read_models)
            remedy = f"It serves: {_names(cards)}. Pass one of them as model=."
        except BackendRejected:  # a gateway that lists none
            pass
        said = f"the server does not serve the model {model!r}"
        error = self.error(BackendRejected, said, remedy, server=server, whole=True)
        error.status = 404
        return error

    async def _try(self, attempt: Callable[[Server], Awaitable[T]], *, takes_turn: bool = True) -> T:
        """Attempt until it works or finally fails, or no try or no time is left."""
        tries = 1 + self.rules.max_retries
        if self.servers.down:
            tries = min(tries, len(self.servers))
        tried: list[Server] = []
        paused: dict[Server, float] = {}  # until when
        while True:
            now = self.clock()
            busy = [server for server, until in paused.items() if until > now]
            server = self.servers.choose(tried, busy, takes_turn=takes_turn)
            tried.append(server)
            try:
                return await attempt(server)
            except _MayPass as failure:
                pause = self._pause(failure, tried)
                if len(tried) >= tries or pause >= self._left():
                    if failure.answer is not None:
                        answer: T = failure.answer
                        return answer
                    self.servers.down = len(tried) >= tries
                    raise failure.error from failure.error.__cause__
                paused[server] = self.clock() + (failure.after or 0.0)
            if pause > 0:
                await self.sleep(pause)

    def _pause(self, failure: _MayPass, tried: list[Server]) -> float:
        """Find the seconds until the next try; infinite if there must be none."""
        if self.servers.others_answer(tried):
            return 0.0
        if failure.after is not None:
            return failure.after if failure.after <= LONGEST_RETRY_AFTER else math.inf
        if failure.again == "elsewhere":
            return math.inf
        if failure.again == "soon" and len(tried) == 1:
            return 0.0
        bound: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (len(tried) - 1))
        return self.jitter() * bound  # full jitter: callers that failed together do not come back together

    async def _once(self, server: Server, request: Request, read: Callable[[bytes], T]) -> T:
        """Send a request and read its answer, or raise."""
        left = self._left()
        if left <= 0:
            raise self.error(DeadlineExceeded, "the deadline passed", server=server)
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

        limits = None if timeout == math.inf else timeout, min(self.rules.connect_timeout, timeout)
        outcome = await self.transport.send(Send(server.endpoint, request, *limits, judge))
        self._attempts += 1
        if isinstance(outcome, Failure):
            raise self._failed(server, outcome)
        if not 200 <= outcome.status < 300:
            raise self._refused(server, outcome, request)
        self._answered(server)
        if results:
            return results[0]
        fault, remedy = faults[0], "Is it a vLLM server?"
        raise _MayPass(self.error(BadReply, fault.message, remedy, server=server, cause=fault, whole=fault.whole))

    def _failed(self, server: Server, failure: Failure) -> Exception:
        """Make the error for no answer."""
        if self._left() < 0.001:  # the caller's time was up, which says nothing about the server
            text = "the server had not answered when the deadline passed"
            remedy = "Allow more time (deadline= or timeout=) or pass fewer documents."
            return self.error(DeadlineExceeded, text, remedy, server=server, cause=failure.cause)
        if failure.kind == "unread":
            return _MayPass(self.error(BadReply, failure.text, server=server, whole=True))
        server.failed(gone=failure.kind == "connect")
        again: Literal["soon", "later", "elsewhere"] = "later"
        text, remedy = failure.text, "Is the vLLM server running there, and has it finished loading?"
        if failure.kind == "broken":
            again = "soon"  # most often a kept connection that the server had closed in that moment
        elif failure.kind == "certificate":
            again = "elsewhere"
            remedy = "The certificate must be valid for that name; SSL_CERT_FILE names more authorities to trust."
        elif failure.kind == "timeout":
            text, remedy = f"no answer within {self._attempt_timeout:.3g} s", "Is it overloaded? See attempt_timeout=."
        return _MayPass(self.error(BackendUnavailable, text, remedy, server=server, cause=failure.cause), again)

    def _refused(self, server: Server, reply: Reply, request: Request) -> Exception:
        """Make the error for a status that is no success."""
        status, said = reply.status, wire.error_text(reply.body)
        message = f"the server answered {status}" + (f": {said}" if said else "")
        if status >= 500 or status in (408, 429):
            if status in (502, 503, 504):
                server.failed(gone=False)
            after = _retry_after(reply.headers.get("retry-after", ""), self.now())
            unavailable = self.error(BackendUnavailable, message, server=server)
            unavailable.retry_after, unavailable.status = after, status
            return _MayPass(unavailable, after=after)
        self._answered(server)
        kind: type[BackendRejected] = BackendRejected
        remedy = None
        if status in (401, 403):
            kind, remedy = AuthError, "Pass api_key= or set VLLM_API_KEY."
        elif 300 <= status < 400:
            message = f"the server answered {status}, a redirect, which is never followed"
            remedy = "Pass the address that it redirects to as base_url."
        elif status == 404 and request.method == "POST" and wire.is_model_missing(reply.body):
            kind = _ModelMissing
        elif status == 404:
            remedy = (
                "It has no score API there: vLLM offers it for a reranker with one label or an embedding model "
                "(--runner pooling), not for a model that generates text."
            )
        elif status == 413:
            remedy = "Shorten it, or have the proxy take larger requests (nginx: client_max_body_size)."
        elif "maximum context length" in said:
            remedy = "Set truncate_prompt_tokens=-1 to have over-long documents cut."
        # `call` looks for a document that is to blame.
        error = self.error(kind, message, remedy, server=server, whole=True)
        error.status = status
        return error

    async def _described(self, server: Server) -> ServerFacts:
        """Learn what a server tells about itself, asked if it is not known."""
        if server.facts is None:
            try:
                version = await self._once(server, Request("GET", "/version"), wire.read_version)
            except BackendRejected:  # a gateway that forwards only /v1
                version = None
            facts = self._facts(server, version, await self._listed(server))
            server.facts = replace(facts, form=await self._form(server, facts))
        return server.facts

    async def _listed(self, server: Server) -> list[Card]:
        """Get the models that are served; none where one is named and the server doesn't tell."""
        refusal: BackendRejected | None = None
        for path in server.endpoint.lists(self.api):
            try:
                return await self._once(server, Request("GET", path), self._cards)
            except BackendRejected as error:
                refusal = refusal or error
        if self.model is None and refusal is not None:
            raise refusal
        return []

    async def _form(self, server: Server, facts: ServerFacts) -> Form:
        """Find how a server is asked for scores: the only way, or the first that it answers."""
        forms = server.endpoint.forms(self.api)
        refusal: BackendError | None = None
        for form in forms if len(forms) > 1 else ():
            request = wire.scoring_request(replace(facts, form=form), [NEUTRAL], [NEUTRAL], Options())
            try:
                await self._once(server, request, functools.partial(wire.read_answer, form.api, positions=[0]))
            except (BackendRejected, _MayPass) as error:
                refused = error.error if isinstance(error, _MayPass) else error
                if isinstance(refused, AuthError) or not isinstance(refused, BackendRejected | BadReply):
                    raise
                if getattr(refusal, "status", 404) == 404:  # a path that is not there tells less
                    refusal = refused
            else:
                return form
        if refusal is not None:
            raise refusal
        return forms[0]

    def _cards(self, body: bytes) -> list[Card]:
        """Read the models that are served; where one is named, a server need not tell."""
        try:
            return wire.read_models(body)
        except BadReply:
            if self.model is None:
                raise
            return []

    def _facts(self, server: Server, version: tuple[int, int] | None, cards: list[Card]) -> ServerFacts:
        if self.model is not None:
            card = next((card for card in cards if card.name == self.model), Card(self.model, ""))
            return ServerFacts(version, self.model, card.root or None, card.window)
        label = server.endpoint.label
        if len({card.root for card in cards}) != 1:
            raise ConfigError(f"{label} serves {len(cards)} models; pass model=. It serves: {_names(cards)}.")
        known = self.servers.facts
        if known is not None and known.model != cards[0].name:
            raise ConfigError(f"{label} serves {cards[0].name!r}, another one {known.model!r}; pass model=.")
        return ServerFacts(version, cards[0].name, cards[0].root, cards[0].window)

    def _own(self, server: Server, answer: Answer, sent_id: str) -> Answer:
        """Check that it is the answer to this request, by the model that gave the call's other answers."""
        if answer.id is not None and answer.id.endswith(sent_id):
            server.echoes_ids = True
        elif server.echoes_ids or ID_PREFIX in (answer.id or ""):
            raise _not_ours(f"the answer is for the request {printable(answer.id or '')!r}, not for {sent_id!r}")
        if self._answered_by is None:
            self._answered_by = answer.model
        elif answer.model != self._answered_by:
            first, other = printable(self._answered_by), printable(str(answer.model))
            raise _not_ours(f"parts of one call were answered by {first!r} and by {other!r}")
        return answer

    def _answered(self, server: Server) -> None:
        server.back_off.worked()
        self.servers.down = False

    def _left(self) -> float:
        """Tell the seconds that are left for the call."""
        return math.inf if self.until is None else self.until - self.clock()


def _not_ours(message: str) -> BadReply:
    """Make the error for an answer that must not be used: asked for in parts, the scores of two would be mixed."""
    error = BadReply(message)
    error.whole = True
    return error


def _names(cards: list[Card]) -> str:
    return printable(", ".join(card.name for card in cards))


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
