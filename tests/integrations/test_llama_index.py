"""The LlamaIndex rerankers: LlamaIndex's contract on the outside, the scores of `rag_rerank` on the inside."""

import asyncio
import copy
import inspect
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_index.core import Settings
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageNode,
    MetadataMode,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from pydantic import ValidationError

from llama_index.postprocessor.rag_rerank import LocalReranker, ScorerReranker, VLLMReranker
from rag_rerank import BackendUnavailable, ConfigError, DocumentRejected, LocalScorer, RerankError, Scorer, VLLMScorer
from tests.vllm_server import VLLMServer

QUERY = "how do giant pandas feed"
TEXTS = [
    "The stock market closed higher on Friday.",
    "The giant panda is a bear native to China.",
    "Giant pandas eat bamboo for up to fourteen hours a day.",
    "Bread is baked from flour, water and yeast.",
    "Zoo keepers feed their giant pandas bamboo shoots and fruit.",
]
ROOT = Path(__file__).resolve().parents[2]
SECRET = "sk-very-secret"
NOBODY = "http://127.0.0.1:9"  # the discard port: nothing answers there


class KeywordScorer(Scorer):
    """Scores by the share of the query's words that a document has; counts its calls."""

    model_name = "keywords"

    def __init__(self) -> None:
        self.calls = 0

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        self.calls += 1
        words = set(queries[0].lower().split())
        return [len(words & set(document.lower().split())) / len(words) for document in documents]


class PickyScorer(KeywordScorer):
    """Rejects documents about bread."""

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        scores = super()._score(queries, documents, until)
        kept = [None if "Bread" in text else score for text, score in zip(documents, scores, strict=True)]
        rejected = [index for index, score in enumerate(kept) if score is None]
        if rejected:
            raise DocumentRejected("no bread", indices=rejected, scores=kept)
        return scores


class Found(BaseRetriever):
    """Finds the same nodes for every query."""

    def __init__(self, nodes: list[NodeWithScore]) -> None:
        super().__init__()
        self.nodes = nodes

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self.nodes


class EventLog(BaseEventHandler):
    """Keeps the rerank events and the input scores at the time of the start event."""

    events: list[BaseEvent] = []  # noqa: RUF012 - pydantic copies it

    def handle(self, event: BaseEvent, **kwargs: object) -> None:
        if isinstance(event, ReRankStartEvent | ReRankEndEvent):
            self.events.append(event)

    def names(self) -> list[str]:
        return [type(event).__name__ for event in self.events]


class CallbackLog(BaseCallbackHandler):
    """Keeps the payloads of LlamaIndex's older callbacks."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.started: list[dict] = []
        self.ended: list[dict] = []

    def on_event_start(self, event_type, payload=None, event_id="", parent_id="", **kwargs):
        if event_type == CBEventType.RERANKING:
            self.started.append(payload)
        return event_id

    def on_event_end(self, event_type, payload=None, event_id="", **kwargs):
        if event_type == CBEventType.RERANKING:
            self.ended.append(payload)

    def start_trace(self, trace_id=None): ...

    def end_trace(self, trace_id=None, trace_map=None): ...


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


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine without text generation asks for the default LLM all the same."""
    monkeypatch.setattr(Settings, "_llm", MockLLM())


@pytest.fixture(params=["sync", "async"])
def rerank(request: pytest.FixtureRequest):
    """``rerank(reranker, nodes, query)``, once through the sync and once through the async method."""

    def sync_call(reranker, nodes, query=QUERY):
        return reranker.postprocess_nodes(nodes, query_str=query)

    def async_call(reranker, nodes, query=QUERY):
        return asyncio.run(reranker.apostprocess_nodes(nodes, query_str=query))

    return sync_call if request.param == "sync" else async_call


