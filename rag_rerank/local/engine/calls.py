"""Calls that share a model: what each still wants to have run, and whose turn it is.

A call of 100,000 documents must not keep one of ten waiting, nor hold all its tokens in memory. So calls are tokenised
a part at a time, and work is taken from all of them in rounds of about one batch: a quarter of each round belongs to
the call that has waited longest, the rest to those that are nearest to their end.
"""

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rag_rerank import telemetry
from rag_rerank.errors import ContentError, RerankError
from rag_rerank.inputs.multimodal import Prepared
from rag_rerank.local.models.model import InputError, Inputs, Model
from rag_rerank.local.transformer.batching import TokenSequence

if TYPE_CHECKING:
    from torch import Tensor

# Documents that are tokenised at a time: enough for sorting by length, few enough that their tokens (about 36 bytes
# each as Python numbers) and the tokenizer's own notes on them stay within a few megabytes.
PART = 256


class WaitingCall:
    """One call that waits, or of which a part has been run. Pairs that occur twice are scored once.

    There is one query for all documents, or one each; with no documents it only waits for the model to be loaded.
    """

    def __init__(
        self, queries: Sequence[Prepared], documents: Sequence[Prepared], instruction: str | None = None
    ) -> None:
        self.future: Future[list[float]] = Future()
        self.texts_truncated = 0  # those longer than what the model reads
        self._given = {"queries": queries, "documents": documents}
        self._instruction = instruction
        self._begun = 0  # different pairs that have been tokenised
        self._tokens = 0  # of these
        self._scored = 0
        self._ready: deque[Item] = deque()
        self._observed = telemetry.current.get()  # of the thread or task that calls

    @functools.cached_property
    def _different(self) -> tuple[list[tuple[Prepared, Prepared]], list[int]]:
        """The different pairs, and the place among them of each that was given.

        Found by the engine's thread: the caller's may be an event loop's. Pair by pair: while one call of C hashes all
        texts, no other thread runs. Images are hashed by their bytes, which Python does once for each bytes object.
        """
        found: dict[tuple[Prepared, Prepared], int] = {}
        pairs = zip(itertools.cycle(self._given["queries"]), self._given["documents"], strict=False)
        places = [found.setdefault(pair, len(found)) for pair in pairs]
        return list(found), places

    @functools.cached_property
    def _scores(self) -> list[float]:
        return [0.0] * len(self._different[0])

    @property
    def unscored(self) -> int:
        """How many different pairs have no score yet."""
        return len(self._different[0]) - self._scored

    @property
    def waits(self) -> bool:
        """Whether it still has something to run that nobody has taken."""
        return bool(self._ready) or self._begun < len(self._different[0])

    def tokens_left(self, model: Model) -> int:
        """Count the tokens that it still wants to have run; texts that were not read yet are taken to be as long."""
        if not self._ready and self.waits:
            self._tokenise(model)
        unread = len(self._different[0]) - self._begun
        return sum(len(item.sequence.ids) for item in self._ready) + unread * self._tokens // max(1, self._begun)

    def take(self, model: Model, tokens: int) -> list["Item"]:
        """Take the next sequences to run: at least one if there is any, then no more than `tokens` hold."""
        taken: list[Item] = []
        if self._observed is not None:
            self._observed.start()
        while self.waits:
            if not self._ready:
                self._tokenise(model)
                continue
            length = len(self._ready[0].sequence.ids)
            if taken and length > tokens:
                break
            taken.append(self._ready.popleft())
            tokens -= max(1, length)
        return taken

    def _tokenise(self, model: Model) -> None:
        one, end = len(self._given["queries"]) == 1, self._begun + PART
        if model.listwise:  # all at once, and equal ones in their places
            documents = self._given["documents"]
            pairs = list(zip(itertools.cycle(self._given["queries"]), documents, strict=False))
            self._different, end = (pairs, list(range(len(pairs)))), len(pairs)
        pairs = self._different[0][self._begun : end]
        queries = [query for query, _ in pairs[: 1 if one else None]]
        try:
            inputs = model.inputs(queries, [document for _, document in pairs], self._instruction)
        except InputError as error:
            position = self._given[error.side].index(error.value)
            raise ContentError(f"{error.side}[{position}] {error}") from error
        part = _Part(self, self._begun, inputs, len(inputs.sequences))
        self._begun += len(pairs)
        self._tokens += sum(len(sequence.ids) for sequence in inputs.sequences)
        # Longest first, so that the batch that needs most memory comes first, and if it fits, so do the others.
        order = sorted(range(len(inputs.sequences)), key=lambda position: -len(inputs.sequences[position].ids))
        self._ready.extend(Item(part, position) for position in order)
        self.texts_truncated += sum(sequence.truncated for sequence in inputs.sequences)

    def take_scores(self, start: int, scores: Sequence[float]) -> None:
        """Keep the scores of one part; with the last one, the call is finished."""
        self._scores[start : start + len(scores)] = scores
        self._scored += len(scores)
        if self.unscored == 0:
            self.succeed([self._scores[place] for place in self._different[1]])

    def succeed(self, scores: list[float]) -> None:
        """Give the caller its scores."""
        with contextlib.suppress(InvalidStateError):  # the caller has cancelled it meanwhile
            self.future.set_result(scores)

    def fail(self, error: RerankError) -> None:
        """Give the caller an error."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(slots=True, eq=False)
class _Part:
    """Documents of one call that were tokenised together."""

    call: WaitingCall
    start: int
    inputs: Inputs
    missing: int
    outputs: "Tensor | None" = None


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence to run, and where its output belongs."""

    part: _Part
    position: int

    @property
    def call(self) -> WaitingCall:
        """The call that it is of."""
        return self.part.call

    @property
    def sequence(self) -> TokenSequence:
        """What to run."""
        return self.part.inputs.sequences[self.position]

    def take(self, output: "Tensor") -> None:
        """Keep its output, ``[size]`` on the CPU; with its part's last one, the call gets the scores."""
        part = self.part
        if part.outputs is None:
            part.outputs = output.new_empty((len(part.inputs.sequences), len(output)))
        part.outputs[self.position] = output
        part.missing -= 1
        if part.missing == 0:
            part.call.take_scores(part.start, part.inputs.scores(part.outputs))


_Taken = tuple[WaitingCall, list[Item] | BaseException]
"""A call and its items, or the error for its caller."""


def next_round(calls: Sequence[WaitingCall], model: Model, tokens: int) -> list[_Taken]:
    """Take about so many tokens from some of the calls, which are in the order in which they came."""
    taken: list[_Taken] = []
    shares = [(call, tokens // 4) for call in calls[:1]] if len(calls) > 1 else []
    shares += [(call, tokens) for call in sorted(calls, key=lambda call: call.unscored)]  # stable: else first come
    for call, share in shares:
        if tokens <= 0:
            break
        try:
            items = call.take(model, min(share, tokens))
        except BaseException as error:  # noqa: BLE001 - whatever a tokenizer raises, a Rust panic, is this caller's
            taken.append((call, error))
            continue
        tokens -= sum(len(item.sequence.ids) for item in items)
        taken.append((call, items))
    return taken
