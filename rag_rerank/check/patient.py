"""One server under examination, and the ways to ask it something.

The only module of the examination that knows what `VLLMScorer` looks like inside.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from rag_rerank.errors import BackendUnavailable
from rag_rerank.families import Family, find_family
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.exchange import Exchange
from rag_rerank.vllm.nodes import Nodes
from rag_rerank.vllm.policy import API
from rag_rerank.vllm.scorer import VLLMScorer
from rag_rerank.vllm.steps import Failure, Send, Steps
from rag_rerank.vllm.transport import Transport
from rag_rerank.vllm.wire import (
    Answer,
    Options,
    Reply,
    Request,
    Server,
    read_relevance_scores,
    read_scores,
    rerank_request,
    score_request,
)


class Patient:
    """A server, asked with a scorer's settings and over its connections.

    Args:
        scorer: Whose settings. It is left as it is; closing it ends the examination.
        endpoint: One of its servers.

    Attributes:
        label: The server's ``host:port``.
        server: What is known of it so far; its model is ``""`` until it is known.
        model: The name that the scorer was given, if it was.
        api, options: What the scorer asks, and what it says beside queries and documents.
        has_key: Whether it sends a key.
        renders: Whether it renders a template itself.
        timeout: Seconds that a call may take.
    """

    def __init__(self, scorer: VLLMScorer, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.label = endpoint.label
        self.model = scorer._model
        self.server = Server(None, self.model or "")
        self.api: API = scorer._api
        self.options: Options = scorer._options
        self.has_key = scorer._transport.has_key
        self.renders = scorer._template is not None
        self.timeout = scorer._default_deadline or 30.0
        self._scorer = _variant(scorer, _nodes=Nodes([endpoint]))

    @property
    def family(self) -> Family | None:
        """The family of the model that it serves, by the name of its checkpoint, else by the served name."""
        return find_family(self.server.checkpoint or "") or find_family(self.server.model)

    def send(self, request: Request, *, keyless: bool = False) -> Reply | Failure:
        """Send one request, once, and take whatever comes; `keyless` without the scorer's key."""
        transport = Transport(None) if keyless else self._scorer._transport
        connect_timeout = min(self._scorer._rules.connect_timeout, self.timeout)
        try:
            return transport.run(_once(Send(self.endpoint, request, self.timeout, connect_timeout, lambda _: True)))
        finally:
            if keyless:
                transport.close()

    def get(self, path: str) -> Reply:
        """The answer to a GET, whatever its status.

        Raises:
            BackendUnavailable: There was none.
        """
        outcome = self.send(Request("GET", path))
        if isinstance(outcome, Failure):
            raise BackendUnavailable(outcome.text, endpoint=self.label, remedy="See the server's log.")
        return outcome

    def request(self, query: str, document: str, request_id: str | None = None, api: API | None = None) -> Request:
        """A request for one score, with the two texts as they are; by the scorer's API or another.

        Raises:
            ConfigError: The server is too old for one of the scorer's options.
        """
        if (api or self.api) == "rerank":
            return rerank_request(self.server, query, [document], self.options, request_id)
        return score_request(self.server, [query], [document], self.options, request_id)

    def read(self, body: bytes) -> Answer:
        """The answer to such a request; raises BadReply."""
        return read_relevance_scores(body, [0]) if self.api == "rerank" else read_scores(body, [0])

    def ask(self, query: str, document: str) -> Answer:
        """One answer to such a request, with the scorer's patience.

        Raises:
            BackendError, ConfigError: As its `score`.
        """
        exchange = Exchange(
            self._scorer._nodes, self._scorer._rules, until=time.monotonic() + self.timeout, model=self.model
        )
        return self._scorer._transport.run(
            exchange.ask(lambda _, request_id: self.request(query, document, request_id), self.read)
        )

    def has_api(self, api: API) -> bool:
        """Whether the server has that API, whatever the scorer asks."""
        outcome = self.send(self.request("a", "a", api=api))
        return isinstance(outcome, Reply) and outcome.status == 200

    def score(
        self, queries: str | Sequence[str], documents: str | Sequence[str], *, logits: bool = False, together: int = 1
    ) -> list[float]:
        """Scores as the scorer's users get them.

        Args:
            queries: See `Scorer.score`.
            documents: See `Scorer.score`.
            logits: With ``use_activation=False`` instead of what the scorer says.
            together: How many documents must go in one request at least, if there are that many.

        Raises:
            BackendError, ConfigError: As there.
        """
        rules = self._scorer._rules
        scorer = _variant(
            self._scorer,
            _options=replace(self.options, use_activation=False) if logits else self.options,
            _rules=replace(rules, chunk_size=max(rules.chunk_size, together)),
        )
        return scorer.score(queries, documents)

    @property
    def told(self) -> Server | None:
        """What it told while it was scoring."""
        return self._scorer._nodes.known


def _variant(scorer: VLLMScorer, **changed: object) -> VLLMScorer:
    """The same scorer, over the same connections, but for some attributes. Not to be closed."""
    variant = object.__new__(VLLMScorer)
    vars(variant).update(vars(scorer), **changed)
    return variant


def _once(send: Send) -> Steps[Reply | Failure]:
    outcome: Reply | Failure = yield send
    return outcome
