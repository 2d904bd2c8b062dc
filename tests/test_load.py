"""The load generator of `make load` counts rightly: on calls whose times are known."""

import asyncio
import math

import pytest

from benchmarks.load.traffic import Outcome, Traffic, closed, opened, quantile
from rag_rerank import BackendUnavailable, DeadlineExceeded


async def test_a_closed_loop_has_as_many_calls_under_way_as_callers():
    """Each calls again when it is answered, until there were enough."""
    under_way, most = 0, 0

    async def ask(number: int) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.01)
        under_way -= 1

    traffic = await closed(ask, 4, 60, 20)
    assert (most, len(traffic.outcomes)) == (4, 20)
    assert traffic.rate == pytest.approx(20 / traffic.stop)
    assert traffic.quantile(0) >= 0.01


async def test_a_closed_loop_ends_with_its_time():
    """What is under way then is waited for, and counts."""
    traffic = await closed(lambda number: asyncio.sleep(0.2), 3, 0.1, 1000)
    assert len(traffic.answered) == 3
    assert traffic.stop >= 0.2


async def test_an_open_loop_does_not_wait_for_answers():
    """100 calls a second of many seconds each: all are under way at once."""
    traffic = await opened(lambda number: asyncio.sleep(5), 100, 0.5)
    assert traffic.under_way == len(traffic.outcomes) > 20
    assert traffic.rate == 0  # none was answered within the half second


async def test_time_counts_from_when_a_call_was_due():
    """A sender that is kept from sending makes calls late, not fast."""

    async def ask(number: int) -> None:
        if number == 0:
            await asyncio.to_thread(lambda: None)
            _block(0.3)

    traffic = await opened(ask, 100, 0.5)
    assert traffic.quantile(1) >= 0.2


def _block(seconds: float) -> None:
    import time

    time.sleep(seconds)


async def test_our_errors_are_counted_and_others_end_the_run():
    """By their names."""

    async def ask(number: int) -> None:
        if number % 3 == 1:
            raise BackendUnavailable("no")
        if number % 3 == 2:
            raise DeadlineExceeded("late")

    traffic = await closed(ask, 1, 60, 9)
    assert traffic.errors == {"BackendUnavailable": 3, "DeadlineExceeded": 3}
    assert len(traffic.answered) == 3

    async def broken(number: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await closed(broken, 1, 60, 1)


def test_what_ends_while_it_warms_up_or_afterwards_does_not_count():
    """Goodput is of the time between."""
    traffic = Traffic(1.0, 3.0, [Outcome(0.0, 0.5), Outcome(0.5, 1.0), Outcome(1.0, 1.5, "E"), Outcome(2.5, 1.0)])
    assert traffic.answered == [1.0]
    assert traffic.rate == 0.5


def test_quantiles():
    """The value that a share does not exceed; none of nothing."""
    assert [quantile([1, 2, 3, 4], share) for share in (0, 0.5, 0.95, 1)] == [1, 3, 4, 4]
    assert math.isnan(quantile([], 0.5))
