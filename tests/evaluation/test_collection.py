"""Collections: BEIR's layout in all its file formats, read strictly."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from rag_rerank import ConfigError
from rag_rerank.embedded import collection_folder
from rag_rerank.evaluation import Collection
from tests.evaluation.collections import small, write, write_small


class TestCollection:
    """BEIR's layout, read strictly."""

    def test_the_embedded_collection_is_complete(self):
        """647 documents, 170 questions with one right answer each, and the licence beside them."""
        collection = Collection.load(collection_folder())
        assert len(collection.documents) == 647
        assert len(collection.queries) == len(collection.judgments) == 170
        assert all(len(grades) == 1 for grades in collection.judgments.values())
        assert collection.name == "python_faq"
        assert "PSF" in (collection_folder() / "LICENSE.rst").read_text(encoding="utf-8")
        assert "Python Software Foundation" in (collection_folder() / "README.md").read_text(encoding="utf-8")

    def test_title_and_text_are_joined_and_an_empty_title_adds_nothing(self, tmp_path: Path):
        """No leading space where there is no title; queries without judgments are left out."""
        write(tmp_path, corpus=[{"_id": "a", "title": "T", "text": "x"}, {"_id": "b", "title": "", "text": "y"}])
        loaded = Collection.load(tmp_path)
        assert loaded.documents == {"a": "T x", "b": "y"}
        assert loaded.queries == {"q": "what?"}

    @pytest.mark.parametrize(
        ("file", "content", "words"),
        [
            ("corpus.jsonl", '{"_id": "a", "text": "x"}\nnope', r"corpus\.jsonl, line 2"),
            ("corpus.jsonl", '{"_id": "a"}', r"corpus\.jsonl, line 1"),
            (
                "corpus.jsonl",
                '{"_id": 1.5, "text": "x"}',
                r"line 1: not an object with _id \(str \| int\), title \(str \| None\), text \(str\)",
            ),
            (
                "corpus.jsonl",
                '{"_id": "a", "text": "x", "title": 3}',
                r"line 1: not an object with _id \(str \| int\), title \(str \| None\), text \(str\)",
            ),
            ("corpus.jsonl", '["a", "x"]', r"corpus\.jsonl, line 1: not an object"),
            ("corpus.jsonl", '\n{"_id": "a", "text": "x"}\n\n{"_id": "a", "text": "y"}', "line 4: the id 'a' is there"),
            ("corpus.jsonl", "", "has no documents"),
            ("queries.jsonl", '{"_id": "other", "text": "x"}', "no query with a judgment"),
            ("qrels.tsv", "query-id\tcorpus-id\tscore\nq\ta\thigh", r"qrels\.tsv, line 2"),
            ("qrels.tsv", "query-id\tcorpus-id\tscore\nq\ta", r"qrels\.tsv, line 2"),
            ("qrels.tsv", "q\ta\t1\nq\ta\t0", r"qrels\.tsv, line 2: the document 'a' has another grade"),
            ("qrels.tsv", "q\ta\t1\nnobody\ta\t1", "1 judged queries have no text, such as 'nobody'"),
        ],
    )
    def test_a_malformed_line_is_named(self, tmp_path: Path, file: str, content: str, words: str):
        """File and line number."""
        write(tmp_path)
        (tmp_path / file).write_text(content)
        with pytest.raises(ConfigError, match=words):
            Collection.load(tmp_path)

    def test_a_missing_file_is_named(self, tmp_path: Path):
        """With its path."""
        with pytest.raises(ConfigError, match=r"qrels\.tsv can't be read|corpus\.jsonl can't be read"):
            Collection.load(tmp_path)

    def test_bytes_that_are_no_text_are_named(self, tmp_path: Path):
        """The file."""
        write(tmp_path)
        (tmp_path / "corpus.jsonl").write_bytes(b'{"_id": "a", "text": "\xff"}')
        with pytest.raises(ConfigError, match=r"corpus\.jsonl can't be read: it is not UTF-8"):
            Collection.load(tmp_path)

    def test_only_a_line_feed_ends_a_line(self, tmp_path: Path):
        """JSON may hold U+2028 and U+0085 as they are; a byte order mark and Windows' line ends do no harm."""
        write(tmp_path)
        text = json.dumps({"_id": "a", "text": "one\u2028two\u0085three"}, ensure_ascii=False)
        (tmp_path / "corpus.jsonl").write_bytes(f"\ufeff{text}\r\n".encode())
        assert Collection.load(tmp_path).documents == {"a": "one\u2028two\u0085three"}

    def test_a_first_line_without_a_header_counts(self, tmp_path: Path):
        """Not every writer of qrels.tsv knows that it has one."""
        write(tmp_path)
        (tmp_path / "qrels.tsv").write_text("q\ta\t1\n")
        assert Collection.load(tmp_path).judgments == {"q": {"a": 1}}

    def test_only_documents_that_are_asked_for_are_kept(self, tmp_path: Path):
        """And those judged relevant, which reports show."""
        loaded = Collection.load(write_small(tmp_path), documents={"d7"})
        assert list(loaded.documents) == ["d1", "d2", "d3", "d6", "d7"]


