"""Calls in virtual time: an event loop that never waits, a transport without sockets, and servers to talk to.

`World` sends what calls send (`rag_rerank.vllm.transport` does it for users), in an event loop whose clock jumps to
whatever happens next. A request goes to a function, which says after how many seconds what comes of it:

    World(Server())                                  one server that does everything right
    World(Script(BUSY, None, (3.0, BROKEN)))         503 to the first request, the third breaks off after 3 s
    World(at(Server(), refuse), servers=2)           the second of two servers behaves as the function `refuse`
"""

import asyncio
import itertools
import json
import math
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from rag_rerank.backoff import BackOff
from rag_rerank.isolation import failure
from rag_rerank.vllm.call import Call
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.exchange import ID_PREFIX, Exchange, Rules, Send
from rag_rerank.vllm.servers import Server as Asked
from rag_rerank.vllm.servers import Servers
from rag_rerank.vllm.wire import Failure, Options, Reply, ServerFacts
from tests.faulty_server import oracle

Outcome = Reply | Failure
Answer = Callable[[Send, float], tuple[float, Outcome]]
"""Told a request and the time, says after how many seconds what comes of it; infinite for a server that hangs."""

START = 1000.0
"""The monotonic clock at the beginning."""
EPOCH = 1_795_300_000.0
"""The date then: Saturday, 21 November 2026, 22:26:40 GMT."""

REFUSED = Failure("connect", "can't connect: refused")
BROKEN = Failure("broken", "the connection broke: reset")
UNTRUSTED = Failure("certificate", "can't trust the server: expired")
UNREAD = Failure("unread", "the answer is longer than 10 bytes")
HANG = (math.inf, BROKEN)
UNREACHABLE = (math.inf, REFUSED)


def refusal(status: int, message: str = "no", **headers: str) -> Reply:
    """An error in the words of vLLM; ``retry_after="3"`` is the header ``Retry-After: 3``."""
    body = json.dumps({"error": {"message": message, "type": "Error", "code": status}}).encode()
    return Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


BUSY = refusal(503, "busy")


class Server:
    """Answers as vLLM does, with the scores of `oracle`. For it a token is a character.

    Args:
        window: How many tokens a pair may have; ``tells_window`` says whether its model list tells.
        template: How many tokens it puts around query and document; None: no template, but 3 special tokens.
        bad: Documents that it refuses, and with them whole requests.
        most: Documents in a request that are not yet too many for it (413).
        ids: ``echoed``, ``own`` or ``none``: what an answer has as its id.
        counts: Whether answers say how many tokens were read.
        seconds: What an answer takes.
    """

    def __init__(
        self,
        *,
        version: str | None = "0.32.0",
        models: Collection[str] = ("m",),
        window: int = 1_000_000,
        tells_window: bool = True,
        template: int | None = None,
        bad: Collection[str] = (),
        most: int = 1_000_000,
        ids: str = "echoed",
        counts: bool = True,
        seconds: float = 0.01,
    ) -> None:
        self.version, self.models, self.window, self.tells_window = version, models, window, tells_window
        self.template, self.bad, self.most, self.ids, self.counts = template, bad, most, ids, counts
        self.seconds = seconds

    def __call__(self, send: Send, now: float) -> tuple[float, Outcome]:
        return self.seconds, self.reply(send)

    def reply(self, send: Send) -> Reply:
        request = send.request
        if request.body is not None:
            return self._scored(request.path, json.loads(request.body), request.id)
        if request.path == "/version" and self.version is not None:
            return _json({"version": self.version})
        if request.path == "/v1/models":
            window = {"max_model_len": self.window} if self.tells_window else {}
            return _json({"data": [{"id": name, "root": f"org/{name}", **window} for name in self.models]})
        return Reply(404, b'{"detail": "Not Found"}')

    def _scored(self, path: str, body: dict[str, Any], request_id: str | None) -> Reply:
        if body["model"] not in self.models:
            return refusal(404, f"The model `{body['model']}` does not exist.")
        documents = body["text_2" if path == "/v1/score" else "documents"]
        queries = body["text_1" if path == "/v1/score" else "query"]
        queries = [queries] * len(documents) if isinstance(queries, str) else queries
        if len(documents) > self.most:
            return Reply(413, b"<html>Payload Too Large</html>")
        scores, tokens = [], 0
        for query, document in zip(queries, documents, strict=True):
            if document in self.bad:
                return refusal(400, "Out of range float values are not JSON compliant")
            read_query = query[: body.get("max_tokens_per_query")]
            read = document[: body.get("max_tokens_per_doc")]
            length = len(read_query) + len(read) + (3 if self.template is None else self.template)
            if length > self.window and "truncate_prompt_tokens" not in body:
                return refusal(400, f"This model's maximum context length is {self.window} tokens, not {length}.")
            whole = length <= self.window or self.template is None
            scores.append(oracle(read_query, read) if whole else -1.0)  # the end of the template is cut off
            tokens += min(length, self.window)
        answer: dict[str, Any] = {"model": body["model"]}
        if self.ids == "echoed":
            answer["id"] = f"score-{body.get('request_id', request_id)}"
        elif self.ids == "own":
            answer["id"] = f"chatcmpl-{len(documents)}"
        if self.counts:
            answer["usage"] = {"prompt_tokens": tokens}
        if path == "/v1/score":
            return _json(answer | {"data": [{"index": index, "score": score} for index, score in enumerate(scores)]})
        results = [{"index": index, "relevance_score": score} for index, score in enumerate(scores)]
        return _json(answer | {"results": sorted(results, key=lambda entry: -entry["relevance_score"])})


