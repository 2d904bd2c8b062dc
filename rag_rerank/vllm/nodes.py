"""The servers of one scorer: which is asked next, and what is known about each."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from rag_rerank.backoff import BackOff
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.wire import Server

DOWN = 3
"""Failures in a row from which a server counts as down, not as having stumbled: it then gets one try per request."""


class Node:
    """One server.

    Attributes:
        endpoint: Its address.
        back_off: Whether it answers.
        server: What it told about itself; None before it was asked, and after it was gone.
        echoes_ids: Whether it has been seen to give a request's id back.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.back_off = BackOff()
        self.server: Server | None = None
        self.echoes_ids = False

    def failed(self, *, gone: bool) -> None:
        """It did not answer; if it is gone, it may come back as another."""
        self.back_off.failed()
        if gone:
            self.server = None
            self.echoes_ids = False


class Nodes:
    """Several servers of the same model, asked in turn; those that do not answer rest for 1, 2, 4 ... 30 s.

    Nothing here is locked: what threads may lose in a race is a count or a turn, and a lock that another thread holds
    at a fork would never be released in the child.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._nodes = [Node(endpoint) for endpoint in endpoints]
        self._turn = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def choose(self, tried: Collection[Node], avoid: Collection[Node] = (), *, aside: bool = False) -> Node:
        """The next in turn that answers as far as is known, and one that was not tried yet if there is one.

        If all rest, it is the one whose rest ends first: one that is thought to be down may be up again, and nobody
        else is there to ask.

        Args:
            tried: Those that were asked already.
            avoid: Those that are not to be asked as long as there is another one.
            aside: Take nobody's turn: or of two servers one would get all small requests and the other all large ones.
        """
        start = self._turn % len(self._nodes)
        self._turn += not aside
        turn = self._nodes[start:] + self._nodes[:start]
        turn = [node for node in turn if node not in avoid] or turn
        for node in turn:
            if node not in tried and node.back_off.claim():
                return node
        return min(turn, key=lambda node: (node.back_off.resting, node in tried, node.back_off.rest_ends))

    def others_answer(self, tried: Collection[Node]) -> bool:
        """Whether there is another server that is not resting."""
        return any(node not in tried and not node.back_off.resting for node in self._nodes)

    def remember(self, *, templated: bool) -> None:
        """Note of every server that is known whether it puts pairs into a template: they are started alike."""
        for node in self._nodes:
            if node.server is not None:
                node.server = replace(node.server, templated=templated)

    @property
    def down(self) -> bool:
        """Whether none of them has answered lately."""
        return all(node.back_off.failures >= DOWN for node in self._nodes)

    @property
    def known(self) -> Server | None:
        """What one of them told about itself."""
        return next((node.server for node in self._nodes if node.server is not None), None)

    @property
    def label(self) -> str:
        """All of them, for errors that concern no single one."""
        return ", ".join(node.endpoint.label for node in self._nodes)
