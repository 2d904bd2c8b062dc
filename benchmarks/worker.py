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
import signal
import sys
import time
from typing import Any

from contestants import CONTESTANTS  # these two are beside this file
from machine import Watch, peak_mb


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
                watch, began = Watch(), time.perf_counter()
                scores = loaded.score(call["queries"], call["documents"])
                seconds = time.perf_counter() - began
                others = watch.others()
            except Exception as error:
                answer(error=describe(error))
                raise
            answer(scores=scores, seconds=seconds, peak_mb=peak_mb(), others=others)


def describe(error: Exception) -> str:
    """Kind and first line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"


if __name__ == "__main__":
    main()
