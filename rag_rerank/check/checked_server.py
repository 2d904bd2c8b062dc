"""One server under examination, and the ways to ask it something."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rag_rerank.errors import BackendUnavailable, BadReply, RerankError
from rag_rerank.families import Family, find_family
from rag_rerank.vllm.client import Client
from rag_rerank.vllm.exchange import Send
from rag_rerank.vllm.keys import Keys
from rag_rerank.vllm.servers import Servers
from rag_rerank.vllm.transport import Transport
from rag_rerank.vllm.wire import Answer, Failure, Reply, Request, ServerFacts, read_answer, scoring_request


class CheckedServer:
    """A server, asked with a scorer's settings and over its connections; the scorer's client is left as it is."""

    def __init__(self, client: Client, position: int) -> None:
        endpoint = client.servers.endpoints[position]
        self.client = replace(client, servers=Servers([endpoint]))  # the same for this server alone
        self.label = endpoint.label
        # What is known so far.
        self.facts = ServerFacts(None, client.rules.model or "", form=endpoint.forms(client.rules.api)[0])
        self.program: str | None = None  # what answers, where it is known and not vLLM

    @property
    def family(self) -> Family | None:
        """The family of the model that it serves, by the name of its checkpoint, else by the served name."""
        return find_family(self.facts.checkpoint or "") or find_family(self.facts.model)

    @property
    def told(self) -> ServerFacts:
        """What it has told while it was scoring; before that, what is known of it."""
        return self.client.servers.facts or self.facts

    def send(self, request: Request, *, without_key: bool = False) -> Reply | Failure:
        """Send one request, once, and take whatever comes."""
        client, endpoints = self.client, self.client.servers.endpoints
        connect = min(client.rules.connect_timeout, client.timeout)
        send = Send(endpoints[0], request, client.timeout, connect, lambda _: True)
        transport = Transport(endpoints, Keys(endpoints, "")) if without_key else client.transport
        try:
            return transport.run(transport.send(send))
        finally:
            if without_key:
                transport.close()

    def get(self, path: str) -> Reply:
        """Get a path, whatever the status; BackendUnavailable where there was no answer."""
        outcome = self.send(Request("GET", path))
        if isinstance(outcome, Failure):
            raise BackendUnavailable(outcome.text, endpoint=self.label, remedy="See the server's log.")
        return outcome

    def ask(self) -> Answer:
        """Get "a" and "a" scored as they are, with the scorer's retries; raises as `Scorer.score`."""
        until = self._until()
        return self.client.transport.run(self.client.exchange(until).ask(self._request, self.read), until)

    def request(self, request_id: str) -> Request:
        """Make the request of `ask`, for `send`."""
        return self._request(self.told, request_id)

    def read(self, body: bytes) -> Answer:
        """Read the answer to such a request; raises BadReply."""
        return read_answer(self.told.form.api, body, [0])

    def _request(self, facts: ServerFacts, request_id: str) -> Request:
        return scoring_request(facts, ["a"], ["a"], self.client.options, request_id)

    def score(
        self, queries: str | Sequence[str], documents: Sequence[str], *, together: int = 1, **changed: Any
    ) -> list[float]:
        """Score as for the scorer's users, with options `changed`; at least so many `together` in one request."""
        rules = replace(self.client.rules, chunk_size=max(self.client.rules.chunk_size, together))
        options = replace(self.client.options, **changed)
        client, until = replace(self.client, rules=rules, options=options), self._until()
        queries = [queries] if isinstance(queries, str) else queries
        outcomes = client.transport.run(client.call(queries, documents, until), until)
        scores = [outcome for outcome in outcomes if isinstance(outcome, float)]
        for error in outcomes:
            if isinstance(error, RerankError):
                raise error
        if not all(map(math.isfinite, scores)):
            raise BadReply("a document got a score that is not finite", endpoint=self.label)
        return scores

    def _until(self) -> float:
        return time.monotonic() + self.client.timeout
