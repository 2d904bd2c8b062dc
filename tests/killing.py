"""A process that is killed at a moment of its work that a test chooses."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rag_rerank.errors import ConfigError


def killed_at(point: int, work: Callable[[], Any]) -> int:
    """Do `work` in a process of its own that SIGKILL ends before it changes the disk for the `point`-th time.

    Returns:
        The exit code: 0 if it came to its end before, -SIGKILL if it was killed, 2 for a ConfigError.
    """
    process = os.fork()
    if process == 0:
        code, left = 3, [point]
        try:

            def counted(change: Callable[..., Any]) -> Callable[..., Any]:
                def counting(*arguments: Any, **options: Any) -> Any:
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return change(*arguments, **options)

                return counting

            os.fsync = counted(os.fsync)
            for name in ("replace", "unlink"):
                setattr(Path, name, counted(getattr(Path, name)))
            work()
            code = 0
        except ConfigError:
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
