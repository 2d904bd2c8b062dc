"""Calls that share a model: what is run once, how much is tokenised at a time, and whose turn it is."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rag_rerank.local.engine.calls import PART, Item, WaitingCall, next_round
from rag_rerank.local.models.model import Inputs
from rag_rerank.local.transformer.batching import TokenSequence


class Pairs:
    """A model that scores a pair by both lengths; keeps what it was asked to tokenise and to run."""

    listwise = False

    def __init__(self, round_tokens: int = 100) -> None:
        self.round_tokens = round_tokens
        self.tokenised: list[tuple[list[str], list[str]]] = []
        self.ran: list[TokenSequence] = []

    def inputs(self, queries: list[str], documents: list[str], instruction: str | None = None) -> Inputs:
        self.tokenised.append((queries, documents))
        if "unreadable" in documents:
            raise KeyError("no such token")
        rows = queries * len(documents) if len(queries) == 1 else queries
        sequences = [TokenSequence([len(query)] * len(text)) for query, text in zip(rows, documents, strict=True)]
        # Of several sequences a score, as a bi-encoder's.
        return Inputs(sequences, lambda outputs: outputs[:, 0].tolist())

    def run(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        self.ran += sequences
        return torch.tensor([[1000.0 * sum(each.ids[:1]) + len(each.ids)] for each in sequences])


def score(query: str, document: str) -> float:
    """What `Pairs` says to a pair."""
    return 1000.0 * (len(query) if document else 0) + len(document)


def play(calls: Sequence[WaitingCall], model: Pairs) -> list[list[tuple[int, int]]]:
    """Round by round to the end: the sequences and tokens that each call had in each."""
    rounds = []
    waiting = list(calls)
    while waiting:
        taken = next_round(waiting, model, model.round_tokens)
        rounds.append([had(taken, call) for call in calls])
        assert sum(count for count, _ in rounds[-1]) > 0
        for _, items in taken:
            run(items, model)
        waiting = [call for call in waiting if call.unscored]
    return rounds


def had(taken: list[tuple[WaitingCall, list[Item] | Exception]], call: WaitingCall) -> tuple[int, int]:
    items = [item for owner, items in taken if owner is call for item in items]
    return len(items), sum(len(item.sequence.ids) for item in items)


def run(items: list[Item] | Exception, model: Pairs) -> None:
    assert isinstance(items, list)
    for item, output in zip(items, model.run([item.sequence for item in items]), strict=True):
        item.take(output)


TEXTS = st.lists(st.text("ab", max_size=4), min_size=1, max_size=40)


def test_documents_that_are_read_together_are_tokenised_together():
    """However many there are, equal ones in their places."""
    model = Pairs()
    model.listwise = True
    call = WaitingCall(["q"], ["a", "bb", "a"] * PART)
    play([call], model)
    assert model.tokenised == [(["q"], ["a", "bb", "a"] * PART)]
    assert call.future.result() == [1001.0, 1002.0, 1001.0] * PART


class TestDuplicates:
    """Scored once, and everywhere in their places."""

    @given(TEXTS, st.integers(1, 50))
    def test_of_one_query(self, documents: list[str], round_tokens: int):
        """Each different document."""
        model, call = Pairs(round_tokens), WaitingCall(["query"], documents)
        play([call], model)
        assert call.future.result(0) == [score("query", text) for text in documents]
        assert len(model.ran) == len(set(documents))

    @given(st.lists(st.tuples(st.text("q", max_size=3), st.text("ab", max_size=3)), min_size=1, max_size=40))
    def test_of_a_query_each(self, pairs: list[tuple[str, str]]):
        """Each different pair: the same document under another query is another."""
        queries, documents = map(list, zip(*pairs, strict=True))
        model, call = Pairs(), WaitingCall(queries, documents)
        play([call], model)
        assert call.future.result(0) == [score(*pair) for pair in pairs]
        assert len(model.ran) == (len(set(pairs)) if len(pairs) > 1 else 1)

    def test_none_is_counted(self):
        """What is still to be scored are different pairs."""
        assert WaitingCall(["q"], ["a", "b", "a"]).unscored == 2
        assert WaitingCall(["q", "q", "r"], ["a", "a", "a"]).unscored == 2


class TestParts:
    """A call is tokenised as it is run, not all at once."""

    def test_a_part_at_a_time(self):
        """10,000 documents are never all in memory as tokens."""
        model, call = Pairs(round_tokens=500), WaitingCall(["q"], [f"{number:06d}" for number in range(10_000)])
        [(_, items)] = next_round([call], model, model.round_tokens)
        assert [len(documents) for _, documents in model.tokenised] == [PART]
        run(items, model)
        play([call], model)
        assert max(len(documents) for _, documents in model.tokenised) == PART
        assert [text for _, documents in model.tokenised for text in documents] == [f"{n:06d}" for n in range(10_000)]
        assert call.future.result(0) == [1006.0] * 10_000

    def test_with_a_query_each(self):
        """The queries are cut alike."""
        pairs = [("q" * (number % 7), str(number)) for number in range(3 * PART + 5)]
        model, call = Pairs(), WaitingCall([query for query, _ in pairs], [text for _, text in pairs])
        play([call], model)
        assert call.future.result(0) == [score(*pair) for pair in pairs]
        assert [len(queries) for queries, _ in model.tokenised] == [PART, PART, PART, 5]

    def test_what_was_not_read_yet_is_taken_to_be_as_long(self):
        """So that the end of a call is seen from afar: 10 tokens each, 300 documents, of which 256 are tokenised."""
        assert WaitingCall(["q"], [f"{number:010d}" for number in range(300)]).tokens_left(Pairs()) == 3000

    def test_longest_first_within_a_part(self):
        """What needs most memory comes first: if it fits, so does the rest."""
        model = Pairs(round_tokens=10_000)
        play([WaitingCall(["q"], ["a" * length for length in (3, 9, 1, 5)])], model)
        assert [len(each.ids) for each in model.ran] == [9, 5, 3, 1]


class TestRounds:
    """About one batch is taken at a time: a quarter for who waits longest, the rest for who is nearest to the end."""

    def documents(self, count: int, tokens: int = 10) -> list[str]:
        """All different."""
        return [f"{number:0{tokens}d}" for number in range(count)]

    def test_one_call_has_a_round_for_itself(self):
        """And no more than one."""
        call = WaitingCall(["q"], self.documents(25))
        assert play([call], Pairs(round_tokens=100)) == [[(10, 100)], [(10, 100)], [(5, 50)]]

    def test_a_short_call_is_done_in_the_next_round(self):
        """However long the one before it."""
        model, long, short = (
            Pairs(round_tokens=100),
            WaitingCall(["q"], self.documents(1000)),
            WaitingCall(["q"], ["a", "b"]),
        )
        next_round([long], model, model.round_tokens)
        taken = next_round([long, short], model, model.round_tokens)
        assert had(taken, short) == (2, 2)
        assert had(taken, long)[1] >= 90

    def test_the_longest_waiting_has_its_share_however_many_come(self):
        """A quarter of each round, in whole sequences: short calls without end can't keep it from its own."""
        model, long = Pairs(round_tokens=100), WaitingCall(["q"], self.documents(30))
        for _ in range(15):
            newcomers = [WaitingCall(["q"], self.documents(5)) for _ in range(10)]
            taken = next_round([long, *newcomers], model, model.round_tokens)
            assert had(taken, long) == (2, 20)
            assert sum(had(taken, call)[1] for call in newcomers) == 80
            for _, items in taken:
                run(items, model)
        assert long.future.result(0) == [1010.0] * 30

    def test_of_equal_calls_the_first_comes_first(self):
        """Nobody overtakes for nothing."""
        calls = [WaitingCall(["q"], self.documents(10)) for _ in range(3)]
        rounds = play(calls, Pairs(round_tokens=100))
        assert [[count for count, _ in round_] for round_ in rounds] == [[10, 0, 0], [0, 10, 0], [0, 0, 10]]

    def test_a_text_over_the_round_is_a_round_of_its_own(self):
        """It must run somewhere."""
        assert play([WaitingCall(["q"], ["a" * 500, "b"])], Pairs(round_tokens=100)) == [[(1, 500)], [(1, 1)]]

    @given(st.lists(TEXTS, min_size=1, max_size=5), st.integers(1, 60))
    def test_every_call_gets_its_own_scores(self, texts: list[list[str]], round_tokens: int):
        """Whatever runs beside it; each sequence once, and no round is over by more than its last sequence."""
        model = Pairs(round_tokens)
        calls = [WaitingCall(["q" * place], documents) for place, documents in enumerate(texts)]
        rounds = play(calls, model)
        for place, (call, documents) in enumerate(zip(calls, texts, strict=True)):
            assert call.future.result(0) == [score("q" * place, text) for text in documents]
        assert len(model.ran) == sum(len(set(documents)) for documents in texts)
        for round_ in rounds:
            assert sum(tokens for _, tokens in round_) < round_tokens + 2 * 4  # two shares, of texts up to 4

    def test_a_text_that_cannot_be_tokenised_is_its_callers(self):
        """The others have their turn."""
        model, fine, broken = Pairs(), WaitingCall(["q"], ["a"]), WaitingCall(["q"], ["unreadable"])
        for calls in ([fine, broken], [broken, fine]):
            taken = next_round(calls, model, model.round_tokens)
            errors = [result for call, result in taken if call is broken]
            assert errors
            assert all(isinstance(error, KeyError) for error in errors)
        assert not any(isinstance(result, Exception) for call, result in taken if call is fine)


class TestFuture:
    """What the caller holds."""

    def test_a_cancelled_call_takes_no_result(self):
        """Scores or errors that come too late are dropped."""
        call = WaitingCall(["q"], ["a"])
        assert call.future.cancel()
        call.succeed([1.0])
        call.fail(RuntimeError())
        assert call.future.cancelled()

    def test_no_score_is_given_before_the_last(self):
        """Half a call is no answer."""
        model, call = Pairs(round_tokens=1), WaitingCall(["q"], ["aa", "b"])
        for done in (False, True):
            [(_, items)] = next_round([call], model, model.round_tokens)
            assert not call.future.done()
            run(items, model)
            assert call.future.done() is done

    def test_an_error_is_the_callers(self):
        """As it was."""
        call = WaitingCall(["q"], ["a"])
        call.fail(KeyError("x"))
        with pytest.raises(KeyError):
            call.future.result(0)
