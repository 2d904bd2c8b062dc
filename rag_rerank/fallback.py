"""FallbackScorer: where one scorer fails, the next one takes over the whole call."""

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from typing import Any, NamedTuple

from rag_rerank.backoff import LONGEST_REST, BackOff
from rag_rerank.errors import (
    FAILED_STATUSES,
    BackendError,
    BackendRejected,
    BackendUnavailable,
    BadReply,
    ConfigError,
    ContentError,
    DeadlineExceeded,
    short_name,
)
from rag_rerank.identity import Identity
from rag_rerank.scorer import Scorer

logger = logging.getLogger(__name__)

# What another scorer may do better. A refusal (`BackendRejected`) is an answer: another model's scores would hide it.
_MOVING = (BackendUnavailable, DeadlineExceeded, BadReply)


class _Member(NamedTuple):
    scorer: Scorer
    back_off: BackOff


class FallbackScorer(Scorer):
    """Asks the first of several scorers that works, such as a vLLM server and then a model in this process.

    A call that ends in `BackendUnavailable`, `DeadlineExceeded`, `BadReply` or a refusal with the status 424 or 5xx
    moves as a whole to the next scorer, with one logged warning: scores of two scorers are never mixed. Whatever else
    goes wrong is raised at once: a refused request or document (`BackendRejected`), a wrong setting or argument. Where
    a query or document holds an image, scorers whose models read text only are passed over.

    A scorer that failed rests for 1, 2, 4 ... 30 s (`BackOff`): meanwhile calls pass it over and try it only where all
    the others fail or rest, too. Where it ran out of time it rests for as long as it had had, at most: a caller in a
    hurry must not take a healthy scorer from the others.

    A call's `deadline` bounds the whole. What is left of it is shared equally among the scorers that are not resting:
    with two of them and 10 s, the first may take 5, the second the remainder. Without one, and with an infinite one,
    each scorer has its own default.

    Where all fail, the error raised is of the last one's kind; its cause is an `ExceptionGroup` with the errors of all
    that were tried. Where just one was, its error is raised as it is.

    Args:
        *scorers: At least one, the best first. They may be used elsewhere, too; closing this one closes them. For it to
            be pickled, they must be such that they can.

    Raises:
        ConfigError: No scorers.
        TypeError: Something is no scorer; the message names the position.
    """

    _locates_failures = True  # each of the scorers has done so

    def __init__(self, *scorers: Scorer) -> None:
        if not scorers:
            raise ConfigError("FallbackScorer needs at least one scorer: FallbackScorer(first, second)")
        for position, scorer in enumerate(scorers):
            if not isinstance(scorer, Scorer):
                said = f"scorers[{position}] must be a Scorer, got {type(scorer).__name__}"
                raise TypeError(f"{said}; pass them one by one: FallbackScorer(first, second)")
        self._members = tuple(_Member(scorer, BackOff()) for scorer in scorers)
        self._answered = scorers[0]
        self.accepts_images = any(scorer.accepts_images for scorer in scorers)  # those that don't are passed over
        # One that has no place for an instruction would score something else.
        self.accepts_instruction = all(scorer.accepts_instruction for scorer in scorers)
        self.remote = all(scorer.remote for scorer in scorers)
        self.calibrated = all(scorer.calibrated for scorer in scorers)

    @property
    def model_name(self) -> str:
        """The model of the scorer that answered last, in whichever thread; the first one's before any has."""
        return self._answered.model_name

    @property
    def listwise(self) -> bool:  # type: ignore[override]  # as that of the scorers
        """Whether any of the scorers' models scores a query's documents together."""
        return any(member.scorer.listwise for member in self._members)

    def identity(self, *, deadline: float | None = None) -> Identity:
        """Say who all of the scorers are; not steady, for any of them may answer."""
        parts = [member.scorer.identity(deadline=deadline) for member in self._members]
        numbered = enumerate(parts, 1)
        facts = {f"{number}. {name}": fact for number, part in numbered for name, fact in part.facts.items()}
        probes = [score for part in parts for score in part.probes]
        return Identity(facts, probes, steady=False, place=" or ".join(dict.fromkeys(part.place for part in parts)))

    # Any: a scorer takes from another what was prepared for it.
    def _score(self, queries: Any, documents: Any, until: float | None, instruction: str | None = None) -> list[float]:
        call = _Call(self, until)
        for member, deadline in call.turns():
            with call.turn(member, deadline):
                return member.scorer.score(queries, documents, instruction=instruction, deadline=deadline)
        raise call.error()

    async def _ascore(
        self, queries: Any, documents: Any, until: float | None, instruction: str | None = None
    ) -> list[float]:
        call = _Call(self, until)
        for member, deadline in call.turns():
            with call.turn(member, deadline):
                return await member.scorer.ascore(queries, documents, instruction=instruction, deadline=deadline)
        raise call.error()

    # A stack runs all of its callbacks, the last one first, even where some of them raise; it raises the last error.
    def _close(self) -> None:
        with ExitStack() as stack:
            for member in reversed(self._members):
                stack.callback(member.scorer.close)

    async def _aclose(self) -> None:
        async with AsyncExitStack() as stack:
            for member in reversed(self._members):
                stack.push_async_callback(member.scorer.aclose)

    def __repr__(self) -> str:
        return f"FallbackScorer({', '.join(repr(member.scorer) for member in self._members)})"


