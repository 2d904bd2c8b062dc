"""Batches and the thread that runs them, with a model of a few lines."""

import gc
import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rag_rerank import BackendError, ConfigError, RerankError
from rag_rerank.local.engine.calls import PART
from rag_rerank.local.engine.engine import Engine
from rag_rerank.local.models.model import Inputs
from rag_rerank.local.transformer.batching import Batching, TokenSequence, by_tokens
from rag_rerank.local.transformer.batching import by_length as batches


class Lengths:
    """A model that scores a document by its length; keeps what it was asked to run."""

    listwise = False

    def __init__(self, token_budget: int = 10) -> None:
        self.batching = Batching(token_budget)
        self.score_type = self.transformer = self  # all in one
        self.ran: list[list[int]] = []
        self.running, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def inputs(self, queries: list[str], documents: list[str], instruction: str | None = None) -> Inputs:
        if "unreadable" in documents:
            raise KeyError("no such token")
        return Inputs([TokenSequence([1] * len(text)) for text in documents], lambda outputs: outputs[:, 0].tolist())

    def batches(self, sequences: Sequence[TokenSequence], token_budget: int) -> list[list[int]]:
        return batches([len(sequence.ids) for sequence in sequences], token_budget)

    def run(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        self.running.set()
        assert self.go_on.wait(10)
        lengths = [len(sequence.ids) for sequence in sequences]
        self.ran.append(lengths)
        if 13 in lengths:
            raise RuntimeError("unlucky")
        return torch.tensor([[float(length)] for length in lengths])


@pytest.fixture
def model() -> Lengths:
    return Lengths()


@pytest.fixture
def engine(model: Lengths):
    engine = Engine(lambda: model, name="lengths")
    yield engine
    model.go_on.set()
    engine.close()


class TestBatches:
    """Like lengths together, within the budget."""

    def test_sequences_of_like_length_go_together(self):
        """Longest first; three of 3 tokens fill a budget of 10."""
        assert batches([1, 3, 5, 3, 3], 10) == [[2, 1], [3, 4, 0]]

    def test_a_sequence_over_the_budget_is_a_batch_of_its_own(self):
        """It must run somewhere."""
        assert batches([50, 2], 10) == [[0], [1]]

    @given(st.lists(st.integers(0, 40)), st.integers(1, 100))
    def test_every_sequence_is_in_one_batch_and_no_batch_is_over_the_budget(self, lengths: list[int], budget: int):
        """Unless it is alone."""
        grouped = batches(lengths, budget)
        assert sorted(position for batch in grouped for position in batch) == list(range(len(lengths)))
        for batch in grouped:
            assert len(batch) == 1 or len(batch) * max(1, *(lengths[position] for position in batch)) <= budget


class TestCalls:
    """Each call gets its own scores, in its own order."""

    def test_scores_come_in_the_callers_order(self, engine: Engine):
        """Whatever order they ran in."""
        assert engine.submit(["q"], ["aaa", "", "a", "aaaaa"]).result(5) == [3.0, 0.0, 1.0, 5.0]

    def test_calls_that_wait_share_batches(self, engine: Engine, model: Lengths):
        """Two calls with one short document each are one batch."""
        model.go_on.clear()
        first = engine.submit(["q"], ["xxxx"])
        assert model.running.wait(5)
        waiting = [engine.submit(["q"], ["a"]), engine.submit(["q"], ["bb"])]
        model.go_on.set()
        assert [future.result(5) for future in [first, *waiting]] == [[4.0], [1.0], [2.0]]
        assert model.ran == [[4], [2, 1]]

    def test_what_nobody_waits_for_any_more_is_not_run(self, engine: Engine, model: Lengths):
        """Cancelling takes the work back, also half done."""
        model.go_on.clear()
        cancelled = engine.submit(["q"], ["x" * 9, "x" * 8, "x" * 7])
        assert model.running.wait(5)
        cancelled.cancel()
        model.go_on.set()
        assert engine.submit(["q"], ["a"]).result(5) == [1.0]
        assert model.ran == [[9], [1]]

    def test_an_error_costs_only_the_calls_in_its_batch(self, engine: Engine):
        """It is ours, names the model, and has torch's error as its cause; the thread lives on."""
        unlucky, fine = engine.submit(["q"], ["x" * 13]), engine.submit(["q"], ["a"])
        with pytest.raises(BackendError, match="lengths failed with RuntimeError: unlucky") as caught:
            unlucky.result(5)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert fine.result(5) == [1.0]

    def test_a_text_that_cannot_be_tokenised_costs_only_its_call(self, engine: Engine):
        """The tokenizer's error becomes ours, too."""
        with pytest.raises(BackendError, match="KeyError"):
            engine.submit(["q"], ["unreadable"]).result(5)
        assert engine.submit(["q"], ["a"]).result(5) == [1.0]


class TestLife:
    """Loading, failing to load, closing."""

    def test_the_model_is_loaded_once_by_the_first_call(self):
        """In the engine's thread, and not before."""
        loaded: list[str] = []

        def load() -> Lengths:
            loaded.append(threading.current_thread().name)
            return Lengths()

        engine = Engine(load, name="lengths")
        time.sleep(0.05)
        assert loaded == []
        for _ in range(2):
            engine.submit(["q"], ["a"]).result(5)
        engine.close()
        assert loaded == ["rag_rerank lengths"]

    def test_a_model_that_cannot_be_loaded_fails_each_call_and_may_be_tried_again(self):
        """The hub may answer next time."""
        answers = iter([ConfigError("not there"), Lengths()])

        def load() -> Lengths:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

        engine = Engine(load, name="lengths")
        with pytest.raises(ConfigError, match="not there"):
            engine.submit(["q"], ["a"]).result(5)
        assert engine.submit(["q"], ["a"]).result(5) == [1.0]
        engine.close()

    def test_closing_fails_what_waits_and_ends_the_thread(self, engine: Engine, model: Lengths):
        """What runs is finished first."""
        model.go_on.clear()
        running = engine.submit(["q"], ["xxxx"])
        assert model.running.wait(5)
        waiting = engine.submit(["q"], ["a"])
        threading.Timer(0.1, model.go_on.set).start()
        engine.close()
        assert running.result(5) == [4.0]
        with pytest.raises(RerankError, match="closed"):
            waiting.result(5)
        assert not engine.thread.is_alive()
        with pytest.raises(RerankError, match="closed"):
            engine.submit(["q"], ["too late"]).result(5)

    def test_a_call_without_documents_only_loads_the_model(self, engine: Engine, model: Lengths):
        """That is how it is warmed up."""
        assert engine.submit(["q"], []).result(5) == []
        assert model.ran == []


class Panic(BaseException):
    """As a tokenizer written in Rust raises it."""


class TestWhatIsNoException:
    """Panics, SystemExit, KeyboardInterrupt: callers get them as errors of ours, and the engine works on."""

    @pytest.mark.parametrize("kind", [Panic, SystemExit, KeyboardInterrupt])
    @pytest.mark.parametrize("place", ["load", "inputs", "batches", "run"])
    def test_costs_its_call_only(self, place: str, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch):
        """Wherever it is raised."""
        model, raised = Lengths(), kind("gone")

        def raising(*_: object) -> object:
            monkeypatch.undo()
            raise raised

        def load() -> Lengths:
            return raising() if place == "load" and not failed else model

        failed: list[BaseException | None] = []
        if place != "load":
            monkeypatch.setattr(model, place, raising)
        engine = Engine(load, name="lengths")
        failed.append(engine.submit(["q"], ["a"]).exception(5))
        assert engine.submit(["q"], ["aa"]).result(5) == [2.0]
        engine.close()
        assert isinstance(failed[0], BackendError)
        assert failed[0].__cause__ is raised


class TestPermanentFaults:
    """What keeps a model from being loaded is a wrong setting, for that is never hidden by passing through."""

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (MemoryError(), r"MemoryError\. The memory is full.*ulimit -v"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "ulimit -v"),
            (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "Set TMPDIR"),
            (ImportError("libcudart.so: cannot open shared object file"), "pip install --force-reinstall"),
            (AttributeError("no such thing"), "AttributeError: no such thing"),
        ],
    )
    def test_of_loading(self, error: Exception, words: str):
        """With the cause, and what to do."""

        def load() -> Lengths:
            raise error

        engine = Engine(load, name="lengths")
        with pytest.raises(ConfigError, match=f"lengths can't be loaded: .*{words}") as caught:
            engine.submit(["q"], ["a"]).result(5)
        engine.close()
        assert caught.value.__cause__ is error

    def test_a_gpus_memory_may_be_free_next_time(self):
        """So it is a failure that may be passed through."""

        def load() -> Lengths:
            raise OutOfMemoryError("CUDA out of memory")

        engine = Engine(load, name="lengths")
        with pytest.raises(BackendError, match="The memory is full"):
            engine.submit(["q"], ["a"]).result(5)
        engine.close()


