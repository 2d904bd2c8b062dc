"""The package's standard tests for rerankers, on its own."""

from pathlib import Path
from typing import Any, ClassVar

import pytest

from langchain_rag_rerank import LocalReranker, ScorerReranker
from langchain_rag_rerank.testing import RerankerUnitTests
from tests.integrations.langchain.common import KeywordScorer


class TestScorerReranker(RerankerUnitTests):
    """Over a scorer of a few lines."""

    @property
    def reranker_class(self) -> type[ScorerReranker]:
        return ScorerReranker

    @property
    def reranker_params(self) -> dict[str, Any]:
        return {"scorer": KeywordScorer()}


class TestLocalReranker(RerankerUnitTests):
    """Over a tiny cross-encoder. VLLMReranker is tested in test_vllm_server.py."""

    @pytest.fixture(autouse=True)
    def _folder(self, cross_encoder: Path) -> None:
        self.folder = cross_encoder

    @property
    def reranker_class(self) -> type[LocalReranker]:
        return LocalReranker

    @property
    def reranker_params(self) -> dict[str, Any]:
        return {"model": self.folder, "dtype": "float32"}


def failing(**faults: Any) -> RerankerUnitTests:
    """The suite over a reranker with faults of its own."""

    class Faulty(ScorerReranker):
        def compress_documents(self, documents, query, callbacks=None):
            return faults["compress"](super().compress_documents(documents, query, callbacks), documents)

    class Suite(RerankerUnitTests):
        reranker_class = Faulty
        reranker_params: ClassVar = {"scorer": KeywordScorer()}

    return Suite()


def changes_inputs(results, documents):
    for document in documents:
        document.metadata["relevance_score"] = 0.0
    return results


def loses_ids(results, documents):
    return [type(result)(page_content=result.page_content, metadata=result.metadata) for result in results]


@pytest.mark.parametrize(
    ("test", "compress"),
    [
        ("test_documents_come_back_best_first", lambda results, _: results[::-1]),
        ("test_documents_come_back_best_first", lambda results, _: results[1:]),
        ("test_documents_come_back_best_first", lambda results, _: tuple(results)),
        ("test_ids_classes_and_metadata_survive", loses_ids),
        ("test_documents_given_are_not_changed", changes_inputs),
        ("test_empty_texts_are_scored", lambda results, _: [r for r in results if r.page_content]),
        ("test_any_sequence_will_do", lambda results, documents: results[:3]),
    ],
)
def test_a_faulty_reranker_does_not_pass(test: str, compress: Any):
    """The tests notice what they are there for: faults that rerankers of other packages have."""
    suite = failing(compress=compress)
    with pytest.raises(AssertionError):
        getattr(suite, test)(suite.make(top_n=99))
