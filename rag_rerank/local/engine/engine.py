"""One thread that owns a model: it loads it, and has what callers hand in scored in common batches.

One thread, for fast tokenizers answer "Already borrowed" when two share one, and one must decide what comes next. It
cuts some of the work that waits (see `calls`) into batches, and gives each call its scores as soon as its last sequence
has run. On a CPU each batch is run by a worker on a core of its own; on a CUDA device the next batch is tokenised and
sent off while the last one still runs.
"""

import contextlib
import logging
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rag_rerank.errors import BackendError, ConfigError, RerankError, short_name
from rag_rerank.inputs.multimodal import Prepared
from rag_rerank.local.engine.calls import Item, WaitingCall, next_round
from rag_rerank.local.engine.workers import EngineThread, Workers
from rag_rerank.local.models.model import Model

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

# Tokens up to which a batch is left to one core, and which are too few to make one more batch of where others run: all
# cores wait for each other at each operation. Calls of 10, 4 and 1 short documents take 23, 15 and 7.3 ms this way, and
# 26, 13 and 6.0 ms where all run what is below 512 tokens; beside a dozen busy processes 94, 62 and 33 ms, and 1,103,
# 1,068 and 378 ms (medians of interleaved calls, MiniLM, bfloat16, 2 cores).
_MIN_BATCH = 256
# Tokens that are too few to be split over idle cores. Calls of 4, 8 and 12 documents of 20 tokens take 14, 19 and 27 ms
# where the cores share them, and 17, 27 and 34 ms where a batch has 256 (MiniLM, float32, 2 cores).
_LEAST = 48


class Engine:
    """A model in a thread of its own; `load` is called there when the first work comes, and again after it failed."""

    def __init__(self, load: Callable[[], Model], *, name: str) -> None:
        self._inbox: _Inbox = queue.SimpleQueue()
        self._name = short_name(name)
        self._warned = False
        self._closing = threading.Event()
        # The thread holds the loop, not the engine: whoever drops the engine can have it collected and closed.
        self._loop = _Loop(load, self._inbox, self._closing, self._name)
        self.thread = EngineThread(target=self._loop.run, name=f"rag_rerank {name}", daemon=True)
        self.thread.start()

    @property
    def model(self) -> Model | None:
        """The model, once it is loaded and until the engine is closed."""
        return self._loop.model

    def submit(
        self, queries: Sequence[Prepared], documents: Sequence[Prepared], instruction: str | None = None
    ) -> "Future[list[float]]":
        """Hand in one call; see `WaitingCall`. Cancelling the future takes it back, even half done."""
        call = WaitingCall(queries, documents, instruction)
        call.future.add_done_callback(lambda _: self._finished(call))
        self._inbox.put(call)
        if self._closing.is_set():  # the thread may have taken its last from the inbox; what came before, it answers
            call.fail(_closed(self._name))
        return call.future

    def stop(self) -> None:
        """Close without waiting and without a lock: a finaliser may run in any thread, at any place."""
        self._closing.set()
        self._inbox.put(None)

    def close(self) -> None:
        """Stop after the batch that is running; work that waits fails. A finaliser in an engine's thread can't wait."""
        self.stop()
        if not isinstance(threading.current_thread(), EngineThread):
            self.thread.join()

    def _finished(self, call: WaitingCall) -> None:
        if call.texts_truncated:
            level, self._warned = logging.DEBUG if self._warned else logging.WARNING, True
            message = (
                "%s reads only so much at a time: %d of a call's texts were cut. "
                'long_documents="max-passage" reads them to their end. (Further calls say so at level DEBUG.)'
            )
            logger.log(level, message, self._name, call.texts_truncated)


@dataclass(frozen=True, slots=True)
class _BatchResult:
    """A batch that was run: its outputs, perhaps still being computed on a device, or what went wrong."""

    items: Sequence[Item]
    outputs: "Tensor | BaseException"


_Inbox = queue.SimpleQueue[WaitingCall | _BatchResult | None]