def found(texts: list[str] = TEXTS, scores: list[float | None] | None = None) -> list[NodeWithScore]:
    scores = [1.0 - position / 10 for position in range(len(texts))] if scores is None else scores
    nodes = [TextNode(text=text, id_=f"n{position}") for position, text in enumerate(texts)]
    return [NodeWithScore(node=node, score=score) for node, score in zip(nodes, scores, strict=True)]


def ids(nodes: list[NodeWithScore]) -> list[str]:
    return [node.node_id for node in nodes]


def scores(nodes: list[NodeWithScore]) -> list[float | None]:
    return [node.score for node in nodes]


def expected(scorer: Scorer) -> tuple[list[str], list[float | None]]:
    ranked = scorer.rerank(QUERY, TEXTS)
    return [f"n{item.index}" for item in ranked], [item.score for item in ranked]


def engine(reranker: ScorerReranker | LocalReranker | VLLMReranker, **options: object) -> RetrieverQueryEngine:
    return RetrieverQueryEngine.from_args(
        Found(found()), node_postprocessors=[reranker], response_mode="no_text", **options
    )


def assert_answers_as(response: RESPONSE_TYPE, reference: Scorer) -> None:
    order, values = expected(reference)
    assert ids(response.source_nodes) == order
    assert scores(response.source_nodes) == pytest.approx(values, abs=1e-4)


# In a query engine, with each kind of scorer


@pytest.mark.usefixtures("offline")
def test_an_engine_ranks_as_the_scorer_does(scorer: KeywordScorer) -> None:
    """The order and the scores of `query` and `aquery` are those of `Scorer.rerank`."""
    queried = engine(ScorerReranker(scorer=scorer))
    assert_answers_as(queried.query(QUERY), scorer)
    assert_answers_as(asyncio.run(queried.aquery(QUERY)), scorer)


@pytest.mark.usefixtures("offline")
def test_an_engine_ranks_with_a_local_model(minilm: Path, local: LocalScorer) -> None:
    """LocalReranker gives the scores of a LocalScorer with the same settings."""
    with LocalReranker(model=minilm, dtype="float32") as reranker:
        queried = engine(reranker)
        assert_answers_as(queried.query(QUERY), local)
        assert_answers_as(asyncio.run(queried.aquery(QUERY)), local)


@pytest.mark.usefixtures("offline")
def test_an_engine_ranks_with_a_served_bi_encoder(vllm_minilm: VLLMServer) -> None:
    """VLLMReranker gives the scores that the same bi-encoder has locally."""
    assert_served_as_local(vllm_minilm)


@pytest.mark.usefixtures("offline")
def test_an_engine_ranks_with_a_served_cross_encoder(vllm_cross_encoder: VLLMServer) -> None:
    """VLLMReranker gives the scores that the same cross-encoder has locally."""
    assert_served_as_local(vllm_cross_encoder)


def assert_served_as_local(server: VLLMServer) -> None:
    reranker = VLLMReranker(base_url=server.base_url, api_key=server.api_key, timeout=120)

    async def ask() -> RESPONSE_TYPE:
        async with reranker:
            return await engine(reranker).aquery(QUERY)

    with LocalScorer(server.folder, dtype="float32") as reference:
        assert_answers_as(engine(reranker).query(QUERY), reference)
        assert_answers_as(asyncio.run(ask()), reference)


def test_a_served_model_survives_its_event_loop(vllm_minilm: VLLMServer) -> None:
    """One VLLMReranker serves two `asyncio.run` in a row, each with its own connections."""
    with VLLMReranker(base_url=vllm_minilm.base_url, api_key=vllm_minilm.api_key, timeout=120) as reranker:
        first, second = (asyncio.run(reranker.apostprocess_nodes(found(), query_str=QUERY)) for _ in range(2))
    assert ids(first) == ids(second)


