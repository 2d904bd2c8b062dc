"""What the tests of the LangChain rerankers share."""

from collections.abc import Iterator

import pytest

from langchain_rag_rerank import LocalReranker, ScorerReranker

pytest.register_assert_rewrite("langchain_rag_rerank.testing")


@pytest.fixture(params=[LocalReranker, ScorerReranker])
def in_process(request, cross_encoder, local_cross_encoder) -> Iterator[LocalReranker | ScorerReranker]:
    """The rerankers that run the tiny cross-encoder here."""
    own = {"model": cross_encoder, "dtype": "float32"}
    fields = {"scorer": local_cross_encoder} if request.param is ScorerReranker else own
    with request.param(top_n=None, **fields) as reranker:
        yield reranker


@pytest.fixture(params=[LocalReranker, ScorerReranker])
def real(request, minilm, local) -> Iterator[LocalReranker | ScorerReranker]:
    """The rerankers that run MiniLM here."""
    fields = {"scorer": local} if request.param is ScorerReranker else {"model": minilm, "dtype": "float32"}
    with request.param(top_n=None, **fields) as reranker:
        yield reranker
