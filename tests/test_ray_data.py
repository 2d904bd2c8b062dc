"""Ray Data: pools of real actors; nothing lost, nothing twice, and every score that of one process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from rag_rerank import LocalScorer, Scorer, VLLMScorer
from rag_rerank.errors import BackendError, BackendUnavailable, ConfigError
from rag_rerank.files import Tally
from rag_rerank.files.formats import Reader
from rag_rerank.ray_data import Pool, rejects_in, rerank_folder, score_dataset
from rag_rerank.ray_data.batches import ScoreBatch
from rag_rerank.ray_data.pool import equal_share
from rag_rerank.ray_data.run import cut, files_in
from tests.faulty_server import FaultyServer, Request, Steps, http, oracle, scores
from tests.models import CORPUS
from tests.scorers import Journal, WordOverlap

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data")]
ONE, TWO = Pool(actors=1), Pool(actors=2)
GROUP, SHARD, COUNT = 64, 128, 640
SINGLE_PROCESS = """
import json, sys, torch
from rag_rerank import LocalScorer
torch.set_num_threads(1)
model, rows, group = sys.argv[1], json.load(open(sys.argv[2])), int(sys.argv[3])
scorer, groups = LocalScorer(model, dtype="float32"), [rows[n : n + group] for n in range(0, len(rows), group)]
print(json.dumps(sum([scorer.score([r["query"] for r in g], [r["document"] for r in g]) for g in groups], [])))
"""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """The address of a Ray with two processors, however many there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # Ray is polite, and tests are waited for
        patch.setenv("OMP_NUM_THREADS", "7")  # as users set it, against which an actor must keep to its share
        patch.setenv("VLLM_API_KEY", "k3y-of-the-machine")
        context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """For the input."""
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


class Threads(Scorer):
    """Gives every document the number of torch's threads where it runs, and that of its tokenizers'."""

    model_name = "threads"

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        import torch

        threads = [float(torch.get_num_threads()), float(os.environ["RAYON_NUM_THREADS"])]
        return (threads * len(documents))[: len(documents)]


