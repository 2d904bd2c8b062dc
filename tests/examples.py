"""The examples of README and guides: found, and run as a reader runs them, in one session a page."""

import json
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = "cross-encoder/ms-marco-MiniLM-L12-v2"  # which the examples name

_EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
_RUN = """
import contextlib, io, json, sys
printed, names = [], {"__name__": "__main__"}
for code in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


def examples(page: Path) -> list[tuple[str, str]]:
    """(code, output) of every Python block; where there is no output, it is to be read, not run."""
    return _EXAMPLE.findall(page.read_text(encoding="utf-8"))


def hub_with(model: Path, folder: Path) -> Path:
    """A folder for HF_HOME in which the examples' model is cached: the checkpoint in `model`."""
    cached = folder / "hub" / f"models--{MODEL.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("released", encoding="utf-8")
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / "released").symlink_to(model)
    return folder


def printed_by(codes: list[str], python: str, hub: Path) -> list[str]:
    """What each example prints, run one after the other in one process. One that fails is an AssertionError."""
    result = subprocess.run(
        [python, "-c", _RUN],
        input=json.dumps(codes),
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        | {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout.splitlines()[-1]))
