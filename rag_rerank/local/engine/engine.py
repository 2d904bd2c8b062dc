"""One thread that owns a model: it loads it, and sees to it that what callers hand in is scored, in common batches.

Why one thread: fast tokenizers answer "Already borrowed" when two threads share one, and somebody must say what comes
next. Callers get a future each. The thread takes some of the work that waits (`rag_rerank.local.engine.calls` says
whose), cuts it into batches, and gives each call its scores as soon as its last sequence has run. On a CPU each
batch is run by a worker on a core of its own; on a CUDA device the next batch is tokenised and sent off while the last
one still runs.
"""

import logging
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rag_rerank.errors import BackendError, RerankError
from rag_rerank.inputs.multimodal import Prepared
from rag_rerank.local.engine.calls import Call, Item, next_round
from rag_rerank.local.models.model import Model

if TYPE_CHECKING:
    from torch import Tensor

    from rag_rerank.local.engine.workers import Workers

logger = logging.getLogger(__name__)

# Tokens up to which a batch is left to one core, and below which work is not split any further. All cores together,
# which wait for each other at each operation, are hardly faster with so little, and much slower beside other processes.
# Calls of 10, 4 and 1 short documents take 23, 15 and 7.3 ms this way, and 26, 13 and 6.0 ms where all cores run what
# is below 512 tokens; beside a dozen busy processes 94, 62 and 33 ms, and 1,103, 1,068 and 378 ms (medians of
# interleaved calls, MiniLM, bfloat16, 2 cores). With 128 instead of 256, the first takes 31 ms.
_LEAST = 256


class Engine:
    """A model in a thread of its own.

    Args:
        load: Makes the model; called in the thread when the first work comes, and again after it failed.
        name: For the thread's name and for errors.
    """

    def __init__(self, load: Callable[[], Model], *, name: str) -> None:
        self._inbox: queue.SimpleQueue[Call | _Ran | None] = queue.SimpleQueue()
        self._name = name
        self._lock = threading.Lock()
        self._told_of_cuts = False
        self._closing = threading.Event()
        # The thread holds the inbox, not the engine: whoever drops the engine can have it collected and closed.
        self._thread = threading.Thread(
            target=_Loop(load, self._inbox, self._closing, name).run, name=f"rag_rerank {name}", daemon=True
        )
        self._thread.start()

    def submit(
        self, queries: Sequence[Prepared], documents: Sequence[Prepared], instruction: str | None = None
    ) -> "Future[list[float]]":
        """Hand in one call; no documents only loads the model. Cancelling the future takes it back, even half done."""
        call = Call(queries, documents, instruction)
        error: RerankError | None = None
        with self._lock:  # nothing may come behind the None that ends the thread: nobody would ever answer it
            if self._closing.is_set():
                error = _closed(self._name)
            else:
                call.future.add_done_callback(lambda _: self._finished(call))
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

    def _finished(self, call: Call) -> None:
        with self._lock:
            level = logging.DEBUG if self._told_of_cuts else logging.WARNING
            self._told_of_cuts = self._told_of_cuts or call.cut > 0
        if call.cut:
            logger.log(
                level,
                "%s reads only so much at a time: %d of a call's texts were cut. %s",
                self._name,
                call.cut,
                'long_documents="max-passage" reads them to their end. (Further calls say so at level DEBUG.)',
            )


@dataclass(frozen=True, slots=True)
class _Ran:
    """A batch that was run: its outputs, perhaps still being computed on a device, or what went wrong."""

    items: Sequence[Item]
    outputs: "Tensor | Exception"


