"""What this process and all below it (such as a vLLM server) take of the machine, and what others do. Stdlib only."""

import contextlib
import os
import resource
import time
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def family() -> list[int]:
    """This process and all below it (a vLLM server's); none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [os.getpid()] if children else []
    for process in found:
        found += children.get(process, [])
    return found


def peak_mb() -> float:
    """Most memory resident at once."""
    # Not ru_maxrss where there is /proc: a process begins with that of the one that started it.
    total = 0
    for process in family():
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return (total or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


def processor() -> tuple[float, float]:
    """Seconds of processor time so far: of the whole machine, stolen ones too, and ours."""
    if not Path("/proc/stat").exists():
        return 0.0, 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = 0
    for process in family():
        with contextlib.suppress(OSError):
            own += sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return (user + nice + system + irq + softirq + steal) / TICK, own / TICK


class Watch:
    """Looks at the processors from its making on."""

    def __init__(self) -> None:
        self._all, self._own = processor()
        self._began = time.perf_counter()

    def others(self) -> float:
        """How many processors were busy with something else until now, on average."""
        seconds = time.perf_counter() - self._began
        everybody, own = processor()
        return max(0.0, everybody - self._all - (own - self._own)) / seconds
