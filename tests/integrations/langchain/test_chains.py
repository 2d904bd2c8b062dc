"""The rerankers as Runnables."""

import asyncio
import inspect
from operator import itemgetter

import pytest
from langchain_core.documents import BaseDocumentCompressor
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from langchain_rag_rerank import LocalReranker, ScorerReranker, VLLMReranker
from tests.integrations.langchain.common import (
    BEST_FIRST,
    QUERY,
    Finds,
    KeywordScorer,
    found,
    keywords,
    numbers,
)


def test_every_reranker_is_a_compressor_and_a_runnable():
    """One object serves retrievers and chains; its input has a schema."""
    for reranker in (keywords(), LocalReranker(), VLLMReranker()):
        assert isinstance(reranker, BaseDocumentCompressor)
        assert reranker.get_name() == type(reranker).__name__
        schema = reranker.get_input_schema().model_json_schema()["$defs"]["RerankInput"]
        assert schema["required"] == ["query", "documents"]


def test_signatures_are_those_of_the_base_class():
    """LangChain looks for a parameter named `callbacks`."""
    for name in ("compress_documents", "acompress_documents"):
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (VLLMReranker, BaseDocumentCompressor))
        assert list(ours.parameters) == list(theirs.parameters)
        assert ours.parameters["callbacks"].default is None


def test_a_chain_reranks_what_it_retrieved():
    """Both chains that the error message below names work; keys that are no concern of the reranker are ignored."""
    reranker, retriever = keywords(), Finds(documents=found())
    assigned = RunnablePassthrough.assign(documents=itemgetter("query") | retriever) | reranker
    assert numbers(assigned.invoke({"query": QUERY, "user": "u1"})) == [1, 3, 2]
    mapped = {"query": RunnablePassthrough(), "documents": retriever} | reranker
    assert numbers(asyncio.run(mapped.ainvoke(QUERY))) == [1, 3, 2]


@pytest.mark.parametrize("given", [found(), {"question": QUERY, "documents": []}])
def test_a_wrong_chain_is_explained(given: object):
    """A retriever piped straight into a reranker loses the query: the error shows the chains that keep it."""
    with pytest.raises(
        TypeError, match=r'RunnablePassthrough\.assign\(documents=itemgetter\("query"\) \| retriever\)'
    ) as caught:
        (RunnableLambda(lambda _: given) | keywords()).invoke(QUERY)
    assert "reranker.as_retriever(retriever)" in str(caught.value)
    with pytest.raises(TypeError, match=r"as_retriever"):
        (Finds(documents=found()) | keywords()).invoke(QUERY)


def test_limits_can_be_given_per_call():
    """top_n and score_threshold of a call take the place of the fields, None included; other names are refused."""
    reranker, given = keywords(top_n=1), {"query": QUERY, "documents": found()}
    assert numbers(reranker.invoke(given, top_n=None)) == BEST_FIRST
    assert numbers(reranker.bind(top_n=2).invoke(given)) == [1, 3]
    assert numbers(asyncio.run(reranker.ainvoke(given, top_n=None, score_threshold=2))) == [1, 3, 2]
    assert numbers(reranker.invoke(given)) == [1]
    with pytest.raises(TypeError, match="'top_k'"):
        reranker.invoke(given, top_k=3)
    with pytest.raises(ValueError, match="top_n must be at least 1"):
        reranker.invoke(given, top_n=0)


def test_two_rerankers_share_one_scorer():
    """ScorerReranker takes a scorer and leaves it to its owner."""
    scorer = KeywordScorer()
    with ScorerReranker(scorer=scorer, top_n=1) as first, ScorerReranker(scorer=scorer, top_n=2) as second:
        assert len(first.compress_documents(found(), QUERY)) == 1
        assert len(second.compress_documents(found(), QUERY)) == 2
    assert scorer.score("a", ["a"]) == [1.0], "closing a reranker has closed the owner's scorer"
    assert scorer.calls == 3


def test_two_rerankers_in_a_row_keep_both_scores():
    """A fast one cuts, a better one orders what is left; each under its own key."""
    first = keywords(top_n=3, score_key="first")
    second = ScorerReranker(scorer=KeywordScorer(), top_n=1, score_key="second")
    chain = RunnablePassthrough.assign(documents=first) | second
    [best] = chain.invoke({"query": QUERY, "documents": found()})
    assert best.metadata == {"n": 1, "first": 4.0, "second": 4.0}


def test_it_streams_what_it_returns():
    """In one piece: a ranking is whole or nothing."""
    assert [numbers(part) for part in keywords().stream({"query": QUERY, "documents": found()})] == [[1, 3, 2]]
