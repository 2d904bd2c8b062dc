"""FallbackScorer: whole calls move, scores are never mixed, and no call outlives its deadline."""

import asyncio
import copy
import functools
import itertools
import logging
import math
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_rerank import (
    AuthError,
    BackendError,
    BackendRejected,
    BackendUnavailable,
    BadReply,
    ConfigError,
    DeadlineExceeded,
    DocumentRejected,
    FallbackScorer,
    Ranked,
    RerankError,
    Scorer,
    fallback,
    scorer,
)
from rag_rerank.backoff import BackOff
from rag_rerank.inputs import NEUTRAL
from tests.scorers import WordOverlap

MOVING = [BackendUnavailable("nobody home"), BadReply("no JSON"), DeadlineExceeded("too slow")]
FINAL = [
    *(AuthError("no key"), BackendRejected("no such model"), DocumentRejected("too long", indices=[0])),
    *(ConfigError("extra missing"), RerankError("closed"), TypeError("no text"), KeyboardInterrupt()),
]


class Clock:
    """Stands in for the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@contextmanager
def virtual_time() -> Iterator[Clock]:
    """Time passes only where a test or a `Member` says so."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "time", clock)
        patch.setattr(fallback, "time", clock)
        patch.setattr(fallback, "BackOff", functools.partial(BackOff, clock.monotonic))
        yield clock


@pytest.fixture
def clock() -> Iterator[Clock]:
    with virtual_time() as clock:
        yield clock


Does = BaseException | float | str


