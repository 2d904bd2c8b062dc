"""What comes in and what comes out: documents, positions, errors."""

import asyncio
import copy
import socket
import threading

import pytest
from langchain_core.documents import Document

from langchain_rag_rerank import ScorerReranker, VLLMReranker
from rag_rerank import BackendUnavailable, BadReply, ConfigError
from tests.integrations.langchain.common import (
    BEST_FIRST,
    QUERY,
    TEXTS,
    BrokenScorer,
    Finds,
    Instructed,
    KeywordScorer,
    Runs,
    compressing,
    found,
    keywords,
    numbers,
    scores,
)
from tests.scorers import Answers


class Passage(Document):
    """A Document subclass with a field of its own."""

    page: int = 0


class TestDocuments:
    """compress_documents and its twin."""

    def test_documents_are_copied_and_never_changed(self):
        """Two calls with one list don't meet: inputs stay what they were, and each result has its own metadata."""
        documents = found()
        before = copy.deepcopy(documents)
        first = keywords().compress_documents(documents, QUERY)
        second = keywords().compress_documents(documents, "bread")
        assert documents == before
        assert scores(first) == [4.0, 4.0, 2.0]
        assert scores(second) == [1.0, 0.0, 0.0]
        assert first[0].metadata == {"n": 1, "relevance_score": 4.0}

    def test_ids_subclasses_and_strange_metadata_survive(self):
        """A copy is of the same class with the same id, and shares values that can't be copied."""
        lock = threading.Lock()
        [result] = keywords().compress_documents([Passage("bears", id="p7", page=7, metadata={"lock": lock})], QUERY)
        assert type(result) is Passage
        assert (result.id, result.page) == ("p7", 7)
        assert result.metadata["lock"] is lock

    def test_results_are_a_list_of_plain_floats(self):
        """Scores can be written as JSON."""
        result = keywords().compress_documents(tuple(found()), QUERY)
        assert type(result) is list
        assert {type(score) for score in scores(result)} == {float}

    def test_documents_may_come_from_anything_that_can_be_read_once(self):
        """A tuple or a generator is as good as a list."""
        for documents in (tuple(found()), (document for document in found())):
            assert numbers(keywords(top_n=None).compress_documents(documents, QUERY)) == BEST_FIRST

    @pytest.mark.parametrize(("top_n", "kept"), [(None, 5), (3, 3), (1, 1), (50, 5)])
    def test_top_n_cuts_the_list(self, top_n: int | None, kept: int):
        """None keeps all, and more than there are is no error."""
        assert numbers(keywords(top_n=top_n).compress_documents(found(), QUERY)) == BEST_FIRST[:kept]

    def test_top_n_is_3_unless_told_otherwise(self):
        """3 is what LangChain's own rerankers keep."""
        assert len(keywords().compress_documents(found(), QUERY)) == 3

    def test_the_threshold_applies_before_top_n(self):
        """A score at the threshold stays; when none reaches it the result is empty."""
        assert numbers(keywords(score_threshold=2, top_n=None).compress_documents(found(), QUERY)) == [1, 3, 2]
        assert numbers(keywords(score_threshold=2, top_n=2).compress_documents(found(), QUERY)) == [1, 3]
        assert keywords(score_threshold=5).compress_documents(found(), QUERY) == []

    def test_ties_and_duplicates_stay_in_retrieval_order(self):
        """Equal documents are all kept, in the order in which they were found."""
        assert numbers(keywords(top_n=None).compress_documents(found(["same"] * 4), "other")) == [0, 1, 2, 3]

    def test_nothing_in_nothing_out(self):
        """No documents: no run, no model, no request."""
        runs, scorer = Runs(), KeywordScorer()
        reranker = ScorerReranker(scorer=scorer)
        unreachable = VLLMReranker(base_url="http://127.0.0.1:1")
        assert reranker.compress_documents([], QUERY, callbacks=[runs]) == []
        assert asyncio.run(reranker.acompress_documents([], QUERY, callbacks=[runs])) == []
        assert unreachable.compress_documents([], QUERY) == []
        assert unreachable.rerank([], QUERY) == asyncio.run(unreachable.arerank([], QUERY)) == []
        assert (runs.starts, scorer.calls) == ([], 0)

    def test_nothing_to_read_is_scored_like_anything_else(self):
        """An empty document is not dropped, and an empty query is no error."""
        documents = found(["", "bears", " "])
        assert numbers(keywords().compress_documents(documents, "bears")) == [1, 0, 2]
        assert scores(keywords().compress_documents(documents, "")) == [0.0, 0.0, 0.0]

    def test_an_earlier_score_is_replaced(self):
        """Where metadata already has a relevance_score, the new one wins; another score_key keeps both."""
        document = Document("bears", metadata={"relevance_score": 99.0})
        assert keywords().compress_documents([document], QUERY)[0].metadata == {"relevance_score": 1.0}
        second = keywords(score_key="second").compress_documents([document], QUERY)
        assert second[0].metadata == {"relevance_score": 99.0, "second": 1.0}

    def test_without_a_key_the_score_is_left_out(self):
        """What finds duplicates by their metadata would take a document with another score for another one."""
        documents = [Document("bears", metadata={"relevance_score": 0.5}), Document("bread")]
        results = keywords(score_key=None).compress_documents(documents, "bread")
        assert [result.metadata for result in results] == [{}, {"relevance_score": 0.5}]
        assert results == [documents[1], documents[0]]

    def test_a_call_has_its_own_instruction(self):
        """In place of the scorer's own, for this call; a scorer with no place for one says so."""
        scorer = Instructed()
        reranker, given = ScorerReranker(scorer=scorer), {"query": QUERY, "documents": found()}
        reranker.invoke(given, instruction="a")
        asyncio.run(reranker.ainvoke(given, instruction="b"))
        reranker.rerank(TEXTS, QUERY, instruction="c")
        asyncio.run(reranker.arerank(TEXTS, QUERY, instruction="d"))
        reranker.as_retriever(Finds(documents=found())).invoke(QUERY, instruction="e")
        reranker.invoke(given)
        assert scorer.instructions == ["a", "b", "c", "d", "e", None]
        with pytest.raises(ConfigError, match="no place for an instruction"):
            keywords().invoke(given, instruction="a")

    def test_a_formatter_chooses_the_text_that_is_scored(self):
        """document_formatter sees the document, so that a title in metadata can count; it must return text."""
        documents = [Document("x", metadata={"n": 0, "title": "y"}), Document("x", metadata={"n": 1, "title": "bears"})]
        titled = keywords(document_formatter=lambda document: document.metadata["title"])
        assert numbers(titled.compress_documents(documents, QUERY)) == [1, 0]
        with pytest.raises(TypeError, match=r"must return str or content, got int for documents\[0\]"):
            keywords(document_formatter=lambda _: 3).compress_documents(documents, QUERY)


