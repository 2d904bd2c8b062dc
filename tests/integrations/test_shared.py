"""One scorer for both frameworks at once: one loaded model, the same scores, and event loops that go on."""

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

import langchain_rag_rerank as langchain
import llama_index.postprocessor.rag_rerank as llama_index
from rag_rerank import LocalScorer
from tests.models import CORPUS

QUERY = "why are python strings immutable"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Real ones, some of them several times: ties."""
    documents = [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()[::30]]
    return documents + documents[:5]


@pytest.fixture(scope="module")
def scorer(cross_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalScorer]:
    """One model, under a name of its own."""
    folder = tmp_path_factory.mktemp("models") / "shared"
    folder.symlink_to(cross_encoder)
    with LocalScorer(folder, dtype="float32") as scorer:
        yield scorer


class Both:
    """A reranker of each framework over one scorer."""

    def __init__(self, scorer: LocalScorer, texts: list[str]) -> None:
        self.of_langchain = langchain.ScorerReranker(scorer=scorer, top_n=None)
        self.of_llama_index = llama_index.ScorerReranker(scorer=scorer, top_n=None)
        self.documents = [Document(text, metadata={"n": n}) for n, text in enumerate(texts)]
        self.nodes = [NodeWithScore(node=TextNode(text=text, id_=str(n))) for n, text in enumerate(texts)]

    async def ask_langchain(self) -> list[tuple[int, float]]:
        results = await self.of_langchain.acompress_documents(self.documents, QUERY)
        return [(result.metadata["n"], result.metadata["relevance_score"]) for result in results]

    async def ask_llama_index(self) -> list[tuple[int, float]]:
        results = await self.of_llama_index.apostprocess_nodes(self.nodes, query_str=QUERY)
        return [(int(result.node.node_id), result.score) for result in results]


def test_both_frameworks_give_the_same_scores_at_the_same_time(scorer: LocalScorer, texts: list[str]):
    """In one event loop, in the same order, and with one thread that runs the model."""
    both = Both(scorer, texts)
    expected = [(place.index, place.score) for place in scorer.rerank(QUERY, texts)]

    async def ask() -> list[list[tuple[int, float]]]:
        return await asyncio.gather(*(call() for _ in range(4) for call in (both.ask_langchain, both.ask_llama_index)))

    for results in asyncio.run(ask()):
        assert [n for n, _ in results] == [n for n, _ in expected]
        assert [score for _, score in results] == pytest.approx([score for _, score in expected], abs=1e-6)
    assert [thread.name for thread in threading.enumerate()].count(f"rag_rerank {scorer.model_name}") == 1


def test_fifty_calls_at_once_do_not_stall_the_event_loop(scorer: LocalScorer, texts: list[str]):
    """Another task's heart goes on beating: nothing is computed and nothing waited for in the loop itself."""
    both = Both(scorer, texts)

    async def beat(beats: list[float]) -> None:
        while True:
            beats.append(time.perf_counter())
            await asyncio.sleep(0.005)

    async def ask() -> tuple[list[float], float]:
        await both.ask_langchain()  # the model is loaded
        beats: list[float] = []
        heart = asyncio.create_task(beat(beats))
        began = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(25) for call in (both.ask_langchain, both.ask_llama_index)))
        took = time.perf_counter() - began
        heart.cancel()
        return beats, took

    beats, took = asyncio.run(ask())
    longest = max(after - before for before, after in itertools.pairwise(beats))
    assert longest < took / 3, "20 to 80 ms of 1.4 to 3.4 s, where this was written"
