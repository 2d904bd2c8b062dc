"""How a request gets its answer: from which server, in how many tries, and whether it is the answer to this request."""

import asyncio
import math
import random
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from rag_rerank.errors import BadReply
from rag_rerank.vllm.facts import LONGEST_AGE, described, missing
from rag_rerank.vllm.sending import MayPass, ModelMissing, Sending
from rag_rerank.vllm.servers import Server, logger
from rag_rerank.vllm.wire import Answer, Request, ServerFacts, printable

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds
LONGEST_RETRY_AFTER = 120.0  # seconds that a call waits where a server asks for it; else the caller is told at once
# By which a reply to another request of ours is known, also on servers that have not echoed an id yet.
ID_PREFIX = "rag-rerank-"


@dataclass(eq=False)
class Exchange(Sending):
    """The requests of one call, tried until they are answered. Tests replace what tells chance and ids, too."""

    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: Callable[[], float] = random.random  # noqa: S311 - in [0, 1); spreads retries, guards nothing
    new_id: Callable[[], str] = lambda: ID_PREFIX + uuid.uuid4().hex

    def __post_init__(self) -> None:
        super().__post_init__()
        self._answered_by: str | None = None
        # After so many seconds without a sign of life (vLLM hangs after SIGTERM) another server is asked as well.
        self._share = math.inf
        if self.rules.attempt_timeout is None and len(self.servers) > 1:
            self._share = max(0.001, self.left() / (1 + self.rules.max_retries))

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
        return await self._try(lambda server: described(self, server), takes_turn=False) if facts is None else facts

    async def ask(
        self, make: Callable[[ServerFacts, str], Request], read: Callable[[bytes], Answer], *, takes_turn: bool = True
    ) -> Answer:
        """Get a request answered; with scores that are not finite only if it had such in the last try."""

        async def attempt(server: Server) -> Answer:
            facts = await described(self, server)
            sent_id = self.new_id()
            request = make(facts, sent_id)
            try:
                answer = await self.once(server, request, lambda body: self._own(server, read(body), sent_id))
            except ModelMissing as refusal:
                server.facts = None  # it was started again with another model
                raise await missing(self, server, facts.model, refusal) from None
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
                            if failure.blames:
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
        if self.servers.others_answer(tried):
            pause = 0.0
        elif len(tried) >= tries or failure.again == "elsewhere":
            return math.inf
        else:
            pause = self._back_off(failure, len(tried))
        if pause >= self.left():
            return math.inf
        logger.info("%s Attempt %d follows in %.3g s.", failure.error, len(tried) + 1, pause)
        return pause

    def _back_off(self, failure: MayPass, tried: int) -> float:
        asked = self.servers.asked_until() - self.clock()
        if asked > 0:
            return asked if asked <= LONGEST_RETRY_AFTER else math.inf
        if failure.again == "soon" and tried == 1:
            return 0.0
        bound: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (tried - 1))
        # Callers that failed together do not come back together; nor before a hiccup of a quarter of a second is over.
        return bound * (1 + self.jitter()) / 2
