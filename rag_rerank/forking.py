"""Locks that a forked child finds open."""

import os
import threading
from typing import TypeVar

L = TypeVar("L", threading.Lock, threading.RLock)


def held_over_forks(lock: L) -> L:
    """Have a lock held while the process forks, so that the child finds it open, and whole what it guards."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which doesn't fork
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
