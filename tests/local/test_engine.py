"""Batches and the thread that runs them, with a model of a few lines."""

import threading
import time
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rag_rerank import BackendError, ConfigError, RerankError
from rag_rerank.local.batching import by_length as batches
from rag_rerank.local.engine import Engine
from rag_rerank.local.model import Inputs, TokenSequence


class Lengths:
    """A model that scores a document by its length; keeps what it was asked to run."""

    def __init__(self, token_budget: int = 10) -> None:
        self.round_tokens = token_budget
        self.ran: list[list[int]] = []
        self.running, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def inputs(self, queries: list[str], documents: list[str]) -> Inputs:
        if "unreadable" in documents:
            raise KeyError("no such token")
        return Inputs([TokenSequence([1] * len(text)) for text in documents], lambda outputs: outputs[:, 0].tolist())

    def batches(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        return batches([len(sequence.ids) for sequence in sequences], self.round_tokens)

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
    engine = Engine(lambda: model, name="lengths", max_waiting_calls=8)
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

        engine = Engine(load, name="lengths", max_waiting_calls=8)
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

        engine = Engine(load, name="lengths", max_waiting_calls=8)
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
        assert not engine._thread.is_alive()
        with pytest.raises(RerankError, match="closed"):
            engine.submit(["q"], ["too late"]).result(5)
