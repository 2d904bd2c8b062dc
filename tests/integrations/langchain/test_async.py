"""Event loops and threads."""

import asyncio
import copy
import shutil
import threading
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest

from langchain_rag_rerank import LocalReranker, ScorerReranker
from tests.integrations.langchain.common import QUERY, KeywordScorer, NativeScorer, found, numbers


class NoThreads(ThreadPoolExecutor):
    """A loop's default executor that nobody may use."""

    def submit(self, *given: object, **options: object):
        raise AssertionError("a thread of the pool was asked for")


def engines(folder: Path) -> int:
    """How many threads run this model."""
    return sum(thread.name == f"rag_rerank {folder}" for thread in threading.enumerate())


def test_async_calls_need_no_thread():
    """An async call awaits the scorer itself instead of sending the sync call to a thread pool."""
    reranker = ScorerReranker(scorer=NativeScorer())
    assert numbers(asyncio.run(reranker.acompress_documents(found(), QUERY))) == [1, 3, 2]


def test_async_calls_leave_the_loops_threads_alone(in_process):
    """LocalReranker's model has a thread of its own."""

    async def ask(executor: Executor) -> list[list[int]]:
        asyncio.get_running_loop().set_default_executor(executor)
        calls = [
            in_process.acompress_documents(found(), QUERY),
            in_process.ainvoke({"query": QUERY, "documents": found()}),
            in_process.arerank(found(), QUERY),
            in_process.abatch([{"query": QUERY, "documents": found()}] * 3),
        ]
        return [await call for call in calls]

    assert all(asyncio.run(ask(NoThreads())))


def test_one_reranker_outlives_its_event_loops(in_process):
    """Scripts and notebooks call asyncio.run again and again with the same reranker."""
    first, second = (asyncio.run(in_process.acompress_documents(found(), QUERY)) for _ in range(2))
    assert first == second


def test_threads_with_loops_of_their_own_share_it(in_process):
    """As servers with several workers do."""
    expected = numbers(in_process.compress_documents(found(), QUERY))
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(lambda: asyncio.run(in_process.acompress_documents(found(), QUERY))) for _ in range(8)]
    assert all(numbers(call.result()) == expected for call in calls)


def test_sync_calls_work_inside_a_running_loop(in_process):
    """As in a notebook's cell."""

    async def cell() -> list[int]:
        return numbers(in_process.compress_documents(found(), QUERY))

    assert asyncio.run(cell()) == numbers(in_process.compress_documents(found(), QUERY))


def test_a_cancelled_call_leaves_it_usable():
    """Whoever waited is told, and the next call works; under passthrough, too."""

    class Slow(KeywordScorer):
        async def _ascore(self, queries, documents, until):
            self.calls += 1
            await asyncio.sleep(60 if self.calls == 1 else 0)
            return [1.0] * len(documents)

    async def cancel(reranker: ScorerReranker) -> list[int]:
        call = asyncio.create_task(reranker.acompress_documents(found(), QUERY))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        return numbers(await reranker.acompress_documents(found(), QUERY))

    for on_error in ("raise", "passthrough"):
        assert asyncio.run(cancel(ScorerReranker(scorer=Slow(), on_error=on_error))) == [0, 1, 2]


def test_first_calls_at_the_same_time_load_one_model(cross_encoder: Path, tmp_path: Path):
    """From threads, loops and copies alike."""
    model = shutil.copytree(cross_encoder, tmp_path / "model")
    with LocalReranker(model=model, dtype="float32") as reranker:
        twins = [reranker, copy.copy(reranker), copy.deepcopy(reranker), reranker.model_copy()]
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(twin.compress_documents, found(), QUERY) for twin in twins]
            calls += [pool.submit(lambda t=twin: asyncio.run(t.acompress_documents(found(), QUERY))) for twin in twins]
        assert len({tuple(numbers(call.result())) for call in calls}) == 1
        assert engines(model) == 1


def test_warmup_loads_the_model_before_the_first_call(cross_encoder: Path, tmp_path: Path):
    """In the thread that the calls use."""
    model = shutil.copytree(cross_encoder, tmp_path / "model")
    with LocalReranker(model=model, dtype="float32") as reranker:
        reranker.warmup()
        assert engines(model) == 1
        reranker.compress_documents(found(), QUERY)
        assert engines(model) == 1
