"""Runs and judgments in TREC's layouts."""

import gzip
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_rerank import ConfigError
from rag_rerank.evaluation import read_judgments, read_run, write_run
from tests.evaluation.test_measures import measure

ids = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=8)
scores = st.none() | st.floats(allow_nan=False, allow_infinity=False, width=64)


class TestRuns:
    """What a first stage found."""

    def test_scores_decide_and_of_equal_ones_the_greater_id_is_first(self, tmp_path: Path):
        """As in trec_eval; ranks are not read, tags may have spaces."""
        file = tmp_path / "run.trec"
        file.write_text("q Q0 a 1 0.5 bm25 of mine\nq Q0 b 2 0.5 x\nq\tQ0\tc\t3\t7e1\tx\n\nr Q0 a 1 -1 x\n")
        assert [(query, list(found)) for query, found in read_run(file).items()] == [
            ("q", ["c", "b", "a"]),
            ("r", ["a"]),
        ]

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("q Q0 b 2 high tag", "line 2: not query, Q0, document, rank, score and tag"),
            ("q Q0 b 2 0.5", "line 2: not query"),
            ("q Q0 b 2 nan tag", "line 2: the score is nan"),
            ("q Q0 b 2 inf tag", "line 2: the score is inf"),
            ("q Q0 a 2 0.5 tag", "line 2: the document 'a' is there twice for 'q'"),
        ],
    )
    def test_a_malformed_line_is_named(self, tmp_path: Path, line: str, words: str):
        """File and line number."""
        file = tmp_path / "run.trec"
        file.write_text(f"q Q0 a 1 0.9 tag\n{line}\n")
        with pytest.raises(ConfigError, match=rf"run\.trec, {words}"):
            read_run(file)

    def test_a_missing_file_is_named(self, tmp_path: Path):
        """With its path."""
        with pytest.raises(ConfigError, match=r"run\.trec can't be read"):
            read_run(tmp_path / "run.trec")

    @given(st.dictionaries(ids, st.dictionaries(ids, scores, min_size=1, max_size=6), max_size=4))
    def test_what_is_written_is_read_in_the_same_order(
        self, tmp_path_factory: pytest.TempPathFactory, found: dict[str, dict[str, float | None]]
    ):
        """Whatever the scores: equal, rising, huge or none; even by readers that hold them in single precision."""
        file = tmp_path_factory.getbasetemp() / "round.trec.gz"
        write_run(file, {query: list(ranking.items()) for query, ranking in found.items()}, tag="my model")
        loaded = read_run(file)
        assert {query: list(ranking) for query, ranking in loaded.items()} == {
            query: list(ranking) for query, ranking in found.items()
        }
        for ranking in loaded.values():
            single = [np.float32(score) for score in ranking.values()]
            assert all(above > below for above, below in pairwise(single))
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            assert all(line.endswith(" my_model\n") for line in lines)

    def test_scores_that_fall_are_written_as_they_are(self, tmp_path: Path):
        """To single precision; those without a score follow in steps of 1."""
        write_run(tmp_path / "run", {"q": [("a", 0.75), ("b", 0.1), ("c", 0.1), ("d", None)]})
        rows = [line.split() for line in (tmp_path / "run").read_text().splitlines()]
        assert [row[2:4] for row in rows] == [["a", "1"], ["b", "2"], ["c", "3"], ["d", "4"]]
        values = [float(row[4]) for row in rows]
        assert values == pytest.approx([0.75, 0.1, 0.1, -0.9], abs=1e-6)
        assert values[1] > values[2]

    @pytest.mark.parametrize("name", ["two words", "", "line\nbreak"])
    def test_an_id_that_the_layout_cant_hold_is_refused(self, tmp_path: Path, name: str):
        """It would shift the columns."""
        with pytest.raises(ConfigError, match="can't stand in a TREC run"):
            write_run(tmp_path / "run", {"q": [(name, 1.0)]})

    def test_a_file_that_cant_be_written_is_named(self, tmp_path: Path):
        """With its path."""
        with pytest.raises(ConfigError, match="can't be written"):
            write_run(tmp_path / "nowhere" / "run", {"q": [("a", 1.0)]})


class TestJudgments:
    """Qrels."""

    def test_both_layouts_give_the_same(self, tmp_path: Path):
        """BEIR's with a header and tabs, TREC's with four columns; and so does a gzipped file."""
        (tmp_path / "beir.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\nq\tb\t0\n")
        (tmp_path / "trec.txt").write_text("q 0 a 1\nq\t0\tb\t0\n")
        (tmp_path / "trec.gz").write_bytes(gzip.compress(b"q 0 a 1\nq 0 b 0\n"))
        (tmp_path / "bare.tsv").write_text("q\ta\t1\nq\tb\t0\n")
        for name in ("beir.tsv", "trec.txt", "trec.gz", "bare.tsv"):
            assert read_judgments(tmp_path / name) == {"q": {"a": 1, "b": 0}}

    @pytest.mark.parametrize("name", ["qrels.tsv", "qrels.jsonl"])
    def test_a_grade_is_a_whole_number(self, tmp_path: Path, name: str):
        """None is cut, and no line with one is taken for a header."""
        line = '{"query-id": "q", "corpus-id": "a", "score": 0.9}' if name.endswith("jsonl") else "q\ta\t0.9"
        (tmp_path / name).write_text(f"{line}\n")
        with pytest.raises(ConfigError, match=rf"{name}, line 1: the grade 0.9 is no whole number"):
            read_judgments(tmp_path / name)
        (tmp_path / name).write_text(line.replace("0.9", "2.0"))
        assert read_judgments(tmp_path / name) == {"q": {"a": 2}}

    @pytest.mark.parametrize("line", ["q 0 a high", "q 0 a 1 1", "q a", "q\ta\tb\tc\td"])
    def test_a_malformed_line_is_named(self, tmp_path: Path, line: str):
        """File and line number, in the first line, too."""
        (tmp_path / "qrels").write_text(f"{line}\n")
        with pytest.raises(ConfigError, match="qrels, line 1: not query, document and grade"):
            read_judgments(tmp_path / "qrels")

    def test_measures_of_what_was_written_are_those_of_what_was_ranked(self, tmp_path: Path):
        """Even where scores were equal."""
        write_run(tmp_path / "run", {"q": [("b", 0.5), ("a", 0.5), ("c", 0.5)]})
        found = {query: list(ranking) for query, ranking in read_run(tmp_path / "run").items()}
        assert measure({"q": {"a": 1}}, found, "RR") == {"RR": 0.5}
