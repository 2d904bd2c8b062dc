"""When something that failed may be tried again: rests that double, and one trial at the end of each."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

FIRST_REST, LONGEST_REST = 1.0, 30.0  # seconds


class _State(NamedTuple):
    rest: float = 0.0  # how long the latest rest is; 0 for what works
    ends: float = -math.inf
    on_trial: bool = False  # whether somebody has claimed it at the end of a rest and not told yet


class BackOff:
    """Remembers for one server or scorer whether it works, and keeps callers off it for a while after it failed.

    A failure begins a rest of 1 s; the next one after the rest doubles it, up to 30 s. Failures during a rest change
    nothing: they are of calls that were under way already. At the end of a rest one caller gets to try (a half-open
    circuit breaker). If that one never tells, being cancelled for example, the next may try after another rest as long.

    Threads and forked processes may share one, without a lock: the state is one tuple that is replaced as a whole. What
    threads at the same moment may lose, a try too many or one more rest, the next call that tells puts right. A pickle
    carries no state, for another process has another clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._state = _State()

    @property
    def rest_ends(self) -> float:
        """When the latest rest ends or ended, on the clock; minus infinity for what works."""
        return self._state.ends

    @property
    def resting(self) -> bool:
        """Whether it is to be left alone now, because it failed or because another caller is trying it."""
        return self._clock() < self._state.ends

    def claim(self) -> bool:
        """Ask whether the caller may try it now; whoever does tells by `failed` or `worked`.

        True for what works; at the end of a rest for one caller, and the same rest begins anew for the others.
        """
        state, now = self._state, self._clock()
        if now < state.ends:
            return False
        if state.rest:
            self._state = state._replace(ends=now + state.rest, on_trial=True)
        return True

    def failed(self) -> None:
        """Tell that it failed."""
        state, now = self._state, self._clock()
        if state.on_trial or now >= state.ends:  # a trial rests by the clock, but its failure is news
            rest = min(LONGEST_REST, max(FIRST_REST, 2 * state.rest))
            self._state = _State(rest, now + rest)

    def worked(self) -> None:
        """Tell that it worked: all failures are forgotten."""
        self._state = _State()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
