"""``rag-rerank eval``, run as a user runs it."""

import inspect
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rag_rerank import LocalScorer, VLLMScorer
from rag_rerank.cli import evaluating
from rag_rerank.evaluation import DEFAULT_MEASURES, Collection, evaluate, read_run
from rag_rerank.identity import PROBES
from rag_rerank.inputs import NEUTRAL
from tests import commands
from tests.evaluation.collections import QUERIES, write, write_small
from tests.faulty_server import FaultyServer, Request, Steps, http, on_scores, right, scores
from tests.test_calibration import calibration
from tests.vllm_server import VLLMServer

pytestmark = pytest.mark.slow  # each starts processes


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "rag_rerank", "eval", *map(str, arguments)]


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "COLUMNS": "120", "XDG_CACHE_HOME": str(home), "VLLM_API_KEY": ""}


def run(home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return commands.run("eval", *arguments, XDG_CACHE_HOME=str(home), VLLM_API_KEY="")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return write_small(tmp_path / "made")


class TestCommand:
    """Tables on stdout, files where they are asked for."""

    def test_its_measures_are_those_of_the_python_api(self):
        """Unless told."""
        assert inspect.signature(evaluating.evaluate).parameters["measures"].default == ",".join(DEFAULT_MEASURES)

    def test_a_local_model_twice(self, tmp_path: Path, folder: Path, cross_encoder: Path):
        """A second time nothing is scored, and the figures are the same; every file that was asked for is there."""
        arguments = [folder, "--model", cross_encoder, "--depth", "2", "--depth", "3", "--dtype", "float32"]
        files = ["--json", tmp_path / "x.json", "--trec-run", tmp_path / "x.trec", "--html", tmp_path / "x.html"]
        first = run(tmp_path, *arguments, *files)
        assert first.returncode == 0, first.stderr
        assert "made: 7 documents, 3 judged queries, candidates by BM25; linear gain." in first.stdout
        assert "tiny-bert-cross-encoder" in first.stdout
        assert " from the cache" in first.stdout
        written = json.loads((tmp_path / "x.json").read_text())
        assert written["systems"][0]["pairs_scored"] > 0
        assert [level["depth"] for level in written["systems"][0]["depths"]] == [2, 3]
        assert read_run(tmp_path / "x.trec").keys() == QUERIES.keys()
        assert "tiny-bert-cross-encoder" in (tmp_path / "x.html").read_text()
        second = run(tmp_path, *arguments, *files)
        assert "\n0 pairs scored" in second.stdout
        again = json.loads((tmp_path / "x.json").read_text())
        assert again["systems"][0]["depths"] == written["systems"][0]["depths"]

    def test_a_calibrated_model_s_policies_are_compared(self, tmp_path: Path, folder: Path, cross_encoder: Path):
        """One file for each model; with another number of files nothing is scored."""
        with LocalScorer(cross_encoder, dtype="float32") as scorer:
            calibration(scorer, scale="logit").save(tmp_path / "relevance.json")
        arguments = [
            folder,
            "--model",
            cross_encoder,
            "--dtype",
            "float32",
            "--calibration",
            tmp_path / "relevance.json",
        ]
        result = run(tmp_path, *arguments, "--policy", "min_precision=0.2 top_n=2", "--json", tmp_path / "x.json")
        assert result.returncode == 0, result.stderr
        assert "min_precision=0.2 top_n=2" in result.stdout
        [system] = json.loads((tmp_path / "x.json").read_text())["systems"]
        assert [each["policy"] for each in system["kept"]] == ["min_precision=0.2 top_n=2"]
        result = run(tmp_path, *arguments, "--model", cross_encoder)
        assert (result.returncode, "1 --calibration for 2 models" in result.stderr) == (2, True)

    def test_several_servers_and_a_model_are_compared(self, tmp_path: Path, folder: Path, cross_encoder: Path):
        """Each with its tables, and each two with each other; a run for each."""
        with FaultyServer() as one, FaultyServer() as two:
            arguments = ["--base-url", one.base_url, "--base-url", two.base_url, "--model", cross_encoder]
            result = run(tmp_path, folder, *arguments, "--trec-run", tmp_path / "all.trec", "--json", tmp_path / "x")
            assert result.returncode == 0, result.stderr
            names = ["tiny-bert-cross-encoder", f"m on {one.label}", f"m on {two.label}"]
        assert [system["name"] for system in json.loads((tmp_path / "x").read_text())["systems"]] == names
        assert result.stdout.count(" … m on ") == 3
        assert len(list(tmp_path.glob("all.*.trec"))) == 3

    def test_a_server_is_scored_through_its_api(self, tmp_path: Path, vllm_minilm: VLLMServer):
        """A real one, with the figures that the Python API finds."""
        arguments = ["--base-url", vllm_minilm.base_url, "--queries", "3", "--depth", "10", "--json", tmp_path / "x"]
        result = run(tmp_path, *arguments)
        assert result.returncode == 0, result.stderr
        written = json.loads((tmp_path / "x").read_text())
        from rag_rerank.embedded import collection_folder

        with VLLMScorer(vllm_minilm.base_url, timeout=120) as scorer:
            collection = Collection.load(collection_folder())
            found = evaluate(collection, scorer, limit=3, depths=[10], cache=False)
        assert written["systems"][0]["depths"][0]["means"] == pytest.approx(
            {name: found.systems[0].deepest.mean(name) for name in found.measures}, abs=1e-3
        )


class TestOtherScorers:
    """The same command with another scorer: nothing of the first one's is taken for its own."""

    def figures(self, home: Path, *arguments: str | Path) -> tuple[dict[str, Any], str]:
        result = run(home, *arguments, "--depth", "3", "--json", home / "x.json")
        assert result.returncode == 0, result.stderr
        (system,) = json.loads((home / "x.json").read_text())["systems"]
        return system, result.stderr

    def test_replaced_weights(self, tmp_path: Path, folder: Path, cross_encoder: Path):
        """Of the same size, in the same folder; and back to the first."""
        from safetensors.torch import load_file, save_file

        model = tmp_path / "model"
        shutil.copytree(cross_encoder, model)
        weights = load_file(model / "model.safetensors")
        arguments = [folder, "--model", model, "--dtype"]
        first, told = self.figures(tmp_path, *arguments, "float32")
        assert "scored anew" not in told
        assert self.figures(tmp_path, *arguments, "float32")[0]["pairs_scored"] == 0
        save_file(
            {name: -2 * tensor for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"}
        )
        second, told = self.figures(tmp_path, *arguments, "float32")
        assert "is not the scorer whose scores are cached; scored anew: " in told
        whole, _ = self.figures(tmp_path, *arguments, "float32", "--cache", tmp_path / "other")
        assert second["depths"][0]["per_query"] == whole["depths"][0]["per_query"]
        assert second["pairs_scored"] == first["pairs_scored"] > 0
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        again, _ = self.figures(tmp_path, *arguments, "float32")
        assert again["depths"][0]["per_query"] == first["depths"][0]["per_query"]

    def test_a_killed_run_goes_on_with_another_model_behind_the_url(self, tmp_path: Path, folder: Path):
        """All is scored anew, and said why."""
        process: subprocess.Popen[bytes] | None = None

        def kill(request: Request) -> Steps | None:
            if request.queries[0] in list(QUERIES.values())[1:] and process is not None:
                process.kill()
            return None

        def other(request: Request) -> Steps:
            answer = scores(request)
            for row in answer["data"]:
                row["score"] = 1 - row["score"]
            return [http(json.dumps(answer))]

        with FaultyServer(on_scores(kill)) as server:
            process = subprocess.Popen(
                command(folder, "--base-url", server.base_url), env=environment(tmp_path), stderr=subprocess.DEVNULL
            )
            assert process.wait(60) == -signal.SIGKILL
            server.behave = on_scores(other)
            resumed, told = self.figures(tmp_path, folder, "--base-url", server.base_url)
            whole, _ = self.figures(tmp_path, folder, "--base-url", server.base_url, "--cache", tmp_path / "other")
        assert "is not the scorer whose scores are cached; scored anew: scores of the probe" in told
        assert (resumed["pairs_cached"], resumed["depths"][0]["per_query"]) == (0, whole["depths"][0]["per_query"])

    def test_halves_of_characters_come_to_the_report(self, tmp_path: Path):
        """As texts from PDFs have them."""
        rows = [{"_id": "a", "title": "", "text": "what? \ud800"}, {"_id": "b", "title": "", "text": "what is what?"}]
        write(tmp_path, rows)
        with FaultyServer() as server:
            done = run(tmp_path, tmp_path, "--base-url", server.base_url, "--html", tmp_path / "report.html")
        assert done.returncode == 0, done.stderr
        assert "what? &#55296;" in (tmp_path / "report.html").read_text(encoding="utf-8")


class TestEnds:
    """What goes wrong."""

    def test_ctrl_c_keeps_what_was_scored_and_says_how_to_go_on(self, tmp_path: Path, folder: Path):
        """The same command then scores only what is left."""

        def slow(request: Request) -> Steps:
            return [0.6, *right(request)]

        with FaultyServer(on_scores(slow)) as server:
            process = subprocess.Popen(
                command(folder, "--base-url", server.base_url, "--depth", "3"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(tmp_path),
            )
            deadline = time.monotonic() + 60
            # One to begin with, who it is; the first query, and whether it is still the same; the second.
            while len(server.score_requests) < 5 and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=300)
            assert (process.returncode, stdout) == (130, "")
            assert "What was scored is kept: the same command goes on from there." in stderr
            assert "Traceback" not in stderr
            server.behave = lambda request: None
            result = run(tmp_path, folder, "--base-url", server.base_url, "--depth", "3", "--json", tmp_path / "x")
        (system,) = json.loads((tmp_path / "x").read_text())["systems"]
        assert result.returncode == 0, result.stderr
        assert system["pairs_scored"] > 0
        assert system["pairs_cached"] > 0

    @pytest.mark.parametrize("last", [1, 6, 16])
    def test_a_killed_one_goes_on_and_scores_nothing_twice(self, tmp_path: Path, last: int):
        """SIGKILL while a request is on its way: only its pairs are asked for again, and the run has the same bytes."""
        probes = {NEUTRAL, *(query for query, _ in PROBES)}  # whether it works, and is still the same model
        counted: Counter[tuple[str, str]] = Counter()
        process: subprocess.Popen[bytes] | None = None
        left = last

        def count(request: Request) -> Steps | None:
            nonlocal left
            if request.queries[0] in probes:
                return None
            left -= 1
            if left == 0 and process is not None:
                process.kill()
                return None
            counted.update(zip(itertools.cycle(request.queries), request.documents, strict=False))
            return None

        with FaultyServer(on_scores(count)) as server:
            arguments = [
                "--base-url",
                server.base_url,
                "--queries",
                "12",
                "--depth",
                "5",
                "--depth",
                "10",
                "--trec-run",
            ]
            process = subprocess.Popen(
                command(*arguments, tmp_path / "x.trec"), env=environment(tmp_path), stderr=subprocess.DEVNULL
            )
            assert process.wait(60) == -signal.SIGKILL
            process = None
            assert not (tmp_path / "x.trec").exists()
            done = counted.copy()
            result = run(tmp_path, *arguments, tmp_path / "x.trec")
            assert result.returncode == 0, result.stderr
            assert set(counted.values()) == {1}
            assert len(counted) > len(done)
            whole = run(tmp_path / "another home", *arguments, tmp_path / "whole.trec")
            assert whole.returncode == 0, whole.stderr
        assert (tmp_path / "x.trec").read_bytes() == (tmp_path / "whole.trec").read_bytes()

    def test_a_server_that_is_not_there_is_told_at_once(self, tmp_path: Path, folder: Path):
        """Before anything else is scored."""
        with FaultyServer() as server:
            server.kill()
            result = run(tmp_path, folder, "--base-url", server.base_url)
        assert result.returncode == 1
        assert server.label in result.stderr
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["/no/such/folder"], "corpus.jsonl can't be read"),
            (["--run", "/no/such/run"], "/no/such/run can't be read"),
            (["--qrels", "/no/such/qrels"], "name the collection's FOLDER"),
            (["--run", "RUN"], "the run has the document 'd1' (for the query 'q1'), the collection has not"),
            (["--html", "/no/such/folder/x.html"], "there is no such folder"),
            (["--json", "/"], "it is a folder"),
            (["--json", "/no/x", "--html", "/no/../no/x"], "one would replace the other"),
            (["--measures", "nDGC@10"], "'nDGC@10' is not known"),
            (["--base-url", "ftp://x"], "http://"),
            (["--base-url", "http://x", "--dtype", "float32"], "local models"),
            (["--depth", "0"], "Invalid value for '--depth'"),
        ],
    )
    def test_a_mistake_is_said_in_one_line(self, tmp_path: Path, arguments: list[str], words: str):
        """Exit code 2, nothing on stdout."""
        (tmp_path / "run.trec").write_text("q1 Q0 d1 1 2 x\n")
        result = run(tmp_path, *(str(tmp_path / "run.trec") if word == "RUN" else word for word in arguments))
        assert (result.returncode, result.stdout) == (2, "")
        assert words in result.stderr
        assert "Traceback" not in result.stderr

    def test_a_cache_may_be_damaged_and_may_be_elsewhere(self, tmp_path: Path, folder: Path):
        """What to do is said; another folder takes its place."""
        with FaultyServer() as server:
            arguments = [folder, "--base-url", server.base_url, "--cache", tmp_path / "cache"]
            first = run(tmp_path, *arguments)
            assert first.returncode == 0, first.stderr
            (file,) = (tmp_path / "cache").iterdir()
            file.write_bytes(b"damaged " * 1000)
            second = run(tmp_path, *arguments)
            assert (second.returncode, second.stdout) == (2, "")
            assert "delete it to start over" in second.stderr
            third = run(tmp_path, *arguments[:-1], tmp_path / "other")
            assert third.returncode == 0, third.stderr
            assert " 0 from the cache" in third.stdout
        assert not (tmp_path / "rag_rerank").exists()
