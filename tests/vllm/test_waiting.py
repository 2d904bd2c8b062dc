"""max_waiting_calls: how many calls of a process may be unfinished, and what becomes of those that come after."""

import asyncio
import multiprocessing
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rag_rerank import BackendUnavailable, ConfigError, DeadlineExceeded, VLLMScorer
from tests.faulty_server import HANG, FaultyServer, Request, Steps, on_scores, oracle, right

EXACT = [oracle("q", "a")]


def count_to_one_in_a_child(scorer: VLLMScorer) -> None:
    assert scorer.score("q", ["a"]) == EXACT


@pytest.mark.parametrize("limit", [1, 3])
def test_one_too_many_is_refused_at_once(limit: int):
    """With nothing sent; those before it are answered."""
    arrived: list[Request] = []
    refused_ones: list[object] = []

    def slow(request: Request) -> Steps:
        arrived.append(request)
        while len(refused_ones) < 2:
            yield 0.01
        yield from right(request)

    async def calls(scorer: VLLMScorer) -> list[object]:
        waiting = [asyncio.ensure_future(scorer.ascore("q", ["a"])) for _ in range(limit)]
        await asyncio.sleep(0)  # they begin
        refused_ones.extend(
            await asyncio.gather(*(scorer.ascore("q", ["a"]) for _ in range(2)), return_exceptions=True)
        )
        return [*await asyncio.gather(*waiting), *refused_ones]

    with FaultyServer(on_scores(slow)) as server, VLLMScorer(server.base_url, max_waiting_calls=limit) as scorer:
        *answered, first, second = asyncio.run(calls(scorer))
        assert answered == [EXACT] * limit
        for refused in (first, second):
            assert isinstance(refused, BackendUnavailable)
            assert f"{limit} calls waiting already" in str(refused)
            assert "max_waiting_calls" in str(refused.remedy)
        assert len(arrived) == limit
        assert scorer.score("q", ["a"]) == EXACT  # and there is room again


def test_threads_are_counted_too():
    """Of eight at once, two are answered and six refused."""
    together = threading.Barrier(8)
    refused: list[int] = []

    def call(scorer: VLLMScorer) -> list[float]:
        together.wait()
        try:
            return scorer.score("q", ["a"])
        except BackendUnavailable:
            refused.append(1)
            raise

    def slow(request: Request) -> Steps:
        while len(refused) < 6:
            yield 0.01
        yield from right(request)

    with (
        FaultyServer(on_scores(slow)) as server,
        VLLMScorer(server.base_url, max_waiting_calls=2) as scorer,
        ThreadPoolExecutor(8) as pool,
    ):
        futures = [pool.submit(call, scorer) for _ in range(8)]
        errors = [future.exception() for future in futures]
    assert errors.count(None) == 2
    assert all(isinstance(error, BackendUnavailable) for error in errors if error is not None)


def test_failed_and_cancelled_calls_make_room():
    """Nobody waits for them any more."""

    async def cancelled(scorer: VLLMScorer) -> None:
        task = asyncio.create_task(scorer.ascore("q", ["a"]))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with (
        FaultyServer(on_scores(lambda request: [HANG])) as server,
        VLLMScorer(server.base_url, max_waiting_calls=1) as scorer,
    ):
        with pytest.raises(DeadlineExceeded):
            scorer.score("q", ["a"], deadline=0.2)
        asyncio.run(cancelled(scorer))
        server.behave = lambda request: None
        assert scorer.score("q", ["a"]) == EXACT


def test_a_forked_child_and_a_copy_begin_with_none():
    """What is under way here is not under way there."""
    over = threading.Event()

    def wait(request: Request) -> Steps:
        while not over.is_set():
            yield 0.01
        yield from right(request)

    with (
        FaultyServer(on_scores(wait, times=1)) as server,
        VLLMScorer(server.base_url, max_waiting_calls=1) as scorer,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(scorer.score, "q", ["a"])
        while not server.score_requests:
            pass
        child = multiprocessing.get_context("fork").Process(target=count_to_one_in_a_child, args=(scorer,), daemon=True)
        child.start()
        with pickle.loads(pickle.dumps(scorer)) as copy:  # noqa: S301
            assert copy.score("q", ["a"]) == EXACT
        child.join(30)
        assert child.exitcode == 0
        over.set()
        assert waiting.result(10) == EXACT


@pytest.mark.parametrize("limit", [0, -1])
def test_none_at_all_is_refused(limit: int):
    """When it is written down."""
    with pytest.raises(ConfigError, match="max_waiting_calls"):
        VLLMScorer(max_waiting_calls=limit)
