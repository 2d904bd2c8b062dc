"""One server under examination, and the ways to ask it something."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rag_rerank.errors import BackendUnavailable, BadReply
from rag_rerank.families import Family, find_family
from rag_rerank.vllm.client import Answer, Client, Failure, Keys, Reply, Request, ServerFacts, Servers, Transport


class CheckedServer:
    """A server, asked with a scorer's settings and over its connections; the scorer's client is left as it is."""

    def __init__(self, client: Client, position: int) -> None:
        endpoint = client.servers.endpoints[position]
        self.client = replace(client, servers=Servers([endpoint]))  # the same for this server alone
        self.label = endpoint.label
        self.facts = ServerFacts(None, client.model or "")  # what is known so far
        self.program: str | None = None  # what answers, where it is known and not vLLM

    @property
    def family(self) -> Family | None:
        """The family of the model that it serves, by the name of its checkpoint, else by the served name."""
        return find_family(self.facts.checkpoint or "") or find_family(self.facts.model)

    @property
    def told(self) -> ServerFacts:
        """What it has told while it was scoring; before that, what is known of it."""
        return self.client.servers.facts or self.facts

    def send_without_key(self, request: Request) -> Reply | Failure:
        """Send one request without the scorer's key, and take whatever comes."""
        transport = Transport(self.client.servers.endpoints, Keys(self.client.servers.endpoints, ""))
        try:
            return replace(self.client, transport=transport).send(request)
        finally:
            transport.close()

    def get(self, path: str) -> Reply:
        """Get a path, whatever the status; BackendUnavailable where there was no answer."""
        outcome = self.client.send(Request("GET", path))
        if isinstance(outcome, Failure):
            raise BackendUnavailable(outcome.text, endpoint=self.label, remedy="See the server's log.")
        return outcome

    def ask(self) -> Answer:
        """Get "a" and "a" scored as they are, with the scorer's retries; raises as `Scorer.score`."""
        return self.client.ask(self._until())

    def score(
        self, queries: str | Sequence[str], documents: Sequence[str], *, together: int = 1, **changed: Any
    ) -> list[float]:
        """Score as for the scorer's users, with options `changed`; at least so many `together` in one request."""
        rules = replace(self.client.rules, chunk_size=max(self.client.rules.chunk_size, together))
        options = replace(self.client.options, **changed)
        client, until = replace(self.client, rules=rules, options=options), self._until()
        queries = [queries] if isinstance(queries, str) else queries
        scores = client.transport.run(client.call(queries, documents, until), until)
        if not all(map(math.isfinite, scores)):
            raise BadReply("a document got a score that is not finite", endpoint=self.label)
        return scores

    def _until(self) -> float:
        return time.monotonic() + self.client.timeout