def _json(content: dict[str, Any]) -> Reply:
    return Reply(200, json.dumps(content).encode())


class Script:
    """Outcomes one after another, whatever is asked; then, and for None, those of a server.

    Args:
        outcomes: Each alone or with the seconds that it takes.
        server: For everything else.
        seconds: For outcomes that don't say.
    """

    def __init__(
        self, *outcomes: Outcome | tuple[float, Outcome] | None, server: Answer | None = None, seconds: float = 0.0
    ) -> None:
        self._outcomes, self._server, self._seconds = iter(outcomes), server or Server(), seconds

    def __call__(self, send: Send, now: float) -> tuple[float, Outcome]:
        outcome = next(self._outcomes, None)
        if outcome is None:
            return self._server(send, now)
        return outcome if isinstance(outcome, tuple) else (self._seconds, outcome)


def at(*answers: Answer) -> Answer:
    """For each server of a world its own."""
    return lambda send, now: answers[int(send.endpoint.label.removesuffix(":1").removeprefix("server"))](send, now)


def always(outcome: Outcome, seconds: float = 0.0) -> Answer:
    """The same to everything."""
    return lambda send, now: (seconds, outcome)


def after(moment: float, then: Answer, before: Answer) -> Answer:
    """Behaves like `before`, from that many seconds after the start like `then`."""
    return lambda send, now: (before if now < START + moment else then)(send, now)


def documents_of(send: Send) -> list[str]:
    """Those of a request for scores."""
    return json.loads(send.request.body)["text_2" if send.request.path == "/v1/score" else "documents"]


@dataclass(frozen=True)
class Sent:
    """A request as it was sent.

    Attributes:
        at: Seconds after the start.
    """

    send: Send
    at: float

    @property
    def path(self) -> str:
        return self.send.request.path

    @property
    def content(self) -> dict[str, Any]:
        return json.loads(self.send.request.body)

    @property
    def documents(self) -> list[str]:
        return documents_of(self.send)