def test_a_served_model_can_be_called_inside_a_running_loop(vllm_minilm: VLLMServer) -> None:
    """The sync method works inside a running event loop, where ObjectRetriever calls it."""

    async def call(reranker: VLLMReranker) -> list[NodeWithScore]:
        return reranker.postprocess_nodes(found(), query_str=QUERY)

    with VLLMReranker(base_url=vllm_minilm.base_url, api_key=vllm_minilm.api_key, timeout=120) as reranker:
        assert len(asyncio.run(call(reranker))) == 5
        assert reranker.scorer.model_name == vllm_minilm.name


@pytest.mark.usefixtures("offline")
def test_an_engine_may_set_the_callback_manager() -> None:
    """Engines assign `callback_manager`; the scorer in use stays the same."""
    manager = CallbackManager([])
    reranker = VLLMReranker()
    before = reranker.scorer
    engine(reranker, callback_manager=manager)
    assert reranker.callback_manager is manager
    assert reranker.scorer is before


# What comes back


@pytest.mark.parametrize("kind", [ScorerReranker, LocalReranker, VLLMReranker])
def test_rerankers_are_postprocessors(kind: type) -> None:
    """Each is a BaseNodePostprocessor and goes by its own name."""
    assert "BaseNodePostprocessor" in [base.__name__ for base in kind.__mro__]
    assert kind.class_name() == kind.__name__


def test_sync_and_async_give_the_same(scorer: KeywordScorer) -> None:
    """Both ways lead to the same nodes with the same scores."""
    reranker = ScorerReranker(scorer=scorer)
    assert reranker.postprocess_nodes(found(), query_str=QUERY) == asyncio.run(
        reranker.apostprocess_nodes(found(), query_str=QUERY)
    )


def test_the_input_is_left_alone(scorer: KeywordScorer, events: EventLog, rerank) -> None:
    """Neither the list nor a node with score nor a node changes; results are new objects that share the nodes."""
    nodes = found()
    kept = list(nodes)
    before = copy.deepcopy(nodes)
    results = rerank(ScorerReranker(scorer=scorer), nodes)
    assert nodes == before
    assert all(node is same for node, same in zip(nodes, kept, strict=True))
    assert scores(events.events[0].nodes) == scores(before)
    assert not {id(result) for result in results} & {id(node) for node in nodes}
    assert {id(result.node) for result in results} == {id(node.node) for node in nodes}


def test_subclasses_of_node_with_score_are_kept(scorer: KeywordScorer, rerank) -> None:
    """A result is of its input's class and has its extra fields."""

    class Tagged(NodeWithScore):
        tag: str = ""

    (result,) = rerank(ScorerReranker(scorer=scorer), [Tagged(node=TextNode(text="panda"), tag="kept")])
    assert isinstance(result, Tagged)
    assert result.tag == "kept"


def test_scores_are_plain_floats(local: LocalScorer, rerank) -> None:
    """A score is a Python float, so a result can be written as JSON."""
    for result in rerank(ScorerReranker(scorer=local), found()):
        assert type(result.score) is float
        assert json.loads(result.to_json())["score"] == result.score


@pytest.mark.parametrize(("top_n", "count"), [(None, 5), (2, 2), (5, 5), (99, 5)])
def test_top_n_bounds_the_number_of_results(scorer: KeywordScorer, rerank, top_n: int | None, count: int) -> None:
    """The best `top_n` come back; None, or more than there are, means all."""
    results = rerank(ScorerReranker(scorer=scorer, top_n=top_n), found())
    assert ids(results) == expected(scorer)[0][:count]


@pytest.mark.parametrize("field", [{"top_n": 0}, {"top_n": -1}, {"score_threshold": float("nan")}, {"topn": 3}])
def test_wrong_fields_are_refused(scorer: KeywordScorer, field: dict[str, float]) -> None:
    """A value out of range is refused, and so is a name that no field has."""
    with pytest.raises(ValidationError):
        ScorerReranker(scorer=scorer, **field)


