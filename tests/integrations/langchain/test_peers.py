"""Beside LangChain's own CrossEncoderReranker, on the same weights; and in the place of its model."""

import json
from pathlib import Path

import pytest
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import Document

from langchain_rag_rerank import LocalReranker, ScorerReranker
from rag_rerank import BackendUnavailable
from tests.integrations.langchain.common import QUERY, BrokenScorer, KeywordScorer, found, keywords, numbers
from tests.models import CORPUS


@pytest.fixture(scope="module")
def theirs(cross_encoder: Path) -> BaseCrossEncoder:
    """What langchain-community's HuggingFaceCrossEncoder does."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = sentence_transformers.CrossEncoder(str(cross_encoder), device="cpu")

    class HuggingFace(BaseCrossEncoder):
        def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
            return encoder.predict(text_pairs, show_progress_bar=False).tolist()

    return HuggingFace()


@pytest.fixture(scope="module")
def ours(cross_encoder: Path):
    """The same weights."""
    with LocalReranker(model=cross_encoder, dtype="float32", top_n=None) as reranker:
        yield reranker


@pytest.fixture(scope="module")
def searches() -> list[tuple[str, list[Document]]]:
    """Questions with documents, most of them longer than the model reads."""
    texts, queries = (
        [json.loads(line)["text"] for line in CORPUS.with_name(name).read_text(encoding="utf-8").splitlines()]
        for name in ("corpus.jsonl", "queries.jsonl")
    )
    return [
        (query, [Document(text, id=str(n)) for n, text in enumerate(texts[start::31])])
        for start, query in enumerate(queries[:12])
    ]


def test_the_order_is_that_of_langchains_reranker(ours, theirs, searches):
    """For a user who changes from one to the other, nothing moves."""
    reference = CrossEncoderReranker(model=theirs, top_n=99)
    for query, documents in searches:
        expected = reference.compress_documents(documents, query)
        results = ours.compress_documents(documents, query)
        assert [result.id for result in results] == [document.id for document in expected]


def test_the_scores_are_those_of_langchains_model(ours, theirs, searches):
    """CrossEncoderReranker itself keeps them for itself."""
    for query, documents in searches:
        pairs = [(query, document.page_content) for document in documents]
        expected = theirs.score(pairs)
        assert ours.as_cross_encoder().score(pairs) == pytest.approx(expected, abs=1e-5)
        results = {
            result.id: result.metadata["relevance_score"] for result in ours.compress_documents(documents, query)
        }
        assert [results[document.id] for document in documents] == pytest.approx(expected, abs=1e-5)


def test_a_reranker_takes_the_place_of_langchains_model():
    """CrossEncoderReranker takes it as its model."""
    theirs = CrossEncoderReranker(model=keywords().as_cross_encoder(), top_n=3)
    assert numbers(theirs.compress_documents(found(), QUERY)) == [1, 3, 2]


def test_pairs_of_one_query_are_its_documents():
    """A listwise model reads them together, as in a rerank."""
    asked = []

    class Listens(KeywordScorer):
        def _score(self, queries, documents, until):
            asked.append((queries, documents))
            return super()._score(queries, documents, until)

    ScorerReranker(scorer=Listens()).as_cross_encoder().score([("q", "a"), ("q", "b")])
    assert asked == [(["q"], ["a", "b"])]


def test_pairs_may_have_different_queries():
    """Any list of pairs, and none."""
    encoder = keywords(top_n=1, score_threshold=99).as_cross_encoder()
    assert encoder.score([("bears", "bears"), ("fish bread", "fish and bread")]) == [1.0, 2.0]
    assert encoder.score([("bears", "bears"), ("bears", "fish")]) == [1.0, 0.0]
    assert encoder.score([]) == []


@pytest.mark.parametrize("pair", ["ab", ("a",), ("a", "b", "c"), ("a", None)])
def test_what_is_no_pair_is_named_with_its_position(pair: object):
    """Two texts are wanted."""
    with pytest.raises(TypeError, match=r"(text_pairs|documents)\[1\]"):
        keywords().as_cross_encoder().score([("a", "b"), pair])


def test_a_cross_encoder_has_nothing_to_pass_through():
    """It gives scores or an error."""
    with pytest.raises(BackendUnavailable):
        ScorerReranker(scorer=BrokenScorer(), on_error="passthrough").as_cross_encoder().score([("a", "b")])


def test_a_cross_encoder_follows_the_fields(cross_encoder: Path):
    """It has no scorer of its own."""
    with LocalReranker(model="/nowhere", dtype="float32") as reranker:
        encoder = reranker.as_cross_encoder()
        reranker.model = cross_encoder
        assert len(encoder.score([("a", "b")])) == 1
