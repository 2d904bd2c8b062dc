"""The servers of one scorer: which is asked next, and what is known about each."""

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rag_rerank.backoff import BackOff
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.wire import Answer, ServerFacts

logger = logging.getLogger("rag_rerank.vllm")

LONGEST_ASKED_REST = 120.0  # seconds that a call waits, and a server rests, where it asks for it (Retry-After)


@dataclass(eq=False)
class Server:
    """One server, and what is known about it."""

    endpoint: Endpoint
    back_off: BackOff = field(default_factory=BackOff)
    asked_until: float = -math.inf  # until when it asked to be left alone (Retry-After)
    answered: float = -math.inf  # when it last gave scores
    answered_sent: float = -math.inf  # when the latest of these requests was sent
    facts: ServerFacts | None = None  # None before it was asked, and after it was gone
    asked_at: float = -math.inf  # when that was
    is_connected: Callable[[], bool] | None = None  # whether it has left open over what it answered last
    echoes_ids: bool = False  # whether it has given a request's id back
    asking: asyncio.Future[Answer | None] | None = None  # for the letters in its facts, if a call is at that now

    @property
    def label(self) -> str:
        """How errors name it."""
        return self.endpoint.label

    def failed(self, began: float, *, gone: bool = False) -> None:
        """Note that a request of that moment was not answered; if the server is gone, it may come back as another."""
        before = self.back_off.rest_ends
        self.back_off.failed(began)
        if self.back_off.rest_ends != before:
            logger.info("%s rests: it does not answer, or not rightly", self.label)
        if gone:
            self.facts, self.echoes_ids = None, False

    def asked(self, seconds: float, now: float) -> None:
        """Note that it asked to be left alone."""
        self.asked_until = now + seconds
        self.back_off.asked(min(seconds, LONGEST_ASKED_REST))
        logger.info("%s asks to be left alone for %.3g s", self.label, seconds)

    def worked(self) -> None:
        """Note that it answered."""
        self.back_off.worked()
        self.asked_until = -math.inf

    def gave_scores(self, sent: float, now: float) -> None:
        """Note that it gave the scores for a request of that moment."""
        self.answered, self.answered_sent = now, max(sent, self.answered_sent)

    def works_off(self, sent: float, share: float, now: float) -> bool:
        """Tell whether a request that it has had for so long waits its turn, as it seems.

        It does where the server has given scores to others within that time, but to none that came much later.
        """
        return self.answered > now - share and self.answered_sent < sent + share / 2


class Servers:
    """Several servers of the same model, asked in turn; those that do not answer rest for 1, 2, 4 ... 30 s.

    Nothing here is locked: what threads may lose in a race is a turn, and a lock that another thread holds at a fork
    would never be released in the child. A pickle carries addresses only.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = tuple(endpoints)
        self.label = ", ".join(endpoint.label for endpoint in endpoints)  # for errors that concern no single one
        self.down = False  # a request has failed in all its tries, and none was answered since: then each gets one try
        self._servers = [Server(endpoint) for endpoint in endpoints]
        self._turn = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Servers, (self.endpoints,)

    def __len__(self) -> int:
        return len(self._servers)

    def choose(self, tried: Collection[Server], busy: Collection[Server] = (), *, takes_turn: bool = True) -> Server:
        """Choose the next in turn that answers as far as is known, and one that was not tried yet if there is one.

        If all rest, it is the one whose rest ends first: one that is thought to be down may be up again, and nobody
        else is there to ask. Those that are busy with the request are chosen last. A small request takes no turn, or of
        two servers one would get all small requests and the other all large ones.
        """
        start = self._turn % len(self._servers)
        self._turn += takes_turn
        turn = self._servers[start:] + self._servers[:start]
        turn = [server for server in turn if server not in busy] or turn
        for server in turn:
            if server not in tried and server.back_off.claim():
                return server
        return min(turn, key=lambda server: (server.back_off.resting, server in tried, server.back_off.rest_ends))

    def others_answer(self, tried: Collection[Server]) -> bool:
        """Tell whether there is another server that is not resting."""
        return any(server not in tried and not server.back_off.resting for server in self._servers)

    def asked_until(self) -> float:
        """Tell when the first of them may be asked again, by what they asked for (Retry-After)."""
        return min(server.asked_until for server in self._servers)

    def forget(self, oldest: float = math.inf) -> None:
        """Have those asked again that told who they are before that moment, or closed what they answered over."""
        for server in self._servers:
            if server.asked_at < oldest or (server.is_connected is not None and not server.is_connected()):
                server.facts = None

    def remember(self, **learned: Any) -> None:
        """Note of every server that is known what was learned of one: they are started alike."""
        for server in self._servers:
            if server.facts is not None:
                server.facts = replace(server.facts, **learned)

    def facts_beside(self, asked: Server | None) -> ServerFacts | None:
        """Give what one told about itself, another one than that."""
        return next((each.facts for each in self._servers if each is not asked and each.facts is not None), None)

    def letters_beside(self, asked: Server, since: float) -> Answer | None:
        """Give another one's answer to two letters, if it has told since that moment who it is."""
        others = (each for each in self._servers if each is not asked and each.facts and each.asked_at >= since)
        return next((each.facts.letters for each in others if each.facts and each.facts.letters), None)

    @property
    def facts(self) -> ServerFacts | None:
        """What one of them told about itself."""
        return self.facts_beside(None)
