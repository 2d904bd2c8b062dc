"""One event loop for the process, in a thread of its own, for callers that have none."""

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from rag_rerank.errors import BackendUnavailable

T = TypeVar("T")


class Background:
    """An event loop in a daemon thread, begun with the first call. A forked child starts its own."""

    def __init__(self) -> None:
        self.forget()
        if hasattr(os, "register_at_fork"):  # not on Windows, which doesn't fork
            # Not with a scorer's first call there: it is all scorers', one of which may have begun before.
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Know of no loop: after a fork its thread is in the other process, and the lock may be held there for ever."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None) -> T:
        """Run `work` to its end, for `timeout` seconds at most. What interrupts the caller (Ctrl-C) cancels it."""
        future: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            if future.set_running_or_notify_cancel():
                tasks.append(task := loop.create_task(work))
                task.add_done_callback(end)
            else:
                work.close()

        def end(task: asyncio.Task[T]) -> None:
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            future.set_result(task.result()) if error is None else future.set_exception(error)

        try:
            loop = self._running()
        except BaseException:
            work.close()
            raise
        # Not run_coroutine_threadsafe: an interruption between its beginning and our waiting would leave the work
        # running (1 of 120 tries).
        try:
            loop.call_soon_threadsafe(begin)
            return future.result(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        except BaseException:
            future.cancel()
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])
            raise

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                _look_up_in_daemon_threads(loop)
                try:
                    threading.Thread(target=_run_for_ever, args=(loop,), name="rag_rerank", daemon=True).start()
                except RuntimeError as error:  # no thread to be had now; the next call tries again
                    loop.close()
                    raise BackendUnavailable(f"this process can't ask a server: {error}", attempts=0) from error
                self._loop = loop
            return self._loop


def _run_for_ever(loop: asyncio.AbstractEventLoop) -> None:
    """Run it whatever a user's function raises: asyncio lets these two end a loop, in which all callers' work is."""
    while True:
        with contextlib.suppress(SystemExit, KeyboardInterrupt):  # its caller gets it all the same
            loop.run_forever()


def _look_up_in_daemon_threads(loop: asyncio.AbstractEventLoop) -> None:
    """Have names looked up by daemon threads, one for each name that is being looked up.

    asyncio's own threads are few, so that hanging lookups of one host hold up those of all others (eight did), and the
    process's end waits for them (15 s, measured).
    """
    under_way: dict[Any, Future[Any]] = {}

    def look_up(future: Future[Any], host: Any, port: Any, options: dict[str, int]) -> None:
        try:
            future.set_result(socket.getaddrinfo(host, port, **options))
        except Exception as error:  # noqa: BLE001 - passed on
            future.set_exception(error)

    async def getaddrinfo(host: Any, port: Any, **options: int) -> Any:
        asked = host, port, *options.items()
        future = under_way.get(asked)
        if future is None:
            future = Future()
            threading.Thread(target=look_up, args=(future, host, port, options), daemon=True).start()
            under_way[asked] = future
            future.add_done_callback(lambda _: under_way.pop(asked))
        found = asyncio.wrap_future(future)
        found.add_done_callback(lambda _: found.cancelled() or found.exception())  # nobody may be waiting any more
        return await asyncio.shield(found)

    loop.getaddrinfo = getaddrinfo  # type: ignore[method-assign]
