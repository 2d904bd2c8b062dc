"""Collections, the first stage and the measures: the figures that everyone else gets."""

import json
import math
from pathlib import Path

import pytest

from rag_rerank import ConfigError
from rag_rerank.embedded import MINILM_SHA256, collection_folder, minilm_folder
from rag_rerank.evaluation import BM25, Collection, measure


@pytest.fixture(scope="module")
def collection() -> Collection:
    return Collection.load(collection_folder())


class TestCollection:
    """BEIR's layout, read strictly."""

    def test_the_embedded_collection_is_complete(self, collection: Collection):
        """647 documents, 170 questions with one right answer each, and the licence beside them."""
        assert len(collection.documents) == 647
        assert len(collection.queries) == len(collection.judgments) == 170
        assert all(len(grades) == 1 for grades in collection.judgments.values())
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
            ("corpus.jsonl", '{"_id": 1, "text": "x"}', "must be strings"),
            ("qrels.tsv", "query-id\tcorpus-id\tscore\nq\ta\thigh", r"qrels\.tsv, line 2"),
            ("qrels.tsv", "query-id\tcorpus-id\tscore\nq\ta", r"qrels\.tsv, line 2"),
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


def write(folder: Path, corpus: list[dict[str, str]] | None = None) -> None:
    rows = corpus or [{"_id": "a", "title": "", "text": "x"}]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "what?"}\n{"_id": "unjudged", "text": "why?"}')
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\n")


class TestBM25:
    """The first stage."""

    def test_it_reaches_the_published_baseline(self, collection: Collection):
        """Lucene's BM25 with stemming: nDCG@10 0.5354, RR@10 0.4820, R@100 0.9235."""
        bm25 = BM25(collection.documents)
        run = {name: bm25.retrieve(text, 100) for name, text in collection.queries.items()}
        means = measure(collection.judgments, run, ("nDCG@10", "RR@10", "R@100"))
        assert means == {
            "nDCG@10": pytest.approx(0.5354, abs=1e-3),
            "RR@10": pytest.approx(0.4820, abs=1e-3),
            "R@100": pytest.approx(0.9235, abs=1e-3),
        }

    def test_documents_that_share_no_word_are_not_retrieved(self):
        """Filling up with zero scores would inflate recall on small collections."""
        bm25 = BM25({"a": "pandas eat bamboo", "b": "bread and water"})
        assert list(bm25.retrieve("bamboo", 100)) == ["a"]
        assert bm25.retrieve("submarine", 100) == {}
        assert bm25.retrieve("", 100) == {}


class TestMeasures:
    """Small enough to check by hand."""

    def test_means_are_over_every_judged_query(self):
        """One right answer at rank 2, one query without results."""
        judgments = {"q1": {"a": 1}, "q2": {"b": 1}}
        means = measure(judgments, {"q1": {"x": 2.0, "a": 1.0}})
        assert means["RR@10"] == pytest.approx(0.5 / 2)
        assert means["nDCG@10"] == pytest.approx(1 / math.log2(3) / 2)


class TestEmbedded:
    """The embedded model is the one that we know."""

    def test_its_weights_are_checked(self, monkeypatch: pytest.MonkeyPatch):
        """By sha256; others are refused with both digests."""
        assert (minilm_folder() / "modules.json").is_file()
        monkeypatch.setattr("rag_rerank.embedded.MINILM_SHA256", "0" * 64)
        with pytest.raises(ConfigError, match=f"{MINILM_SHA256}, expected 0000"):
            minilm_folder()
