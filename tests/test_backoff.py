"""Rests and trials of `rag_rerank.backoff`, on a clock that the tests turn."""

import math
import os
import pickle
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_rerank.backoff import LONGEST_REST, BackOff
from tests.forking import forked


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def back_off(clock: Clock) -> BackOff:
    return BackOff(clock)


def in_threads(count: int, act: Callable[[], object]) -> list[object]:
    """What `act` gives in that many threads that begin at once."""
    barrier, results = threading.Barrier(count), []

    def run() -> None:
        barrier.wait()
        results.append(act())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class TestRests:
    """A failure begins a rest, each longer than the one before."""

    def test_a_new_one_works_as_far_as_known(self, back_off: BackOff):
        """No failure, no rest, and everybody may try."""
        assert (back_off.resting, back_off.rest_ends) == (False, -math.inf)
        assert [back_off.claim() for _ in range(3)] == [True] * 3
        assert not back_off.resting

    def test_a_failure_begins_a_rest_of_one_second(self, back_off: BackOff, clock: Clock):
        """To the moment: at its end it is over."""
        back_off.failed()
        assert (back_off.resting, back_off.rest_ends) == (True, clock.now + 1)
        assert not back_off.claim()
        clock.now += 0.999
        assert back_off.resting
        assert not back_off.claim()
        clock.now = 1001.0
        assert not back_off.resting

    def test_failures_after_a_rest_double_it_up_to_half_a_minute(self, back_off: BackOff, clock: Clock):
        """1, 2, 4, 8, 16, 30, 30."""
        rests = []
        for _ in range(7):
            back_off.failed()
            rests.append(back_off.rest_ends - clock.now)
            clock.now = back_off.rest_ends
        assert rests == [1, 2, 4, 8, 16, 30, 30]

    def test_failures_during_a_rest_change_nothing(self, back_off: BackOff, clock: Clock):
        """Calls that were under way when the first of them failed say nothing new."""
        for _ in range(8):
            back_off.failed()
            clock.now += 0.1
        assert back_off.rest_ends == 1001.0

    def test_one_success_forgets_all(self, back_off: BackOff, clock: Clock):
        """During a rest, too; the next rest is the first again."""
        for _ in range(3):
            back_off.failed()
            clock.now = back_off.rest_ends
        back_off.failed()
        back_off.worked()
        assert (back_off.resting, back_off.rest_ends) == (False, -math.inf)
        back_off.failed()
        assert back_off.rest_ends == clock.now + 1

    def test_what_others_begin_makes_a_failure_no_older(self, back_off: BackOff, clock: Clock):
        """While it works, everybody may try, and each who fails tells."""
        began = clock.now
        clock.now += 1
        assert back_off.claim()
        back_off.failed(began)
        assert back_off.resting

    def test_what_it_asks_for_lengthens_a_rest_and_no_more(self, back_off: BackOff, clock: Clock):
        """The next is twice what it was before, as ever; a shorter time than is left changes nothing."""
        back_off.failed()
        clock.now = 1001.0
        back_off.failed()
        for asked, ends in ((0.5, 1003.0), (10.0, 1011.0)):
            back_off.asked(asked)
            assert back_off.rest_ends == ends
        clock.now = 1011.0
        back_off.failed()
        assert back_off.rest_ends == 1015.0

    def test_a_rest_that_it_asks_for_ends_in_one_trial(self, back_off: BackOff, clock: Clock):
        """As any, also where it had not failed before."""
        back_off.asked(10.0)
        clock.now += 10
        assert [back_off.claim() for _ in range(2)] == [True, False]

    def test_the_next_to_be_ready_can_be_chosen(self, clock: Clock):
        """Earliest end first; what works is ready before all."""
        works, short, long = BackOff(clock), BackOff(clock), BackOff(clock)
        long.failed()
        clock.now += 1
        long.failed()
        short.failed()
        assert sorted([long, short, works], key=lambda item: item.rest_ends) == [works, short, long]