class _Loop:
    """What the engine's thread does, until it is told to end."""

    def __init__(
        self,
        load: Callable[[], Model],
        inbox: "queue.SimpleQueue[Call | _Ran | None]",
        closing: threading.Event,
        name: str,
    ) -> None:
        self._load, self._inbox, self._closing, self._name = load, inbox, closing, name
        self._model: Model | None = None
        self._workers: Workers | None = None
        self._calls: list[Call] = []  # unfinished, in the order in which they came
        self._backlog: deque[list[Item]] = deque()  # batches that nobody has begun
        self._at_work = 0  # batches that workers have
        self._sent: deque[_Ran] = deque()  # batches that a device has

    def run(self) -> None:
        """Serve calls."""
        while not self._closing.is_set():
            self._receive(wait=not self._can_go_on())
            if self._calls and not self._closing.is_set():
                self._go_on()
            self._calls = [call for call in self._calls if not call.future.done()]
        while self._at_work:  # what runs is finished
            self._receive(wait=True)
        if self._workers is not None:
            self._workers.close()
        self._receive(wait=False)
        _fail(self._calls, _closed(self._name))

    def _can_go_on(self) -> bool:
        if self._sent:
            return True
        busy = self._workers is not None and self._at_work >= self._workers.count
        return not busy and bool(self._backlog or any(call.waits or not call.unscored for call in self._calls))

    def _receive(self, *, wait: bool) -> None:
        """Take what has come; if there is nothing else to do, wait for something."""
        while wait or not self._inbox.empty():
            message = self._inbox.get()
            wait = False
            if isinstance(message, Call):
                self._calls.append(message)
            elif message is not None:
                self._at_work -= 1
                self._hand_out(message)

    def _go_on(self) -> None:
        """Do the next thing: load, make batches, begin them, or wait for a device."""
        try:
            model = self._model = self._model or self._load()
            if self._workers is None and model.pace.at_a_time > 1:
                # Here, not above: it imports torch.
                from rag_rerank.local.engine.workers import Workers  # noqa: PLC0415

                self._workers = Workers(model.pace.at_a_time, f"rag_rerank {self._name}")
        except Exception as error:  # noqa: BLE001 - the callers get it; the next one may have better luck
            _fail(self._calls, _as_backend_error(error, self._name))
            return
        for call in self._calls:
            if not call.unscored:  # it only wanted the model loaded
                call.succeed([])
        idle = 1 if self._workers is None else self._workers.count - self._at_work
        while len(self._backlog) < idle and any(call.waits for call in self._calls if not call.future.done()):
            self._make_batches(model)
        # A large batch that is alone is run by all cores, or by the device.
        alone = len(self._backlog) == 1 and not self._at_work and _tokens(self._backlog[0]) > _LEAST
        if self._workers is None or alone:
            self._run_here(model)
        else:
            while self._backlog and self._at_work < self._workers.count:
                self._begin(model, self._workers)

    def _make_batches(self, model: Model) -> None:
        """Cut some of the work that waits into batches; they become smaller towards the end, so that no core waits."""
        waiting = [call for call in self._calls if call.waits and not call.future.done()]
        pace, cores = model.pace, 1 if self._workers is None else self._workers.count
        budget = pace.token_budget
        try:
            if cores > 1 and len(waiting) <= 4 * cores:
                lefts = [call.tokens_left(model) for call in waiting]
                if None not in lefts:
                    budget = max(_LEAST, min(budget, math.ceil(sum(filter(None, lefts)) / cores)))
        except Exception:  # noqa: BLE001, S110 - a text that can't be tokenised: its call is told below
            pass
        items: list[Item] = []
        for call, taken in next_round(waiting, model, budget * pace.batches_ahead):
            if isinstance(taken, Exception):
                call.fail(_as_backend_error(taken, self._name))
            else:
                items += taken
        try:
            batches = model.batches([item.sequence for item in items], budget)
        except Exception as error:  # noqa: BLE001 - the thread must live on
            _fail([item.call for item in items], _as_backend_error(error, self._name))
            return
        self._backlog.extend([items[position] for position in batch] for batch in batches)

    def _begin(self, model: Model, workers: "Workers") -> None:
        items = _wanted(self._backlog.popleft())
        if items:
            inbox = self._inbox  # not self: a worker that is idle must not keep anything
            self._at_work += 1
            workers.submit(lambda: inbox.put(_ran(model, items)))

    def _run_here(self, model: Model) -> None:
        items = _wanted(self._backlog.popleft()) if self._backlog else []
        if items:
            self._sent.append(_ran(model, items))
        # A device that works by itself gets its next batch before the outputs of the last are waited for.
        ahead = 1 if items and getattr(self._sent[-1].outputs, "is_cuda", False) else 0
        while len(self._sent) > ahead:
            self._hand_out(self._sent.popleft())

    def _hand_out(self, ran: _Ran) -> None:
        """Give each call its outputs, or see what to do about an error."""
        if isinstance(ran.outputs, Exception):
            self._after_error(ran.outputs, ran.items)
            return
        try:
            outputs = ran.outputs.cpu()
        except Exception as error:  # noqa: BLE001 - on CUDA errors show when outputs are read
            self._after_error(error, ran.items)
            return
        # A masked key weighs 0, but 0 times NaN is NaN: one sequence may have spoilt others of its row, so each
        # that has no number is run alone.
        again = outputs.isnan().any(1).tolist() if len(ran.items) > 1 else [False]
        for item, output, alone in zip(ran.items, outputs, again, strict=True):
            if alone:
                self._backlog.append([item])
                continue
            try:
                item.take(output)
            except Exception as error:  # noqa: BLE001 - a score that can't be made of its output
                item.call.fail(_as_backend_error(error, self._name))

    def _after_error(self, error: Exception, items: Sequence[Item]) -> None:
        """A batch failed: run each caller's part of it alone, so that only those fail who are the cause.

        What is one caller's is halved where the device's memory was too small for it.
        """
        calls = list(dict.fromkeys(item.call for item in items))
        if len(calls) > 1:
            self._backlog.extendleft([item for item in items if item.call is call] for call in calls)
        elif _out_of_memory(error) and len(items) > 1:
            half = len(items) // 2
            self._backlog.extendleft((list(items[half:]), list(items[:half])))
        else:
            calls[0].fail(_as_backend_error(error, self._name))


def _ran(model: Model, items: Sequence[Item]) -> _Ran:
    try:
        return _Ran(items, model.run([item.sequence for item in items]))
    except Exception as error:  # noqa: BLE001 - whatever it is, the callers get it
        return _Ran(items, error)


def _tokens(items: Sequence[Item]) -> int:
    return sum(len(item.sequence.ids) for item in items)


def _wanted(items: Sequence[Item]) -> list[Item]:
    """Those that somebody still waits for."""
    return [item for item in items if not item.call.future.done()]


def _fail(calls: Sequence[Call], error: Exception) -> None:
    for call in calls:
        call.fail(error)


def _closed(name: str) -> RerankError:
    return RerankError(f"The scorer of {name} was closed before this call was done.")


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
