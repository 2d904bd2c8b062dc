"""What comes back: which nodes, in which order, with which scores; and that what went in stays as it was."""

import asyncio
import copy
import json

import pytest
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageNode,
    IndexNode,
    MediaResource,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from pydantic import ValidationError

from llama_index.postprocessor.rag_rerank import LocalReranker, ScorerReranker, VLLMReranker
from rag_rerank import LocalScorer
from tests.integrations.llamaindex.support import (
    ORDER,
    QUERY,
    TEXTS,
    EventLog,
    KeywordScorer,
    expected,
    found,
    ids,
    scores,
)

NODES = [
    TextNode(text="a panda"),
    Document(text="a panda"),
    Node(text_resource=MediaResource(text="a panda")),
    ImageNode(text="a panda", image_url="http://x/y.png"),
    IndexNode(text="a panda", index_id="elsewhere", obj=TextNode(text="what it refers to")),
]
every_node = pytest.mark.parametrize("node", NODES, ids=lambda node: type(node).__name__)


@pytest.mark.parametrize("kind", [ScorerReranker, LocalReranker, VLLMReranker])
def test_rerankers_are_postprocessors(kind: type) -> None:
    """Each is a BaseNodePostprocessor and goes by its own name."""
    assert "BaseNodePostprocessor" in [base.__name__ for base in kind.__mro__]
    assert kind.class_name() == kind.__name__


def test_the_order_is_that_of_the_scores(scorer: KeywordScorer, rerank) -> None:
    """Best first, all of the input, five by default."""
    assert ids(rerank(ScorerReranker(scorer=scorer), found())) == ORDER == expected(scorer)[0]


def test_sync_and_async_give_the_same(scorer: KeywordScorer) -> None:
    """Both ways lead to the same nodes with the same scores."""
    reranker = ScorerReranker(scorer=scorer)
    assert reranker.postprocess_nodes(found(), query_str=QUERY) == asyncio.run(
        reranker.apostprocess_nodes(found(), query_str=QUERY)
    )


def test_a_query_bundle_says_what_a_string_says(scorer: KeywordScorer) -> None:
    """Engines pass a bundle; its `query_str` counts, not what is to be embedded."""
    reranker = ScorerReranker(scorer=scorer)
    bundle = QueryBundle(QUERY, custom_embedding_strs=["bread"])
    by_string = reranker.postprocess_nodes(found(), query_str=QUERY)
    assert reranker.postprocess_nodes(found(), bundle) == by_string
    assert asyncio.run(reranker.apostprocess_nodes(found(), bundle)) == by_string


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


@every_node
@pytest.mark.parametrize("keep", [False, True])
def test_no_kind_of_node_is_changed(scorer: KeywordScorer, events: EventLog, rerank, node: BaseNode, keep) -> None:
    """Deep inside, too, and whatever is asked for; nor are the nodes that traces were given."""
    node = node.model_copy(update={"metadata": {"tags": ["a"]}})
    nodes = [NodeWithScore(node=node, score=0.5), *found(["", "bread"])]
    before = [item.to_dict() for item in nodes]
    results = rerank(ScorerReranker(scorer=scorer, keep_retrieval_score=keep), nodes, "panda")
    assert [item.to_dict() for item in nodes] == before
    assert [item.to_dict() for item in events.events[0].nodes] == before
    assert scores(results) == [1.0, 0.0, None]


def test_subclasses_of_node_with_score_are_kept(scorer: KeywordScorer, rerank) -> None:
    """A result is of its input's class and has its extra fields."""

    class Tagged(NodeWithScore):
        tag: str = ""

    for keep in (False, True):
        reranker = ScorerReranker(scorer=scorer, keep_retrieval_score=keep)
        (result,) = rerank(reranker, [Tagged(node=TextNode(text="panda"), tag="kept")])
        assert isinstance(result, Tagged)
        assert result.tag == "kept"


def test_scores_are_plain_floats(local: LocalScorer, rerank) -> None:
    """A score is a Python float, so a result can be written as JSON."""
    for result in rerank(ScorerReranker(scorer=local), found()):
        assert type(result.score) is float
        assert json.loads(result.to_json())["score"] == result.score


@pytest.mark.parametrize(("top_n", "count"), [(None, 5), (1, 1), (2, 2), (5, 5), (99, 5)])
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


@every_node
def test_every_node_with_text_is_accepted(scorer: KeywordScorer, rerank, node: BaseNode) -> None:
    """What counts is the text that the node gives, not its class."""
    (result,) = rerank(ScorerReranker(scorer=scorer), [NodeWithScore(node=node)], "panda")
    assert result.node is node
    assert result.score == 1.0


def test_no_nodes_need_no_scorer(scorer: KeywordScorer, events: EventLog, rerank) -> None:
    """An empty list comes back as one, without a call to the back end, and traces see the beginning and the end."""
    assert rerank(ScorerReranker(scorer=scorer), []) == []
    assert scorer.calls == 0
    assert events.names() == ["ReRankStartEvent", "ReRankEndEvent"]
