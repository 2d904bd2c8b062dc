"""When something that failed may be tried again: rests that double, and one trial at the end of each."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

FIRST_REST, LONGEST_REST = 1.0, 30.0  # seconds


class _State(NamedTuple):
    rest: float = 0.0  # how long the latest rest is; 0 for what works
    ends: float = -math.inf
    since: float = -math.inf  # what began before this moment tells nothing new


class BackOff:
    """Remembers for one server or scorer whether it works, and keeps callers off it for a while after it failed.

    A failure begins a rest of 1 s; the next one after the rest doubles it, up to 30 s. Concurrent failures count once:
    what began before the latest news of it, or during a rest, changes nothing by failing. At the end of a rest one
    caller gets to try (a half-open circuit breaker). If that one never tells, the next may after another rest as long.

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
            self._state = _State(state.rest, now + state.rest, now)
        return True

    def failed(self, began: float | None = None, *, longest: float = LONGEST_REST) -> None:
        """Tell that it failed, in what `began` at that moment (None: now); it rests for `longest` seconds at most."""
        state, now = self._state, self._clock()
        if (now if began is None else began) >= state.since:
            rest = min(longest, max(FIRST_REST, 2 * state.rest))
            self._state = _State(rest, now + rest, now + rest)

    def asked(self, seconds: float) -> None:
        """Tell that it asked to be left alone for so long."""
        state, ends = self._state, self._clock() + seconds
        if ends > state.ends:
            self._state = _State(state.rest or FIRST_REST, ends, ends)

    def worked(self) -> None:
        """Tell that it worked: all failures are forgotten."""
        self._state = _State(since=self._clock())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