class OfItsProcess(WordOverlap):
    """Is another one in each process."""

    def _facts(self, until: float | None) -> dict[str, str]:
        return {"process": str(os.getpid())}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def numbered(count: int, **words: str) -> list[dict[str, Any]]:
    """Pairs, each with its number; words for the documents of some, by number: _3="poison"."""
    return [
        {"query": f"q {number}", "document": f"{number} {words.get(f'_{number}', '')}".strip()}
        for number in range(count)
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of all files, in the order of their names."""
    return [json.loads(line) for file in sorted(path.glob("*.jsonl")) for line in file.read_text().splitlines()]


class TestScores:
    """They are those of one process."""

    @pytest.fixture(scope="class")
    @staticmethod
    def pairs() -> list[dict[str, Any]]:
        """Of the bundled collection, of all lengths, with a date, which JSON doesn't know."""
        texts = [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()]
        return [
            {"id": number, "query": texts[number % 97][:40], "document": texts[number % 600][: 20 + number]}
            for number in range(COUNT)
        ]

    @pytest.fixture(scope="class")
    @staticmethod
    def expected(cross_encoder: Path, pairs: list[dict[str, Any]], tmp_path_factory: Any) -> list[float]:
        """Those of a process without Ray, on one core."""
        path = tmp_path_factory.mktemp("single") / "pairs.json"
        path.write_text(json.dumps(pairs))
        command = [sys.executable, "-c", SINGLE_PROCESS, str(cross_encoder), str(path), str(GROUP)]
        return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)

    def test_a_folder(
        self, cross_encoder: Path, pairs: list[dict[str, Any]], expected: list[float], folder: Path, out: Path
    ):
        """To the last bit through two actors, pair by pair; rows with documents are ranked, in folders inside, too."""
        write(folder / "pairs.parquet", pairs)
        (folder / "deep").mkdir()
        lists = [{"query": row["query"], "documents": ["other", row["document"]]} for row in pairs[:30]]
        write(folder / "deep" / "lists.jsonl", lists)
        scorer = LocalScorer(cross_encoder, dtype="float32")
        tally = rerank_folder(scorer, folder, out, pool=TWO, shard_lines=SHARD, group=GROUP)
        assert tally == Tally(lines=COUNT + 30, ranked=COUNT + 30, documents=COUNT + 60)
        files = sorted(out.glob("*.parquet"))
        assert [path.name for path in files] == [f"pairs-{first:012}.parquet" for first in range(0, COUNT, SHARD)]
        found = [row for path in files for row in parquet.read_table(path).to_pylist()]
        assert found == [row | {"score": score} for row, score in zip(pairs, expected, strict=True)]
        ranked = read(out / "deep")
        assert [{name: row[name] for name in ("query", "documents")} for row in ranked] == lists
        best = {item["index"]: item["score"] for item in ranked[3]["ranked"]}
        assert best[1] == pytest.approx(expected[3], abs=1e-5)

    def test_a_step_of_a_pipeline(self, cross_encoder: Path, pairs: list[dict[str, Any]], expected: list[float]):
        """A long table of pairs; the rest of the columns stays."""
        dataset = ray.data.from_items(pairs, override_num_blocks=1)
        scorer = LocalScorer(cross_encoder, dtype="float32")
        scored = score_dataset(dataset, scorer, pool=Pool(actors=1, cpus=1), batch_size=GROUP)
        rows = sorted(scored.take_all(), key=lambda row: row["id"])
        added = [{"score": score, "score_error": None} for score in expected]
        assert rows == [pair | new for pair, new in zip(pairs, added, strict=True)]

    def test_an_actor_keeps_to_its_share_of_the_cores(self, folder: Path, out: Path):
        """Whatever OMP_NUM_THREADS says."""
        write(folder / "a.jsonl", [{"query": "q", "documents": ["threads of torch", "of tokenizers"]}])
        rerank_folder(Threads(), folder, out, pool=TWO)
        assert [item["score"] for item in read(out)[0]["ranked"]] == [1.0, 1.0]

    def test_a_server_gets_the_key_of_the_actors_machine(self):
        """The scorer's own goes nowhere."""
        with FaultyServer() as server:
            scorer = VLLMScorer(server.base_url, api_key="k3y-of-the-driver")
            rows = [{"query": "q", "documents": ["a", "b", "c"]}]
            (row,) = score_dataset(ray.data.from_items(rows), scorer, pool=ONE, top_n=2).take_all()
            keys = {request.headers["authorization"] for request in server.score_requests}
        scores = {document: oracle("q", document) for document in "abc"}
        best = sorted(scores, key=lambda document: -scores[document])[:2]
        assert row["ranked"] == [{"index": "abc".index(document), "score": scores[document]} for document in best]
        assert keys == {"Bearer k3y-of-the-machine"}


class TestDeaths:
    """An actor dies."""

    def test_nothing_is_lost_and_nothing_done_twice(self, folder: Path, out: Path, journal: Journal):
        """Another one goes on behind the last group."""
        rows = numbered(40, _13="mortal")
        write(folder / "a.jsonl", rows)
        tally = rerank_folder(journal, folder, out, pool=TWO, shard_lines=10, group=2)
        assert journal.path.with_name("died").exists()
        assert (tally.lines, tally.ranked) == (40, 40)
        assert [row["document"] for row in read(out)] == [row["document"] for row in rows]
        assert sorted(journal.lines()) == sorted(row["document"] for row in rows)

    def test_lines_that_kill_every_actor_end_the_run(self, folder: Path, out: Path, journal: Journal):
        """Named; Ray would go on for ever. What was finished is kept."""
        write(folder / "a.jsonl", numbered(20, _13="deadly"))
        with pytest.raises(BackendError, match=r"3 actors died .* at what follows line 12 of .*a\.jsonl") as caught:
            rerank_folder(journal, folder, out, pool=ONE, shard_lines=10, group=2)
        assert "the same command continues" in str(caught.value)
        assert [row["document"] for row in read(out)] == [str(number) for number in range(10)]
        assert journal.lines() == [str(number) for number in range(12)]


class TestPoison:
    """Lines that can't be scored."""

    def test_they_go_to_the_rejects(self, folder: Path, out: Path, journal: Journal):
        """With their number in their file, in files that nobody takes for the output; the others are scored."""
        write(folder / "a.jsonl", numbered(30, _17="poison"))
        with (folder / "a.jsonl").open("a") as file:
            file.write("nope\n\n")
        tally = rerank_folder(journal, folder, out, pool=ONE, shard_lines=10)
        assert (tally.lines, tally.ranked, tally.rejected, tally.blank) == (32, 29, 2, 1)
        assert [row["document"] for row in read(out)] == [str(number) for number in range(30) if number != 17]
        second, fourth = sorted(rejects_in(out).iterdir())
        assert (second.name, fourth.name) == ("a-000000000010.jsonl.jsonl", "a-000000000030.jsonl.jsonl")
        reject = json.loads(second.read_text())
        assert (reject["line"], reject["error"]) == (18, "document rejected: odd")
        assert json.loads(fourth.read_text())["line"] == 31
        assert {path.name for path in out.iterdir() if path.name[0] == "_"} == {"_rag_rerank", "_rejects"}

    def test_in_a_pipeline_a_column_says_what_is_wrong(self, journal: Journal):
        """And the row has no score; without Ray, since a class for map_batches is a class."""
        score = ScoreBatch(journal)
        table = score(pa.table({"query": ["3", "q", "q"], "document": ["3", "poison", None], "score": ["", "", ""]}))
        assert table.column_names == ["query", "document", "score", "score_error"]
        assert table["score"].to_pylist() == [1.0, None, None]
        assert table["score_error"].to_pylist() == [
            None,
            "document rejected: odd",
            'document must be str or an object with a "text", got NoneType',
        ]
        with pytest.raises(ConfigError, match="there are text"):
            score(pa.table({"text": ["a"]}))
        with pytest.raises(ConfigError, match="each row is a pair"):
            ScoreBatch(journal, top_n=1)(pa.table({"query": ["q"], "document": ["d"]}))


class TestGoingOn:
    """The same command again."""

    def test_after_an_error(self, folder: Path, out: Path, journal: Journal):
        """The back end's own comes out; what was scored is not scored again, and other runs keep out."""
        rows = numbered(40, _35="down")
        write(folder / "a.jsonl", rows)
        options: dict[str, Any] = {"pool": ONE, "shard_lines": 10, "group": 5}
        with pytest.raises(BackendUnavailable, match="nobody there") as caught:
            rerank_folder(journal, folder, out, **options)
        assert caught.value.attempts == 3
        assert journal.lines() == [row["document"] for row in rows[:35]]
        for name, value in {"group": 6, "top_n": 1, "shard_lines": 9}.items():
            with pytest.raises(ConfigError, match=f"{name}: {value}, before .*--restart"):
                rerank_folder(journal, folder, out, **(options | {name: value}))
        with pytest.raises(ConfigError, match="scores of the probe: .*, before .*--restart"):
            rerank_folder(Journal(journal.path, weight=0.5), folder, out, **options)
        journal.path.with_name("up").touch()
        seen: list[tuple[Tally, float]] = []
        tally = rerank_folder(journal, folder, out, **options, progress=lambda *now: seen.append(now))
        assert seen == [(Tally(30, 30, 0, 30, 30), 0.75), (Tally(40, 40, 0, 40, 30), 1.0)]
        assert seen[-1][0] == tally
        assert journal.lines() == [row["document"] for row in rows]
        assert rerank_folder(journal, folder, out, **options).resumed == 40
        with pytest.raises(ConfigError, match="scores of the probe: .*, before .*--restart"):  # finished, it is, too
            rerank_folder(Journal(journal.path, weight=0.5), folder, out, **options)
        write(folder / "b.jsonl", rows)
        with pytest.raises(ConfigError, match="b.jsonl: .* bytes of .*, before none"):
            rerank_folder(journal, folder, out, **options)
        assert rerank_folder(journal, folder, out, **options, restart=True) == Tally(80, 80, 0, 80, 0)

    def test_not_with_a_machine_that_has_another_scorer(self, folder: Path, out: Path):
        """Its first shard ends the run, and has no output."""
        write(folder / "a.jsonl", numbered(8))
        with pytest.raises(ConfigError, match=r"process: \d+, before \d+"):
            rerank_folder(OfItsProcess(), folder, out, pool=TWO, shard_lines=4)
        assert len(read(out)) <= 4

    def test_after_ctrl_c_on_the_command_line(self, cluster: str, folder: Path, out: Path):
        """On the cluster at RAY_ADDRESS first, then on one of its own; in between, changes are refused."""
        write(folder / "a.jsonl", numbered(60))
        process: subprocess.Popen[str] | None = None
        asked: list[str] = []
        swapped = False

        def behave(request: Request) -> Steps | None:
            if swapped and request.wants_scores:  # the server behind the URL has another model
                answer = scores(request)
                for item in answer["data"]:
                    item["score"] /= 2
                return [http(json.dumps(answer))]
            if request.wants_scores:
                asked.extend(request.documents)
                if len(asked) > 60 and process is not None and process.poll() is None:
                    process.send_signal(signal.SIGINT)
                    return [30.0]
            return None

        with FaultyServer(behave) as server:
            command = [
                sys.executable,
                "-m",
                "rag_rerank",
                "rerank",
                "--engine",
                "ray",
                "--base-url",
                server.base_url,
            ]
            command += ["--num-actors", "2", "--shard-lines", "10", "--in", str(folder), "--out", str(out)]
            environment = {**os.environ, "VLLM_API_KEY": ""}
            process = subprocess.Popen(
                command, stderr=subprocess.PIPE, text=True, env={**environment, "RAY_ADDRESS": cluster}
            )
            stderr = process.communicate(timeout=300)[1]
            assert process.returncode == 130, stderr
            assert f"The finished shards are kept in {out}: the same command continues behind them." in stderr
            finished = {row["document"] for row in read(out)}
            assert finished
            before = len(asked)
            on_cluster = {**environment, "RAY_ADDRESS": cluster}
            left = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
            other = subprocess.run(
                [*command, "--top-n", "1"], capture_output=True, text=True, env=on_cluster, check=False
            )
            assert (other.returncode, "top_n: 1, before None" in other.stderr) == (2, True), other.stderr
            swapped = True
            other = subprocess.run(command, capture_output=True, text=True, env=on_cluster, check=False)
            assert (other.returncode, "before" in other.stderr, "--restart" in other.stderr) == (2, True, True)
            assert {path: path.read_bytes() for path in out.rglob("*.jsonl")} == left
            swapped = False
            again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert again.returncode == 0, again.stderr
        assert f"60 lines: 60 reranked (60 documents), 0 rejected; written to {out}." in again.stderr
        assert [row["document"] for row in read(out)] == [str(number) for number in range(60)]
        assert not finished & set(asked[before:])


class TestBefore:
    """What is refused, or found out, before any work."""

    @pytest.mark.parametrize(
        ("source", "target", "words"),
        [
            ("none", "out", "there is no file or folder"),
            ("empty", "out", "has no files that end in"),
            ("in", "in/out", "inside of the input"),
            ("in", "none/out", "there is no folder"),
            ("in", "file", "is a file"),
            ("in", "full", "holds other files"),
        ],
    )
    def test_folders_that_will_not_do(self, source: str, target: str, words: str, folder: Path, journal: Journal):
        """Each with its name; nothing is written."""
        write(folder / "a.jsonl", numbered(1))
        (folder.parent / "empty").mkdir()
        (folder.parent / "full").mkdir()
        (folder.parent / "full" / "file").touch()
        (folder.parent / "file").touch()
        before = sorted(folder.parent.rglob("*"))
        with pytest.raises(ConfigError, match=words):
            rerank_folder(journal, folder.parent / source, folder.parent / target, pool=TWO)
        assert sorted(folder.parent.rglob("*")) == before

    @pytest.mark.parametrize(
        ("pool", "words"),
        [({"actors": 3, "cpus": 1}, "3 actors of 1 CPUs .* only 2"), ({"gpus": 1, "actors": 1}, "don't fit")],
    )
    def test_more_than_there_is(self, pool: dict[str, Any], words: str, folder: Path, out: Path, journal: Journal):
        """Ray would wait for it for ever."""
        write(folder / "a.jsonl", numbered(1))
        with pytest.raises(ConfigError, match=words):
            rerank_folder(journal, folder, out, pool=Pool(**pool))

    @pytest.mark.parametrize("pool", [{"actors": 0}, {"cpus": -1}, {"gpus": float("nan")}])
    def test_numbers_out_of_range(self, pool: dict[str, Any]):
        """Named."""
        with pytest.raises(ConfigError, match=next(iter(pool))):
            Pool(**pool)

    @pytest.mark.parametrize(
        ("cpus", "actors", "each"),
        [([2], 2, 1), ([8], 3, 2), ([8, 8], 2, 8), ([8, 4], 3, 4), ([2], 3, 0.5), ([1], 3, 0.3333), ([64, 64], 128, 1)],
    )
    def test_an_equal_share(self, cpus: list[float], actors: int, each: float):
        """Such that all fit on their machines."""
        assert equal_share(cpus, actors) == each

    @given(
        lines=st.lists(st.sampled_from([b"\n", b"a\n", b"x" * 300 + b"\n", b"\r\n"]), max_size=30),
        last=st.sampled_from([b"", b"no end"]),
        size=st.integers(1, 12),
    )
    def test_shards_are_all_lines_once(self, lines: list[bytes], last: bytes, size: int):
        """In order, each file's own, none longer than asked for."""
        with TemporaryDirectory() as name:
            path = Path(name, "a.jsonl")
            path.write_bytes(b"".join([*lines, last]))
            shards = cut(files_in(path), size)
            read = [list(Reader(shard.source, shard.part)) for shard in shards]
            assert [line for shard in read for line in shard] == list(Reader(path))
            assert all(len(shard) == size for shard in read[:-1])
            assert len({shard.name for shard in shards}) == len(shards)

    @given(rows=st.integers(0, 40), size=st.integers(1, 12), groups=st.integers(1, 50))
    def test_shards_of_parquet_too(self, rows: int, size: int, groups: int):
        """Wherever its row groups end."""
        with TemporaryDirectory() as name:
            path = Path(name, "a.parquet")
            parquet.write_table(pa.table({"n": range(rows)}), path, row_group_size=groups)
            shards = cut(files_in(path), size)
            read = [json.loads(line)["n"] for shard in shards for line in Reader(shard.source, shard.part)]
        assert read == list(range(rows))

    def test_ray_is_imported_by_the_first_call(self):
        """And where it is not installed, the error says how to get it."""
        script = (
            "import sys; sys.modules['ray'] = None\n"
            "from pathlib import Path; import rag_rerank.ray_data as r; from rag_rerank import LocalScorer\n"
            "assert not {'torch', 'pyarrow', 'pandas'} & set(sys.modules)\n"
            "try: r.score_dataset(None, LocalScorer('x'))\n"
            "except r.pool.ConfigError as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert "pip install 'rag-rerank[ray]'" in done.stdout

    def test_a_folder_needs_ray_but_not_ray_data(self, folder: Path, out: Path):
        """Which takes as long to import as all of Ray."""
        write(folder / "a.jsonl", numbered(1))
        script = (
            "import sys; sys.modules['ray.data'] = None\n"
            "from pathlib import Path; from rag_rerank.ray_data import rerank_folder\n"
            "from tests.scorers import WordOverlap\n"
            f"print(rerank_folder(WordOverlap(), Path({str(folder)!r}), Path({str(out)!r})).ranked)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout == "1\n"
