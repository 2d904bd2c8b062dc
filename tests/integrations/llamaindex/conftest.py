"""Fixtures of the tests of the LlamaIndex rerankers."""

import asyncio
from collections.abc import Iterator

import pytest
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler

from tests.integrations.llamaindex.support import QUERY, EventLog, KeywordScorer


@pytest.fixture
def scorer() -> KeywordScorer:
    return KeywordScorer()


@pytest.fixture
def events() -> Iterator[EventLog]:
    log, root = EventLog(), get_dispatcher()
    root.add_event_handler(log)
    yield log
    root.event_handlers.remove(log)


@pytest.fixture
def spans() -> Iterator[SimpleSpanHandler]:
    handler, root = SimpleSpanHandler(), get_dispatcher()
    root.add_span_handler(handler)
    yield handler
    root.span_handlers.remove(handler)


@pytest.fixture(params=["sync", "async"])
def rerank(request: pytest.FixtureRequest):
    """``rerank(reranker, nodes, query)``, once through the sync and once through the async method."""

    def sync_call(reranker, nodes, query=QUERY):
        return reranker.postprocess_nodes(nodes, query_str=query)

    def async_call(reranker, nodes, query=QUERY):
        return asyncio.run(reranker.apostprocess_nodes(nodes, query_str=query))

    return sync_call if request.param == "sync" else async_call
