"""Threads that compute side by side, one core each.

By itself torch splits every operation over all cores and waits for the slowest before the next: 1,500 times for 100
documents. Whole batches side by side wait for nobody: 1.1 times as fast on two quiet cores (MiniLM, bfloat16), 4.7
times beside another process that keeps one of them busy.
"""

import queue
import threading
from collections.abc import Callable


class EngineThread(threading.Thread):
    """A thread of an engine. It never waits for an engine's end, which may be waiting for it."""


class Workers:
    """`count` threads that run tasks, in which torch uses one core."""

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self._tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        names, task = [f"{name} {number}" for number in range(count)], (self._tasks,)
        self._threads = [EngineThread(target=_work, args=task, name=each, daemon=True) for each in names]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], object]) -> None:
        """Have a task run; what it returns is dropped, and it must not raise."""
        self._tasks.put(task)

    def close(self) -> None:
        """Finish what was submitted, and end the threads."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()


def _work(tasks: "queue.SimpleQueue[Callable[[], object] | None]") -> None:
    from rag_rerank.local.hardware import use_one_core  # noqa: PLC0415 - it imports torch

    use_one_core()
    while (task := tasks.get()) is not None:
        task()
        del task  # an idle worker must not keep the last batch
