"""Scores that are kept: by content, by several processes at once, through kills."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from rag_rerank import ConfigError
from rag_rerank.evaluation.cache import ScoreCache, default_folder
from rag_rerank.identity import Identity

ME = Identity({"model": "me/my model", "dtype": "float32"}, (0.5, 20.0), place="here")


class TestScoreCache:
    """Each scorer's own, in one file."""

    def test_what_was_kept_is_there_when_it_is_opened_again(self, tmp_path: Path):
        """To the last bit; what the scorer refused is not."""
        with closing(ScoreCache(tmp_path / "new" / "folder", ME)) as cache:
            cache.keep("q", ["a", "b", "c"], [1 / 3, None, -2.5e-300])
        with closing(ScoreCache(tmp_path / "new" / "folder", ME)) as cache:
            assert cache.scores("q", ["c", "b", "a", "d"]) == [-2.5e-300, None, 1 / 3, None]
            assert cache.scores("other", ["a"]) == [None]
            assert cache.scores("q", []) == []

    def test_keys_are_texts_and_not_their_joints(self, tmp_path: Path):
        """Where one text ends and the next begins makes a difference, and so does every letter, lone surrogates too."""
        with closing(ScoreCache(tmp_path, ME)) as cache:
            cache.keep("ab", ["c", "\ud800", ""], [1.0, 2.0, 3.0])
            assert cache.scores("a", ["bc"]) == [None]
            assert cache.scores("ab", ["c ", "C", "\ud800", ""]) == [None, None, 2.0, 3.0]

    def test_many_documents_at_a_time(self, tmp_path: Path):
        """More than sqlite takes in one statement."""
        texts = [str(number) for number in range(1203)]
        with closing(ScoreCache(tmp_path, ME)) as cache:
            cache.keep("q", texts, [float(text) for text in texts])
            assert cache.scores("q", texts) == [float(text) for text in texts]

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            (replace(ME, facts=ME.facts | {"dtype": "bfloat16"}), "dtype: bfloat16, before float32"),
            (replace(ME, probes=(0.53, 20.0)), "scores of the probe: 0.53, 20, before 0.5, 20"),
        ],
    )
    def test_another_scorer_has_scores_of_its_own(
        self, tmp_path: Path, other: Identity, words: str, caplog: pytest.LogCaptureFixture
    ):
        """In what it differs is said when it is new, and never again."""
        with closing(ScoreCache(tmp_path, ME)) as cache:
            cache.keep("q", ["a"], [1.0], seconds=1.0)
        assert caplog.text == ""
        with closing(ScoreCache(tmp_path, other)) as cache:
            assert words in caplog.text
            assert (cache.scores("q", ["a"]), cache.seconds("q", ["a"])) == ([None], None)
            cache.keep("q", ["a"], [2.0])
        caplog.clear()
        for identity, score in ((ME, 1.0), (other, 2.0)):
            with closing(ScoreCache(tmp_path, identity)) as cache:
                assert cache.scores("q", ["a"]) == [score]
        assert caplog.text == ""

    def test_folders_of_other_names_are_other_models(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        """Which is no news; what changed in a folder of the same name is."""
        folder = replace(ME, facts={"model": "a folder", "weights": "1"}, name="one")
        for identity in (folder, replace(folder, facts=folder.facts | {"weights": "2"}, name="two")):
            ScoreCache(tmp_path, identity).close()
        assert caplog.text == ""
        ScoreCache(tmp_path, replace(folder, facts=folder.facts | {"weights": "3"})).close()
        assert "one is not the scorer whose scores are cached" in caplog.text

    def test_scores_that_differ_by_rounding_are_the_same_scorer_s(self, tmp_path: Path):
        """As those of half precision do from call to call."""
        with closing(ScoreCache(tmp_path, ME)) as cache:
            cache.keep("q", ["a"], [1.0])
        with closing(ScoreCache(tmp_path, replace(ME, probes=(0.505, 19.9)))) as cache:
            assert cache.scores("q", ["a"]) == [1.0]

    def test_a_scorer_s_scores_are_lost_with_its_entry(self, tmp_path: Path):
        """And are no other one's: a damaged file may have lost just that."""
        with closing(ScoreCache(tmp_path, ME)) as cache:
            cache.keep("q", ["a"], [1.0])
        with closing(sqlite3.connect(cache.path, isolation_level=None)) as database:
            database.execute("DELETE FROM scorers")
        with closing(ScoreCache(tmp_path, replace(ME, probes=(0.9, 1.0)))) as cache:
            assert cache.scores("q", ["a"]) == [None]

    def test_two_scorers_with_equal_facts_may_write_at_once(self, tmp_path: Path):
        """Neither gets a score of the other."""
        other = replace(ME, probes=(0.9, 1.0))
        with closing(ScoreCache(tmp_path, ME)) as mine, closing(ScoreCache(tmp_path, other)) as theirs:
            theirs.keep("q", ["a"], [2.0])
            mine.keep("q", ["a", "b"], [1.0, 1.0])
            assert (mine.scores("q", ["a", "b"]), theirs.scores("q", ["a", "b"])) == ([1.0, 1.0], [2.0, None])

    def test_times_are_of_the_very_call_and_place(self, tmp_path: Path):
        """Other documents, another order or another machine have their own."""
        with closing(ScoreCache(tmp_path, ME)) as cache:
            cache.keep("q", ["a", "b"], [1.0, 2.0], seconds=0.25)
        with closing(ScoreCache(tmp_path, ME)) as cache:
            assert [cache.seconds("q", texts) for texts in (["a", "b"], ["b", "a"], ["a"])] == [0.25, None, None]
        with closing(ScoreCache(tmp_path, replace(ME, place="elsewhere"))) as cache:
            assert cache.scores("q", ["a", "b"]) == [1.0, 2.0]
            assert cache.seconds("q", ["a", "b"]) is None

    @pytest.mark.parametrize("missing", [1, 100, 4096, 5000])
    def test_a_file_that_was_cut_off_gives_no_wrong_score(self, tmp_path: Path, missing: int):
        """It is named, or the scores are not known."""
        texts = [str(number) for number in range(2000)]
        with closing(ScoreCache(tmp_path, ME)) as cache:
            cache.keep("q", texts, [1.5] * 2000)
        os.truncate(cache.path, cache.path.stat().st_size - missing)
        with (
            pytest.raises(ConfigError, match="can't be used: .*delete it to start over"),
            closing(ScoreCache(tmp_path, ME)) as cache,
        ):
            assert set(cache.scores("q", texts)) <= {1.5, None}

    @pytest.mark.parametrize("content", [b"this is no database, but long enough to be taken for one" * 20])
    def test_a_damaged_file_is_named(self, tmp_path: Path, content: bytes):
        """With what to do."""
        with closing(ScoreCache(tmp_path, ME)) as cache:
            path = cache.path
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{path.name} can't be used: .*delete it to start over"):
            ScoreCache(tmp_path, ME)

    def test_a_folder_that_cant_be_made_is_named(self, tmp_path: Path):
        """With what to do."""
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="can't be used"):
            ScoreCache(tmp_path / "file", ME)

    def test_the_default_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        """As the XDG specification has it."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_folder() == tmp_path / "rag_rerank"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert default_folder() == Path.home() / ".cache" / "rag_rerank"


WRITER = """
import sys, time
from contextlib import closing
from rag_rerank.evaluation.cache import ScoreCache
from rag_rerank.identity import Identity

folder, name, pause = sys.argv[1:]
me = Identity({"model": "me/my model", "dtype": "float32"}, (0.5, 20.0), place="here")
with closing(ScoreCache(folder, me)) as cache:
    print("open", flush=True)
    for number in range(300):
        cache.keep(f"{name}{number}", ["a", "b"], [number, -number])
        time.sleep(float(pause))
"""


def writer(folder: Path, name: str, pause: float = 0) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(folder), name, str(pause)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


class TestProcesses:
    """Several at once, and killed."""

    def test_two_processes_write_one_file(self, tmp_path: Path):
        """Nothing is lost."""
        writers = [writer(tmp_path, "x"), writer(tmp_path, "y")]
        assert [process.wait(60) for process in writers] == [0, 0]
        with closing(ScoreCache(tmp_path, ME)) as cache:
            for name in "xy":
                for number in (0, 150, 299):
                    assert cache.scores(f"{name}{number}", ["a", "b"]) == [number, -number]

    def test_a_killed_process_leaves_all_that_it_had_written(self, tmp_path: Path):
        """In a file that is whole."""
        process = writer(tmp_path, "x", pause=0.01)
        assert process.stdout is not None
        process.stdout.readline()
        with closing(ScoreCache(tmp_path, ME)) as cache:
            while cache.scores("x5", ["a"]) == [None]:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            assert [cache.scores(f"x{number}", ["b"]) for number in range(6)] == [[-number] for number in range(6)]
            with closing(sqlite3.connect(cache.path)) as database:
                assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