class _Call:
    """One call on its way from scorer to scorer: whose turn it is, for how long, and what came of it."""

    def __init__(self, fallback: FallbackScorer, until: float | None) -> None:
        self._fallback, self._until, self._began = fallback, until, time.monotonic()
        self._failed: list[tuple[Scorer, BackendError]] = []
        self._text_only: ContentError | None = None  # of the first that can't score what this call holds

    def turns(self) -> Iterator[tuple[_Member, float | None]]:
        """Each scorer to be tried, and its seconds, for as long as the one before failed and there is time."""
        waiting = list(self._fallback._members)
        while waiting:
            left = None if self._until is None else self._until - time.monotonic()
            if self._failed and left is not None and left <= 0:
                return
            ready = [member for member in waiting if not member.back_off.resting] or waiting
            # One whose rest has just ended may have been claimed by another call since; the last resort is not asked.
            member = next((member for member in ready if member.back_off.claim()), ready[0])
            deadline = None if left is None else left / len(ready)
            waiting.remove(member)
            for scorer, error in self._failed[-1:]:
                failed, kind = _name(scorer), type(error).__name__
                logger.warning("the call moves from %s to %s: %s: %s", failed, _name(member.scorer), kind, error)
            yield member, deadline

    @contextmanager
    def turn(self, member: _Member, deadline: float | None) -> Iterator[None]:
        """Around a scorer's turn: keeps what came of it, and lets no error out that ends only the turn."""
        began, back_off = time.monotonic(), member.back_off
        try:
            yield
        except _MOVING as error:
            self._failed.append((member.scorer, error))
            share = deadline if isinstance(error, DeadlineExceeded) else None
            back_off.failed(began, longest=LONGEST_REST if share is None else min(share, LONGEST_REST))
            if isinstance(error, BackendUnavailable) and error.retry_after is not None:
                back_off.asked(error.retry_after)
        except BackendRejected as error:
            self._answered(member)
            if (error.status or 0) < 500 and error.status not in FAILED_STATUSES:
                raise
            self._failed.append((member.scorer, error))  # a server that fails over a document has refused nothing
        except ContentError as error:
            # Images were read before the first turn: it is this model that reads text only.
            self._text_only = self._text_only or error
            back_off.worked()
        else:
            self._answered(member)

    def _answered(self, member: _Member) -> None:
        member.back_off.worked()
        self._fallback._answered = member.scorer

    def error(self) -> BackendError | ContentError:
        """Make the error for a call whose last turn is over."""
        if self._text_only is not None and not self._failed:
            return self._text_only
        errors = [error for _, error in self._failed]
        last = errors[-1]
        if len(errors) == 1:
            return last
        tried = f"{len(errors)} of {len(self._fallback._members)} scorers were tried and failed"
        error = copy.copy(last)  # its cause, what the connection or the model said, stays the last one's own
        error.message = f"{tried}, the last of them {_name(self._failed[-1][0])}: {last.message}"
        error.elapsed, error.__cause__ = time.monotonic() - self._began, ExceptionGroup(tried, errors)
        return error


def _name(scorer: Scorer) -> str:
    """Name a scorer by class and model: both scorers may run the same model."""
    return f"{type(scorer).__name__} ({short_name(scorer.model_name)})"
