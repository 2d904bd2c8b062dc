"""Servers, and both ways to call them; with short pauses."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rag_rerank import VLLMScorer
from rag_rerank.vllm import exchange
from tests.faulty_server import FaultyServer


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "FIRST_PAUSE", 0.01)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server


@pytest.fixture(params=["sync", "async"])
def score(request: pytest.FixtureRequest) -> Callable[..., list[float]]:
    """Both ways to ask for scores."""
    if request.param == "sync":
        return lambda scorer, *args, **options: scorer.score(*args, **options)

    async def ask(scorer: VLLMScorer, *args: Any, **options: Any) -> list[float]:
        async with scorer:
            return await scorer.ascore(*args, **options)

    return lambda *args, **options: asyncio.run(ask(*args, **options))


@pytest.fixture(scope="module")
def shared() -> Iterator[FaultyServer]:
    """One server for all examples of a property."""
    with FaultyServer() as server:
        yield server
