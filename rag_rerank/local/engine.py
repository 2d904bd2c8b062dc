"""One thread that owns a model: it loads it, and scores what callers hand in, in common batches.

Why one thread: fast tokenizers answer "Already borrowed" when two threads share one, and two forward passes at once on
one device take longer than one after the other. Callers get a future each. Every round takes all the work that waits,
cuts it into batches by length (not by caller), and gives each call its scores as soon as its last sequence has run.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rag_rerank.errors import BackendError, RerankError
from rag_rerank.local.model import Inputs, Model

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, eq=False)
class _Work:
    """One call that waits."""

    queries: list[str]
    documents: list[str]
    future: "Future[list[float]]" = field(default_factory=Future)

    def succeed(self, scores: list[float]) -> None:
        with contextlib.suppress(InvalidStateError):  # the caller has cancelled it meanwhile
            self.future.set_result(scores)

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(slots=True, eq=False)
class _Running:
    """One call whose sequences are being run, in whatever batches."""

    work: _Work
    inputs: Inputs
    missing: int
    outputs: "Tensor | None" = None

    def take(self, position: int, output: "Tensor") -> None:
        """Keep the output of one sequence; with the last one, the call is finished."""
        if self.outputs is None:
            self.outputs = output.new_empty((len(self.inputs.sequences), len(output)))
        self.outputs[position] = output
        self.missing -= 1
        if self.missing == 0:
            self.work.succeed(self.inputs.scores(self.outputs))


class Engine:
    """A model in a thread of its own.

    Args:
        load: Makes the model; called in the thread when the first work comes, and again after it failed.
        name: For the thread's name and for errors.
    """

    def __init__(self, load: Callable[[], Model], *, name: str) -> None:
        self._inbox: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._name = name
        self._lock = threading.Lock()
        self._closed = False
        # The thread holds the inbox, not the engine: whoever drops the engine can have it collected and closed.
        self._thread = threading.Thread(
            target=_serve, args=(load, self._inbox, name), name=f"rag_rerank {name}", daemon=True
        )
        self._thread.start()

    def submit(self, queries: list[str], documents: list[str]) -> "Future[list[float]]":
        """Hand in one call; no documents only loads the model. Cancelling the future takes it back, even half done."""
        work = _Work(queries, documents)
        with self._lock:  # nothing may come behind the None that ends the thread: nobody would ever answer it
            if self._closed:
                work.fail(_closed(self._name))
            else:
                self._inbox.put(work)
        return work.future

    def close(self) -> None:
        """Stop after the batch that is running; work that waits fails."""
        with self._lock:
            self._closed = True
            self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()


def _serve(load: Callable[[], Model], inbox: "queue.SimpleQueue[_Work | None]", name: str) -> None:
    model: Model | None = None
    while True:
        round_of_work, closing = _take(inbox)
        if closing:
            for work in round_of_work:
                work.fail(_closed(name))
            return
        try:
            model = model or load()
        except Exception as error:  # noqa: BLE001 - the callers get it; the next one may have better luck
            for work in round_of_work:
                work.fail(_as_backend_error(error, name))
            continue
        _score_together(model, round_of_work, name)
        del round_of_work  # an idle engine must not keep the last call's texts


def _closed(name: str) -> RerankError:
    return RerankError(f"The scorer of {name} was closed before this call was done.")


def _take(inbox: "queue.SimpleQueue[_Work | None]") -> tuple[list[_Work], bool]:
    """All the work that waits, at least one; and whether the engine is to stop."""
    taken = [inbox.get()]
    while not inbox.empty():
        taken.append(inbox.get())
    return [work for work in taken if work is not None], None in taken


def _score_together(model: Model, round_of_work: list[_Work], name: str) -> None:
    """Run the sequences of all calls in common batches."""
    pool: list[tuple[_Running, int]] = []
    for work in round_of_work:
        if work.future.done():
            continue
        if not work.documents:
            work.succeed([])
            continue
        try:
            inputs = model.inputs(work.queries, work.documents)
        except Exception as error:  # noqa: BLE001 - whatever a tokenizer raises belongs to this one caller
            work.fail(_as_backend_error(error, name))
            continue
        running = _Running(work, inputs, missing=len(inputs.sequences))
        pool += [(running, position) for position in range(running.missing)]
    lengths = [len(running.inputs.sequences[position].ids) for running, position in pool]
    for batch in batches(lengths, model.token_budget):
        wanted = [pool[item] for item in batch if not pool[item][0].work.future.done()]
        if not wanted:
            continue
        try:
            outputs = model.run([running.inputs.sequences[position] for running, position in wanted])
            for (running, position), output in zip(wanted, outputs, strict=True):
                running.take(position, output)
        except Exception as error:  # noqa: BLE001 - the thread must live on; these callers get the error
            for running, _ in wanted:
                running.work.fail(_as_backend_error(error, name))


def batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group sequences of like length so that little is padded.

    Args:
        lengths: Length of each sequence, in tokens.
        token_budget: Most tokens in a batch after padding to its longest. A longer sequence gets a batch of its own.

    Returns:
        Positions in `lengths`, each exactly once, longest first: the batch that needs most memory comes first, and if
        it fits, so does the rest.
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