class VirtualLoop(asyncio.BaseEventLoop):
    """An event loop whose clock jumps to whatever happens next."""

    def __init__(self) -> None:
        super().__init__()
        self.now = START
        self._selector = self

    def time(self) -> float:
        return self.now

    def select(self, timeout: float | None) -> list[Any]:
        """As its own selector: nothing comes from outside."""
        if timeout != 0:
            assert timeout is not None, "the call waits for something that never comes"
            assert self._scheduled[0].when() < math.inf, "the call waits for ever"
            self.now = self._scheduled[0].when()
        return []

    def _process_events(self, events: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


class World:
    """Servers, the clock, and the driver.

    Args:
        answer: What servers answer.
        servers: How many; they are called server0:1, server1:1 ...
        deadline: Seconds that a call may take.
        known: Whether the servers have told already that they are version 0.32 and serve m.
        jitter: Always that.
        rules: Fields of `Rules`.

    Attributes:
        now: The monotonic clock.
        sent, slept: What was done, in order.
        discarded: Replies after which the connection was closed.
        most_at_once: Most requests under way at the same time.
    """

    def __init__(
        self,
        answer: Answer | None = None,
        *,
        servers: int = 1,
        deadline: float | None = None,
        known: bool = True,
        jitter: float = 0.0,
        **rules: Any,
    ) -> None:
        self.answer = answer or Server()
        self.deadline, self.jitter, self.rules = deadline, jitter, Rules(**rules)
        self.servers = Servers([Endpoint(f"http://server{number}:1", f"server{number}:1") for number in range(servers)])
        self.loop = VirtualLoop()
        self.sent: list[Sent] = []
        self.slept: list[float] = []
        self.discarded: list[Reply] = []
        self.most_at_once = 0
        self._under_way = 0
        self._ids = itertools.count(1)
        for server in self.each_server:
            server.back_off = BackOff(self.clock)
            server.asked_at = START
            server.facts = ServerFacts((0, 32), "m", "org/m", 1_000_000) if known else None

    @property
    def each_server(self) -> list[Asked]:
        return self.servers._servers

    @property
    def now(self) -> float:
        return self.loop.now

    @now.setter
    def now(self, now: float) -> None:
        self.loop.now = now

    def clock(self) -> float:
        return self.loop.now

    def exchange(self, api: str = "score") -> Exchange:
        """That of a call that begins now."""
        for server in self.each_server:
            if server.facts is not None:
                server.facts = replace(server.facts, form=server.endpoint.forms(api)[0])
        return Exchange(
            self.send,
            self.servers,
            replace(self.rules, api=api),
            until=None if self.deadline is None else self.now + self.deadline,
            clock=self.clock,
            now=lambda: EPOCH + self.now - START,
            sleep=self.sleep,
            jitter=lambda: self.jitter,
            new_id=lambda: f"{ID_PREFIX}{next(self._ids)}",
        )

    async def call(
        self, queries: str | list[str], documents: list[str], *, api: str = "score", fit: bool = False, **options
    ) -> list[float]:
        """A call, from beginning to end."""
        queries = [queries] if isinstance(queries, str) else queries
        outcomes = await Call(self.exchange(api), queries, documents, Options(**options), fit).score()
        if error := failure(outcomes):
            raise error
        return outcomes

    def score(self, *arguments: Any, **options: Any) -> list[float]:
        """A call in an event loop."""
        return self.run(self.call(*arguments, **options))

    def at_once(self, count: int) -> list[list[float]]:
        """So many calls."""

        async def calls() -> list[list[float]]:
            return await asyncio.gather(*(self.call("q", ["a", "b"]) for _ in range(count)))

        return self.run(calls())

    @property
    def elapsed(self) -> float:
        return self.now - START

    @property
    def paths(self) -> list[str]:
        return [sent.path for sent in self.sent]

    @property
    def hosts(self) -> list[int]:
        """The numbers of the servers that were asked."""
        return [int(sent.send.endpoint.label.removesuffix(":1").removeprefix("server")) for sent in self.sent]

    @property
    def score_requests(self) -> list[Sent]:
        return [sent for sent in self.sent if sent.send.request.body is not None]

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do the work; nothing is left running when this returns or raises."""
        try:
            return self.loop.run_until_complete(work)
        finally:
            assert self._under_way == 0
            assert asyncio.all_tasks(self.loop) == set()

    async def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.slept.append(seconds)
        await asyncio.sleep(seconds)

    async def send(self, send: Send) -> Outcome:
        """What the transport does."""
        assert send.connect_timeout > 0
        assert send.timeout is None or send.timeout >= send.connect_timeout
        self.sent.append(Sent(send, self.now - START))
        seconds, outcome = self.answer(send, self.now)
        no_connection = isinstance(outcome, Failure) and outcome.kind in ("connect", "certificate")
        if no_connection and seconds > send.connect_timeout:
            seconds, outcome = send.connect_timeout, Failure("connect", "can't connect: timed out")
        if send.timeout is not None and seconds > send.timeout:
            seconds, outcome = send.timeout, Failure("timeout", "timed out")
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._under_way -= 1
        if isinstance(outcome, Reply) and not send.judge(outcome):
            self.discarded.append(outcome)
        return outcome
