"""Forks vLLM servers that need not import vLLM. Run by the Python of .venv-vllm, see `tests.vllm_server`.

A server is three processes (API, engine core, worker), and by itself each of them is a fresh interpreter: of 25 s of a
core, 20 go into importing vLLM three times. Here it is imported once, in a process that never starts a thread, and all
others are its copies. What they run is vLLM's own code; elsewhere than on CPUs, it forks its processes by itself.

Reads requests as lines of JSON from stdin and answers each with a line. When stdin ends, perhaps because the process
behind it was killed, all servers are ended.

    {"start": [options], "environment": {...}, "folder": "...", "log": "..."}    the id of the process, and of its group
    {"poll": id}                                                                its exit code, null while it runs
    {"wait": id}                                                                its exit code
"""

import gc
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

MODULES = ["vllm.entrypoints.launchers.api_server.entry", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"]


def import_all() -> None:
    """Import what servers do, and have them fork their processes though they run on a CPU."""
    for name in MODULES:
        importlib.import_module(name)
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config.__func__

    def update_and_fork(cls: type, config: Any) -> None:
        update(cls, config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = classmethod(update_and_fork)
    gc.collect()
    gc.freeze()  # a collection would write to all of the memory that the copies share
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads > 1:
        raise RuntimeError(f"{threads} threads, of which a forked child has one")


def serve(request: dict[str, Any]) -> None:
    """Become a server."""
    os.setsid()
    for name, mode, target in ((os.devnull, os.O_RDONLY, 0), (request["log"], os.O_WRONLY | os.O_APPEND, 1)):
        os.dup2(os.open(name, mode), target)
    os.dup2(1, 2)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = ["vllm", *request["start"]]
    sys.modules[MODULES[0]].main()


def start(request: dict[str, Any]) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            serve(request)
            code = 0
        except BaseException:  # noqa: BLE001 - in its log
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return process


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed while modules are imported is no reply
    import_all()
    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: int | None = start(request)
            codes[answer] = None
        else:
            process = request.get("poll") or request["wait"]
            if codes[process] is None:
                ended, status = os.waitpid(process, os.WNOHANG if "poll" in request else 0)
                codes[process] = os.waitstatus_to_exitcode(status) if ended else None
            answer = codes[process]
        replies.write(f"{json.dumps(answer)}\n")
        replies.flush()
    for process, code in codes.items():
        if code is None:
            os.killpg(process, signal.SIGKILL)


if __name__ == "__main__":
    main()