class OutOfMemoryError(RuntimeError):
    """As torch's is called."""


class Tokens(Lengths):
    """Pads nothing, and waits for a permit before each batch; a batch may be too large for its memory."""

    def __init__(self, token_budget: int = 1000, *, memory: int = 10**9, free: bool = False) -> None:
        super().__init__(token_budget)
        self.memory = memory
        self.begun, self.permits, self.free = threading.Semaphore(0), threading.Semaphore(0), free
        self.largest_part = self.parts = 0
        self.before_each: Callable[[], None] = lambda: None

    def inputs(self, queries: list[str], documents: list[str], instruction: str | None = None) -> Inputs:
        self.parts += 1
        self.largest_part = max(self.largest_part, len(documents))
        return super().inputs(queries, documents, instruction)

    def batches(self, sequences: Sequence[TokenSequence], token_budget: int) -> list[list[int]]:
        return by_tokens([len(sequence.ids) for sequence in sequences], token_budget)

    def run(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        self.begun.release()
        assert self.free or self.permits.acquire(timeout=10)
        self.before_each()
        if sum(len(sequence.ids) for sequence in sequences) > self.memory:
            raise OutOfMemoryError("tried to allocate 7 GiB")
        return super().run(sequences)

    def let_go(self) -> None:
        """No more waiting."""
        self.free = True
        self.permits.release()


def documents(count: int, tokens: int) -> list[str]:
    """All different."""
    return [f"{number:0{tokens}d}" for number in range(count)]


@pytest.fixture
def engine_of():
    """Makes engines, and closes them."""
    engines: list[tuple[Engine, Tokens]] = []

    def make(model: Tokens) -> Engine:
        engine = Engine(lambda: model, name="tokens")
        engines.append((engine, model))
        return engine

    yield make
    for engine, model in engines:
        model.let_go()
        engine.close()


class TestFairness:
    """One engine for all, and nobody waits for the longest."""

    def test_a_short_call_overtakes_a_long_one(self, engine_of):
        """At most two batches after the one that ran when it came, it is done."""
        model = Tokens()
        engine = engine_of(model)
        long = engine.submit(["q"], documents(1000, 100))
        assert model.begun.acquire(timeout=5)
        short = engine.submit(["q"], documents(10, 20))
        ran_until_done: list[int] = []
        short.add_done_callback(lambda _: ran_until_done.append(len(model.ran)))
        model.let_go()
        assert short.result(5) == [20.0] * 10
        assert long.result(5) == [100.0] * 1000
        assert ran_until_done[0] <= 3
        assert len(model.ran) > 90

    def test_a_long_call_goes_on_under_a_stream_of_short_ones(self, engine_of):
        """A quarter of each batch is its own: 40 documents of 100 tokens take at most 20 batches of 1,000."""
        model = Tokens(free=True)
        engine = engine_of(model)
        shorts: list[Future[list[float]]] = []
        # Three batches' worth of them come with each batch that runs.
        model.before_each = lambda: shorts.extend(engine.submit(["q"], documents(10, 20)) for _ in range(15))
        long = engine.submit(["q"], documents(40, 100))
        ran_until_done: list[int] = []
        long.add_done_callback(lambda _: (ran_until_done.append(len(model.ran)), setattr(model, "before_each", int)))
        assert long.result(5) == [100.0] * 40
        assert ran_until_done[0] <= 20
        assert all(short.result(5) == [20.0] * 10 for short in shorts)
        assert len(shorts) > 50

    def test_many_threads_get_their_own_scores(self, engine_of):
        """160 calls at once, of one to nine documents."""
        model = Tokens(50, free=True)
        engine = engine_of(model)

        def ask(thread: int) -> bool:
            texts = [["x" * ((thread * 20 + call + place) % 12) for place in range(1 + call % 9)] for call in range(20)]
            futures = [engine.submit(["q"], each) for each in texts]
            return [future.result(10) for future in futures] == [[float(len(text)) for text in each] for each in texts]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(8)))

    def test_10000_documents_are_tokenised_in_parts(self, engine_of):
        """A few megabytes at a time."""
        model = Tokens(free=True)
        assert engine_of(model).submit(["q"], documents(10_000, 5)).result(10) == [5.0] * 10_000
        assert model.largest_part == PART
        assert all(sum(lengths) <= 1000 for lengths in model.ran)


