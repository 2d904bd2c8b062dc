"""Threads of one core each, and an engine that uses them."""

import threading
import time
from collections.abc import Sequence

import pytest
import torch

from rag_rerank import BackendError
from rag_rerank.local.engine.engine import Engine
from rag_rerank.local.engine.workers import Workers
from rag_rerank.local.hardware import one_core_each, use_one_core
from rag_rerank.local.models.model import Inputs
from rag_rerank.local.transformer.batching import Batching, TokenSequence, by_tokens

needs_cores = pytest.mark.skipif(torch.get_num_threads() < 2, reason="one core is all there is")


def in_a_thread(work):
    result = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join()
    return result[0]


def cores_used() -> float:
    """By a matrix product, of the processor's time against the clock's."""
    matrix = torch.ones(1500, 1500)
    matrix @ matrix
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(10):
        matrix @ matrix
    return (time.process_time() - processor) / (time.perf_counter() - clock)


class TestOneCore:
    """It is the calling thread's business alone."""

    @needs_cores
    def test_other_threads_keep_theirs(self):
        """Those that there are, and those that are started later."""
        before = torch.get_num_threads()
        assert in_a_thread(lambda: (use_one_core(), torch.get_num_threads())) == (True, 1)
        assert torch.get_num_threads() == before
        assert in_a_thread(torch.get_num_threads) == before

    def test_mkl_keeps_to_it(self):
        """It has a setting of its own, which torch.set_num_threads makes for all threads."""
        assert in_a_thread(lambda: (use_one_core(), cores_used())[1]) < 1.3

    @needs_cores
    def test_it_works_on_linux(self):
        """Where it doesn't, batches are run one after the other, by all cores."""
        assert one_core_each()


class TestWorkers:
    """A pool that ends in order."""

    def test_tasks_run_side_by_side_and_to_the_end(self):
        """Two wait for each other; closing waits for all."""
        workers, meeting, done = Workers(2, "test"), threading.Barrier(2), []
        for number in range(2):
            workers.submit(lambda number=number: (meeting.wait(10), done.append(number)))
        workers.submit(lambda: (time.sleep(0.05), done.append("last")))
        workers.close()
        assert set(done) == {0, 1, "last"}


class SideBySide:
    """Two batches at a time, which wait for each other; scores are lengths."""

    listwise = False

    def __init__(self) -> None:
        self.batching = Batching(10_000, parallel=2)
        self.score_type = self.transformer = self  # all in one
        self.threads: set[str] = set()
        self.together = 0
        self.last_batches: tuple[int, ...] = ()  # tokens of the two that were begun last
        self._changed, self._now = threading.Condition(), 0
        self.running, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def inputs(self, queries: list[str], documents: list[str], instruction: str | None = None) -> Inputs:
        return Inputs([TokenSequence([1] * len(text)) for text in documents], lambda outputs: outputs[:, 0].tolist())

    def batches(self, sequences: Sequence[TokenSequence], token_budget: int) -> list[list[int]]:
        return by_tokens([len(sequence.ids) for sequence in sequences], token_budget)

    def run(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        self.last_batches = (*self.last_batches[-1:], sum(len(sequence.ids) for sequence in sequences))
        with self._changed:
            self._now += 1
            self.together = max(self.together, self._now)
            self.threads.add(threading.current_thread().name)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.together > 1, timeout=1)
            self._now -= 1
        self.running.set()
        assert self.go_on.wait(10)
        if any(len(sequence.ids) == 13 for sequence in sequences):
            raise RuntimeError("unlucky")
        return torch.tensor([[float(len(sequence.ids))] for sequence in sequences])


class TestEngine:
    """Batches side by side."""

    @pytest.fixture
    def model(self) -> SideBySide:
        return SideBySide()

    @pytest.fixture
    def engine(self, model: SideBySide):
        engine = Engine(lambda: model, name="toy")
        yield engine
        engine.close()

    def test_one_call_is_split_between_the_cores(self, engine: Engine, model: SideBySide):
        """Though one batch would hold it: 40 documents of 100 tokens."""
        documents = [f"{number:0100d}" for number in range(40)]
        assert engine.submit(["q"], documents).result(10) == [100.0] * 40
        assert model.threads == {"rag_rerank toy 0", "rag_rerank toy 1"}
        assert model.together == 2

    def test_a_small_call_is_split_too(self, engine: Engine, model: SideBySide):
        """10 documents of 30 tokens: cores that share one batch would wait for each other at every operation."""
        assert engine.submit(["q"], [f"{number:030d}" for number in range(10)]).result(10) == [30.0] * 10
        assert model.threads == {"rag_rerank toy 0", "rag_rerank toy 1"}
        assert model.together == 2

    def test_a_few_short_documents_are_shared_out_evenly(self, engine: Engine, model: SideBySide):
        """6 of 20 tokens: half of them is a batch that takes little more than half the time."""
        assert engine.submit(["q"], [f"{number:020d}" for number in range(6)]).result(10) == [20.0] * 6
        assert model.last_batches == (60, 60)

    @pytest.mark.parametrize("count", [240, 257, 300, 512, 513])
    def test_the_cores_end_together(self, engine: Engine, model: SideBySide, count: int):
        """Also where the last documents are tokenised after the first: no core has more than a batch before the end."""
        assert engine.submit(["q"], [f"{number:020d}" for number in range(count)]).result(10) == [20.0] * count
        assert max(model.last_batches) <= 256 + 20

    def test_a_large_lone_batch_is_run_by_all_cores(self, engine: Engine, model: SideBySide):
        """In the engine's own thread, where torch has them all."""
        assert engine.submit(["q"], ["a" * 257]).result(10) == [257.0]
        assert model.threads == {"rag_rerank toy"}

    def test_a_small_lone_batch_is_run_by_one_core(self, engine: Engine, model: SideBySide):
        """It would hardly gain from more, and beside other processes lose."""
        assert engine.submit(["q"], ["a" * 256]).result(10) == [256.0]
        assert model.threads <= {"rag_rerank toy 0", "rag_rerank toy 1"}
        assert model.together == 1

    def test_an_error_costs_only_its_caller(self, engine: Engine):
        """Whoever shared its batch is run again."""
        calls = [engine.submit(["q"], [f"{number:0{length}d}" for number in range(20)]) for length in (300, 13, 299)]
        assert calls[0].result(10) == [300.0] * 20
        assert "unlucky" in str(calls[1].exception(10))
        assert calls[2].result(10) == [299.0] * 20

    def test_what_is_no_exception_costs_only_its_caller(self, engine: Engine, model: SideBySide, monkeypatch):
        """And its worker works on."""

        def exiting(sequences: Sequence[TokenSequence]) -> torch.Tensor:
            raise SystemExit(1)

        with monkeypatch.context() as patch:
            patch.setattr(model, "run", exiting)
            failed = [engine.submit(["q"], ["a"]).exception(10) for _ in range(3)]
        assert all(isinstance(error, BackendError) and isinstance(error.__cause__, SystemExit) for error in failed)
        assert engine.submit(["q"], ["aa"]).result(10) == [2.0]

    def test_closing_ends_the_workers(self, model: SideBySide):
        """What they have begun is finished, what waits fails."""
        engine = Engine(lambda: model, name="ending")
        model.go_on.clear()
        call = engine.submit(["q"], [f"{number:0900d}" for number in range(400)])
        assert model.running.wait(10)
        threading.Timer(0.1, model.go_on.set).start()
        engine.close()
        assert "closed" in str(call.exception(10))
        assert not [thread for thread in threading.enumerate() if "ending" in thread.name]
