"""Threads that compute side by side, one core each.

By itself torch splits every operation over all cores and waits for the slowest before the next: 1,500 times for 100
documents. Whole batches side by side wait for nobody: 1.1 times as fast on two quiet cores (MiniLM, bfloat16), 4.7
times beside another process that keeps one of them busy.
"""

import ctypes
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Workers:
    """`count` threads that run tasks, in which torch uses one core."""

    def __init__(self, count: int, name: str) -> None:
        self.count = count
        self._tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        names, task = [f"{name} {number}" for number in range(count)], (self._tasks,)
        self._threads = [threading.Thread(target=_work, args=task, name=each, daemon=True) for each in names]
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
    use_one_core()
    while (task := tasks.get()) is not None:
        task()
        del task  # an idle worker must not keep the last batch


def available() -> bool:
    """Tell whether threads can be made to use one core each, and all others left as they are."""
    if torch.get_num_threads() < 2:
        return False
    before, inside = torch.get_num_threads(), []
    thread = threading.Thread(target=lambda: inside.append(use_one_core()))
    thread.start()
    thread.join()
    return inside == [True] and torch.get_num_threads() == before


def use_one_core() -> bool:
    """Make torch compute in the calling thread alone; True if that worked.

    ``torch.set_num_threads`` would do it for all threads that are started later, too, and for MKL in all there are. The
    OpenMP and MKL libraries behind it know a setting for the calling thread only.
    """
    torch.get_num_threads()  # torch sets a thread up when it first meets it: not after us, please
    for path in _openmp_libraries():
        try:
            ctypes.CDLL(path).omp_set_num_threads(1)
        except (OSError, AttributeError):
            continue
        if torch.get_num_threads() == 1:
            _limit_mkl()
            return True
    return False


def _openmp_libraries() -> list[str]:
    """Find the OpenMP libraries that this process has loaded; on Linux, elsewhere there are none to be found."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if "/" in line)
    return [path for path in paths if Path(path).name.startswith(("libgomp", "libiomp", "libomp"))]


def _limit_mkl() -> None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # The C function; the name in lower case is Fortran's, which takes an address.
        limit: Any = ctypes.CDLL(str(library)).MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return  # a torch without MKL
    limit(1)
