"""One thread that owns a model: it loads it, and scores what callers hand in, in common batches.

Why one thread: fast tokenizers answer "Already borrowed" when two threads share one, and two forward passes at once on
one device take longer than one after the other. Callers get a future each. Every round takes all the work that waits,
cuts it into batches by length (not by caller), and gives each call its scores as soon as its last sequence has run.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rag_rerank.errors import BackendError, RerankError
from rag_rerank.local.model import Inputs, Model, TokenSequence

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, eq=False)
class _Work:
    """One call on its way through the engine."""

    queries: list[str]
    documents: list[str]
    future: "Future[list[float]]" = field(default_factory=Future)
    inputs: Inputs | None = None
    outputs: "Tensor | None" = None
    missing: int = 0  # sequences that have not run yet

    def fail(self, error: BaseException) -> None:
        _settle(self.future.set_exception, error)


class Engine:
    """A model in a thread of its own.

    Args:
        load: Makes the model; called in the thread when the first work comes, and again after it failed.
        name: For the thread's name and for errors.
    """

    def __init__(self, load: Callable[[], Model], *, name: str) -> None:
        self._inbox: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        # The thread holds the inbox, not the engine: whoever drops the engine can have it collected and closed.
        self._thread = threading.Thread(
            target=_serve, args=(load, self._inbox, name), name=f"rag_rerank {name}", daemon=True
        )
        self._thread.start()

    def submit(self, queries: list[str], documents: list[str]) -> "Future[list[float]]":
        """Hand in one call; no documents only loads the model. Cancelling the future takes the work back, even half done."""
        work = _Work(queries, documents)
        self._inbox.put(work)
        return work.future

    def close(self) -> None:
        """Stop after the batch that is running; work that waits fails."""
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _serve(load: Callable[[], Model], inbox: "queue.SimpleQueue[_Work | None]", name: str) -> None:
    model: Model | None = None
    while True:
        round_of_work, closing = _take(inbox)
        if closing:
            for work in round_of_work:
                work.fail(RerankError(f"The scorer of {name} was closed while this call waited."))
            return
        try:
            model = model or load()
        except Exception as error:
            for work in round_of_work:
                work.fail(error)
            continue
        _score_together(model, round_of_work, name)


def _take(inbox: "queue.SimpleQueue[_Work | None]") -> tuple[list[_Work], bool]:
    """All the work that waits, at least one; and whether the engine is to stop."""
    taken = [inbox.get()]
    while not inbox.empty():
        taken.append(inbox.get())
    return [work for work in taken if work is not None], None in taken


def _score_together(model: Model, round_of_work: list[_Work], name: str) -> None:
    pool: list[tuple[_Work, int]] = []
    for work in round_of_work:
        if not work.documents:
            _settle(work.future.set_result, [])
        elif not work.future.done():
            try:
                work.inputs = model.inputs(work.queries, work.documents)
            except Exception as error:
                work.fail(_as_backend_error(error, name))
                continue
            work.missing = len(work.inputs.sequences)
            pool += [(work, position) for position in range(work.missing)]
    for batch in batches([len(_sequence(item).ids) for item in pool], model.token_budget):
        wanted = [pool[position] for position in batch if not pool[position][0].future.done()]
        if not wanted:
            continue
        try:
            _hand_out(wanted, model.run([_sequence(item) for item in wanted]))
        except Exception as error:
            for work, _ in wanted:
                work.fail(_as_backend_error(error, name))


def _sequence(item: tuple[_Work, int]) -> TokenSequence:
    work, position = item
    assert work.inputs is not None  # set before anything of it entered the pool
    return work.inputs.sequences[position]


def _hand_out(wanted: list[tuple[_Work, int]], outputs: "Tensor") -> None:
    """Put each output where its call expects it; finish the calls that were waiting for their last one."""
    for row, (work, position) in enumerate(wanted):
        assert work.inputs is not None
        if work.outputs is None:
            work.outputs = outputs.new_empty((len(work.inputs.sequences), outputs.shape[1]))
        work.outputs[position] = outputs[row]
        work.missing -= 1
        if work.missing == 0:
            _settle(work.future.set_result, work.inputs.scores(work.outputs))


def batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group sequences of like length so that little is padded.

    Args:
        lengths: Length of each sequence, in tokens.
        token_budget: Most tokens in a batch after padding to its longest. A longer sequence gets a batch of its own.

    Returns:
        Positions in `lengths`, each exactly once, longest first: the batch that needs most memory comes first, and if it
        fits, so does the rest.
    """
    grouped: list[list[int]] = []
    room = 0
    for position in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if room == 0:
            grouped.append([])
            room = max(1, token_budget // max(1, lengths[position]))
        grouped[-1].append(position)
        room -= 1
    return grouped


def _settle(set_future: Callable[[Any], None], value: Any) -> None:
    """Set a result or an error, unless the caller has cancelled the future meanwhile."""
    try:
        set_future(value)
    except InvalidStateError:
        pass


def _as_backend_error(error: Exception, name: str) -> Exception:
    """Errors of torch and tokenizers as ours, with the original as the cause."""
    if isinstance(error, RerankError):
        return error
    remedy = None
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch to name it
        remedy = "The device's memory is full: set max_length, use a smaller dtype, or share the device with less."
    wrapped = BackendError(f"{name} failed with {type(error).__name__}: {error}", remedy=remedy)
    wrapped.__cause__ = error
    return wrapped
