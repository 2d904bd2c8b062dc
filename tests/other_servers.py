"""Servers that are not vLLM, each a program in an environment of its own."""

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.starter import ROOT


def program(environment: str, name: str) -> Path:
    """Its path; skip the test where it is not installed, and fail it where real servers must be there."""
    path = ROOT / environment / "bin" / name
    if not path.exists():
        missing = pytest.fail if os.environ.get("RAG_RERANK_REQUIRE_VLLM") else pytest.skip
        missing(f"{name} is not installed: run `make {environment}/.installed`")
    return path


@contextlib.contextmanager
def running(command: Sequence[str | Path], url: str, log: Path, **options: Any) -> Iterator[None]:
    """Run a server; it is ready when `url` is answered."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, **options)
    try:
        _wait(process, url, log)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.25)
    pytest.fail(f"no answer from {url}:\n{log.read_text()[-3000:]}")