def test_the_threshold_applies_before_top_n(scorer: KeywordScorer, rerank) -> None:
    """Nodes at or above the threshold stay; there may be fewer than `top_n`, or none."""
    assert scores(rerank(ScorerReranker(scorer=scorer, score_threshold=0.4), found())) == [0.6, 0.4]
    assert scores(rerank(ScorerReranker(scorer=scorer, score_threshold=0.4, top_n=1), found())) == [0.6]
    assert rerank(ScorerReranker(scorer=scorer, score_threshold=2.0), found()) == []


def test_ties_keep_retrieval_order(scorer: KeywordScorer, rerank) -> None:
    """Equal scores stay in the order in which the nodes came."""
    results = rerank(ScorerReranker(scorer=scorer), found(["a panda", "a panda bear", "panda food"]), "panda")
    assert ids(results) == ["n0", "n1", "n2"]


def test_equal_nodes_stay_separate(scorer: KeywordScorer, rerank) -> None:
    """Nodes with the same text, or even the same id, each come back."""
    node = NodeWithScore(node=TextNode(text="a panda", id_="same"))
    assert ids(rerank(ScorerReranker(scorer=scorer), [node, node, *found(["a panda"])], "panda")) == [
        "same",
        "same",
        "n0",
    ]


def test_retrieval_scores_may_be_missing(scorer: KeywordScorer, rerank) -> None:
    """Nodes that a retriever gave no score are scored as any others."""
    assert scores(rerank(ScorerReranker(scorer=scorer), found(["panda", "bear"], [None, None]), "panda")) == [1.0, 0.0]


def test_one_node_is_enough(local: LocalScorer, rerank) -> None:
    """A single node comes back with its score."""
    (result,) = rerank(ScorerReranker(scorer=local), found(TEXTS[:1]))
    assert result.score == pytest.approx(local.score(QUERY, TEXTS[0])[0])


@pytest.mark.parametrize(
    "node",
    [TextNode(text="a panda"), Document(text="a panda"), ImageNode(text="a panda", image_url="http://x/y.png")],
    ids=lambda node: type(node).__name__,
)
def test_every_node_with_text_is_accepted(scorer: KeywordScorer, rerank, node: BaseNode) -> None:
    """What counts is the text that the node gives, not its class."""
    (result,) = rerank(ScorerReranker(scorer=scorer), [NodeWithScore(node=node)], "panda")
    assert result.node is node
    assert result.score == 1.0


@pytest.mark.parametrize(
    ("mode", "score"),
    [(MetadataMode.EMBED, 1 / 3), (MetadataMode.LLM, 2 / 3), (MetadataMode.ALL, 1.0), (MetadataMode.NONE, 0.0)],
)
def test_metadata_is_scored_as_configured(scorer: KeywordScorer, rerank, mode: MetadataMode, score: float) -> None:
    """`metadata_mode` says which metadata is scored with the text; by default, what embeddings see."""
    node = TextNode(text="text", metadata={"a": "one", "b": "two", "c": "three"})
    node.excluded_embed_metadata_keys = ["b", "c"]
    node.excluded_llm_metadata_keys = ["a"]
    (result,) = rerank(ScorerReranker(scorer=scorer, metadata_mode=mode), [NodeWithScore(node=node)], "one two three")
    assert result.score == pytest.approx(score)
    assert ScorerReranker(scorer=scorer).metadata_mode is MetadataMode.EMBED


def test_no_nodes_need_no_scorer(scorer: KeywordScorer, events: EventLog, rerank) -> None:
    """An empty list comes back as one, without a call to the back end, and traces see the beginning and the end."""
    assert rerank(ScorerReranker(scorer=scorer), []) == []
    assert scorer.calls == 0
    assert events.names() == ["ReRankStartEvent", "ReRankEndEvent"]


# What is refused, and failures


def test_a_query_is_needed(scorer: KeywordScorer) -> None:
    """Without a query, the message says how to pass one."""
    reranker = ScorerReranker(scorer=scorer)
    with pytest.raises(ValueError, match=r"Missing query bundle in extra info\. Pass query_bundle= or query_str=\."):
        reranker.postprocess_nodes(found())
    with pytest.raises(ValueError, match="Missing query bundle"):
        asyncio.run(reranker.apostprocess_nodes([]))


