"""How a request gets its answer: from which server, in how many tries, and whether it is the answer to this request."""

import asyncio
import contextlib
import functools
import math
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar, cast

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
from rag_rerank.vllm.servers import LONGEST_ASKED_REST, Server, Servers, logger
from rag_rerank.vllm.wire import (
    API,
    Answer,
    Card,
    Failure,
    Form,
    Options,
    Reply,
    Request,
    ServerFacts,
    Version,
    printable,
)

T = TypeVar("T")
E = TypeVar("E", bound=BackendError)

# Seconds for which what is known of a server holds; where it could not tell, it is asked again soon.
LONGEST_AGE, SHORTEST_AGE = 60.0, 5.0
APART = 0.05  # by how much the scores of a pair may differ among servers, as a part of those beyond 1: by rounding
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds
# By which a reply to another request of ours is known, also on servers that have not echoed an id yet.
ID_PREFIX = "rag-rerank-"

_REMEDIES = {  # by the kind of a failure, or by the status of a refusal
    "local": "Allow more (ulimit -n), or make fewer calls at a time (max_waiting_calls=).",
    "certificate": "The certificate must be valid for that name; SSL_CERT_FILE names the authorities to trust.",
    "tls": "Does it speak https there? Else its address begins with http://.",
    "timeout": "Is it overloaded? See attempt_timeout= and timeout=.",
    401: "Pass api_key= or set VLLM_API_KEY.",
    403: "Pass api_key= or set VLLM_API_KEY.",
    404: "It has no score API there: vLLM offers it for a reranker with one label or an embedding model "
    "(--runner pooling), not for a model that generates text.",
    407: "Put user and password into the proxy's address: HTTP_PROXY=http://user:password@proxy:3128.",
    413: "Shorten it, or have the proxy take larger requests (nginx: client_max_body_size).",
}

