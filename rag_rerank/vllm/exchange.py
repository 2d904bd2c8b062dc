"""How one request gets its answer: from which server, in how many tries, in what time, and what is no answer."""

import asyncio
import functools
import math
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Generic, Literal, Protocol, TypeVar, cast

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
from rag_rerank.vllm.servers import Server, Servers, logger
from rag_rerank.vllm.wire import API, Answer, Card, Failure, Form, Options, Reply, Request, ServerFacts, printable

T = TypeVar("T")
E = TypeVar("E", bound=BackendError)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds
LONGEST_RETRY_AFTER = 120.0  # seconds that a call waits where a server asks for it; else the caller is told at once
# Seconds for which what is known of a server holds; where it could not tell, it is asked again soon.
LONGEST_AGE, SHORTEST_AGE = 60.0, 5.0
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
class _MayPass(Exception):
    """A failure that another try may not meet: at once on a new connection, after a pause, or with another server."""

    error: BackendError  # what the caller gets if there is no other try
    again: Literal["soon", "later", "elsewhere"] = "later"
    blames: bool = False  # its server, once another one has answered the same request
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


@dataclass(eq=False)
class _Attempts(Generic[T]):
    """Attempts under way for one request: one, or several where servers are silent."""

    sleep: Callable[[float], Awaitable[None]]
    under_way: dict[asyncio.Task[T], tuple[Server, float]] = field(default_factory=dict)  # and when each began
    blamed: list[tuple[Server, float]] = field(default_factory=list)
    alone: tuple[Coroutine[Any, Any, T], Server, float] | None = None

    @property
    def servers(self) -> list[Server]:
        """Those that are asked."""
        return [server for server, _ in self.under_way.values()]

    def begin(self, attempt: Coroutine[Any, Any, T], server: Server, began: float, *, alone: bool) -> None:
        """Begin another one; alone, it needs no task of its own."""
        if alone:
            self.alone = attempt, server, began
        else:
            self.under_way[asyncio.create_task(attempt)] = server, began

    async def first(self, seconds: float) -> list[T]:
        """Wait for the first answer, for so long; empty where there is none. Raises _MayPass where one has failed."""
        if self.alone is not None:
            (attempt, server, began), self.alone = self.alone, None
            try:
                return self._answered(await attempt, server)
            except _MayPass as failure:
                self._failed(failure, server, began)
                raise
        if not self.under_way:
            await self.sleep(seconds)
            return []
        timeout = None if seconds == math.inf else seconds
        done, _ = await asyncio.wait(self.under_way, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in sorted(done, key=lambda task: task.exception() is not None)[:1]:  # the others are done next time
            server, began = self.under_way.pop(task)
            try:
                return self._answered(task.result(), server)
            except _MayPass as failure:
                self._failed(failure, server, began)
                raise
        return []

    def _answered(self, answer: T, server: Server) -> list[T]:
        for other, began in self.blamed:
            if other is not server:
                other.failed(began)
        return [answer]

    def _failed(self, failure: "_MayPass", server: Server, began: float) -> None:
        if failure.blames:
            self.blamed.append((server, began))

    async def end(self) -> None:
        """Give up what is still under way."""
        for task in self.under_way:
            task.cancel()
        await asyncio.gather(*self.under_way, return_exceptions=True)


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
    usage: Usage = field(default_factory=Usage)
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: Callable[[], float] = random.random  # noqa: S311 - in [0, 1); spreads retries, guards nothing
    new_id: Callable[[], str] = lambda: ID_PREFIX + uuid.uuid4().hex

    def __post_init__(self) -> None:
        self._began = self.clock()
        self._answered_by: str | None = None
        self._attempt_timeout = self.rules.attempt_timeout or math.inf
        # After so many seconds without a sign of life (vLLM hangs after SIGTERM) another server is asked as well.
        self._share = math.inf
        if self.rules.attempt_timeout is None and len(self.servers) > 1:
            self._share = max(0.001, self._left() / (1 + self.rules.max_retries))

    @property
    def model_name(self) -> str:
        """What is asked, as far as that is known."""
        facts = self.servers.facts
        return self.model or ("the model" if facts is None else facts.model)

    async def describe(self, *, surely: bool = False) -> ServerFacts:
        """Learn what one of the servers tells about itself; asked anew to be sure, where it may have restarted."""
        if surely and self.servers.may_have_restarted(self.clock() - LONGEST_AGE):
            self.servers.forget()
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
            except _ModelMissing as refusal:
                server.facts = None  # it was started again with another model
                raise await self._missing(server, facts.model, refusal) from None
            self.usage.prompt_tokens += answer.prompt_tokens or 0
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
        error = kind(message, endpoint=where, attempts=self.usage.requests, elapsed=elapsed, remedy=remedy)
        error.whole = whole
        if cause is not None:
            error.__cause__ = cause
        return error

    async def _missing(self, server: Server, model: str, refusal: BackendRejected) -> Exception:
        """Make the error for a model that is not served, as it seems, with those that are."""
        said, remedy = f"the server does not serve the model {model!r}", "Pass the name that it serves as model=."
        cards = await self._optional(server, Request("GET", "/v1/models"), wire.read_models)
        is_listed = any(card.name == model for card in cards or ())
        if is_listed:
            said, remedy = (
                refusal.message,
                'It has no such API there. endpoint="auto" finds out whether it has another.',
            )
        elif cards is not None:
            remedy = f"It serves: {_names(cards)}. Pass one of them as model=."
        error = self.error(BackendRejected, said, remedy, server=server, whole=True)
        error.status, error.body, error.request_id = 404, refusal.body, refusal.request_id
        return error if is_listed or self.model is not None else _MayPass(error, "soon")

    async def _optional(self, server: Server, request: Request, read: Callable[[bytes], T]) -> T | None:
        """Ask what a server need not tell; None where it answers anything else, as gateways do."""
        try:
            return await self._once(server, request, read, optional=True)
        except BackendRejected:
            return None
        except _MayPass as failure:
            if failure.error.status is None and not isinstance(failure.error, BadReply):
                raise  # nobody is there
            server.asked_at = self.clock() - LONGEST_AGE + SHORTEST_AGE
            return None

    async def _try(self, attempt: Callable[[Server], Coroutine[Any, Any, T]], *, takes_turn: bool = True) -> T:
        """Attempt until it works or finally fails, or no try or no time is left; other servers are no retries.

        An attempt is not given up because its server is silent: another one is asked as well, and the first answer
        counts. So several servers answer whatever one of them would.
        """
        tries = 1 + self.rules.max_retries
        if self.servers.down:
            tries = min(tries, len(self.servers))
        tried: list[Server] = []
        attempts: _Attempts[T] = _Attempts(self.sleep)
        try:
            while True:
                server, began = self.servers.choose(tried, attempts.servers, takes_turn=takes_turn), self.clock()
                tried.append(server)
                attempts.begin(attempt(server), server, began, alone=self._share == math.inf)
                pause: float | None = None  # until the next attempt, once one has failed
                while pause is None or pause > 0:
                    try:
                        answers = await attempts.first(self._share if pause is None else pause)
                    except _MayPass as failure:
                        pause = self._pause(failure, tried, tries)
                        if pause == math.inf and not attempts.under_way:
                            return cast("T", self._given_up(failure, down=len(tried) >= tries))
                        continue
                    if answers:
                        return answers[0]
                    if pause is not None:
                        break  # it is over
                    if not server.works_off(began, self._share, self.clock()):
                        server.failed(began)
                        if self.servers.others_answer(attempts.servers):
                            break
        finally:
            await attempts.end()

    def _given_up(self, failure: _MayPass, *, down: bool) -> Any:
        """Return what a call gets that is not tried again, or raise it."""
        if failure.answer is not None:
            return failure.answer
        self.servers.down = down
        raise failure.error from failure.error.__cause__

    def _pause(self, failure: _MayPass, tried: list[Server], tries: int) -> float:
        """Find the seconds until the next try; infinite if there must be none."""
        pause = self._back_off(failure, tried)
        if (len(tried) >= tries and not self.servers.others_answer(tried)) or pause >= self._left():
            return math.inf
        if pause < math.inf:
            logger.info("%s Attempt %d follows in %.3g s.", failure.error, len(tried) + 1, pause)
        return pause

    def _back_off(self, failure: _MayPass, tried: list[Server]) -> float:
        if self.servers.others_answer(tried):
            return 0.0
        if failure.again == "elsewhere":
            return math.inf
        asked = self.servers.asked_until() - self.clock()
        if asked > 0:
            return asked if asked <= LONGEST_RETRY_AFTER else math.inf
        if failure.again == "soon" and len(tried) == 1:
            return 0.0
        bound: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (len(tried) - 1))
        # Callers that failed together do not come back together; nor before a hiccup of a quarter of a second is over.
        return bound * (1 + self.jitter()) / 2

    async def _once(self, server: Server, request: Request, read: Callable[[bytes], T], *, optional: bool = False) -> T:
        """Send a request and read its answer, or raise; nothing is held against a server that need not answer."""
        left = self._left()
        if left <= 0:
            raise self.error(DeadlineExceeded, "the deadline passed", server=server)
        timeout = min(left, self._attempt_timeout)
        results: list[T] = []
        faults: list[BadReply] = []

        def judge(reply: Reply) -> bool:
            faults.clear()
            try:
                if 200 <= reply.status < 300:
                    results.append(read(reply.body))  # where the status is 204, say, this is no answer either
            except BadReply as fault:
                faults.append(fault)
            return not faults

        limits = None if timeout == math.inf else timeout, min(self.rules.connect_timeout, timeout)
        sent = self.clock()
        outcome = await self.transport.send(Send(server.endpoint, request, *limits, judge))
        self.usage.requests += 1
        if isinstance(outcome, Failure):
            raise self._failed(server, outcome, sent)
        if not 200 <= outcome.status < 300:
            raise self._refused(server, outcome, request, None if optional else sent)
        if results:
            self._answered(server)
            server.connection = outcome.connection
            if request.body is not None:
                server.gave_scores(sent, self.clock())
            return results[0]
        fault, remedy, message = faults[0], "Is it a vLLM server?", faults[0].message
        if wire.is_model_missing(outcome.body):  # an error with a status of success, as some gateways send
            message += f": {wire.error_text(outcome.body)}"
        error = self.error(BadReply, message, remedy, server=server, cause=fault, whole=fault.whole)
        raise _MayPass(_told(error, outcome, request), blames=True)

    def _failed(self, server: Server, failure: Failure, sent: float) -> Exception:
        """Make the error for no answer."""
        if self._left() < 0.001:  # the caller's time was up, which says nothing about the server
            text = "the server had not answered when the deadline passed"
            remedy = "Allow more time (deadline= or timeout=) or pass fewer documents."
            return self.error(DeadlineExceeded, text, remedy, server=server, cause=failure.cause)
        if failure.kind == "unread":
            return _MayPass(self.error(BadReply, failure.text, server=server, whole=True), blames=True)
        if failure.kind == "local":
            remedy = "Allow more (ulimit -n), or make fewer calls at a time (max_waiting_calls=)."
            return _MayPass(self.error(BackendUnavailable, failure.text, remedy, server=server, cause=failure.cause))
        server.failed(sent, gone=failure.kind == "connect")
        again: Literal["soon", "later", "elsewhere"] = "later"
        text, remedy = failure.text, "Is the vLLM server running there, and has it finished loading?"
        if failure.kind == "broken":
            again = "soon"  # most often a kept connection that the server had closed in that moment
        elif failure.kind == "certificate":
            again = "elsewhere"
            remedy = "The certificate must be valid for that name; SSL_CERT_FILE names more authorities to trust."
        elif failure.kind == "timeout":
            limit = "the time for a try" if self._attempt_timeout == math.inf else f"{self._attempt_timeout:.3g} s"
            text, remedy = f"no answer within {limit}", "Is it overloaded? See attempt_timeout= and timeout=."
        return _MayPass(self.error(BackendUnavailable, text, remedy, server=server, cause=failure.cause), again)

    def _refused(self, server: Server, reply: Reply, request: Request, sent: float | None) -> Exception:
        """Make the error for a status that is no success."""
        status, said = reply.status, wire.error_text(reply.body)
        message = f"the server answered {status}" + (f": {said}" if said else "")
        if (status >= 500 and status not in (501, 505)) or status in (408, 409, 425, 429):
            if status in (502, 503, 504) and sent is not None:
                server.failed(sent)
            after = _retry_after(reply.headers.get("retry-after", ""), self.now())
            if after is not None and sent is not None:
                server.asked(after, self.clock())
            unavailable = self.error(BackendUnavailable, message, server=server)
            unavailable.retry_after = after
            return _MayPass(_told(unavailable, reply, request), blames=status >= 500)
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
            remedy = "Set max_tokens_per_doc= to have over-long documents cut."
        # `call` looks for a document that is to blame.
        return _told(self.error(kind, message, remedy, server=server, whole=True), reply, request)

    async def _described(self, server: Server) -> ServerFacts:
        """Learn what a server tells about itself, asked if it is not known or was long ago."""
        before, now = server.facts, self.clock()
        if before is None or now - server.asked_at > LONGEST_AGE:
            server.asked_at = now  # others go on with what is known meanwhile
            version = await self._optional(server, Request("GET", "/version"), wire.read_version)
            facts = self._facts(server, version, await self._listed(server))
            if before is not None and before == replace(
                facts, has_template=before.has_template, form=before.form, most_bytes=before.most_bytes
            ):
                server.facts = replace(before, has_template=None)  # a restart may have changed no more than that
            else:
                server.facts = replace(facts, form=await self._form(server, facts))
        return server.facts or await self._described(server)

    async def _listed(self, server: Server) -> list[Card]:
        """Get the models that are served; none where one is named and the server doesn't tell."""
        refusal: BackendRejected | None = None
        for path in server.endpoint.lists(self.api):
            if self.model is not None:
                cards = await self._optional(server, Request("GET", path), wire.read_models)
                if cards is not None:
                    return cards
                continue
            try:
                return await self._once(server, Request("GET", path), wire.read_models)
            except BackendRejected as error:
                refusal = refusal or error
        if refusal is not None:
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

    def _facts(self, server: Server, version: tuple[int, int] | None, cards: list[Card]) -> ServerFacts:
        if not any(card.window for card in cards):
            version = None  # some gateways have a version of their own: only vLLM's lists tell how long prompts may be
        if self.model is not None:
            card = next((card for card in cards if card.name == self.model), Card(self.model, ""))
            return ServerFacts(version, self.model, card.root or None, card.window)
        label = server.endpoint.label
        if len({card.root for card in cards}) != 1:
            raise ConfigError(f"{label} serves {len(cards)} models; pass model=. It serves: {_names(cards)}.")
        known = self.servers.facts_beside(server)
        if known is not None and known.model != cards[0].name:
            self.servers.forget()  # unless they all have another one now
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
        server.worked()
        self.servers.down = False

    def _left(self) -> float:
        """Tell the seconds that are left for the call."""
        return math.inf if self.until is None else self.until - self.clock()


def _told(error: E, reply: Reply, request: Request) -> E:
    """Note in an error what the server told: status, id, the beginning of the body."""
    error.status, error.body = reply.status, reply.body[:2000].decode("utf-8", "replace")
    error.request_id = reply.headers.get("x-request-id") or request.id
    return error


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