class TestTrials:
    """At the end of a rest one caller tries, and the others wait for what it tells."""

    @pytest.fixture
    def ready(self, back_off: BackOff, clock: Clock) -> BackOff:
        """One whose second rest, of 2 s, has just ended."""
        for _ in range(2):
            back_off.failed()
            clock.now = back_off.rest_ends
        return back_off

    def test_one_caller_gets_it(self, ready: BackOff, clock: Clock):
        """The same rest begins anew for the others."""
        assert [ready.claim() for _ in range(4)] == [True, False, False, False]
        assert (ready.resting, ready.rest_ends) == (True, clock.now + 2)

    def test_a_trial_that_fails_doubles_the_rest(self, ready: BackOff, clock: Clock):
        """Although it rested by the clock while it was tried; and only once."""
        ready.claim()
        clock.now += 0.5
        ready.failed()
        ready.failed()
        assert ready.rest_ends == clock.now + 4

    def test_a_trial_that_fails_late_doubles_the_rest_too(self, ready: BackOff, clock: Clock):
        """From the moment that it tells."""
        ready.claim()
        clock.now += 20
        ready.failed()
        assert ready.rest_ends == clock.now + 4

    def test_a_trial_that_works_opens_it_for_all(self, ready: BackOff):
        """At once."""
        ready.claim()
        ready.worked()
        assert [ready.claim() for _ in range(3)] == [True] * 3

    def test_a_trial_that_never_tells_is_followed_by_another(self, ready: BackOff, clock: Clock):
        """After a rest as long, not doubled: nothing is known to have failed."""
        for _ in range(3):
            assert ready.claim()
            assert ready.rest_ends == clock.now + 2
            clock.now = ready.rest_ends


@given(st.lists(st.sampled_from(["failed", "worked", "claim"]) | st.floats(0, 40), max_size=60))
def test_no_history_breaks_the_rules(history: list[str | float]):
    """Rests within bounds, a claim for each that works and none for one that rests."""
    clock = Clock()
    back_off = BackOff(clock)
    failures = 0
    for event in history:
        rested, ends = back_off.resting, back_off.rest_ends
        match event:
            case "failed":
                failures += 1
                back_off.failed()
                assert back_off.resting
                assert ends <= back_off.rest_ends
            case "worked":
                failures = 0
                back_off.worked()
                assert not back_off.resting
            case "claim":
                assert back_off.claim() is not rested
                assert back_off.resting is (failures > 0)
            case seconds:
                clock.now += seconds
        if back_off.resting:
            assert 0 < back_off.rest_ends - clock.now <= LONGEST_REST
    if failures:
        clock.now += LONGEST_REST
        assert back_off.claim()  # nothing is given up for ever


class TestSharing:
    """Threads, forks and pickles."""

    def test_threads_that_fail_at_once_are_one_doubling(self, back_off: BackOff, clock: Clock):
        """However they interleave."""
        for rest in (1, 2, 4):
            in_threads(8, back_off.failed)
            assert back_off.rest_ends == clock.now + rest
            clock.now = back_off.rest_ends

    def test_threads_that_claim_at_once_are_about_one(self, back_off: BackOff, clock: Clock):
        """At least one; two only if they look in the same instant."""
        back_off.failed()
        clock.now = back_off.rest_ends
        assert 1 <= in_threads(8, back_off.claim).count(True) <= 8
        assert back_off.rest_ends == clock.now + 1
        assert not back_off.claim()

    def test_what_is_overwritten_leaves_a_valid_state(self, back_off: BackOff, clock: Clock):
        """Eight threads telling this and that for a while: afterwards it rests and is claimed as ever."""

        def tell() -> None:
            for _ in range(200):
                if back_off.claim():
                    back_off.failed()
                    back_off.worked()
                    back_off.failed()
                clock.now += 0.01

        in_threads(8, tell)
        back_off.worked()
        back_off.failed()
        assert back_off.rest_ends == clock.now + 1
        clock.now = back_off.rest_ends
        assert [back_off.claim(), back_off.claim()] == [True, False]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
    def test_a_forked_child_goes_on_by_itself(self, back_off: BackOff):
        """It knows what its parent knew; what it learns stays with it."""
        back_off.failed()

        def child() -> None:
            assert back_off.resting
            back_off.worked()
            assert back_off.claim()

        assert forked(child) == 0
        assert back_off.resting

    def test_a_pickle_starts_fresh(self):
        """On the clock of its own process: neither state nor clock mean anything there."""
        back_off = BackOff(lambda: 1000.0)
        back_off.failed()
        copy = pickle.loads(pickle.dumps(back_off))  # noqa: S301 - our own
        assert (copy.resting, copy.rest_ends) == (False, -math.inf)
        copy.failed()
        assert copy.resting
        assert back_off.resting

    def test_the_default_clock_goes_by_itself(self):
        """Seconds of the monotonic clock."""
        back_off = BackOff()
        back_off.failed()
        assert back_off.resting
        assert not back_off.claim()