class TestCancelling:
    """What was taken back is neither run nor tokenised, and costs nobody else anything."""

    def test_in_the_middle_of_a_long_call(self, engine_of):
        """The next batch is another's."""
        model = Tokens()
        engine = engine_of(model)
        long, other = engine.submit(["q"], documents(2000, 100)), engine.submit(["q"], documents(3, 7))
        assert model.begun.acquire(timeout=5)
        long.cancel()
        model.let_go()
        assert other.result(5) == [7.0] * 3
        assert engine.submit(["q"], ["a"]).result(5) == [1.0]
        assert len(model.ran) <= 3
        assert model.parts <= 3

    def test_beside_others_in_a_batch(self, engine_of):
        """They get their scores."""
        model = Tokens()
        engine = engine_of(model)
        first = engine.submit(["q"], ["x"])
        assert model.begun.acquire(timeout=5)
        cancelled, kept = engine.submit(["q"], ["aa"]), engine.submit(["q"], ["bbb"])
        model.permits.release()  # the first batch; the next one has both
        assert model.begun.acquire(timeout=5)
        cancelled.cancel()
        model.let_go()
        assert first.result(5) == [1.0]
        assert kept.result(5) == [3.0]
        assert cancelled.cancelled()


class TestNumbers:
    """What is no number is its document's alone."""

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_one_that_spoils_its_batch(self, engine_of, bad: float, monkeypatch: pytest.MonkeyPatch):
        """Each that got none is run alone; infinity, whose sigmoid would be a score, is none."""
        model = Tokens(free=True)
        run = model.run

        def spoilt(sequences: Sequence[TokenSequence]) -> torch.Tensor:
            lengths = [len(sequence.ids) for sequence in sequences]
            return torch.full((len(lengths), 1), bad) if 5 in lengths else run(sequences)

        monkeypatch.setattr(model, "run", spoilt)
        engine = engine_of(model)
        texts = ["x" * length for length in (3, 5, 8, 1)]
        scores = engine.submit(["q"], texts).result(5)
        assert scores[:1] + scores[2:] == [3.0, 8.0, 1.0]
        assert math.isnan(scores[1])


class TestErrors:
    """An error is its cause's alone."""

    def test_in_a_shared_batch(self, engine_of):
        """Each call's part is run again by itself: only the one with 13 tokens fails."""
        model = Tokens()
        engine = engine_of(model)
        first = engine.submit(["q"], ["x"])
        assert model.begun.acquire(timeout=5)
        lengths = [(4, 5), (6,), (13, 2), (7, 8), (9,)]
        futures = [engine.submit(["q"], ["x" * length for length in call]) for call in lengths]
        model.let_go()
        assert first.result(5) == [1.0]
        for call, future in zip(lengths, futures, strict=True):
            if 13 in call:
                assert isinstance(future.exception(5), BackendError)
            else:
                assert future.result(5) == [float(length) for length in call]
        assert sorted(model.ran[1]) == sorted(length for call in lengths for length in call)  # it was one batch

    def test_a_batch_too_large_for_the_memory_is_halved_until_it_fits(self, engine_of):
        """One caller's 16 documents, of which the memory holds three."""
        model = Tokens(memory=30, free=True)
        assert engine_of(model).submit(["q"], documents(16, 10)).result(5) == [10.0] * 16
        assert model.ran == [[10, 10]] * 8

    def test_calls_that_together_are_too_large_are_run_one_by_one(self, engine_of):
        """Nobody fails for another's sake."""
        model = Tokens(memory=30)
        engine = engine_of(model)
        futures = [engine.submit(["q"], documents(2, 10)) for _ in range(5)]
        model.let_go()
        assert [future.result(5) for future in futures] == [[10.0] * 2] * 5

    def test_while_batches_are_made_of_it(self, engine_of, monkeypatch: pytest.MonkeyPatch):
        """Whatever goes wrong, callers are answered and the thread lives on."""
        model = Tokens(free=True)
        engine = engine_of(model)

        def failing(*_: object) -> list[list[int]]:
            monkeypatch.undo()
            raise MemoryError

        monkeypatch.setattr(model, "batches", failing)
        assert isinstance(engine.submit(["q"], ["a"]).exception(1), BackendError)
        assert engine.submit(["q"], ["a"]).result(1) == [1.0]

    def test_a_document_too_large_for_the_memory_fails_its_call(self, engine_of):
        """With what to do; the next call has its memory."""
        model = Tokens(memory=30, free=True)
        engine = engine_of(model)
        with pytest.raises(BackendError, match="OutOfMemoryError") as caught:
            engine.submit(["q"], ["x" * 31, "x"]).result(5)
        assert "max_length" in str(caught.value.remedy)
        assert engine.submit(["q"], ["x" * 30]).result(5) == [30.0]