class _Loop:
    """The work of the engine's thread, until it is told to end."""

    def __init__(self, load: Callable[[], Model], inbox: _Inbox, closing: threading.Event, name: str) -> None:
        self._load, self._inbox, self._closing, self._name = load, inbox, closing, name
        self.model: Model | None = None
        self._workers: Workers | None = None
        self._calls: list[WaitingCall] = []  # unfinished, in the order in which they came
        self._backlog: deque[list[Item]] = deque()  # batches that nobody has begun
        self._running = 0  # batches that workers have
        self._on_device: deque[_BatchResult] = deque()  # batches that a device has

    def run(self) -> None:
        """Serve calls, whatever is raised meanwhile: with the thread ended, the next caller would wait for ever."""
        while not self._closing.is_set():
            try:
                self._receive(wait=not self._can_go_on())
                if self._calls and not self._closing.is_set():
                    self._go_on()
            except BaseException as error:  # noqa: BLE001 - SystemExit, KeyboardInterrupt, a panic of a Rust tokenizer
                self._backlog.clear()
                self._on_device.clear()
                _fail(self._calls, _ours(error, self._name))
            self._calls = [call for call in self._calls if not call.future.done()]
        while self._running:  # what runs is finished
            self._receive(wait=True)
        if self._workers is not None:
            self._workers.close()
        self._receive(wait=False)
        _fail(self._calls, _closed(self._name))
        self.model = None

    def _can_go_on(self) -> bool:
        if self._on_device:
            return True
        busy = self._workers is not None and self._running >= self._workers.count
        return not busy and bool(self._backlog or any(call.waits or not call.unscored for call in self._calls))

    def _receive(self, *, wait: bool) -> None:
        """Take what has come; with `wait`, until something has."""
        while wait or not self._inbox.empty():
            message = self._inbox.get()
            wait = False
            if isinstance(message, WaitingCall):
                self._calls.append(message)
            elif message is not None:
                self._running -= 1
                self._hand_out(message)

    def _go_on(self) -> None:
        """Load, make batches, begin them, or wait for a device."""
        try:
            if self.model is None:
                model = self._load()
                if (parallel := model.score_type.transformer.batching.parallel) > 1:
                    self._workers = Workers(parallel, f"rag_rerank {self._name}")
                self.model = model
            model = self.model
        except BaseException as error:  # noqa: BLE001 - the callers get it; the next one may have better luck
            _fail(self._calls, _ours(error, self._name, loading=self.model is None))
            return
        for call in self._calls:
            if not call.unscored:  # it only wanted the model loaded
                call.succeed([])
        idle = 1 if self._workers is None else self._workers.count - self._running
        while len(self._backlog) < idle and any(call.waits for call in self._calls if not call.future.done()):
            self._make_batches(model)
        # A large batch that is alone is run by all cores, or by the device.
        alone = len(self._backlog) == 1 and not self._running
        if self._workers is None or (alone and sum(len(item.sequence.ids) for item in self._backlog[0]) > _MIN_BATCH):
            self._run_here(model)
        else:
            while self._backlog and self._running < self._workers.count:
                self._begin(model, self._workers)

    def _make_batches(self, model: Model) -> None:
        """Cut some of the work that waits into batches; they become smaller towards the end, so that no core waits."""
        waiting = [call for call in self._calls if call.waits and not call.future.done()]
        transformer, cores = model.score_type.transformer, 1 if self._workers is None else self._workers.count
        batching = transformer.batching
        budget = batching.token_budget
        if cores > 1 and len(waiting) <= 4 * cores:
            idle = cores - self._running - len(self._backlog)
            # A text that can't be tokenised: next_round gives its call the error.
            with contextlib.suppress(BaseException):
                left = sum(call.tokens_left(model) for call in waiting)
                parts = max(idle, min(cores, 2 * left // _MIN_BATCH))
                budget = max(_LEAST, min(budget, math.ceil(left / parts)))
        items: list[Item] = []
        for call, taken in next_round(waiting, model, budget * batching.batches_ahead):
            if isinstance(taken, BaseException):
                call.fail(_ours(taken, self._name))
            else:
                items += taken
        # Of what is taken at once, no more batches than parts: each may have one sequence beyond its share.
        longest = max((len(item.sequence.ids) for item in items), default=0)
        batches = transformer.batches([item.sequence for item in items], min(batching.token_budget, budget + longest))
        self._backlog.extend([items[position] for position in batch] for batch in batches)

    def _begin(self, model: Model, workers: Workers) -> None:
        if items := _wanted(self._backlog.popleft()):
            inbox = self._inbox  # not self: a worker that is idle must not keep anything
            self._running += 1
            workers.submit(lambda: inbox.put(_run_batch(model, items)))

    def _run_here(self, model: Model) -> None:
        items = _wanted(self._backlog.popleft()) if self._backlog else []
        if items:
            self._on_device.append(_run_batch(model, items))
        # A device that works by itself gets its next batch before the outputs of the last are waited for.
        ahead = 1 if items and getattr(self._on_device[-1].outputs, "is_cuda", False) else 0
        while len(self._on_device) > ahead:
            self._hand_out(self._on_device.popleft())

    def _hand_out(self, result: _BatchResult) -> None:
        """Give each call its outputs, or see what to do about an error."""
        try:
            if isinstance(result.outputs, BaseException):
                raise result.outputs  # noqa: TRY301 - handled like those of the next line
            outputs = result.outputs.cpu()
        except BaseException as error:  # noqa: BLE001 - on CUDA, errors show only when outputs are read
            self._after_error(error, result.items)
            return
        # A masked key weighs 0, but 0 times NaN is NaN: one sequence may have spoilt others of its row, so each
        # that has no number is run alone. Infinity is none, either: its sigmoid would look like a score.
        finite = outputs.isfinite().all(1)
        outputs = outputs.masked_fill(~finite.unsqueeze(1), math.nan)
        for item, output, done in zip(result.items, outputs, finite.tolist(), strict=True):
            if not done and len(result.items) > 1:
                self._backlog.append([item])
                continue
            try:
                item.take(output)
            except BaseException as error:  # noqa: BLE001 - a score that can't be made of its output
                item.call.fail(_ours(error, self._name))

    def _after_error(self, error: BaseException, items: Sequence[Item]) -> None:
        """Run each call's part of a failed batch alone; halve what is one call's but too large for the memory."""
        calls = list(dict.fromkeys(item.call for item in items))
        if len(calls) > 1:
            self._backlog.extendleft([item for item in items if item.call is call] for call in calls)
        elif _out_of_memory(error) and len(items) > 1:
            half = len(items) // 2
            self._backlog.extendleft((list(items[half:]), list(items[:half])))
        else:
            calls[0].fail(_ours(error, self._name))


def _run_batch(model: Model, items: Sequence[Item]) -> _BatchResult:
    try:
        return _BatchResult(items, model.score_type.run([item.sequence for item in items]))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the callers get it
        return _BatchResult(items, error)


def _wanted(items: Sequence[Item]) -> list[Item]:
    """Items that a caller still waits for."""
    return [item for item in items if not item.call.future.done()]


def _fail(calls: Sequence[WaitingCall], error: RerankError) -> None:
    for call in calls:
        call.fail(error)


def _closed(name: str) -> RerankError:
    return RerankError(f"The scorer of {name} was closed before this call was done.")


def _out_of_memory(error: BaseException) -> bool:
    """Tell torch's own error, without importing torch to name it, and those of memory that is the processor's."""
    words = f"{type(error).__name__} {error}".lower()
    full = "memoryerror", "out of memory", "allocate memory", "failed to map segment", "can't start new thread"
    return any(each in words for each in full)


def _ours(error: BaseException, name: str, *, loading: bool = False) -> RerankError:
    """Turn errors of torch and tokenizers into ours, with the original as the cause.

    What keeps a model from being loaded will do so next time, too: a `ConfigError`. Only a GPU's memory may be free.
    """
    if isinstance(error, RerankError):
        return error
    kind, remedy = type(error).__name__, None
    if _out_of_memory(error):
        remedy = (
            "The memory is full: set max_length, use a smaller dtype or model, share the device with less, or raise "
            "the process's limit (ulimit -v, the container's)."
        )
    elif "temporary directory" in str(error):
        remedy = "Set TMPDIR to a folder that can be written to."
    elif isinstance(error, ImportError):
        remedy = "Install anew what it needs: pip install --force-reinstall 'rag-rerank[local]'."
    cause = f"{kind}: {error}".rstrip(": ")
    ours: RerankError = BackendError(f"{name} failed with {cause}", remedy=remedy)
    if loading and isinstance(error, Exception) and kind != "OutOfMemoryError":
        ours = ConfigError(f"{name} can't be loaded: {cause}" + (f". {remedy}" if remedy else ""))
    ours.__cause__ = error
    return ours