def test_nodes_without_score_are_refused(scorer: KeywordScorer, rerank) -> None:
    """A bare node is a TypeError that names position and class, before anything is scored."""
    with pytest.raises(TypeError, match=r"nodes\[1\] must be NodeWithScore, got TextNode"):
        rerank(ScorerReranker(scorer=scorer), [found()[0], TextNode(text="panda")])
    assert scorer.calls == 0


def test_a_missing_server_is_an_error(rerank) -> None:
    """Where nobody answers, the scorer's own error comes out."""
    with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1:9"):
        rerank(VLLMReranker(base_url=NOBODY, max_retries=0), found())


def test_passthrough_keeps_the_retrieval_order(events: EventLog, caplog: pytest.LogCaptureFixture, rerank) -> None:
    """After a failure: the first `top_n` with their retrieval scores, one warning, and a call that has ended well."""
    reranker = VLLMReranker(base_url=NOBODY, max_retries=0, top_n=3, on_error="passthrough")
    nodes = found(scores=[0.1, None, 0.3, 0.4, 0.5])
    results = rerank(reranker, nodes)
    assert results == nodes[:3]
    assert not {id(result) for result in results} & {id(node) for node in nodes}
    assert [record.name.split(".")[0] for record in caplog.records if record.levelno >= logging.WARNING] == [
        "rag_rerank"
    ]
    assert events.names() == ["ReRankStartEvent", "ReRankEndEvent"]


def test_passthrough_ranks_rejected_nodes_last(rerank) -> None:
    """Where only some nodes are rejected, they follow without a score: their retrieval score has another scale."""
    results = rerank(ScorerReranker(scorer=PickyScorer(), on_error="passthrough"), found())
    assert ids(results) == ["n4", "n2", "n1", "n0", "n3"]
    assert scores(results)[-1] is None
    assert None not in scores(results)[:-1]


def test_configuration_errors_are_never_passed_through(tmp_path: Path, rerank) -> None:
    """A model that does not exist is reported even under ``on_error="passthrough"``."""
    reranker = LocalReranker(model=tmp_path / "none", local_files_only=True, on_error="passthrough")
    with reranker, pytest.raises(ConfigError):
        rerank(reranker, found())


# Traces


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


def test_events_carry_the_span_of_their_call(scorer: KeywordScorer, events: EventLog, rerank, request) -> None:
    """Both events belong to the hook's own span, also in async calls, where LlamaIndex would make none."""
    rerank(ScorerReranker(scorer=scorer), found())
    (span,) = {event.span_id for event in events.events}
    hook = "_apostprocess_nodes" if "async" in request.node.name else "_postprocess_nodes"
    assert span.startswith(f"ScorerReranker.{hook}-")


def test_an_error_drops_the_span(events: EventLog, spans: SimpleSpanHandler, rerank) -> None:
    """After an error there is no end event, and the span has the error instead."""
    with pytest.raises(BackendUnavailable):
        rerank(VLLMReranker(base_url=NOBODY, max_retries=0), found())
    assert events.names() == ["ReRankStartEvent"]
    assert [span.id_ for span in spans.dropped_spans] == [events.events[0].span_id]
    assert spans.open_spans == {}


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


def test_callbacks_end_after_an_error(rerank) -> None:
    """A failed call ends its callback event with the error."""
    log = CallbackLog()
    with pytest.raises(BackendUnavailable) as caught:
        rerank(VLLMReranker(base_url=NOBODY, max_retries=0, callback_manager=CallbackManager([log])), found())
    assert log.ended == [{EventPayload.EXCEPTION: caught.value}]


# Event loops