class TestPositions:
    """`rerank`, which other rerankers of LangChain have as well."""

    def test_positions_and_scores_instead_of_documents(self):
        """In the form that CohereRerank and JinaRerank give them."""
        results = keywords(top_n=2).rerank(TEXTS, QUERY)
        assert results == [{"index": 1, "relevance_score": 4.0}, {"index": 3, "relevance_score": 4.0}]
        assert results == asyncio.run(keywords(top_n=2).arerank(TEXTS, QUERY))

    def test_texts_documents_and_mappings_are_taken(self):
        """Mappings with the text under `text`, as Cohere's clients have them, or `page_content`."""
        given = [
            "bears",
            Document("bears sleep"),
            {"text": "bears sleep in"},
            {"page_content": "bears sleep in winter"},
        ]
        results = keywords(top_n=None).rerank(given, QUERY)
        assert [(result["index"], result["relevance_score"]) for result in results] == [(3, 4), (2, 3), (1, 2), (0, 1)]

    def test_a_formatter_sees_a_document(self):
        """Whatever was passed; the rest of a mapping is its metadata."""
        reranker = keywords(document_formatter=lambda d: f"{d.metadata.get('title', '')} {d.page_content}")
        results = reranker.rerank([{"text": "x", "title": "bears"}, "x", {"text": "x", "title": "bears sleep"}], QUERY)
        assert [result["index"] for result in results] == [2, 0, 1]

    def test_a_formatter_sees_a_mapping_without_text(self):
        """As Cohere's `rank_fields` chose what to score: all of the mapping is metadata."""
        reranker = keywords(document_formatter=lambda d: f"{d.metadata['title']} {d.metadata['body']}")
        results = reranker.rerank([{"title": "x", "body": "bears"}, {"title": "bears", "body": "sleep"}], QUERY)
        assert [result["index"] for result in results] == [1, 0]

    def test_a_call_has_its_own_limits(self):
        """They take the place of the fields, None included; other names are refused, with a hint."""
        reranker = keywords(top_n=1)
        assert len(reranker.rerank(TEXTS, QUERY, top_n=None)) == 5
        assert len(asyncio.run(reranker.arerank(TEXTS, QUERY, top_n=None, score_threshold=2))) == 3
        assert len(reranker.rerank(TEXTS, QUERY)) == 1
        with pytest.raises(TypeError, match=r"'top_k'.*did you mean top_n\?"):
            reranker.rerank(TEXTS, QUERY, top_k=3)
        with pytest.raises(ValueError, match="top_n must be at least 1"):
            reranker.rerank(TEXTS, QUERY, top_n=-1)

    @pytest.mark.parametrize(
        ("documents", "query", "message"),
        [
            ("text", QUERY, "documents must be a sequence of texts or documents, got str"),
            (None, QUERY, "got NoneType"),
            (["a", 3], QUERY, r"documents\[1\] must be str, Document or a mapping, got int"),
            (["a", {"content": "b"}], QUERY, r'documents\[1\] must have its text under "text" or "page_content"'),
            ([{"text": None}], QUERY, r"documents\[0\] must have its text"),
            (["a"], None, "query must be str, got NoneType"),
        ],
    )
    def test_wrong_types_are_named_with_their_position(self, documents: object, query: object, message: str):
        """Before anything is scored."""
        with pytest.raises(TypeError, match=message):
            keywords().rerank(documents, query)
        with pytest.raises(TypeError, match=message):
            asyncio.run(keywords().arerank(documents, query))

    def test_a_failure_that_is_passed_through_has_no_scores(self):
        """The first top_n positions, each with None."""
        reranker = ScorerReranker(scorer=BrokenScorer(), on_error="passthrough", top_n=2)
        expected = [{"index": 0, "relevance_score": None}, {"index": 1, "relevance_score": None}]
        assert reranker.rerank(TEXTS, QUERY) == asyncio.run(reranker.arerank(TEXTS, QUERY)) == expected


