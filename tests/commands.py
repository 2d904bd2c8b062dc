"""The command line, run in a process of its own that need not import torch first, which takes seconds."""

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.starter import Started, Starter

_STARTER = Starter("rag_rerank", "tests.command_imports", environment=os.environ)


def start(
    *arguments: str | Path,
    output: Path,
    errors: Path | None = None,
    stdin: Path | str = os.devnull,
    folder: Path | str = ".",
    environment: Mapping[str, str],
) -> Started:
    """Start `rag-rerank`; see `Starter.start`."""
    files = {"output": output, "errors": errors, "stdin": stdin}
    return _STARTER.start([*map(str, arguments)], **files, folder=folder, environment={**os.environ, **environment})


def run(
    *arguments: str | Path, stdin: str | bytes = "", folder: Path | str = ".", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `rag-rerank` to its end."""
    with tempfile.TemporaryDirectory() as temporary:
        files = {name: Path(temporary) / name for name in ("stdin", "output", "errors")}
        for path in files.values():
            path.touch()
        files["stdin"].write_bytes(stdin.encode() if isinstance(stdin, str) else stdin)
        code = start(*arguments, **files, folder=folder, environment={"COLUMNS": "120", **environment}).wait()
        printed = [files[name].read_text(encoding="utf-8") for name in ("output", "errors")]
    return subprocess.CompletedProcess(["rag-rerank", *arguments], code, *printed)
