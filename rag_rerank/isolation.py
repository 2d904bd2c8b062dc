"""Whose fault a failure is: found out by asking again with less, the same for every back end.

A back end that knows which documents are to blame says so: it gives their errors in the place of their scores, or
raises one error with `indices` and `scores`. Any other failure that one
pair may have caused is narrowed down: first to queries, then to the documents of one. Whether it is the server or the
model that fails is asked once, with a text that nothing refuses.
"""

import copy
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

from rag_rerank.errors import (
    FAILED_STATUSES,
    AuthError,
    BackendError,
    BackendRejected,
    BackendUnavailable,
    BadReply,
    ContentError,
    DocumentRejected,
    RerankError,
)
from rag_rerank.inputs import NEUTRAL
from rag_rerank.inputs.multimodal import Contents

_PROBE = [NEUTRAL]

Outcome = float | RerankError
"""Of one pair: its finite score, or why it has none."""

Pairs = tuple[Contents, Contents]
"""One query for all documents or one each, and the documents."""


class Asking:
    """A call that asks a back end until each of its pairs has an outcome: the loop around it decides how to wait.

    `pairs` is what to ask next, None when all is done; then `outcomes` has one for each document. Where a `Scorer` is
    `listwise`, which may not be known before the first answer, documents of one query are never asked about apart.
    Errors that are `located` say for themselves what they concern, and nothing is asked again.
    """

    def __init__(self, queries: Contents, documents: Contents, *, scorer: Any, located: bool) -> None:
        self._scorer = scorer
        self._steps = _isolate(queries, documents, listwise=lambda: scorer.listwise, located=located)
        self.pairs: Pairs | None = next(self._steps) if documents else None
        self.outcomes: list[Outcome] = []

    def take(self, reply: Sequence[Outcome] | RerankError) -> None:
        """Take what came of `pairs`."""
        try:
            self.pairs = self._steps.send(reply)
        except StopIteration as end:
            self.pairs, self.outcomes = None, end.value
        for outcome in self.outcomes:
            if isinstance(outcome, BackendError) and outcome.model is None:
                outcome.model = self._scorer.model_name

    def fail(self, error: Exception) -> None:
        """Take an error; raise what is none of ours, but that a probe fails only says that nothing works."""
        if isinstance(error, RerankError):
            self.take(error)
        elif self.pairs is not None and self.pairs[1] is _PROBE:
            self.take(BackendError(str(error)))
        else:
            raise error


def _isolate(
    queries: Contents, documents: Contents, *, listwise: Callable[[], bool], located: bool
) -> Generator[Pairs, Sequence[Outcome] | RerankError, list[Outcome]]:
    """Yield what to ask, take what came of it; one pair of n that fails costs about 2 log2(n) questions more."""
    outcomes: list[Outcome] = [math.nan] * len(documents)
    works = False  # whether a neutral pair is known to get a score
    waiting: list[Sequence[int]] = [range(len(documents))]
    while waiting:
        positions = waiting.pop()
        reply = yield _pairs(queries, documents, positions)
        found = _outcomes(reply, len(positions))
        if isinstance(found, RerankError):
            parts = [] if located or not _may_be_one_pairs(found) else _by_query(queries, positions)
            if len(parts) > 1:
                works = works or not isinstance((yield _PROBE, _PROBE), RerankError)
                parts = parts if works else []
            elif parts and len(positions) > 1 and not listwise() and not isinstance(found, ContentError):
                # Where the query fails with any document, it is to blame; or the back end is.
                query = queries[0 if len(queries) == 1 else positions[0]]
                middle = len(positions) // 2
                blameless = not isinstance((yield [query], _PROBE), RerankError)
                parts = [positions[:middle], positions[middle:]] if blameless else []
            else:
                parts = []
            waiting.extend(reversed(parts))
            found = [found] * len(positions)
        for position, outcome in zip(positions, found, strict=True):
            outcomes[position] = outcome
    return outcomes


