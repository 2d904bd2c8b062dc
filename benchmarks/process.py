"""A worker as seen from outside: started, asked, timed and ended."""

import contextlib
import json
import os
import queue
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.texts import Call

WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 900.0  # seconds for one answer


class WorkerError(Exception):
    """A contestant could not be loaded or asked; the message is for the table."""


class Worker:
    """One contestant's process.

    Args:
        python: Of the contestant's virtual environment.
        contestant: Its name in `contestants.CONTESTANTS`.
        options: What it is loaded with.
        log: Where its output goes.
        environment: More environment variables.

    Raises:
        WorkerError: When it is asked: it failed, ended or didn't answer.
    """

    def __init__(
        self, python: Path, contestant: str, options: dict[str, Any], log: Path, environment: dict[str, str]
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._began = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own script
                [python, WORKER, contestant, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", **environment},
                start_new_session=True,  # Ctrl-C is for the coordinator, which ends its workers in order
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def start(self) -> dict[str, Any]:
        """Wait until it has scored one pair: what it says of itself, and ``cold_seconds`` from its start until then."""
        self._send(Call(["what is a panda?"], [["The giant panda is a bear."]]))
        facts = self._receive()
        self._receive()
        return {**facts, "cold_seconds": time.perf_counter() - self._began}

    def ask(self, call: Call) -> dict[str, Any]:
        """Scores, seconds and peak memory."""
        self._send(call)
        return self._receive()

    def close(self) -> None:
        """End it: politely, so that it ends its server, then firmly."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        for end in (lambda: None, self._process.terminate, self._process.kill):
            end()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                continue
            return

    def _send(self, call: Call) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: reading says why
            self._process.stdin.write(json.dumps({"queries": call.queries, "documents": call.documents}) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=PATIENCE)
        except queue.Empty:
            raise WorkerError(f"no answer within {PATIENCE:.0f} s") from None
        if not line:
            output = [text for text in self._log.read_text(errors="replace").splitlines() if text.strip()]
            raise WorkerError(f"ended with {self._process.wait()}: {(output or ['no output'])[-1].strip()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer
