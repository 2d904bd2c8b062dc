"""Forked children: what they do is bounded, and one may be killed at a moment of its work that a test chooses."""

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rag_rerank.errors import ConfigError
from rag_rerank.runs import Store


def forked(work: Callable[[], Any], seconds: int = 120) -> int:
    """Do `work` in a forked child.

    A child that hangs, perhaps on what another thread of its parent held, shows its stacks and is ended by SIGALRM.

    Returns:
        The exit code: 0 if it came to its end, 2 for a ConfigError, 3 for another error, -signal if it was killed.
    """
    process = os.fork()
    if process == 0:
        code = 3
        try:
            # Not faulthandler's own timer: it would wait for the parent's, which pytest has started.
            faulthandler.register(signal.SIGALRM, file=sys.__stderr__, chain=True)
            signal.alarm(seconds)
            work()
            code = 0
        except ConfigError:
            code = 2
        except BaseException:  # noqa: BLE001 - the child tells by its exit code alone
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_at(point: int, work: Callable[[], Any]) -> int:
    """Do `work` in a child that SIGKILL ends before it changes the disk for the `point`-th time; see `forked`."""
    left = [point]

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return counting

    def killed() -> None:
        os.fsync = counted(os.fsync)
        for name in ("each", "write"):  # before each statement; sqlite answers for what is within one
            setattr(Store, name, counted(getattr(Store, name)))
        for name in ("replace", "unlink"):
            setattr(Path, name, counted(getattr(Path, name)))
        work()

    return forked(killed)
