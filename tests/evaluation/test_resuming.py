"""A cache never changes a result: whatever was killed, damaged or exchanged before, it is that of a run without one."""

import math
import os
import re
import signal
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from rag_rerank import ConfigError, Scorer
from rag_rerank.evaluation import cache, evaluate, scoring
from rag_rerank.identity import PROBES
from tests.evaluation.collections import small
from tests.forking import forked
from tests.scorers import overlap

RUN = {query: {name: -float(rank) for rank, name in enumerate(small().documents)} for query in small().queries}
COLLECTIONS = {
    "small": small(),
    "other texts": replace(
        small(), documents={name: f"{text} {'red' * (name < 'd4')}" for name, text in small().documents.items()}
    ),
}


class Model(Scorer):
    """A scorer with everything that tells it from others of its class, or that may happen to it.

    Args:
        weight: Of the overlap; tells in the scores of the probe.
        bias: Added where the document has honey; tells in the facts only.
        refuses: Whether documents with a stain get no score.
        replaced_after: Calls after which another weight answers, as a server that was restarted; none if negative.
        dies_after: Calls after which the process is killed; none if negative.
    """

    model_name = "a/model"

    def __init__(self, weight: float, bias: float, refuses: bool, *, replaced_after: int = -1, dies_after: int = -1):
        self._weight, self._bias, self._refuses = weight, bias, refuses
        self._replaced_after, self._dies_after = replaced_after, dies_after
        self.remote = replaced_after >= 0
        self._calls = 0

    def _facts(self, until: float | None) -> dict[str, str]:
        return {"bias": str(self._bias), "refuses": str(self._refuses)}

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        if self._calls == self._dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._calls == self._replaced_after:
            self._weight += 0.5
        self._calls += 1
        rows = queries * len(documents) if len(queries) == 1 else queries
        return [
            math.nan
            if self._refuses and "stain" in text
            else self._weight * overlap(query, text) + self._bias * ("honey" in text)
            for query, text in zip(rows, documents, strict=True)
        ]


MODELS = [(1.0, 0.0, False), (0.5, 0.0, False), (1.0, 0.25, False), (1.0, 0.0, True)]
models = st.sampled_from(MODELS)
names = st.sampled_from(sorted(COLLECTIONS))
depth_lists = st.sampled_from([(1,), (2, 4), (3, 7)])


def results(scorer: Scorer, name: str, depths: tuple[int, ...], folder: Path | bool) -> Any:
    """All of an evaluation that is no time and does not tell where a score is from."""
    found = evaluate(COLLECTIONS[name], scorer, run=RUN, depths=depths, cache=folder)
    (system,) = found.systems
    scores = {query: list(values) for query, values in system.scores.items()}
    return scores, [level.values for level in system.levels], system.rejected


def outcome_of(scorer: Scorer, name: str, depths: tuple[int, ...], folder: Path) -> Any:
    """The results, or the message of a ConfigError."""
    try:
        return results(scorer, name, depths, folder)
    except ConfigError as error:
        return str(error)


class Resuming(RuleBasedStateMachine):
    """Runs with one cache folder, and what may happen between and within them."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        self.patch = pytest.MonkeyPatch()

    @initialize(timed=st.sampled_from([0, 1, 200]))
    def start(self, timed: int) -> None:
        """With queries scored one by one, together, or both; nobody waits a minute for a lock."""
        self.patch.setattr(scoring, "TIMED_QUERIES", timed)
        self.patch.setattr(cache, "_LOCK_TIMEOUT", 0.0)

    def teardown(self) -> None:
        self.patch.undo()
        self.temporary.cleanup()

    @rule(model=models, name=names, depths=depth_lists)
    def run(self, model: tuple[float, float, bool], name: str, depths: tuple[int, ...]) -> None:
        """To its end. A damaged file is named, and the run goes well when it is deleted."""
        outcome = outcome_of(Model(*model), name, depths, self.folder)
        while isinstance(outcome, str):
            damaged = re.search(r"(\S+) can't be used: .* delete it to start over", outcome)
            assert damaged is not None, outcome
            Path(damaged[1]).unlink()  # fails where it was deleted before, so this comes to an end
            outcome = outcome_of(Model(*model), name, depths, self.folder)
        assert outcome == results(Model(*model), name, depths, False)

    @rule(model=models, name=names, depths=depth_lists, calls=st.integers(0, 9))
    def run_killed(self, model: tuple[float, float, bool], name: str, depths: tuple[int, ...], calls: int) -> None:
        """By SIGKILL, in a process of its own, within a call; or just behind the last one."""
        forked(lambda: results(Model(*model, dies_after=calls), name, depths, self.folder))

    @rule(model=models, name=names, depths=depth_lists, calls=st.integers(1, 9))
    def run_replaced(self, model: tuple[float, float, bool], name: str, depths: tuple[int, ...], calls: int) -> None:
        """Another model answers from some call on: refused, unless the first one's scores were all there."""
        outcome = outcome_of(Model(*model, replaced_after=calls), name, depths, self.folder)
        if isinstance(outcome, str):
            assert re.search("became another scorer during the run: scores of the probe|can't be used", outcome)
        else:
            assert outcome == results(Model(*model), name, depths, False)

    @rule(data=st.data(), share=st.floats(0, 1))
    def truncate(self, data: st.DataObject, share: float) -> None:
        """Cut one of the files, as a full disk may."""
        if files := sorted(self.folder.glob("*.sqlite")):
            path = data.draw(st.sampled_from(files))
            os.truncate(path, int(path.stat().st_size * share))

    @rule(model=models, name=names, depths=depth_lists)
    def run_locked(self, model: tuple[float, float, bool], name: str, depths: tuple[int, ...]) -> None:
        """While another process keeps all files to itself: told, unless the scorer has none of them."""
        with locked(self.folder):
            outcome = outcome_of(Model(*model), name, depths, self.folder)
        if isinstance(outcome, str):
            assert "can't be used" in outcome
        else:
            assert outcome == results(Model(*model), name, depths, False)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    connections = [sqlite3.connect(path, isolation_level=None, timeout=0) for path in folder.glob("*.sqlite")]
    try:
        for connection in connections:
            try:
                connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.DatabaseError:  # damaged
                continue
        yield
    finally:
        for connection in connections:
            connection.close()


TestResuming = Resuming.TestCase
TestResuming.settings = settings(
    max_examples=40, stateful_step_count=15, deadline=None, phases=(Phase.reuse, Phase.generate)
)


def test_a_run_waits_for_another_process_that_writes(tmp_path: Path):
    """And goes on when that has done."""
    model = MODELS[0]
    expected = results(Model(*model), "small", (3,), tmp_path)
    (path,) = tmp_path.iterdir()
    reader, writer = os.pipe()

    def write() -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            os.write(writer, b"locked")
            time.sleep(0.5)

    with ThreadPoolExecutor(1) as pool:
        child = pool.submit(forked, write)
        os.read(reader, 6)
        assert results(Model(*model), "small", (3,), tmp_path) == expected
        assert child.result() == 0


def test_models_differ_where_the_tests_need_it():
    """Two by the scores of the probe alone, one by its facts alone."""
    first, second, third, _ = (Model(*model).identity() for model in MODELS)
    assert first.facts == second.facts
    assert [change.partition(":")[0] for change in second.differences(first)] == ["scores of the probe"]
    assert [change.partition(":")[0] for change in third.differences(first)] == ["bias"]
    assert not any("honey" in text or "stain" in text for _, text in PROBES)
