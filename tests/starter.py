"""Processes that are forked by one that has imported what they need: importing takes longer than what they do.

    starter = Starter("rag_rerank", "tests.command_imports")     as `python -m rag_rerank`, without the 5 s for torch
    process = starter.start(["score", ...], output=path)

The program is the same, and so is all that it can do: it has its own arguments, environment, folder, files, process
group and exit code. The one that forks never has a second thread, which a child would lack. It ends with the process
that made it, even where that is killed, and takes what it has started along.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # threads of OpenMP don't survive a fork


class Starter:
    """What asks the process that forks, which is made when it is first needed.

    Args:
        program: The module that is run as by ``python -m``.
        imports: The module that is imported ahead.
        python: The interpreter.
        environment: Of the process that forks: for what is read while modules are imported.
    """

    def __init__(
        self, program: str, imports: str, *, python: Path | str = sys.executable, environment: Mapping[str, str]
    ) -> None:
        self._command = [str(python), "-m", "tests.starter", program, imports]
        self._environment = {**environment, **_ONE_THREAD}
        self._process: subprocess.Popen[str] | None = None
        self._asking = threading.Lock()

    def start(
        self,
        arguments: Sequence[str],
        *,
        output: Path,
        errors: Path | None = None,
        stdin: Path | str = os.devnull,
        environment: Mapping[str, str] | None = None,
        folder: Path | str = ".",
    ) -> "Started":
        """Start the program. What it prints is put behind what is in `output`, and so are errors if None."""
        request = {
            "arguments": list(arguments),
            "files": [str(stdin), str(output), str(errors or output)],
            "environment": {**(os.environ if environment is None else environment), **_ONE_THREAD},
            "folder": str(Path(folder).absolute()),
        }
        return Started(self, self.ask(request))

    def ask(self, request: dict[str, Any] | int) -> Any:
        with self._asking:
            if self._process is None:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=self._environment,
                    start_new_session=True,
                    cwd=ROOT,
                )
                atexit.register(self._process.communicate)
            print(json.dumps(request), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{' '.join(self._command)} ended with {self._process.wait()}; see stderr")
        return json.loads(answer)


@dataclass(frozen=True, slots=True)
class Started:
    """A process that was forked, with what `subprocess.Popen` has. It leads a group of its own."""

    starter: Starter
    pid: int

    def poll(self) -> int | None:
        code: int | None = self.starter.ask(self.pid)
        return code

    def wait(self, timeout: float = 300.0) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(f"still running after {timeout:.0f} s")
            time.sleep(0.005)
        return code


def _serve(imports: str) -> bool:
    """Answer requests, which are lines of JSON on stdin, with a line each; True in a child, for it to run the program.

    What `Starter.start` sends is answered with the child's id; an id with its exit code, or null while it runs.
    """
    replies = os.dup(1)
    os.dup2(2, 1)  # what is printed while modules are imported is no reply
    importlib.import_module(imports)
    gc.collect()
    gc.freeze()  # a collection would write to all of the memory that is shared with children
    if (threads := len(list(Path("/proc/self/task").iterdir()))) > 1:
        raise RuntimeError(f"{imports} has started {threads - 1} threads, which forked children would lack")
    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            if codes[request] is None:
                ended, status = os.waitpid(request, os.WNOHANG)
                codes[request] = os.waitstatus_to_exitcode(status) if ended else None
            answer = codes[request]
        else:
            answer = os.fork()
            if answer == 0:
                os.close(replies)
                _become(request)
                return True
            codes[answer] = None
        os.write(replies, f"{json.dumps(answer)}\n".encode())
    for process, code in codes.items():
        if code is None:
            os.killpg(process, signal.SIGKILL)
    return False


def _become(request: dict[str, Any]) -> None:
    """Be what was asked for: a process like one that was started by a shell."""
    os.setsid()
    for number, name in enumerate(request["files"]):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the old one has read further requests
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv[1:] = request["arguments"]


if __name__ == "__main__":
    program, imports = sys.argv[1:]
    if _serve(imports):
        runpy.run_module(program, run_name="__main__", alter_sys=True)
