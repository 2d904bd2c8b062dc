"""Calls at a time, or calls per second, and what became of them.

A closed loop has a number of callers, each of whom calls again once it is answered: it finds how much a server can do.
An open loop sends calls when they are due, whether the last ones are answered or not, as users do: it shows what
happens beyond that. Its latencies count from when a call was due, so that a late sender hides nothing.
"""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from rag_rerank import RerankError

Ask = Callable[[int], Awaitable[object]]
"""Makes the call of this number."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call.

    Attributes:
        began: Seconds from the beginning of the traffic until it was due.
        seconds: From then until it ended.
        error: The name of the error's class; None for scores.
    """

    began: float
    seconds: float
    error: str | None = None


@dataclass
class Traffic:
    """Calls over a while, and what became of them.

    Attributes:
        start, stop: Seconds from the beginning between which what ends is counted.
        outcomes: In the order in which they ended.
        under_way: The most calls that were under way at once.
    """

    start: float
    stop: float
    outcomes: list[Outcome] = field(default_factory=list)
    under_way: int = 0

    @property
    def answered(self) -> list[float]:
        """Seconds of the calls that got scores within the time that counts, sorted."""
        ends = ((each.began + each.seconds, each) for each in self.outcomes if each.error is None)
        return sorted(each.seconds for end, each in ends if self.start <= end <= self.stop)

    @property
    def rate(self) -> float:
        """Calls answered in a second: goodput."""
        return len(self.answered) / (self.stop - self.start)

    @property
    def errors(self) -> Counter[str]:
        """How many calls ended in each kind of error, whenever."""
        return Counter(each.error for each in self.outcomes if each.error is not None)

    def quantile(self, share: float) -> float:
        """Seconds within which this share of the answered calls was answered; NaN where none was."""
        return quantile(self.answered, share)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that this share of sorted values does not exceed; NaN of none."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


async def closed(
    ask: Ask, callers: int, seconds: float, most: int, *, until: asyncio.Task[Traffic] | None = None
) -> Traffic:
    """So many callers, for so long or until there were `most` calls; what is under way then is waited for.

    `until` is something that ends it earlier.
    """
    traffic, numbers, began = Traffic(0.0, seconds), itertools.count(), time.perf_counter()

    async def caller() -> None:
        while (now := time.perf_counter() - began) < seconds and not (until and until.done()):
            if (number := next(numbers)) >= most:
                break
            await _ask(traffic, ask, number, now, began)

    await asyncio.gather(*(caller() for _ in range(callers)))
    traffic.under_way = callers
    traffic.stop = time.perf_counter() - began  # of calls that take longer than all this, none would count before
    return traffic


async def opened(ask: Ask, rate: float, seconds: float, *, warming_up: float = 0.0, seed: int = 0) -> Traffic:
    """Calls that come by chance (a Poisson process), `rate` a second; the first ones are not counted."""
    chance, traffic, began = random.Random(seed), Traffic(warming_up, seconds), time.perf_counter()  # noqa: S311
    due, tasks = 0.0, []
    for number in itertools.count():
        due += chance.expovariate(rate)
        if due >= seconds:
            break
        await asyncio.sleep(max(0.0, due - (time.perf_counter() - began)))
        tasks.append(asyncio.create_task(_ask(traffic, ask, number, due, began)))
        traffic.under_way = max(traffic.under_way, sum(not task.done() for task in tasks))
    await asyncio.gather(*tasks)
    return traffic


async def _ask(traffic: Traffic, ask: Ask, number: int, due: float, began: float) -> None:
    error: str | None = None
    try:
        await ask(number)
    except RerankError as raised:  # anything else is a fault, and ends the run
        error = type(raised).__name__
    traffic.outcomes.append(Outcome(due, time.perf_counter() - began - due, error))
