"""One thread that owns a model: it loads it, and scores what callers hand in, in common batches.

Why one thread: fast tokenizers answer "Already borrowed" when two threads share one, and two forward passes at once on
one device take longer than one after the other. Callers get a future each. Round by round (`rag_rerank.local.calls`)
the thread takes some of the work that waits, runs it in batches, whosever it is, and gives each call its scores as soon
as its last sequence has run. On a CUDA device the next round is tokenised and sent off while the last one still runs.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rag_rerank.errors import BackendError, BackendUnavailable, RerankError
from rag_rerank.local.calls import Call, Item, next_round
from rag_rerank.local.model import Model

if TYPE_CHECKING:
    from torch import Tensor


class Engine:
    """A model in a thread of its own.

    Args:
        load: Makes the model; called in the thread when the first work comes, and again after it failed.
        name: For the thread's name and for errors.
        max_waiting_calls: How many calls may be unfinished at a time.
    """

    def __init__(self, load: Callable[[], Model], *, name: str, max_waiting_calls: int) -> None:
        self._inbox: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._name, self._max_waiting_calls = name, max_waiting_calls
        self._lock = threading.Lock()
        self._unfinished = 0
        self._closing = threading.Event()
        # The thread holds the inbox, not the engine: whoever drops the engine can have it collected and closed.
        self._thread = threading.Thread(
            target=_serve, args=(load, self._inbox, self._closing, name), name=f"rag_rerank {name}", daemon=True
        )
        self._thread.start()

    def submit(self, queries: list[str], documents: list[str]) -> "Future[list[float]]":
        """Hand in one call; no documents only loads the model. Cancelling the future takes it back, even half done."""
        call = Call(queries, documents)
        error: RerankError | None = None
        with self._lock:  # nothing may come behind the None that ends the thread: nobody would ever answer it
            if self._closing.is_set():
                error = _closed(self._name)
            elif self._unfinished >= self._max_waiting_calls:
                error = BackendUnavailable(
                    f"{self._name} has {self._unfinished} calls waiting already",
                    remedy="Try again later, bound the calls at a time, or set max_waiting_calls.",
                )
            else:
                self._unfinished += 1
                call.future.add_done_callback(self._finished)
                self._inbox.put(call)
        if error is not None:
            call.fail(error)
        return call.future

    def close(self) -> None:
        """Stop after the batch that is running; work that waits fails."""
        with self._lock:
            self._closing.set()
            self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _finished(self, _: "Future[list[float]]") -> None:
        with self._lock:
            self._unfinished -= 1


def _serve(
    load: Callable[[], Model], inbox: "queue.SimpleQueue[Call | None]", closing: threading.Event, name: str
) -> None:
    model: Model | None = None
    calls: list[Call] = []  # unfinished, in the order in which they came
    sent: deque[_Sent] = deque()  # batches whose outputs have not been read
    while True:
        _receive(inbox, calls, wait=not calls and not sent)
        if closing.is_set():
            _fail(calls, _closed(name))
            return
        try:
            model = model or load()
        except Exception as error:  # noqa: BLE001 - the callers get it; the next one may have better luck
            _fail(calls, _as_backend_error(error, name))
        else:
            _run_round(model, calls, sent, closing, name)
        calls[:] = [call for call in calls if not call.future.done()]


def _fail(calls: list[Call], error: Exception) -> None:
    for call in calls:
        call.fail(error)


def _closed(name: str) -> RerankError:
    return RerankError(f"The scorer of {name} was closed before this call was done.")


def _receive(inbox: "queue.SimpleQueue[Call | None]", calls: list[Call], *, wait: bool) -> None:
    """Take all the calls that have come; if there is nothing else to do, wait for one."""
    while wait or not inbox.empty():
        call = inbox.get()
        wait = False
        if call is not None:
            calls.append(call)


@dataclass(frozen=True, slots=True)
class _Sent:
    """A batch that has been handed to the device."""

    items: Sequence[Item]
    outputs: "Tensor"


def _run_round(model: Model, calls: list[Call], sent: "deque[_Sent]", closing: threading.Event, name: str) -> None:
    """Run some of the work, and read the outputs of what was run before."""
    items: list[Item] = []
    for call in calls:
        if not call.unscored:  # it only wanted the model loaded
            call.succeed([])
    for call, taken in next_round([call for call in calls if not call.future.done()], model):
        if isinstance(taken, Exception):
            call.fail(_as_backend_error(taken, name))
        else:
            items += taken
    try:
        batches = model.batches([item.sequence for item in items])
    except Exception as error:  # noqa: BLE001 - the thread must live on
        _fail([item.call for item in items], _as_backend_error(error, name))
        return
    for batch in batches:
        if closing.is_set():
            return
        _run(model, [items[position] for position in batch], sent, name)
        # A device that works by itself gets its next batch before the outputs of the last are waited for.
        while len(sent) > (1 if sent and sent[-1].outputs.is_cuda else 0):
            _finish(model, sent.popleft(), sent, name)
    if not items and sent:
        _finish(model, sent.popleft(), sent, name)


def _run(model: Model, items: Sequence[Item], sent: "deque[_Sent]", name: str) -> None:
    items = [item for item in items if not item.call.future.done()]
    if items:
        try:
            sent.append(_Sent(items, model.run([item.sequence for item in items])))
        except Exception as error:  # noqa: BLE001 - the thread must live on; these callers get the error
            _after_error(error, model, items, sent, name)


def _finish(model: Model, batch: "_Sent", sent: "deque[_Sent]", name: str) -> None:
    try:
        outputs = batch.outputs.cpu()
    except Exception as error:  # noqa: BLE001 - as above; on CUDA errors show when outputs are read
        _after_error(error, model, batch.items, sent, name)
        return
    for item, output in zip(batch.items, outputs, strict=True):
        try:
            item.take(output)
        except Exception as error:  # noqa: BLE001 - a score that can't be made of its output
            item.call.fail(_as_backend_error(error, name))


def _after_error(error: Exception, model: Model, items: Sequence[Item], sent: "deque[_Sent]", name: str) -> None:
    """A batch failed: run each caller's part of it alone, so that only those fail who are the cause.

    What is one caller's is halved where the device's memory was too small for it.
    """
    calls = list(dict.fromkeys(item.call for item in items))
    if len(calls) > 1:
        for call in calls:
            _run(model, [item for item in items if item.call is call], sent, name)
    elif _out_of_memory(error) and len(items) > 1:
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            _run(model, half, sent, name)
    else:
        calls[0].fail(_as_backend_error(error, name))


def _out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's, without importing torch to name it


def _as_backend_error(error: Exception, name: str) -> Exception:
    """Errors of torch and tokenizers as ours, with the original as the cause."""
    if isinstance(error, RerankError):
        return error
    remedy = None
    if _out_of_memory(error):
        remedy = "The device's memory is full: set max_length, use a smaller dtype, or share the device with less."
    wrapped = BackendError(f"{name} failed with {type(error).__name__}: {error}", remedy=remedy)
    wrapped.__cause__ = error
    return wrapped
