"""How a call to a server goes, without doing any of it: no socket, no sleep.

`Call.score` is a generator. It yields what is to be done next, `Send` or `Sleep`, and is told with ``send()`` what came
of it, a `Reply` or a `Failure`; it returns the scores or raises. Two drivers run it, one for threads and one for event
loops (`rag_rerank.vllm.transport`), so the rules stand here once and are tested with a list of replies. The pattern is
that of httpx's authentication flow.
"""

import itertools
import math
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
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
from rag_rerank.vllm.wire import (
    Options,
    Reply,
    Request,
    Server,
    error_text,
    is_model_missing,
    read_models,
    read_relevance_scores,
    read_scores,
    read_version,
    rerank_request,
    score_request,
)


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request; its `Reply` or `Failure` must be there within `timeout` seconds (None: no limit)."""

    request: Request
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait; nothing comes of it."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """No reply.

    Attributes:
        kind: ``timeout``: the time was up; ``connect``: no connection; ``broken``: it broke off; ``unread``: an answer
            came that must not be read (too large, compressed).
        text: What happened, in one clause.
        cause: The HTTP library's exception, where there was one.
    """

    kind: Literal["timeout", "connect", "broken", "unread"]
    text: str
    cause: Exception | None = None


T = TypeVar("T")
E = TypeVar("E", bound=BackendError)
Steps = Generator[Send | Sleep, Reply | Failure | None, T]
"""Yields what to do, is told what came of it, returns a T."""

RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds


class _ModelMissing(BackendRejected):
    """The server does not know the model's name."""


