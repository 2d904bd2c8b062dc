"""Servers, scorers, and both ways to call them; with short pauses."""

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from rag_rerank import (
    Scorer,
    VLLMScorer,
    backoff,
)
from rag_rerank.vllm import exchange
from tests.faulty_server import (
    FaultyServer,
)
from tests.vllm.faults.common import (
    DOCUMENTS,
    PAUSES,
    QUERY,
    REST,
    Connect,
    Score,
    Serve,
)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "FIRST_PAUSE", PAUSES / 3)  # the second is twice as long
    monkeypatch.setattr(backoff, "FIRST_REST", REST)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts servers."""
    with contextlib.ExitStack() as servers:
        yield lambda *arguments, **options: servers.enter_context(FaultyServer(*arguments, **options))


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes scorers for servers or addresses."""
    with contextlib.ExitStack() as scorers:

        def make(*servers: FaultyServer | str, **settings) -> VLLMScorer:
            urls = [server if isinstance(server, str) else server.base_url for server in servers]
            usual = {"timeout": 60.0, "connect_timeout": 1.0, "chunk_size": 32, "max_concurrency": 4}
            return scorers.enter_context(VLLMScorer(urls, **usual | settings))

        yield make


@pytest.fixture(params=["sync", "async"])
def score(request: pytest.FixtureRequest) -> Iterator[Score]:
    """`score` and `ascore`, the latter in one event loop for the test."""
    if request.param == "sync":

        def run(scorer: Scorer, documents=DOCUMENTS, queries=QUERY, **options) -> list[float]:
            return scorer.score(queries, documents, **options)

        yield run
    else:
        with asyncio.Runner() as runner:

            def run(scorer: Scorer, documents=DOCUMENTS, queries=QUERY, **options) -> list[float]:
                return runner.run(scorer.ascore(queries, documents, **options))

            yield run
