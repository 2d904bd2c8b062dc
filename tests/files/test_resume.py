"""Durable state: a run is killed, changed and continued at random, and never mixes two scorers."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rag_rerank.errors import ConfigError
from rag_rerank.files import Tally, partial_of, rejects_of, rerank_file
from tests import kept
from tests.forking import killed_at
from tests.scorers import WordOverlap

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="no fork, no flock")]

INPUTS = [
    b"".join(
        line.encode() + b"\n"
        for number in range(count)
        for line in (
            json.dumps({"query": "giant panda", "documents": ["a bear", f"panda {number}", "the giant panda"]}),
            "" if number % 3 else "nope",
        )
    )
    for count in (3, 6)
]
OPTIONS: list[dict[str, Any]] = [{}, {"top_n": 1}, {"score_threshold": 0.4}, {"group": 4}]


class Swapped(WordOverlap):
    """A server that is replaced by another after so many calls."""

    def __init__(self, after: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.after = after

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        if len(self.calls) >= self.after:
            self.weight = 0.5
        return super()._score(queries, documents, until)


Swapped.__module__, Swapped.__qualname__ = WordOverlap.__module__, WordOverlap.__qualname__  # the same scorer


class Runs(RuleBasedStateMachine):
    """Runs over one input and one output.

    The output is that of the last run that was finished, byte for byte, and what a run left behind is continued only
    by what began it.
    """

    undisturbed: ClassVar[dict[Any, tuple[bytes, bytes]]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(os, "fsync", lambda file: None)  # SIGKILL takes nothing back that was written
        self.folder = TemporaryDirectory()
        self.source, self.target = (Path(self.folder.name, name) for name in ("in.jsonl", "out.jsonl"))
        self.now: Any = None  # weight, number of the input, options
        self.begun: Any = None  # what made what is kept; None: there is nothing that could be continued
        self.outputs: list[bytes | None] = [None]  # what the output may be

    def teardown(self) -> None:
        self.folder.cleanup()
        self.patch.undo()

    def expected(self) -> tuple[bytes, bytes]:
        """The output of a run that nothing disturbs, and its rejects."""
        weight, number, options = self.now
        key = weight, number, str(options)
        if key not in self.undisturbed:
            with TemporaryDirectory() as folder:
                target = Path(folder, "out.jsonl")
                rerank_file(WordOverlap(weight=weight), self.source, target, **{"group": 2} | options)
                self.undisturbed[key] = target.read_bytes(), rejects_of(target).read_bytes()
        return self.undisturbed[key]

    def run(self, scorer: WordOverlap, *, restart: bool = False) -> Tally:
        return rerank_file(scorer, self.source, self.target, restart=restart, **{"group": 2} | self.now[2])

    @initialize()
    def first(self) -> None:
        self.become(1.0, 0, OPTIONS[0])

    @rule(what=st.sampled_from(["weights", "input", "options", "nothing"]), options=st.sampled_from(OPTIONS))
    def change(self, what: str, options: dict[str, Any]) -> None:
        """One thing of what the last run was made of, so that each is compared for itself; and run at once."""
        weight, number, same = self.begun or self.now
        self.become(
            1.25 - weight if what == "weights" else weight,
            1 - number if what == "input" else number,
            options if what == "options" else same,
        )
        self.interrupt(99, restart=False)

    def become(self, weight: float, number: int, options: dict[str, Any]) -> None:
        self.now = weight, number, options
        self.source.write_bytes(INPUTS[number])
        os.utime(self.source, ns=(number, number))

    @rule(point=st.integers(0, 40), restart=st.booleans())
    def kill(self, point: int, restart: bool) -> None:
        """By SIGKILL, at any point at which a run changes the disk."""
        with self.settling():
            refused, before = self.begun not in (None, self.now) and not restart, self.files()
            code = killed_at(point, lambda: self.run(WordOverlap(weight=self.now[0]), restart=restart))
            if refused:
                assert code in (2, -signal.SIGKILL)
                assert self.files() == before
            elif code == 0:
                self.finished()
            else:
                assert code == -signal.SIGKILL
                self.outputs.append(self.expected()[0])

    @rule(stop_at=st.integers(0, 4), restart=st.booleans())
    def interrupt(self, stop_at: int, restart: bool) -> None:
        """By Ctrl-C, unless it comes to its end before."""
        scorer = WordOverlap(weight=self.now[0], stop_at=stop_at)
        with self.settling():
            if self.begun not in (None, self.now) and not restart:
                before = self.files()
                with pytest.raises(ConfigError, match=r", before .*; --restart"):
                    self.run(scorer)
                assert (scorer.calls, self.files()) == ([], before)
                return
            try:
                self.run(scorer, restart=restart)
            except KeyboardInterrupt:
                return
            self.finished()

    @rule(after=st.integers(1, 5))
    @precondition(lambda self: self.begun in (None, self.now))
    def swap(self, after: int) -> None:
        """The server is replaced in the middle of a run, which is refused, unless it was over."""
        scorer = Swapped(after, weight=self.now[0], remote=True)
        with self.settling():
            refusal = None
            try:
                self.run(scorer)
            except ConfigError as error:
                refusal = str(error)
            if refusal is None:
                assert len(scorer.calls) <= after
                self.finished()
            else:
                assert "scores of the probe" in refusal

    def finished(self) -> None:
        output, rejects = self.expected()
        assert rejects_of(self.target).read_bytes() == rejects
        assert not [name for name in self.files() if "partial" in name]
        self.outputs = [output]

    @contextmanager
    def settling(self) -> Iterator[None]:
        """Find out whether a run has left something that the next one would continue."""
        before = kept.record(partial_of(self.target))
        yield
        left = kept.record(partial_of(self.target))
        if not left[0]:
            self.begun = None
        elif left != before:
            self.begun = self.now

    def files(self) -> dict[str, bytes]:
        """All but sqlite's own notes, which are of a run that was killed."""
        paths = [path for path in Path(self.folder.name).iterdir() if not path.name.endswith(("-journal", "-wal"))]
        return {path.name: path.read_bytes() for path in paths}

    @invariant()
    def nothing_is_mixed(self) -> None:
        output = self.target.read_bytes() if self.target.exists() else None
        assert output in self.outputs
        self.outputs = [output]


class TestRuns(Runs.TestCase):
    settings = settings(max_examples=40, stateful_step_count=20)


def test_two_kills_and_then_a_run_that_comes_to_its_end() -> None:
    """Whatever point it is killed at, and the next run as it begins, what is left is continued, never refused."""
    for first in range(30):
        for second in (0, 3, 6):
            runs = Runs()
            runs.first()
            for point in (first, second, 99):
                runs.kill(point, restart=False)
            assert runs.begun is None
            runs.teardown()