class Text(str):
    """A text that one can see vanish."""


class TestMemory:
    """An engine that has nothing to do keeps nothing."""

    @pytest.mark.parametrize("ending", ["scored", "failed", "unreadable", "cancelled"])
    def test_no_text_outlives_its_call(self, engine_of, ending: str):
        """However it ended."""
        model = Tokens()
        engine = engine_of(model)
        texts = [Text("a"), Text("x" * 13) if ending == "failed" else Text("bb")]
        gone = [weakref.ref(text) for text in texts]
        held = engine.submit(["q"], ["x"])
        assert model.begun.acquire(timeout=5)
        future = engine.submit(["q"], [*texts, *(["unreadable"] if ending == "unreadable" else [])])
        if ending == "cancelled":
            future.cancel()
        model.let_go()
        assert (future.cancelled() or future.exception(5) is not None) == (ending != "scored")
        assert held.result(5) == [1.0]
        del future, texts
        until = time.monotonic() + 60
        while any(ref() is not None for ref in gone) and time.monotonic() < until:
            gc.collect()
            time.sleep(0.01)
        assert [ref() for ref in gone] == [None, None]


@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=30), min_size=1, max_size=6), st.integers(1, 60))
def test_scores_come_in_order_whatever_runs_together(calls: list[list[int]], token_budget: int):
    """Each document once, duplicates included."""
    model = Tokens(token_budget)
    engine = Engine(lambda: model, name="tokens")
    futures = [engine.submit(["q"], ["x" * length for length in lengths]) for lengths in calls]
    model.let_go()
    assert [future.result(5) for future in futures] == [[float(length) for length in lengths] for lengths in calls]
    engine.close()
    assert sum(map(len, model.ran)) == sum(len(set(lengths)) for lengths in calls)