class TestFormats:
    """The same collection from other files."""

    def test_gzipped(self, tmp_path: Path):
        """Each file, and judgments in a folder of their own."""
        write_small(tmp_path)
        (tmp_path / "qrels").mkdir()
        moved = {
            "corpus.jsonl": "corpus.jsonl.gz",
            "queries.jsonl": "queries.jsonl.gz",
            "qrels.tsv": "qrels/test.tsv.gz",
        }
        for old, new in moved.items():
            (tmp_path / new).write_bytes(gzip.compress((tmp_path / old).read_bytes()))
            (tmp_path / old).unlink()
        loaded = Collection.load(tmp_path)
        assert (loaded.documents, loaded.queries, loaded.judgments) == (
            small().documents,
            small().queries,
            small().judgments,
        )

    @pytest.mark.parametrize(
        "content", [b"none", gzip.compress(b'{"_id": "a", "text": "x"}')[:-9]], ids=["none", "cut off"]
    )
    def test_a_broken_archive_is_named(self, tmp_path: Path, content: bytes):
        """Not one, or cut off."""
        write(tmp_path)
        (tmp_path / "corpus.jsonl").unlink()
        (tmp_path / "corpus.jsonl.gz").write_bytes(content)
        with pytest.raises(ConfigError, match=r"corpus\.jsonl\.gz is damaged"):
            Collection.load(tmp_path)

    def test_judgments_as_json_lines(self, tmp_path: Path):
        """As some collections on the hub have them, numbers for ids included."""
        write(tmp_path)
        (tmp_path / "qrels.jsonl").write_text('{"query-id": "q", "corpus-id": 7, "score": 2}\n')
        assert Collection.load(tmp_path, qrels=tmp_path / "qrels.jsonl").judgments == {"q": {"7": 2}}
        (tmp_path / "qrels.jsonl").write_text('{"query-id": "q", "corpus-id": 7}\n')
        with pytest.raises(ConfigError, match=r"qrels\.jsonl, line 1: not an object with query-id"):
            Collection.load(tmp_path, qrels=tmp_path / "qrels.jsonl")

    def test_parquet(self, tmp_path: Path):
        """In several files, with columns that nobody asked for."""
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        whole = small()
        (tmp_path / "corpus").mkdir()
        names = list(whole.documents)
        for number, part in enumerate([names[:3], names[3:]]):
            table = {"_id": part, "title": [None] * len(part), "text": [whole.documents[name] for name in part]}
            table["vector"] = [[0.5, 1.0]] * len(part)
            parquet.write_table(arrow.table(table), tmp_path / "corpus" / f"corpus-0000{number}-of-00002.parquet")
        queries = {"_id": list(whole.queries), "text": list(whole.queries.values())}
        parquet.write_table(arrow.table(queries), tmp_path / "queries.parquet")
        rows = [(query, name, grade) for query, grades in whole.judgments.items() for name, grade in grades.items()]
        columns = zip(("query-id", "corpus-id", "score"), zip(*rows, strict=True), strict=True)
        parquet.write_table(arrow.table({name: list(values) for name, values in columns}), tmp_path / "qrels.parquet")
        loaded = Collection.load(tmp_path)
        assert (loaded.documents, loaded.queries, loaded.judgments) == (whole.documents, whole.queries, whole.judgments)

    def test_a_broken_parquet_file_is_named(self, tmp_path: Path):
        """As any other."""
        pytest.importorskip("pyarrow")
        write(tmp_path)
        (tmp_path / "corpus.jsonl").unlink()
        (tmp_path / "corpus.parquet").write_bytes(b"nope")
        with pytest.raises(ConfigError, match=r"corpus\.parquet is damaged"):
            Collection.load(tmp_path)

    def test_parquet_without_pyarrow_says_what_to_install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """With the command."""
        write(tmp_path)
        (tmp_path / "corpus.jsonl").unlink()
        (tmp_path / "corpus.parquet").write_bytes(b"")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
        with pytest.raises(ConfigError, match="pip install pyarrow"):
            Collection.load(tmp_path)