class Member(Scorer):
    """Scores a document by a number of its own plus the document's; before that, does what the script says.

    An exception is raised, a number of seconds passes (up to the deadline), any text makes the reply a score short.
    After the script's end all calls work. `given` has the seconds that each call was given.
    """

    def __init__(self, number: int, *script: Does, clock: Clock | None = None) -> None:
        self.number = number
        self.script: Iterable[Does] = iter(script)
        self.clock = clock or Clock()
        self.given: list[float | None] = []
        self.doors: list[str] = []
        self.closed: list[str] = []

    @property
    def model_name(self) -> str:
        return f"model-{self.number}"

    def _work(self, documents: list[str], until: float | None) -> list[float]:
        if documents == [NEUTRAL]:  # the core asks whether it works at all: no
            raise BackendRejected("no")
        self.given.append(None if until is None else until - self.clock.now)
        does = next(self.script, None)
        match does:
            case BaseException():
                raise does.with_traceback(None)  # the same one is raised in many tests
            case float() | int():
                self.clock.now += does if until is None else min(does, until - self.clock.now)
                if until is not None and self.clock.now >= until:
                    raise DeadlineExceeded("too slow")
            case str():
                return self.scores(documents)[1:]
        return self.scores(documents)

    def scores(self, documents: list[str]) -> list[float]:
        return [self.number * 1000.0 + int(document) for document in documents]

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        self.doors.append("score")
        return self._work(documents, until)

    async def _ascore(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        self.doors.append("ascore")
        return self._work(documents, until)

    def _close(self) -> None:
        self.closed.append("close")

    async def _aclose(self) -> None:
        self.closed.append("aclose")

    def __repr__(self) -> str:
        return f"Member({self.number})"


Ask = Callable[..., list[float]]


@pytest.fixture(params=["score", "ascore"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Scores documents, through either door."""

    def ask(asked: Scorer, documents: Iterable[str] = ("1", "2"), **deadline: float) -> list[float]:
        if request.param == "score":
            return asked.score("q", list(documents), **deadline)
        return asyncio.run(asked.ascore("q", list(documents), **deadline))

    return ask


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class TestMoves:
    """What another scorer may do better moves to it, as a whole."""

    def test_the_first_is_asked_as_long_as_it_works(self, ask: Ask, caplog: pytest.LogCaptureFixture):
        """The second hears nothing, the log neither."""
        first, second = Member(1), Member(2)
        both = FallbackScorer(first, second)
        assert [ask(both) for _ in range(3)] == [[1001.0, 1002.0]] * 3
        assert second.given == []
        assert warnings_of(caplog) == []

    def test_each_door_leads_to_the_same_door_of_the_scorers(self):
        """In an event loop nothing blocks that needn't."""
        first, second = Member(1, *MOVING[:1] * 2), Member(2)
        both = FallbackScorer(first, second)
        both.score("q", ["1"])
        asyncio.run(both.ascore("q", ["1"]))
        assert second.doors == ["score", "ascore"]

    @pytest.mark.parametrize("error", MOVING, ids=lambda error: type(error).__name__)
    def test_a_failure_moves_the_call_with_one_warning(
        self, ask: Ask, error: BackendError, caplog: pytest.LogCaptureFixture
    ):
        """It names from where, to where, and why."""
        both = FallbackScorer(Member(1, error), Member(2))
        assert ask(both) == [2001.0, 2002.0]
        [warning] = warnings_of(caplog)
        for part in ("Member (model-1)", "Member (model-2)", type(error).__name__, str(error)):
            assert part in warning

    def test_too_few_scores_are_a_failure_too(self, ask: Ask):
        """The scorer's own promises are checked before its scores are taken; none of them is used."""
        assert ask(FallbackScorer(Member(1, "short"), Member(2))) == [2001.0, 2002.0]

    @pytest.mark.parametrize("error", FINAL, ids=lambda error: type(error).__name__)
    def test_whatever_else_is_raised_at_once(self, ask: Ask, error: BaseException, caplog: pytest.LogCaptureFixture):
        """A refusal is an answer, a mistake is to be seen; neither puts the scorer to rest."""
        first, second = Member(1, error), Member(2)
        both = FallbackScorer(first, second)
        with pytest.raises(type(error)) as caught:
            ask(both)
        assert caught.value is error
        assert second.given == []
        assert warnings_of(caplog) == []
        assert ask(both) == [1001.0, 1002.0]

    def test_wrong_arguments_reach_no_scorer(self):
        """They are checked once, before."""
        first = Member(1)
        with pytest.raises(TypeError, match=r"documents\[0\]"):
            FallbackScorer(first).score("q", [None])
        assert FallbackScorer(first).score("q", []) == []
        assert first.given == []

    @given(st.lists(st.text(), max_size=3), st.text())
    def test_a_text_is_the_same_text_through_one_more_scorer(self, documents: list[str], query: str):
        """It is cleaned twice then: the second time must change nothing."""
        direct, behind = WordOverlap(), WordOverlap()
        spelled = [f"{text}<<|im_end|>|||A|||B|||[[INST]</s>\udc00" for text in [query, *documents]]
        direct.score(spelled[0], spelled)
        FallbackScorer(behind).score(spelled[0], spelled)
        assert behind.calls == direct.calls

    def test_rejected_documents_are_passed_through_with_the_others_scores(self, clock: Clock):
        """As by the scorer itself, whose model is named: it has answered."""
        error = DocumentRejected("too long", indices=[0], scores=[None, 0.1, 0.2])
        both = FallbackScorer(Member(1, MOVING[0]), Member(2, error))
        assert both.rerank("q", ["1", "2", "3"], on_error="passthrough") == [
            Ranked(2, 0.2),
            Ranked(1, 0.1),
            Ranked(0, None),
        ]
        assert both.model_name == "model-2"

    def test_a_failure_of_all_is_passed_through_in_retrieval_order(self):
        """Every document once, without a score."""
        both = FallbackScorer(Member(1, MOVING[0]), Member(2, MOVING[1]))
        assert both.rerank("q", ["1", "2"], on_error="passthrough") == [Ranked(0, None), Ranked(1, None)]


class TestAllFail:
    """The last error tells, and leads to the others."""

    @pytest.mark.parametrize("last", MOVING, ids=lambda error: type(error).__name__)
    def test_the_error_is_of_the_last_ones_kind(self, ask: Ask, last: BackendError, clock: Clock):
        """With its facts, the time of the whole call, and all errors as they were, causes included."""
        first_error = BackendUnavailable("nobody home")
        first_error.__cause__ = OSError("refused")
        last = type(last)("it went wrong", endpoint="host:1", attempts=3, elapsed=0.1, remedy="Mend it.")
        last.__cause__ = OSError("reset")
        last.retry_after = 60.0
        with pytest.raises(type(last)) as caught:
            ask(FallbackScorer(Member(1, first_error), Member(2, last)))
        assert caught.value is not last
        assert caught.value.retry_after == 60.0
        assert str(caught.value) == (
            "2 of 2 scorers were tried and failed, the last of them Member (model-2): it went wrong "
            "(host:1, 3 attempts, 0.00 s). Mend it."
        )
        cause = caught.value.__cause__
        assert isinstance(cause, ExceptionGroup)
        assert cause.exceptions == (first_error, last)
        assert str(last.__cause__) == "reset"

    def test_one_alone_raises_its_own_error(self, ask: Ask):
        """There is nothing to add."""
        error = BackendUnavailable("nobody home")
        with pytest.raises(BackendUnavailable) as caught:
            ask(FallbackScorer(Member(1, error)))
        assert caught.value is error

    def test_the_error_can_be_pickled(self):
        """multiprocessing and Ray hand errors on."""
        both = FallbackScorer(Member(1, MOVING[0]), Member(2, MOVING[1]))
        with pytest.raises(BadReply) as caught:
            both.score("q", "1")
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # noqa: S301 - our own


class TestRests:
    """What failed is left alone for a while."""

    def test_it_is_passed_over_until_its_rest_ends(self, ask: Ask, clock: Clock, caplog: pytest.LogCaptureFixture):
        """Then one call tries it, and where it works it is the first again. Only the move is logged."""
        first, second = Member(1, MOVING[0]), Member(2)
        both = FallbackScorer(first, second)
        assert [ask(both, "1") for _ in range(3)] == [[2001.0]] * 3
        assert len(first.given) == 1
        clock.now += 1
        assert [ask(both, "1") for _ in range(2)] == [[1001.0]] * 2
        assert len(warnings_of(caplog)) == 1

    def test_rests_double(self, clock: Clock):
        """Of 100 calls, one a second, a scorer that stays away gets one at 0, 1, 3, 7, 15, 31, 61 and 91 s."""
        first = Member(1, *MOVING[:1] * 100)
        both = FallbackScorer(first, Member(2))
        tried = []
        for second in range(100):
            before = len(first.given)
            assert both.score("q", "1") == [2001.0]
            if len(first.given) > before:
                tried.append(second)
            clock.now += 1
        assert tried == [0, 1, 3, 7, 15, 31, 61, 91]

    def test_one_that_says_when_is_left_alone_until_then(self, clock: Clock):
        """A server's Retry-After."""
        both = FallbackScorer(Member(1, BackendUnavailable("busy", retry_after=60.0)), Member(2))
        for seconds, answered_by in ((0, 2), (59, 2), (1, 1)):
            clock.now += seconds
            assert both.score("q", "1") == [1000.0 * answered_by + 1]

    def test_the_first_that_works_is_taken(self, clock: Clock):
        """The order of the scorers is the order of preference."""
        members = Member(1, MOVING[0]), Member(2, MOVING[0]), Member(3), Member(4)
        several = FallbackScorer(*members)
        assert several.score("q", "1") == [3001.0]
        assert several.score("q", "1") == [3001.0]
        assert [len(member.given) for member in members] == [1, 1, 2, 0]

    def test_where_all_rest_all_are_tried_in_order(self, ask: Ask, clock: Clock):
        """A guess that something is broken must not become an error by itself."""
        first, second = Member(1, *MOVING[:1] * 2), Member(2, MOVING[0])
        both = FallbackScorer(first, second)
        with pytest.raises(BackendUnavailable):
            ask(both)
        assert ask(both) == [2001.0, 2002.0]
        assert len(first.given) == 2

    def test_what_rests_is_the_last_resort(self, ask: Ask, clock: Clock):
        """Where the one that worked fails, the one that rests is asked before the call is given up."""
        both = FallbackScorer(Member(1, MOVING[0]), Member(2, 0, MOVING[0], clock=clock))
        assert ask(both) == [2001.0, 2002.0]
        assert ask(both) == [1001.0, 1002.0]

    @pytest.mark.parametrize("error", FINAL[:3], ids=lambda error: type(error).__name__)
    def test_a_refusal_ends_the_rest(self, error: BackendRejected, clock: Clock):
        """What refuses is there."""
        first = Member(1, MOVING[0], error)
        both = FallbackScorer(first, Member(2))
        both.score("q", "1")
        clock.now += 1
        with pytest.raises(type(error)):
            both.score("q", "1")
        assert both.score("q", "1") == [1001.0]

    def test_a_trial_that_is_cancelled_is_followed_by_another(self, clock: Clock):
        """Nothing was learned, so nothing changes but the time."""
        first = Member(1, MOVING[0], KeyboardInterrupt())
        both = FallbackScorer(first, Member(2))
        both.score("q", "1")
        clock.now += 1
        with pytest.raises(KeyboardInterrupt):
            both.score("q", "1")
        assert both.score("q", "1") == [2001.0]
        clock.now += 1
        assert both.score("q", "1") == [1001.0]


class TestDeadlines:
    """One deadline for the whole call, shared by those that can be tried."""

    def test_each_but_the_last_gets_an_equal_share_of_what_is_left(self, ask: Ask, clock: Clock):
        """The first hangs; the second fails at once, so the third has the remainder."""
        members = Member(1, 99.0, clock=clock), Member(2, MOVING[0], clock=clock), Member(3, clock=clock)
        assert ask(FallbackScorer(*members), deadline=12) == [3001.0, 3002.0]
        assert [member.given for member in members] == [[4.0], [4.0], [8.0]]

    def test_what_rests_gets_no_share(self, ask: Ask, clock: Clock):
        """All the time goes to those that may work, the last resort gets what they leave."""
        members = Member(1, MOVING[0], clock=clock), Member(2, 0, 6, clock=clock)
        both = FallbackScorer(*members)
        ask(both)
        assert ask(both, deadline=10) == [2001.0, 2002.0]
        assert members[1].given == [None, 10.0]

    def test_nobody_is_asked_when_the_time_is_up(self, ask: Ask, clock: Clock):
        """The error is that of the one that used it."""
        first, second = Member(1, MOVING[0], clock=clock), Member(2, 0, 99, clock=clock)
        both = FallbackScorer(first, second)
        ask(both)
        with pytest.raises(DeadlineExceeded, match="^too slow.$"):
            ask(both, deadline=10)
        assert clock.now == 1010.0
        assert len(first.given) == 1

    @pytest.mark.parametrize("deadline", [None, math.inf])
    def test_without_one_each_has_its_own(self, ask: Ask, clock: Clock, deadline: float | None):
        """No limit here, the scorer's default there."""
        first, second = Member(1, 99, clock=clock), Member(2, clock=clock)
        first._default_deadline = 30.0
        assert ask(FallbackScorer(first, second), deadline=deadline) == [2001.0, 2002.0]
        assert (first.given, second.given) == ([30.0], [None])

    def test_a_caller_in_a_hurry_puts_a_scorer_to_rest_for_as_long_as_it_waited(self, ask: Ask, clock: Clock):
        """Half a second was too short: that says more about the caller."""
        first, second = Member(1, 0.6, clock=clock), Member(2, clock=clock)
        both = FallbackScorer(first, second)
        assert [ask(both, deadline=1) for _ in range(5)] == [[2001.0, 2002.0]] * 5
        assert len(first.given) == 1
        clock.now += 0.5
        assert ask(both) == [1001.0, 1002.0]

    def test_a_caller_in_a_hurry_still_finds_out_who_is_not_there(self, clock: Clock):
        """Only running out of time is about the caller's time."""
        first = Member(1, MOVING[0], clock=clock)
        both = FallbackScorer(first, Member(2, clock=clock))
        assert [both.score("q", "1", deadline=0.1) for _ in range(2)] == [[2001.0]] * 2
        assert len(first.given) == 1

    @pytest.mark.parametrize(("deadline", "default"), [(2, None), (20, None), (None, 30.0), (None, 0.2)])
    def test_a_second_or_its_own_time_was_enough(self, deadline: float | None, default: float | None, clock: Clock):
        """One that hangs must not cost every call its share."""
        first = Member(1, 99, clock=clock)
        first._default_deadline = default
        both = FallbackScorer(first, Member(2, clock=clock))
        assert [both.score("q", "1", deadline=deadline) for _ in range(2)] == [[2001.0]] * 2
        assert len(first.given) == 1

    def test_time_that_runs_out_before_the_first_is_nobodys_failure(self, clock: Clock):
        """Each moment on this clock comes later than the one before."""
        first = Member(1)
        both = FallbackScorer(first, Member(2))
        moments = itertools.count(1000.0)
        clock.monotonic = lambda: next(moments)
        with pytest.raises(DeadlineExceeded, match="before the call began"):
            both.score("q", "1", deadline=0.5)
        assert first.given == []
        assert both.score("q", "1") == [1001.0]


events = st.tuples(
    st.sampled_from([0.0, 0.5, 1.0, 5.0, 40.0]),  # seconds since the call before
    st.sampled_from([None, 0.5, 3.0, 10.0]),  # deadline
    st.integers(1, 4),  # documents
    st.booleans(),  # which door
)
doings = st.sampled_from([None, 0.2, 2.0, 7.0, 1e6, "short", *MOVING, *FINAL[:4]])


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(st.lists(st.lists(doings, max_size=8), min_size=1, max_size=4), st.lists(events, min_size=1, max_size=8))
def test_no_schedule_mixes_scores_or_outlives_a_deadline(
    scripts: list[list[Does]], calls: list[tuple[float, float | None, int, bool]]
):
    """Every call: all scores of one scorer, which is the one that is named; or an error of ours, in time.

    No scorer is asked twice in a call, and none fails unasked: an error means that all were asked or the time was up.
    """
    with virtual_time() as clock, asyncio.Runner() as runner:
        members = [Member(number, *script, clock=clock) for number, script in enumerate(scripts)]
        several = FallbackScorer(*members)
        for seconds, deadline, count, in_loop in calls:
            clock.now += seconds
            began, asked = clock.now, [len(member.given) for member in members]
            documents = [str(number) for number in range(count)]
            error: BaseException | None = None
            try:
                if in_loop:
                    scores = runner.run(several.ascore("q", documents, deadline=deadline))
                else:
                    scores = several.score("q", documents, deadline=deadline)
                by = scores[0] // 1000
                assert scores == members[int(by)].scores(documents)
                assert several.model_name == f"model-{int(by)}"
            except RerankError as raised:
                error = raised
            times = [len(member.given) - before for member, before in zip(members, asked, strict=True)]
            assert set(times) <= {0, 1}
            assert deadline is None or clock.now <= began + deadline + 1e-6
            if isinstance(error, BackendError) and not isinstance(error, BackendRejected):
                assert all(times) or (deadline is not None and clock.now >= began + deadline - 1e-6)


class TestThreads:
    """Many callers share one."""

    def test_a_scorer_that_goes_away_and_comes_back_costs_no_call(self, caplog: pytest.LogCaptureFixture):
        """8 threads of 250 calls each: all exact, each from one scorer, and a resting one is asked hardly ever."""
        gone, asked = threading.Event(), []

        class Flaky(Member):
            def _work(self, documents: list[str], until: float | None) -> list[float]:
                if gone.is_set():
                    asked.append(self)
                    raise BackendUnavailable("nobody home")
                return self.scores(documents)

        first, second = Flaky(1), Member(2)
        both = FallbackScorer(first, second)
        results: list[list[float]] = []

        def call() -> None:
            for number in range(250):
                if number == 100:
                    gone.set()
                results.append(both.score("q", ["1", "2", "3"]))

        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        documents = ["1", "2", "3"]
        assert len(results) == 2000
        assert all(scores in (first.scores(documents), second.scores(documents)) for scores in results)
        # Eight at once at the most before the first failure is known; 32 is a machine that slept through rests.
        assert 1 <= len(asked) == len(warnings_of(caplog)) <= 32
        gone.clear()
        assert both.score("q", documents) in (first.scores(documents), second.scores(documents))


class TestBeingAScorer:
    """Names, copies, pickles, closing."""

    def test_the_model_is_that_of_the_last_answer(self, ask: Ask, clock: Clock):
        """The first one's before there is any; a failure changes nothing."""
        both = FallbackScorer(
            Member(1, MOVING[0], 0, *MOVING[:1] * 2, clock=clock), Member(2, 0, MOVING[0], clock=clock)
        )
        names = [both.model_name]
        for _ in range(2):
            ask(both)
            names.append(both.model_name)
            clock.now += 1
        with pytest.raises(BackendUnavailable):
            ask(both)
        assert [*names, both.model_name] == ["model-1", "model-2", "model-1", "model-1"]

    def test_no_scorers_are_refused(self):
        """At construction."""
        with pytest.raises(ConfigError, match="at least one"):
            FallbackScorer()

    @pytest.mark.parametrize("wrong", [None, "http://localhost:8000", WordOverlap, [WordOverlap()]])
    def test_what_is_no_scorer_is_refused_with_its_position(self, wrong: object):
        """A list is the likely mistake."""
        with pytest.raises(TypeError, match=rf"scorers\[1\] must be a Scorer, got {type(wrong).__name__}; pass them"):
            FallbackScorer(WordOverlap(), wrong)

    def test_its_repr_shows_the_scorers(self):
        """In their order."""
        assert repr(FallbackScorer(Member(1), FallbackScorer(Member(2)))) == (
            "FallbackScorer(Member(1), FallbackScorer(Member(2)))"
        )

    def test_fallbacks_nest(self, ask: Ask):
        """One is a scorer like any other."""
        inner = FallbackScorer(Member(1, MOVING[0]), Member(2, MOVING[1]))
        outer = FallbackScorer(inner, Member(3))
        assert ask(outer) == [3001.0, 3002.0]
        assert outer.model_name == "model-3"

    def test_the_same_scorer_may_stand_twice(self, ask: Ask):
        """A second try, so to speak; each place rests for itself."""
        twice = Member(1, MOVING[0])
        assert ask(FallbackScorer(twice, twice)) == [1001.0, 1002.0]
        assert len(twice.given) == 2

    def test_a_copy_is_the_scorer_itself(self):
        """As with all scorers."""
        both = FallbackScorer(Member(1), Member(2))
        assert copy.copy(both) is both
        assert copy.deepcopy(both) is both

    def test_a_pickle_has_the_scorers_and_no_rests(self):
        """Another process finds out for itself what works."""
        both = FallbackScorer(WordOverlap(), WordOverlap())
        both._members[0].back_off.failed()
        assert both.score("a", "a") == [1.0]
        assert both._members[0].scorer.calls == []
        loaded = pickle.loads(pickle.dumps(both))  # noqa: S301 - our own
        assert loaded.score("a", "a") == [1.0]
        assert len(loaded._members[0].scorer.calls) == 1
        both.close()
        with pytest.raises(RerankError, match="closed"):
            pickle.loads(pickle.dumps(both)).score("a", "a")  # noqa: S301 - our own

    def test_closing_closes_all_once(self):
        """By the same door; scoring afterwards is an error."""
        members = Member(1), Member(2)
        with FallbackScorer(*members) as both:
            pass
        both.close()
        assert [member.closed for member in members] == [["close"], ["close"]]
        with pytest.raises(RerankError, match="FallbackScorer is closed"):
            both.score("q", "1")

        async def use(*members: Member) -> None:
            async with FallbackScorer(*members) as both:
                pass
            await both.aclose()

        members = Member(1), Member(2)
        asyncio.run(use(*members))
        assert [member.closed for member in members] == [["aclose"], ["aclose"]]

    @pytest.mark.parametrize("close", [FallbackScorer.close, lambda several: asyncio.run(several.aclose())])
    def test_closing_goes_on_where_one_fails_to(self, close: Callable[[FallbackScorer], None]):
        """All are closed, in order; then the last error is raised."""
        order = []

        class Stuck(Member):
            def _close(self) -> None:
                order.append(self.number)
                raise OSError(f"{self.number} is stuck")

            async def _aclose(self) -> None:
                self._close()

        last = Member(3)
        several = FallbackScorer(Stuck(1), Stuck(2), last)
        with pytest.raises(OSError, match="2 is stuck"):
            close(several)
        assert order == [1, 2]
        assert len(last.closed) == 1
        close(several)  # it counts as closed all the same
        assert order == [1, 2]