class Call:
    """One call: how long it may take, what it has tried so far.

    Args:
        label: The server, as errors name it.
        until: When the call must be over, on `clock`; None for no limit.
        max_retries: How often one request is repeated after a failure that may pass: no connection, a broken one, the
            statuses 408, 429, 500, 502, 503, 504, or a reply that is no valid answer. Scoring has no side effects, so
            repeating is safe.
        clock, jitter: Seconds, and a number in [0, 1); replaced in tests.
    """

    def __init__(
        self,
        label: str,
        *,
        until: float | None,
        max_retries: int,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._label = label
        self._until = until
        self._max_retries = max_retries
        self._clock = clock
        self._jitter = jitter
        self._began = clock()
        self._attempts = 0

    def score(
        self,
        server: Server,
        queries: Sequence[str],
        documents: Sequence[str],
        *,
        options: Options,
        endpoint: Literal["score", "rerank"] = "score",
    ) -> Steps[list[float]]:
        """Score checked input on a server that `learn` has described."""
        try:
            if endpoint == "score":
                request = score_request(server, queries, documents, options)
                return (yield from self._exchange(request, lambda body: read_scores(body, len(documents))))
            scores: list[float] = []
            for query, texts in _by_query(queries, documents):
                scores += yield from self._rerank(rerank_request(server, query, texts, options), len(texts))
        except _ModelMissing:
            served = yield from self._served()
            message = f"the server does not serve the model {server.model!r}"
            raise self._error(BackendRejected, message, f"{_it_serves(served)} Pass one of them as model=.") from None
        return scores

    def _rerank(self, request: Request, expected: int) -> Steps[list[float]]:
        return (yield from self._exchange(request, lambda body: read_relevance_scores(body, expected)))

    def learn(self, model: str | None) -> Steps[Server]:
        """Ask the server for its version and its models; `model` is the name that the caller gave, if any."""
        try:
            version = yield from self._exchange(Request("GET", "/version"), read_version)
        except BackendRejected:  # a gateway that forwards only /v1
            version = None
        try:
            served = yield from self._served()
        except (BackendRejected, BadReply):
            if model is None:
                raise
            served = []
        if model is not None:
            return Server(version, model, dict(served).get(model))
        if len({checkpoint for _, checkpoint in served}) != 1:
            raise ConfigError(f"{self._label} serves {len(served)} models; pass model=. {_it_serves(served)}")
        return Server(version, *served[0])

    def _served(self) -> Steps[list[tuple[str, str]]]:
        return (yield from self._exchange(Request("GET", "/v1/models"), read_models))

    def _exchange(self, request: Request, read: Callable[[bytes], T]) -> Steps[T]:
        """Send a request until there is a readable answer or a final refusal, or no try or no time is left."""
        retry = 0
        while True:
            if self._left() <= 0:
                raise self._error(DeadlineExceeded, "the deadline passed")
            outcome = yield Send(request, None if self._until is None else self._left())
            self._attempts += 1
            try:
                return read(self._answer(outcome))
            except BadReply as error:
                failure: BackendError = self._error(BadReply, error.message, "Is it a vLLM server?")
                failure.__cause__ = error
            except BackendUnavailable as error:
                failure = error
            pause = self._pause(retry, outcome)
            if retry >= self._max_retries or pause >= self._left():
                raise failure
            yield Sleep(pause)
            retry += 1

    def _answer(self, outcome: Reply | Failure | None) -> bytes:
        """The body of a good answer; anything else as the error that it is."""
        if isinstance(outcome, Reply) and outcome.status == 200:
            return outcome.body
        if isinstance(outcome, Reply):
            raise self._refusal(outcome)
        failure = outcome or Failure("broken", "no answer")
        error: BackendError
        if failure.kind == "timeout":
            error = self._error(
                DeadlineExceeded,
                "the server had not answered when the deadline passed",
                "Allow more time (deadline= or timeout=) or pass fewer documents.",
            )
        elif failure.kind == "unread":
            error = self._error(BadReply, failure.text)
        else:
            error = self._error(
                BackendUnavailable, failure.text, "Is the vLLM server running there, and has it finished loading?"
            )
        error.__cause__ = failure.cause
        raise error

    def _refusal(self, reply: Reply) -> BackendError:
        """The error for a status other than 200."""
        status, said = reply.status, error_text(reply.body)
        if status in RETRIED_STATUSES:
            return self._error(BackendUnavailable, f"the server answered {status}: {said}")
        if status in (401, 403):
            return self._error(AuthError, f"the server answered {status}: {said}", "Pass api_key= or set VLLM_API_KEY.")
        if 300 <= status < 400:
            return self._error(
                BackendRejected,
                f"the server answered {status}, a redirect, which is never followed",
                "Pass the address that it redirects to as base_url.",
            )
        if status == 404 and is_model_missing(reply.body):
            return self._error(_ModelMissing, f"the server answered 404: {said}")
        remedy = None
        if status == 404:
            remedy = (
                "It has no score API there: vLLM offers it for a reranker with one label or an embedding model "
                "(--runner pooling), not for a model that generates text."
            )
        elif "maximum context length" in said:
            remedy = "Set truncate_prompt_tokens=-1 to have over-long documents cut."
        return self._error(BackendRejected, f"the server answered {status}: {said}", remedy)

    def _error(self, kind: type[E], message: str, remedy: str | None = None) -> E:
        elapsed = self._clock() - self._began
        return kind(message, endpoint=self._label, attempts=self._attempts, elapsed=elapsed, remedy=remedy)

    def _left(self) -> float:
        """Seconds left for the call."""
        return math.inf if self._until is None else self._until - self._clock()

    def _pause(self, retry: int, outcome: Reply | Failure | None) -> float:
        """Seconds to wait before the next try: what the server asks for, else full jitter over doubling bounds."""
        asked = outcome.headers.get("retry-after", "") if isinstance(outcome, Reply) else ""
        try:
            seconds = float(asked)
        except ValueError:
            seconds = math.nan
        if 0 <= seconds < math.inf:
            return seconds
        bound: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2**retry)
        return self._jitter() * bound


def _by_query(queries: Sequence[str], documents: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """The documents of each query: a rerank API takes one query at a time."""
    rows = list(queries) * len(documents) if len(queries) == 1 else queries
    for query, pairs in itertools.groupby(zip(rows, documents, strict=True), key=lambda pair: pair[0]):
        yield query, [document for _, document in pairs]


def _it_serves(served: Sequence[tuple[str, str]]) -> str:
    return f"It serves: {', '.join(name for name, _ in served)}."
