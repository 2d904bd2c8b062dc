"""Events, spans and callbacks: each call begins once and ends once, in a span of its own."""

import asyncio

import pytest
from llama_index.core.callbacks import CallbackManager, EventPayload
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler

from llama_index.postprocessor.rag_rerank import LocalReranker, ScorerReranker, VLLMReranker
from rag_rerank import BackendUnavailable
from tests.integrations.llamaindex.support import (
    NOBODY,
    QUERY,
    BrokenScorer,
    CallbackLog,
    EventLog,
    KeywordScorer,
    WaitingScorer,
    found,
    ids,
    until,
)


def test_events_tell_what_happened(scorer: KeywordScorer, events: EventLog, rerank) -> None:
    """The start event has query, nodes, `top_n` and model; the end event has the results."""
    nodes = found()
    results = rerank(ScorerReranker(scorer=scorer, top_n=2), nodes)
    start, end = events.events
    assert start.query.query_str == QUERY
    assert ids(start.nodes) == ids(nodes)
    assert (start.top_n, start.model_name) == (2, "keywords")
    assert end.nodes == results


def test_events_need_a_number_where_all_are_kept(scorer: KeywordScorer, events: EventLog, rerank) -> None:
    """With ``top_n=None`` the event says how many nodes there are."""
    rerank(ScorerReranker(scorer=scorer, top_n=None), found())
    assert events.events[0].top_n == 5
    rerank(ScorerReranker(scorer=scorer, top_n=None), [])
    assert events.events[2].top_n == 0


def test_an_unknown_model_has_a_name_in_events(events: EventLog, rerank) -> None:
    """Events need one; a server that was not asked yet has told none."""
    rerank(VLLMReranker(base_url=NOBODY, max_retries=0, on_error="passthrough"), found())
    rerank(VLLMReranker(base_url=NOBODY, max_retries=0, on_error="passthrough", model="m"), found())
    assert [event.model_name for event in events.events[::2]] == ["unknown", "m"]


def test_events_carry_the_span_of_their_call(scorer: KeywordScorer, events: EventLog, rerank, request) -> None:
    """Both events belong to the hook's own span, also in async calls, where LlamaIndex would make none."""
    rerank(ScorerReranker(scorer=scorer), found())
    (span,) = {event.span_id for event in events.events}
    hook = "_apostprocess_nodes" if "async" in request.node.name else "_postprocess_nodes"
    assert span.startswith(f"ScorerReranker.{hook}-")


@pytest.mark.parametrize("on_error", ["raise", "passthrough"])
@pytest.mark.parametrize("texts", [["panda"], [], [" "]], ids=["nodes", "no nodes", "no text"])
def test_a_call_is_one_span_and_two_events(events, spans: SimpleSpanHandler, rerank, texts, on_error: str) -> None:
    """Nothing inside of it, not even the making of a scorer, opens another; none stays open."""
    reranker = VLLMReranker(base_url=NOBODY, max_retries=0, on_error=on_error)
    reranker.timeout = 5.0  # so that another scorer is built
    if texts == ["panda"] and on_error == "raise":
        with pytest.raises(BackendUnavailable):
            rerank(reranker, found(texts))
        assert events.names() == ["ReRankStartEvent"]
        assert (len(spans.dropped_spans), len(spans.completed_spans)) == (1, 0)
    else:
        rerank(reranker, found(texts))
        assert events.names() == ["ReRankStartEvent", "ReRankEndEvent"]
        assert (len(spans.dropped_spans), len(spans.completed_spans)) == (0, 1)
    assert spans.open_spans == {}


def test_making_a_reranker_is_no_span(spans: SimpleSpanHandler) -> None:
    """It is no part of a query."""
    LocalReranker()
    VLLMReranker().close()
    assert (spans.completed_spans, spans.dropped_spans, spans.open_spans) == ([], [], {})


def test_an_error_drops_the_span(events: EventLog, spans: SimpleSpanHandler, rerank) -> None:
    """After an error there is no end event, and the span has the error instead."""
    with pytest.raises(BackendUnavailable):
        rerank(VLLMReranker(base_url=NOBODY, max_retries=0), found())
    assert events.names() == ["ReRankStartEvent"]
    assert [span.id_ for span in spans.dropped_spans] == [events.events[0].span_id]
    assert spans.open_spans == {}


def test_a_wrong_argument_drops_the_span(scorer: KeywordScorer, events, spans: SimpleSpanHandler, rerank) -> None:
    """Reranking had not begun, so there is no event."""
    with pytest.raises(ValueError, match="Missing query bundle"):
        rerank(ScorerReranker(scorer=scorer), found(), " ")
    assert events.names() == []
    assert len(spans.dropped_spans) == 1


def test_a_cancelled_call_leaves_no_span_open(events: EventLog, spans: SimpleSpanHandler) -> None:
    """It ends as one that failed."""
    log = CallbackLog()

    async def cancelled() -> None:
        scorer = WaitingScorer()
        reranker = ScorerReranker(scorer=scorer, callback_manager=CallbackManager([log]))
        task = asyncio.create_task(reranker.apostprocess_nodes(found(), query_str=QUERY))
        await until(lambda: scorer.waiting == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert events.names() == ["ReRankStartEvent"]
    assert (len(spans.dropped_spans), spans.open_spans) == (1, {})
    assert (len(log.started), len(log.ended)) == (1, 1)


def test_callbacks_get_their_payload(scorer: KeywordScorer, rerank) -> None:
    """The older callbacks see nodes, model, query and `top_n`, then the results."""
    log = CallbackLog()
    nodes = found()
    results = rerank(ScorerReranker(scorer=scorer, top_n=2, callback_manager=CallbackManager([log])), nodes)
    assert log.started == [
        {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: "keywords",
            EventPayload.QUERY_STR: QUERY,
            EventPayload.TOP_K: 2,
        }
    ]
    assert log.ended == [{EventPayload.NODES: results}]


def test_callbacks_are_balanced(scorer: KeywordScorer, rerank) -> None:
    """Also without nodes, and where a call was passed through."""
    log = CallbackLog()
    manager = CallbackManager([log])
    rerank(ScorerReranker(scorer=scorer, callback_manager=manager), [])
    rerank(ScorerReranker(scorer=BrokenScorer(), on_error="passthrough", callback_manager=manager), found())
    assert [payload[EventPayload.TOP_K] for payload in log.started] == [5, 5]
    assert [len(payload[EventPayload.NODES]) for payload in log.ended] == [0, 5]


def test_callbacks_end_after_an_error(rerank) -> None:
    """A failed call ends its callback event with the error."""
    log = CallbackLog()
    with pytest.raises(BackendUnavailable) as caught:
        rerank(VLLMReranker(base_url=NOBODY, max_retries=0, callback_manager=CallbackManager([log])), found())
    assert log.ended == [{EventPayload.EXCEPTION: caught.value}]
