"""The servers of one scorer: which is asked next, and what is known about each."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from rag_rerank.backoff import BackOff
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.wire import ServerFacts


class Server:
    """One server, and what is known about it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.back_off = BackOff()
        self.facts: ServerFacts | None = None  # None before it was asked, and after it was gone
        self.echoes_ids = False  # whether it has given a request's id back

    def failed(self, *, gone: bool) -> None:
        """Note that it did not answer; if it is gone, it may come back as another."""
        self.back_off.failed()
        if gone:
            self.facts, self.echoes_ids = None, False


class Servers:
    """Several servers of the same model, asked in turn; those that do not answer rest for 1, 2, 4 ... 30 s.

    Nothing here is locked: what threads may lose in a race is a turn, and a lock that another thread holds at a fork
    would never be released in the child. A pickle carries addresses only.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = tuple(endpoints)
        self.down = False  # a request has failed in all its tries, and none was answered since: then each gets one try
        self._servers = [Server(endpoint) for endpoint in endpoints]
        self._turn = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Servers, (self.endpoints,)

    def __len__(self) -> int:
        return len(self._servers)

    def choose(self, tried: Collection[Server], avoid: Collection[Server] = (), *, takes_turn: bool = True) -> Server:
        """Choose the next in turn that answers as far as is known, and one that was not tried yet if there is one.

        If all rest, it is the one whose rest ends first: one that is thought to be down may be up again, and nobody
        else is there to ask. Those to avoid are chosen where there is no other. A small request takes no turn, or of
        two servers one would get all small requests and the other all large ones.
        """
        start = self._turn % len(self._servers)
        self._turn += takes_turn
        turn = self._servers[start:] + self._servers[:start]
        turn = [server for server in turn if server not in avoid] or turn
        for server in turn:
            if server not in tried and server.back_off.claim():
                return server
        return min(turn, key=lambda server: (server.back_off.resting, server in tried, server.back_off.rest_ends))

    def others_answer(self, tried: Collection[Server]) -> bool:
        """Tell whether there is another server that is not resting."""
        return any(server not in tried and not server.back_off.resting for server in self._servers)

    def forget(self) -> None:
        """Have all servers asked again who they are."""
        for server in self._servers:
            server.facts = None

    def remember(self, **learned: Any) -> None:
        """Note of every server that is known what was learned of one: they are started alike."""
        for server in self._servers:
            if server.facts is not None:
                server.facts = replace(server.facts, **learned)

    @property
    def facts(self) -> ServerFacts | None:
        """What one of them told about itself."""
        return next((server.facts for server in self._servers if server.facts is not None), None)

    @property
    def label(self) -> str:
        """All of them, for errors that concern no single one."""
        return ", ".join(endpoint.label for endpoint in self.endpoints)