def test_one_reranker_serves_several_loops(local: LocalScorer) -> None:
    """Two `asyncio.run` in a row work with one reranker."""
    reranker = ScorerReranker(scorer=local)
    first, second = (asyncio.run(reranker.apostprocess_nodes(found(), query_str=QUERY)) for _ in range(2))
    assert first == second


def test_the_sync_method_works_inside_a_running_loop(local: LocalScorer) -> None:
    """Some of LlamaIndex's async code calls the sync method."""

    async def call() -> list[NodeWithScore]:
        return ScorerReranker(scorer=local).postprocess_nodes(found(), query_str=QUERY)

    assert ids(asyncio.run(call())) == expected(local)[0]


# Settings, copies, secrets


@pytest.mark.parametrize(("kind", "backend"), [(LocalReranker, LocalScorer), (VLLMReranker, VLLMScorer)])
def test_fields_are_the_scorers_arguments(kind: type[LocalReranker | VLLMReranker], backend: type[Scorer]) -> None:
    """Each argument of the scorer is a field with the same default, and there are no others."""
    arguments = {name: argument.default for name, argument in inspect.signature(backend).parameters.items()}
    fields = kind.model_fields.keys() - ScorerReranker.model_fields.keys()
    assert fields == arguments.keys()
    for name in fields:
        assert kind.model_fields[name].get_default(call_default_factory=True) in (arguments[name], {})


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (VLLMReranker, {"base_url": "localhost:8000"}),
        (VLLMReranker, {"timeout": 0}),
        (LocalReranker, {"dtype": "float8"}),
        (LocalReranker, {"model": ""}),
    ],
)
def test_wrong_settings_are_reported_at_once(kind: type, wrong: dict[str, object]) -> None:
    """A setting that the scorer refuses is its ConfigError at construction, not pydantic's error."""
    with pytest.raises(ConfigError):
        kind(**wrong)


def test_a_changed_field_counts_from_the_next_call() -> None:
    """The scorer always fits the fields, whichever way they were changed, and is kept while they stay."""
    reranker = VLLMReranker(base_url=NOBODY, model="a")
    first = reranker.scorer
    reranker.top_n = 1
    assert reranker.scorer is first
    reranker.model = "b"
    assert reranker.scorer.model_name == "b"
    assert reranker.model_copy(update={"model": "c"}).scorer.model_name == "c"
    assert reranker.scorer.model_name == "b"
    options = LocalReranker()
    before = options.scorer
    options.model_kwargs["attn_implementation"] = "eager"
    assert options.scorer is not before


RERANKERS = [
    VLLMReranker(base_url=NOBODY, model="m", api_key=SECRET, top_n=None, score_threshold=0.5, timeout=3),
    LocalReranker(model=Path("folder"), dtype="float32", metadata_mode=MetadataMode.NONE, on_error="passthrough"),
]
by_name = pytest.mark.parametrize("reranker", RERANKERS, ids=lambda reranker: reranker.class_name())


@by_name
def test_settings_survive_dict_and_json(reranker: VLLMReranker | LocalReranker) -> None:
    """`from_dict` and `from_json` give back what `to_dict` and `to_json` were given, but for the key."""
    kind = type(reranker)
    assert kind.from_dict(reranker.to_dict()).to_dict() == reranker.to_dict()
    assert kind.from_json(reranker.to_json()).to_dict() == reranker.to_dict()
    assert reranker.to_dict()["class_name"] == kind.__name__


@by_name
def test_rerankers_can_be_pickled_and_copied(reranker: VLLMReranker | LocalReranker, caplog) -> None:
    """A pickle and a deep copy have the same settings, and LlamaIndex warns of nothing that it had to remove."""
    for twin in (pickle.loads(pickle.dumps(reranker)), copy.deepcopy(reranker)):  # noqa: S301 - our own
        assert twin.to_dict() == reranker.to_dict()
        assert twin.scorer.model_name == reranker.scorer.model_name
    assert caplog.records == []