class TestFailure:
    """What becomes of a call that gets no scores."""

    def test_passthrough_keeps_retrieval_order_without_scores(self, caplog: pytest.LogCaptureFixture):
        """A failure costs the ranking, not the documents: one warning, no score key, not even an old one."""
        documents = [Document(text, metadata={"n": n, "relevance_score": 0.5}) for n, text in enumerate(TEXTS)]
        reranker = ScorerReranker(scorer=BrokenScorer(), on_error="passthrough")
        for result in (
            reranker.compress_documents(documents, QUERY),
            asyncio.run(reranker.acompress_documents(documents, QUERY)),
        ):
            assert [document.metadata for document in result] == [{"n": 0}, {"n": 1}, {"n": 2}]
        assert len(caplog.records) == 2

    def test_a_missing_server_is_an_error_in_the_retriever(self):
        """Nobody listens: BackendUnavailable reaches the caller, sync and async, and never an empty list."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            free = taken.getsockname()[1]
        retriever = compressing(VLLMReranker(base_url=f"http://127.0.0.1:{free}", max_retries=0))
        with pytest.raises(BackendUnavailable, match=f"127.0.0.1:{free}"):
            retriever.invoke(QUERY)
        with pytest.raises(BackendUnavailable, match=f"127.0.0.1:{free}"):
            asyncio.run(retriever.ainvoke(QUERY))

    @pytest.mark.parametrize("answer", [[1.0, 2.0], [1.0] * 6, [1.0, 2.0, float("nan"), 3.0, 4.0]])
    def test_no_document_is_lost_to_a_wrong_answer(self, answer: list[float]):
        """Too few scores, too many, or one that is no number: an error, not a shorter or a shuffled list."""
        with pytest.raises(BadReply):
            ScorerReranker(scorer=Answers(lambda _: answer)).compress_documents(found(), QUERY)

    @pytest.mark.parametrize(
        ("documents", "query", "message"),
        [
            (found(), None, "query must be str, got NoneType"),
            (None, QUERY, "documents must be a sequence of Document, got NoneType"),
            ("text", QUERY, "documents must be a sequence of Document, got str"),
            ([*found(), "text"], QUERY, r"documents\[5\] must be a Document, got str"),
            (
                [Document("a"), Document.model_construct(page_content=None, id="x", metadata={})],
                QUERY,
                r"documents\[1\] \(id='x'\): page_content must be str, got NoneType",
            ),
        ],
    )
    def test_wrong_types_are_named_with_their_position(self, documents: object, query: object, message: str):
        """TypeError before anything is scored, and not passed through."""
        scorer = KeywordScorer()
        reranker = ScorerReranker(scorer=scorer, on_error="passthrough")
        with pytest.raises(TypeError, match=message):
            reranker.compress_documents(documents, query)
        with pytest.raises(TypeError, match=message):
            asyncio.run(reranker.acompress_documents(documents, query))
        assert scorer.calls == 0
