"""The record of a folder's run: it is killed, changed and continued at random, and never mixes two scorers."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from rag_rerank import ConfigError
from rag_rerank.ray_data import rejects_in, rerank_folder, run
from tests import kept
from tests.forking import killed_at
from tests.scorers import WordOverlap

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="no fork, no flock")]

INPUTS = [
    "".join(
        json.dumps({"query": "giant panda", "documents": ["a bear", f"panda {number}", "the giant panda"]}) + "\n"
        for number in range(count)
    )
    + "nope\n"
    for count in (4, 7)
]
OPTIONS: list[dict[str, Any]] = [{}, {"top_n": 1}, {"shard_lines": 2}, {"group": 6}]


class Actor:
    """An actor in this process: what is asked of it is done at once."""

    def __init__(self, instance: object) -> None:
        self._instance = instance

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self._instance, name))


@contextmanager
def in_this_process() -> Iterator[Any]:
    """What the runner uses of Ray, with no other process: what is tested is what is on the disk."""
    yield SimpleNamespace(
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}],
        remote=lambda **options: lambda made: SimpleNamespace(remote=lambda *given: Actor(made(*given))),
        get=lambda reply: reply,
        wait=lambda replies: (replies[:1], replies[1:]),
        kill=lambda actor: None,
        exceptions=SimpleNamespace(RayError=ChildProcessError, RayActorError=ChildProcessError),
    )


class FolderRuns(RuleBasedStateMachine):
    """Runs over one folder of input and one of output, whose files are all of the run that began there."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", lambda file: None)  # SIGKILL takes nothing back that was written
        self.patch.setattr(run, "connected", in_this_process)
        self.folder = TemporaryDirectory()
        self.source, self.target = (Path(self.folder.name, name) for name in ("a.jsonl", "out"))
        self.now: Any = None  # weight, number of the input, options
        self.begun: Any = None  # what the run in the folder is made of, and the files that it makes

    def teardown(self) -> None:
        self.folder.cleanup()
        self.patch.undo()

    @initialize()
    def first(self) -> None:
        self.become(1.0, 0, OPTIONS[0])

    @rule(what=st.sampled_from(["weights", "input", "options", "nothing"]), options=st.sampled_from(OPTIONS))
    def change(self, what: str, options: dict[str, Any]) -> None:
        """One thing of what the last run was made of, so that each is compared for itself; and run at once."""
        weight, number, kept = self.begun[0] if self.begun else self.now
        self.become(
            1.25 - weight if what == "weights" else weight,
            1 - number if what == "input" else number,
            options if what == "options" else kept,
        )
        self.finish()

    def become(self, weight: float, number: int, options: dict[str, Any]) -> None:
        self.now = weight, number, options
        self.source.write_text(INPUTS[number])
        os.utime(self.source, ns=(number, number))

    @rule(point=st.integers(0, 60), restart=st.booleans())
    def kill(self, point: int, restart: bool) -> None:
        """By SIGKILL, at any point at which a run changes the disk, unless it comes to its end before."""
        written, before = kept.record(self.target / "_rag_rerank" / "run.sqlite")[0], self.files()
        refused = self.begun is not None and self.begun[0] != self.now and not restart
        code = killed_at(point, lambda: self.run(restart=restart))
        if refused:
            assert code in (2, -signal.SIGKILL)
            assert self.files() == before
            return
        assert code in (0, -signal.SIGKILL)
        if kept.record(self.target / "_rag_rerank" / "run.sqlite")[0] != written:
            self.begun = self.now, self.expected()
        if code == 0:
            assert self.made(self.target) == self.begun[1]

    @rule()
    def finish(self) -> None:
        """To its end, or refused."""
        if self.begun is not None and self.begun[0] != self.now:
            with pytest.raises(ConfigError, match=r", before .*; --restart"):
                self.run()
            return
        self.begun = self.now, self.expected()
        self.run()
        assert self.made(self.target) == self.begun[1]

    @invariant()
    def nothing_is_mixed(self) -> None:
        assert self.made(self.target).items() <= (self.begun[1].items() if self.begun else set())

    def run(self, target: Path | None = None, *, restart: bool = False) -> None:
        weight, _, options = self.now
        options = {"shard_lines": 3, "group": 3} | options
        rerank_folder(WordOverlap(weight=weight), self.source, target or self.target, restart=restart, **options)

    def expected(self) -> dict[str, bytes]:
        """The files of a run that nothing disturbs."""
        with TemporaryDirectory() as folder:
            self.run(Path(folder, "out"))
            return self.made(Path(folder, "out"))

    def made(self, target: Path) -> dict[str, bytes]:
        files = [*target.glob("*.jsonl"), *rejects_in(target).glob("*.jsonl")]
        return {path.name: path.read_bytes() for path in files}

    def files(self) -> dict[str, bytes]:
        """All but sqlite's own notes, which are of a run that was killed."""
        notes = "-journal", "-wal"
        paths = [path for path in self.target.rglob("*") if path.is_file() and not path.name.endswith(notes)]
        return {str(path): path.read_bytes() for path in paths}


class TestFolderRuns(FolderRuns.TestCase):
    settings = settings(max_examples=30, stateful_step_count=12)