NOBODY = ("connect", "certificate", "tls", "local")  # kinds of failures without a connection


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings of `VLLMScorer` that say what its requests ask for and how they go; see there."""

    chunk_size: int = 128
    max_concurrency: int = 4
    max_retries: int = 2
    connect_timeout: float = 2.0
    attempt_timeout: float | None = None
    model: str | None = None
    api: API | Literal["auto"] = "score"
    logits: bool = False  # use_activation=False


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
    """A failure that another try may not meet."""

    error: BackendError  # what the caller gets if there is no other try
    kind: str = ""  # of the `Failure`, where there was no reply; or "renamed", of the model
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
class Exchange:
    """The requests of one call, tried until they are answered. Tests replace what tells time, chance and ids."""

    send: Callable[[Send], Awaitable[Reply | Failure]]  # `Transport.send`, or a test's
    servers: Servers
    rules: Rules
    _: KW_ONLY
    until: float | None  # when the call must be over, on `clock`
    usage: Usage = field(default_factory=Usage)
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: Callable[[], float] = random.random  # noqa: S311 - in [0, 1); spreads retries, guards nothing
    new_id: Callable[[], str] = lambda: ID_PREFIX + uuid.uuid4().hex

    def __post_init__(self) -> None:
        self._began = self.clock()
        self._answered_by: str | None = None
        self._letters: Answer | None = None  # by the first server that was asked, where others may be
        # After so many seconds without a sign of life (vLLM hangs after SIGTERM) another server is asked as well.
        self._share = math.inf
        if self.rules.attempt_timeout is None and len(self.servers) > 1:
            self._share = max(0.001, self.left() / (1 + self.rules.max_retries))

    def left(self) -> float:
        """Tell the seconds that are left for the call."""
        return math.inf if self.until is None else self.until - self.clock()

    def error(
        self, kind: type[E], message: str, remedy: str | None = None, server: Server | None = None, **facts: Any
    ) -> E:
        """Make an error of one server or all, with how many attempts and how long; `facts` are more attributes."""
        told = {"endpoint": (server or self.servers).label, "attempts": self.usage.requests, "remedy": remedy}
        return kind(message, told | {"elapsed": self.clock() - self._began} | facts)

    async def describe(self, *, surely: bool = False) -> ServerFacts:
        """Learn what one of the servers tells about itself; asked anew to be sure, where it may have restarted."""
        if surely:
            self.servers.forget(self.clock() - LONGEST_AGE)
        facts = self.servers.facts
        return await self._try(self._described, takes_turn=False) if facts is None else facts

    async def ask(
        self, make: Callable[[ServerFacts, str], Request], read: Callable[[bytes], Answer], *, takes_turn: bool = True
    ) -> Answer:
        """Get a request answered; with scores that are not finite only if it had such in the last try."""

        async def attempt(server: Server) -> Answer:
            facts = await self._described(server)
            self._compare(server, facts, self._letters)
            self._letters = self._letters or facts.letters
            sent_id = self.new_id()
            request = make(facts, sent_id)
            try:
                answer = await self.once(server, request, lambda body: self._own(server, read(body), sent_id))
            except ModelMissing as refusal:
                server.facts = None  # it was started again with another model
                raise await self._missing(server, facts.model, refusal) from None
            self.usage.prompt_tokens += answer.prompt_tokens or 0
            if not all(map(math.isfinite, answer.scores)):
                raise MayPass(self.error(BadReply, "a score is not finite", None, server), answer=answer)
            return answer

        return await self._try(attempt, takes_turn=takes_turn)

    def _own(self, server: Server, answer: Answer, sent_id: str) -> Answer:
        """Check that it is the answer to this request, by the model that gave the call's other answers."""
        if answer.id is not None and answer.id.endswith(sent_id):
            server.echoes_ids = True
        elif server.echoes_ids or ID_PREFIX in (answer.id or ""):
            said = f"the answer is for the request {printable(answer.id or '')!r}, not for {sent_id!r}"
            raise BadReply(said, whole=True)
        if self._answered_by is None:
            self._answered_by = answer.model
        elif answer.model != self._answered_by:
            first, other = printable(self._answered_by), printable(str(answer.model))
            # Asked for in parts, the scores of two would be mixed.
            raise BadReply(f"parts of one call were answered by {first!r} and by {other!r}", whole=True)
        return answer

    async def _try(self, attempt: Callable[[Server], Coroutine[Any, Any, T]], *, takes_turn: bool = True) -> T:
        """Attempt until it works or finally fails, or no try or no time is left; other servers are no retries.

        An attempt is not given up because its server is silent: another one is asked as well, and the first answer
        counts. So several servers answer whatever one of them would.
        """
        tries = 1 + self.rules.max_retries
        tries = min(tries, len(self.servers)) if self.servers.down else tries
        tried: list[Server] = []
        blamed: dict[Server, float] = {}
        under_way: dict[asyncio.Future[T], tuple[Server, float]] = {}  # and when each began
        try:
            while True:
                busy = [server for server, _ in under_way.values()]
                server, began = self.servers.choose(tried, busy, takes_turn=takes_turn), self.clock()
                tried.append(server)
                under_way[await self._begun(attempt(server))] = server, began
                pause: float | None = None  # until the next attempt, once one has failed
                while pause is None or pause > 0:
                    ended = await self._first(under_way, self._share if pause is None else pause)
                    if ended is not None:
                        asked, since = under_way.pop(ended)
                        try:
                            answer = ended.result()
                        except MayPass as failure:
                            if isinstance(failure.error, BadReply) or (failure.error.status or 0) >= 500:
                                blamed[asked] = since
                            pause = self._pause(failure, tried, tries)
                            if pause == math.inf and not under_way:
                                return cast("T", self._given_up(failure, down=len(tried) >= tries))
                            continue
                        blamed.pop(asked, None)
                        for other, since in blamed.items():
                            other.failed(since)
                        return answer
                    if pause is not None:
                        break  # it is over
                    if not server.works_off(began, self._share, self.clock()):
                        server.failed(began)
                        if self.servers.others_answer([server for server, _ in under_way.values()]):
                            break
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    def _given_up(self, failure: MayPass, *, down: bool) -> Any:
        """Return what a call gets that is not tried again, or raise it."""
        if failure.answer is None:
            self.servers.down = down
            raise failure.error from failure.error.__cause__
        return failure.answer

    async def _begun(self, attempt: Coroutine[Any, Any, T]) -> asyncio.Future[T]:
        """Begin an attempt; where no other may begin beside it, it needs no task of its own, and is over on return."""
        if self._share < math.inf:
            return asyncio.create_task(attempt)
        ended: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        try:
            ended.set_result(await attempt)
        except MayPass as failure:
            ended.set_exception(failure)
        return ended

    async def _first(
        self, under_way: dict[asyncio.Future[T], tuple[Server, float]], seconds: float
    ) -> asyncio.Future[T] | None:
        """Wait for the first attempt that is over, an answer before a failure, for so long."""
        if not under_way:
            await self.sleep(seconds)
        elif not any(each.done() for each in under_way):
            timeout = None if seconds == math.inf else seconds
            await asyncio.wait(under_way, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        over = [each for each in under_way if each.done()]
        return min(over, key=lambda each: each.exception() is not None, default=None)

    def _pause(self, failure: MayPass, tried: list[Server], tries: int) -> float:
        """Find the seconds until the next try; infinite if there must be none."""
        asked = self.servers.asked_until() - self.clock()
        if self.servers.others_answer(tried):
            pause = 0.0
        elif len(tried) >= tries or failure.kind == "certificate":
            pause = math.inf
        elif asked > 0:
            pause = asked if asked <= LONGEST_ASKED_REST else math.inf  # else the caller is told at once
        elif failure.kind in ("broken", "renamed") and len(tried) == 1:  # most often a kept one, closed in that moment
            pause = 0.0
        else:
            bound: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (len(tried) - 1))
            # Callers that failed together don't come back together, nor before a hiccup of a quarter of a second ends.
            pause = bound * (1 + self.jitter()) / 2
        if pause >= self.left():
            return math.inf
        logger.info("%s Attempt %d follows in %.3g s.", failure.error, len(tried) + 1, pause)
        return pause

    # One request to one server, once.

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
            raise MayPass(self.error(BadReply, fault.message, "Is it a vLLM server?", server, **facts)) from None

    def _failed(self, server: Server, failure: Failure, sent: float | None) -> Exception:
        """Make the error for no answer."""
        cause = {"__cause__": failure.cause}
        if self.left() < 0.001:  # the caller's time was up, which says nothing about the server
            text = "the server had not answered when the deadline passed"
            remedy = "Allow more time (deadline= or timeout=) or pass fewer documents."
            return self.error(DeadlineExceeded, text, remedy, server, **cause)
        if failure.kind == "unread":
            return MayPass(self.error(BadReply, failure.text, None, server, whole=True))
        if failure.kind != "local" and sent is not None:
            # A connection breaks in a restart, too, after which others' scores must not be mixed with another model's.
            gone = failure.kind in NOBODY or (failure.kind == "broken" and len(self.servers) > 1)
            server.failed(sent, gone=gone)
        text = failure.text
        if failure.kind == "timeout":
            limit = self.rules.attempt_timeout
            text = f"no answer within {'the time for a try' if limit is None else f'{limit:.3g} s'}"
        remedy = _REMEDIES.get(failure.kind, "Is the vLLM server running there, and has it finished loading?")
        error = self.error(BackendUnavailable, text, remedy, server, **cause)
        return MayPass(error, failure.kind)

    def _refused(self, server: Server, reply: Reply, request: Request, sent: float | None) -> Exception:
        """Make the error for a status that is no success."""
        status, said, facts = reply.status, wire.error_text(reply.body), _told(reply, request)
        message = f"the server answered {status}" + (f": {said}" if said else "")
        if (status >= 500 and status not in (501, 505)) or status in (408, 409, 424, 425, 429):
            after = _retry_after(reply.headers.get("retry-after", ""), self.now())
            if sent is not None:
                if status in (502, 503, 504):
                    server.failed(sent, gone=status == 502)  # a gateway's: nobody is behind it
                if after is not None:
                    server.asked(after, self.clock())
            return MayPass(self.error(BackendUnavailable, message, None, server, retry_after=after, **facts))
        self._answered(server)
        kind: type[BackendRejected] = AuthError if status in (401, 403) else BackendRejected
        remedy = _REMEDIES.get(status)
        if 300 <= status < 400:
            message = f"the server answered {status}, a redirect, which is never followed"
            remedy = "Pass the address that it redirects to as base_url."
        elif status == 404 and request.method == "POST" and wire.is_model_missing(reply.body):
            kind, remedy = ModelMissing, None
        elif wire.is_too_long(said):
            remedy = "Set max_tokens_per_doc= to have over-long documents cut."
        # `call` looks for a document that is to blame.
        return self.error(kind, message, remedy, server, whole=True, **facts)

    def _answered(self, server: Server) -> None:
        server.worked()
        self.servers.down = False

    # What is known of a server: asked of it, with an age; what it does not tell is unknown, and never read as "no".

    async def _described(self, server: Server) -> ServerFacts:
        """Learn what a server tells about itself, asked if it is not known or was long ago."""
        before, now = server.facts, self.clock()
        if before is None or now - server.asked_at > LONGEST_AGE:
            former, server.asked_at = server.asked_at, now  # others go on with what is known meanwhile
            try:
                version = await self._optional(server, Request("GET", "/version"), wire.read_version)
                facts = self._facts(server, version, await self._listed(server))
                if facts == before:
                    facts = replace(before, has_template=None)  # a restart may have changed no more than that
                else:
                    server.facts = None  # of another server, whatever becomes of what follows
                    facts = replace(facts, form=await self._form(server, facts))
                    if self.rules.logits:
                        await self._check_logits(server, facts)
                if len(self.servers) > 1:
                    facts = replace(facts, letters=await self._scored_letters(server, facts))
            except asyncio.CancelledError:
                server.asked_at = former
                raise
            server.facts = facts
            self._compare(server, facts, self.servers.letters_beside(server, now - LONGEST_AGE))
        return server.facts or await self._described(server)

    async def _missing(self, server: Server, model: str, refusal: BackendRejected) -> Exception:
        """Make the error for a model that is not served, as it seems, with those that are."""
        said, remedy = f"the server does not serve the model {model!r}", "Pass the name that it serves as model=."
        cards = await self._optional(server, Request("GET", "/v1/models"), wire.read_models)
        is_listed = any(card.name == model for card in cards or ())
        if is_listed:
            said = refusal.message
            remedy = 'It has no such API there. endpoint="auto" finds out whether it has another.'
        elif cards is not None:
            remedy = f"It serves: {_names(cards)}. Pass one of them as model=."
        facts = {"status": 404, "body": refusal.body, "request_id": refusal.request_id}
        error = self.error(BackendRejected, said, remedy, server, whole=True, **facts)
        return error if is_listed or self.rules.model is not None else MayPass(error, "renamed")

    async def _optional(self, server: Server, request: Request, read: Callable[[bytes], T]) -> T | None:
        """Ask what a server need not tell; None where it answers anything else, or nothing, as gateways do."""
        for once_more in (True, False):
            try:
                return await self.once(server, request, read, optional=True)
            except BackendRejected:
                break
            except MayPass as failure:
                if failure.kind in NOBODY:
                    raise
                if failure.kind == "broken" and once_more:  # most often an old connection
                    continue
                if failure.kind != "timeout":
                    server.asked_at = self.clock() - LONGEST_AGE + SHORTEST_AGE
                break
        return None

    async def _listed(self, server: Server) -> list[Card]:
        """Get the models that are served; none where one is named and the server doesn't tell."""
        refusals = []
        for path in server.endpoint.lists(self.rules.api):
            request = Request("GET", path)
            try:
                if self.rules.model is None:
                    return await self.once(server, request, wire.read_models)
                cards = await self._optional(server, request, wire.read_models)
                if cards is not None:
                    return cards
            except BackendRejected as refusal:
                refusals.append(refusal)
        if refusals:
            raise refusals[0]
        return []

    async def _form(self, server: Server, facts: ServerFacts) -> Form:
        """Find how a server is asked for scores: the only way, or the first that it answers."""
        forms = server.endpoint.forms(self.rules.api)
        if len(forms) == 1:
            return forms[0]
        refusals: list[BackendError] = []
        for form in forms:
            try:
                await self.once(server, *_letters(replace(facts, form=form)))
            except (BackendRejected, MayPass) as error:
                refusal = error.error if isinstance(error, MayPass) else error
                if isinstance(refusal, AuthError) or not isinstance(refusal, BackendRejected | BadReply):
                    raise
                refusals.append(refusal)
            else:
                return form
        raise min(refusals, key=lambda refusal: refusal.status == 404)  # a path that is not there tells less

    async def _check_logits(self, server: Server, facts: ServerFacts) -> None:
        """Refuse to take logits that are none, see `wire.WRONG_LOGITS`: seen in whether their sigmoid is the score."""
        if not wire.WRONG_LOGITS[0] <= (facts.version or (0, 0)) <= wire.WRONG_LOGITS[1]:
            return
        (logit,) = (await self.once(server, *_letters(facts, use_activation=False))).scores
        (score,) = (await self.once(server, *_letters(facts))).scores
        if not 0 < score < 1 or math.isclose(score, logit, abs_tol=0.01):
            return  # the model has no activation
        if score > 0.99:  # rounding leaves no more to compare
            is_right = logit > 4
        else:
            is_right = math.isclose(math.log(score / (1 - score)), logit, rel_tol=0.05, abs_tol=0.1)
        if not is_right:
            version = ".".join(map(str, facts.version or ()))
            said = f"vLLM {version} gives wrong logits for this model (use_activation=False): it leaves out a layer of"
            raise ConfigError(f"{said} its head. Upgrade to 0.31 or newer, or leave out use_activation=")

    async def _scored_letters(self, server: Server, facts: ServerFacts) -> Answer | None:
        """Have one of several servers score two letters, to be compared; None where it refuses them.

        Calls that begin together ask once. Those of another thread's event loop can't wait for it, and ask themselves.
        """
        loop, beside = asyncio.get_running_loop(), server.asking
        if beside is not None and beside.get_loop() is loop:
            await asyncio.wait([beside], timeout=None if self.until is None else self.left())
            if beside.done() and not beside.cancelled():
                return beside.result()
        server.asking = asking = loop.create_future()
        request, read = _letters(facts, sent_id := self.new_id())
        answer: Answer | None = None
        try:
            with contextlib.suppress(BackendRejected):
                answer = await self.once(server, request, lambda body: self._own(server, read(body), sent_id))
            if answer is not None and answer.model not in (None, facts.model):
                answer = None  # it says itself that this was another one
            asking.set_result(answer)
        finally:
            server.asking = None
            asking.cancel()
        return answer

    def _compare(self, server: Server, facts: ServerFacts, other: Answer | None) -> None:
        """Raise ConfigError where another server, or this one before, gave two letters another score.

        Else a call could mix the scores of two models of one name, or of one with and without its template.
        """
        if facts.letters is None or other is None:
            return
        (ours,), (theirs,) = facts.letters.scores, other.scores
        tokens = facts.letters.prompt_tokens, other.prompt_tokens
        if abs(ours - theirs) > APART * max(1.0, abs(theirs)) or (all(tokens) and tokens[0] != tokens[1]):
            self.servers.forget()  # unless they are all alike now
            said = f"{ours:.3g} ({tokens[0]} tokens), another server {theirs:.3g} ({tokens[1]})"
            raise ConfigError(
                f"{server.label} gives a pair of letters the score {said}: start them with the same model, template "
                "and options. `rag-rerank check` compares them"
            )

    def _facts(self, server: Server, version: Version | None, cards: list[Card]) -> ServerFacts:
        if not any(card.window for card in cards):
            version = None  # some gateways have a version of their own: only vLLM's lists tell how long prompts may be
        if self.rules.model is not None:
            card = next((card for card in cards if card.name == self.rules.model), Card(self.rules.model, ""))
            return ServerFacts(version, card.name, card.root or None, card.window)
        label = server.endpoint.label
        if not cards:
            remedy = "Wait until one is loaded, or pass its name as model=."
            raise MayPass(self.error(BackendUnavailable, "the server lists no model", remedy, server))
        if len({card.root for card in cards}) != 1:
            raise ConfigError(f"{label} serves {len(cards)} models; pass model=. It serves: {_names(cards)}.")
        known = self.servers.facts_beside(server)
        if known is not None and known.model != cards[0].name:
            self.servers.forget()  # unless they all have another one now
            raise ConfigError(f"{label} serves {cards[0].name!r}, another one {known.model!r}; pass model=.")
        return ServerFacts(version, cards[0].name, cards[0].root, cards[0].window)


def _letters(
    facts: ServerFacts, sent_id: str | None = None, **options: Any
) -> tuple[Request, Callable[[bytes], Answer]]:
    """Make a request to score two letters, and what reads the answer."""
    request = wire.scoring_request(facts, [NEUTRAL], [NEUTRAL], Options(**options), sent_id)
    return request, functools.partial(wire.read_answer, facts.form.api, positions=[0])


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
            seconds = date.replace(tzinfo=date.tzinfo or UTC).timestamp() - now
        except (ValueError, OverflowError):
            return None
    # A year is beyond any meaning that it may have.
    return seconds if 0 <= seconds < 366 * 86400 else None


def _names(cards: list[Card]) -> str:
    return printable(", ".join(card.name for card in cards))
