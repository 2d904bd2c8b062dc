"""`rag-rerank rerank --in --out` as a user runs it: killed half-way, and continued after something has changed."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from rag_rerank.files import partial_of
from tests import commands, kept
from tests.faulty_server import FaultyServer, Request, Steps, http, scores
from tests.models import make_bert_cross_encoder

pytestmark = pytest.mark.slow  # each starts processes
LINES = 800


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return commands.run("rerank", *arguments, VLLM_API_KEY="")


def killed(target: Path, *arguments: str | Path) -> int:
    """Run the command until some groups of lines are finished, then kill it; how many lines they are."""
    partial, log = partial_of(target), target.with_name("log")
    log.touch()
    process = commands.start("rerank", *arguments, output=log, environment={"VLLM_API_KEY": ""})
    until = time.monotonic() + 300
    while sum(path.read_bytes().count(b'"ranked"') for path in target.parent.glob(f"{partial.name}*")) < LINES // 4:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    log.unlink()
    assert not target.exists()
    return kept.lines(partial)


def refused(words: str, target: Path, *arguments: str | Path) -> None:
    """Run the command: it says what differs and how to start over, and touches nothing."""
    before = {path: path.read_bytes() for path in target.parent.iterdir() if path.is_file()}
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert words in done.stderr
    assert "--restart" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in target.parent.iterdir() if path.is_file()} == before


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    rows = [
        {"query": f"question {number}", "documents": ["an answer " * (number % 40), f"{number}", "no answer"]}
        for number in range(LINES)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_another_model_in_the_same_folder(source: Path, target: Path, tmp_path: Path):
    """Refused; and another option; the same command with the same weights ends in the same bytes as if undisturbed."""
    first = make_bert_cross_encoder(tmp_path / "first")
    second = make_bert_cross_encoder(tmp_path / "second", seed=1)
    model = shutil.copytree(first, tmp_path / "model")
    files = ["--model", model, "--dtype", "float32", "--in", source, "--out"]
    assert run(*files, target.with_name("whole.jsonl")).returncode == 0
    done = killed(target, *files, target)
    assert 0 < done < LINES
    refused("top_n: 1, before None", target, *files, target, "--top-n", "1")
    shutil.rmtree(model)
    shutil.copytree(second, model)
    refused("before", target, *files, target)
    shutil.rmtree(model)
    shutil.copytree(first, model)
    end = run(*files, target)
    assert end.returncode == 0, end.stderr
    assert end.stderr.startswith(f"{done:,} lines of")
    assert target.read_bytes() == target.with_name("whole.jsonl").read_bytes()
    assert not [path.name for path in tmp_path.iterdir() if "partial" in path.name]


class Model:
    """What a server serves: the scores of one model, or those of another, which are half as high.

    Attributes:
        other: Whether it is the other one.
        swap_at: The number of requests for scores after which it becomes the other one.
        delay: Seconds that each takes.
    """

    def __init__(self) -> None:
        self.other, self.swap_at, self.requests, self.delay = False, 10**9, 0, 0.0

    def __call__(self, request: Request) -> Steps | None:
        if not request.wants_scores:
            return None
        self.requests += 1
        self.other = self.other or self.requests > self.swap_at
        answer: dict[str, Any] = scores(request)
        for item in answer["data"]:
            item["score"] /= 2 if self.other else 1
        return [self.delay, http(json.dumps(answer))]


class TestServer:
    """A server behind a URL."""

    def test_it_serves_another_model(self, source: Path, target: Path):
        """Refused; as is another option; with the first one again, the output is the same as if undisturbed."""
        model = Model()
        with FaultyServer(model) as server:
            files = ["--base-url", server.base_url, "--in", source, "--out"]
            assert run(*files, target.with_name("whole.jsonl")).returncode == 0
            model.delay = 0.05
            done = killed(target, *files, target)
            assert 0 < done < LINES
            model.delay, model.other = 0.0, True
            refused("before", target, *files, target)
            model.other = False
            refused("top_n: 1, before None", target, *files, target, "--top-n", "1")
            left = {path: path.read_bytes() for path in target.parent.iterdir()}
            server.kill()
            down = run(*files, target)
            assert (down.returncode, "Traceback" in down.stderr) == (1, False)
            assert {path: path.read_bytes() for path in target.parent.iterdir()} == left
            server.revive()
            end = run(*files, target)
        assert end.returncode == 0, end.stderr
        assert end.stderr.startswith(f"{done:,} lines of")
        assert target.read_bytes() == target.with_name("whole.jsonl").read_bytes()

    def test_it_is_replaced_in_the_middle_of_a_run(self, source: Path, target: Path):
        """The run ends at once; what it keeps has the scores of the first one only."""
        model = Model()
        with FaultyServer(model) as server:
            files = ["--base-url", server.base_url, "--in", source, "--out"]
            assert run(*files, target.with_name("whole.jsonl")).returncode == 0
            model.swap_at = model.requests + (model.requests // 2)
            refusal = run(*files, target)
            assert refusal.returncode == 2, refusal.stderr
            assert "before" in refusal.stderr
            assert "--restart" in refusal.stderr
            assert not target.exists()
            begun = kept.output(partial_of(target))
            assert begun
            assert target.with_name("whole.jsonl").read_bytes().startswith(begun)
            refused("before", target, *files, target)
            model.other, model.swap_at = False, 10**9
            assert run(*files, target).returncode == 0
        assert target.read_bytes() == target.with_name("whole.jsonl").read_bytes()
