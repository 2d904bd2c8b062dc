"""The first stage: the figures that everyone else gets."""

import pytest

from rag_rerank import ConfigError
from rag_rerank.embedded import collection_folder
from rag_rerank.evaluation import BM25, Collection
from tests.evaluation.test_measures import measure


class TestBM25:
    """The first stage."""

    def test_it_reaches_the_published_baseline(self):
        """Lucene's BM25 with stemming: nDCG@10 0.5354, RR@10 0.4820, R@100 0.9235."""
        collection = Collection.load(collection_folder())
        bm25 = BM25(collection.documents)
        run = {name: list(bm25.retrieve(text, 100)) for name, text in collection.queries.items()}
        means = measure(collection.judgments, run, "nDCG@10", "RR@10", "R@100")
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

    def test_of_equal_documents_the_first_are_retrieved(self):
        """On any processor: which of them numpy puts first depends on its instructions."""
        documents = {f"d{number}": "pandas eat bamboo" for number in range(1000)}
        assert list(BM25(documents).retrieve("bamboo", 100)) == [f"d{number}" for number in range(100)]

    def test_halves_of_characters_are_no_error(self):
        """As texts from PDFs have them."""
        for language in ("english", "none", "characters"):
            assert list(BM25({"a": "bamboo \ud800", "b": "bread"}, language).retrieve("bamboo \udc00", 9)) == ["a"]

    def test_words_are_those_of_the_language(self):
        """Stemmed as its own, as they are, or pairs of characters where no spaces part them."""
        german, japanese = {"a": "zwei Häuser", "b": "das Wasser"}, {"a": "熊は竹を食べる", "b": "水とパン"}
        assert list(BM25(german, "german").retrieve("Haus", 9)) == ["a"]
        assert list(BM25(german, "none").retrieve("Haus", 9)) == []
        assert list(BM25(japanese).retrieve("竹を", 9)) == []
        assert list(BM25(japanese, "characters").retrieve("竹を", 9)) == ["a"]
        with pytest.raises(ConfigError, match="'klingon' is none of arabic, .*, characters"):
            BM25(german, "klingon")
