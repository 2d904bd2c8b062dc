"""One contestant in a process of its own, so that each has its own libraries, threads and memory.

    PYTHON benchmarks/worker.py CONTESTANT '{"folder": ..., other options}'

Run by path with the Python of any virtual environment: until a contestant is loaded, only the standard library is
imported. Lines of JSON in, ``{"queries": [...], "documents": [[...], ...]}``, one list of documents per query; lines of
JSON out, ``{"scores": [[...], ...], "seconds": ..., "peak_mb": ..., "others": ...}`` or ``{"error": ...}``, where
`others` is how many processors were busy with something else meanwhile. The first line out says that it is ready, with
version and number format. Ends with its input.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS  # beside this file

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


def main() -> None:
    began = time.perf_counter()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the answers
    del sys.path[0]  # this folder: its modules' names are too common
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that servers are ended

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")

    with contextlib.ExitStack() as stack:
        try:
            loaded = CONTESTANTS[sys.argv[1]](json.loads(sys.argv[2]), stack)
        except Exception as error:  # whatever it is belongs into the table
            answer(error=describe(error))
            raise
        answer(
            ready=True,
            import_and_load_seconds=time.perf_counter() - began,
            version=loaded.version,
            dtype=loaded.dtype,
        )
        for line in sys.stdin:
            call = json.loads(line)
            try:
                all_before, own_before = processor()
                began = time.perf_counter()
                scores = loaded.score(call["queries"], call["documents"])
                seconds = time.perf_counter() - began
                everybody, own = processor()
            except Exception as error:
                answer(error=describe(error))
                raise
            others = max(0.0, everybody - all_before - (own - own_before)) / seconds
            answer(scores=scores, seconds=seconds, peak_mb=peak_mb(), others=others)


def describe(error: Exception) -> str:
    """Kind and first line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"


if __name__ == "__main__":
    main()