def test_copies_share_the_scorer(local: LocalScorer) -> None:
    """No copy loads a model of its own."""
    for reranker in (LocalReranker(), VLLMReranker(api_key=SECRET), ScorerReranker(scorer=local)):
        assert copy.copy(reranker).scorer is reranker.scorer
        assert copy.deepcopy(reranker).scorer is reranker.scorer


def test_pickling_leaves_the_reranker_as_it_is() -> None:
    """What can't be pickled, such as an engine's callbacks, stays where it is."""
    log = CallbackLog()
    log.unpicklable = lambda: None
    reranker = VLLMReranker(callback_manager=CallbackManager([log]))
    pickle.dumps(reranker)
    assert reranker.callback_manager.handlers == [log]


def test_the_key_is_shown_nowhere(events: EventLog) -> None:
    """It is in no repr, dict, JSON, pickle or event; deep copies have it, for they stay in the process."""
    reranker = VLLMReranker(base_url=NOBODY, api_key=SECRET, max_retries=0)
    with pytest.raises(BackendUnavailable) as caught:
        reranker.postprocess_nodes(found(), query_str=QUERY)
    shown = [repr(reranker), str(reranker.to_dict()), reranker.to_json(), repr(caught.value), repr(events.events)]
    assert all(SECRET not in text for text in shown)
    assert SECRET.encode() not in pickle.dumps(reranker)
    assert copy.deepcopy(reranker).api_key.get_secret_value() == SECRET


def test_a_given_scorer_is_given_again(scorer: KeywordScorer) -> None:
    """A ScorerReranker's dict leaves the scorer out; `from_dict` takes it as an argument."""
    data = ScorerReranker(scorer=scorer, top_n=2).to_dict()
    assert "scorer" not in data
    again = ScorerReranker.from_dict(data, scorer=scorer)
    assert (again.scorer, again.top_n) == (scorer, 2)
    with pytest.raises(ValidationError):
        ScorerReranker.from_dict(data)


def test_only_scorers_are_accepted() -> None:
    """Something else in the place of a scorer is refused at construction."""
    with pytest.raises(ValidationError):
        ScorerReranker(scorer="cross-encoder/ms-marco-MiniLM-L6-v2")


@pytest.mark.parametrize("kind", [ScorerReranker, LocalReranker, VLLMReranker])
def test_schemas_list_the_fields(kind: type[ScorerReranker]) -> None:
    """The JSON schema, which forms and tools are made from, has the fields and the class's name."""
    properties = kind.model_json_schema()["properties"]
    assert {"top_n", "score_threshold", "metadata_mode", "on_error", "class_name"} <= properties.keys()


def test_closing_ends_what_the_reranker_built(scorer: KeywordScorer) -> None:
    """A closed reranker scores no more; a scorer that was passed in stays open for its owner."""
    with VLLMReranker() as own:
        pass
    with pytest.raises(RerankError, match="closed"):
        own.postprocess_nodes(found(), query_str=QUERY)
    with ScorerReranker(scorer=scorer) as given:
        pass
    assert len(given.postprocess_nodes(found(), query_str=QUERY)) == 5


def test_closing_works_in_an_event_loop(scorer: KeywordScorer) -> None:
    """``async with`` closes as ``with`` does."""

    async def use() -> VLLMReranker:
        async with ScorerReranker(scorer=scorer), VLLMReranker() as own:
            return own

    with pytest.raises(RerankError, match="closed"):
        asyncio.run(use()).postprocess_nodes(found(), query_str=QUERY)


def test_importing_and_constructing_load_no_model_library() -> None:
    """Neither the import nor a constructor brings torch or transformers; the import brings no back end either."""
    script = """
import sys
from llama_index.postprocessor.rag_rerank import LocalReranker, VLLMReranker
assert not {"torch", "transformers", "rag_rerank.local", "rag_rerank.vllm"} & sys.modules.keys()
LocalReranker(), VLLMReranker()
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