def failure(outcomes: Sequence[Outcome]) -> RerankError | None:
    """Join the errors among one query's outcomes to one error; None where each has a score.

    Documents that failed while others did not become a `DocumentRejected`, or a `BadReply` for scores that are not
    finite, with their `indices` and the `scores` of the others.
    """
    failed = {position: outcome for position, outcome in enumerate(outcomes) if isinstance(outcome, RerankError)}
    if not failed:
        return None
    errors = list(dict.fromkeys(failed.values()))
    first = errors[0]
    whole = next((error for error in errors if not _may_be_one_pairs(error)), None)
    if whole is not None:
        return whole
    if not isinstance(first, BackendError):
        return first
    located = bool(first.scores) or (isinstance(first, DocumentRejected) and first.reason is not None)
    if len(errors) == 1 and len(failed) == len(outcomes) and not located:
        return first
    scores = [outcome if isinstance(outcome, float) else None for outcome in outcomes]
    if len(errors) == 1 and first.scores == tuple(scores):
        return first  # the back end's own, which says it already
    places = f"documents[{next(iter(failed))}]" + (f" and {len(failed) - 1} more" if len(failed) > 1 else "")
    facts = {name: value for name, value in vars(first).items() if name != "message"}
    facts |= {"indices": tuple(failed), "scores": tuple(scores)}
    if isinstance(first, BadReply):
        joined: BackendError = BadReply(f"{places} {first.reason or f'got no score: {first.message}'}", facts)
    else:
        joined = DocumentRejected(f"{places} rejected: {first.reason or first.message}", facts)
    joined.__cause__ = first.__cause__ if located else first
    return joined


def naming_query(error: RerankError, position: int) -> RerankError:
    """Copy an error, with its query's position before the message and, for a `BackendError`, in `query`."""
    if not isinstance(error, BackendError):
        named: RerankError = type(error)(f"queries[{position}]: {error}")
        named.__cause__ = error
        return named
    told = copy.copy(error)
    told.message = f"queries[{position}]: {error.message}"
    told.query = position
    told.__cause__ = error.__cause__
    return told


def _pairs(queries: Contents, documents: Contents, positions: Sequence[int]) -> Pairs:
    whole = len(positions) == len(documents)
    asked = queries if whole or len(queries) == 1 else [queries[position] for position in positions]
    if not whole and len(asked) > 1 and all(query == asked[0] for query in asked):
        asked = asked[:1]
    return asked, documents if whole else [documents[position] for position in positions]


def _outcomes(reply: Sequence[Outcome] | RerankError, count: int) -> list[Outcome] | RerankError:
    """Read the outcomes off a reply; or give an error back that does not say whose fault it is."""
    if not isinstance(reply, RerankError):
        if len(reply) == count:
            return [each if isinstance(each, RerankError) else _finite(float(each)) for each in reply]
        wrong = BadReply(f"the back end gave {len(reply)} scores for {count} documents")
        return [wrong] * count  # its own fault whatever it is asked: not to be mended by asking for less
    if isinstance(reply, BackendError) and reply.indices and len(reply.scores) == count:
        return [reply if score is None else _finite(score) for score in reply.scores]
    return reply


def _finite(score: float) -> Outcome:
    if math.isfinite(score):
        return score
    remedy = 'Half precision may have overflowed: try dtype="float32".'
    error = BadReply(f"a document got the score {score}", remedy=remedy)
    error.reason = f"got the score {score}"
    return error


def _may_be_one_pairs(error: RerankError) -> bool:
    """Tell what one query or document may have caused from what no other input would have changed."""
    if isinstance(error, BackendError) and error.whole:
        return False
    if isinstance(error, BackendUnavailable):
        return error.status in FAILED_STATUSES
    if isinstance(error, BackendRejected | BadReply):
        return not isinstance(error, AuthError)
    return type(error) is BackendError or isinstance(error, ContentError)


def _by_query(queries: Contents, positions: Sequence[int]) -> list[Sequence[int]]:
    """Halves of the positions with no query in both, where there are several; else all of them as one."""
    asked = queries[:1] if len(queries) == 1 else [queries[position] for position in positions]
    changes = [place for place in range(1, len(asked)) if asked[place] != asked[place - 1]]
    if not changes:
        return [positions]
    middle = min(changes, key=lambda place: abs(place - len(asked) / 2))
    return [positions[:middle], positions[middle:]]
