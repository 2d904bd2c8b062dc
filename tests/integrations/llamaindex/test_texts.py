"""What of a node is scored, and what of its retrieval score is kept: metadata, nodes without text, kept scores."""

import logging

import pytest
from llama_index.core.postprocessor import SentenceTransformerRerank
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeWithScore,
    TextNode,
)

from llama_index.postprocessor.rag_rerank import ScorerReranker
from tests.integrations.llamaindex.support import (
    ORDER,
    TEXTS,
    BrokenScorer,
    EventLog,
    KeywordScorer,
    PickyScorer,
    found,
    ids,
    scores,
)

FILE = {"file_name": "panda.png"}
WITHOUT_TEXT = [
    TextNode(text=""),
    TextNode(text=" \n\t", metadata=FILE),
    ImageNode(image_url="http://x/panda.png", metadata=FILE),
    Node(image_resource=MediaResource(url="http://x/panda.png"), metadata=FILE),
    Document(text="", metadata=FILE),
]
MODES = [MetadataMode.EMBED, MetadataMode.LLM, MetadataMode.ALL, MetadataMode.NONE]


class TestMetadata:
    """Metadata is scored with the text."""

    @pytest.mark.parametrize(
        ("mode", "score"),
        [(MetadataMode.EMBED, 1 / 3), (MetadataMode.LLM, 2 / 3), (MetadataMode.ALL, 1.0), (MetadataMode.NONE, 0.0)],
    )
    def test_metadata_is_scored_as_configured(self, scorer: KeywordScorer, rerank, mode: MetadataMode, score) -> None:
        """`metadata_mode` says which metadata is scored with the text; by default, what embeddings see."""
        node = TextNode(text="text", metadata={"a": "one", "b": "two", "c": "three"})
        node.excluded_embed_metadata_keys = ["b", "c"]
        node.excluded_llm_metadata_keys = ["a"]
        reranker = ScorerReranker(scorer=scorer, metadata_mode=mode)
        (result,) = rerank(reranker, [NodeWithScore(node=node)], "one two three")
        assert result.score == pytest.approx(score)
        assert ScorerReranker(scorer=scorer).metadata_mode is MetadataMode.EMBED

    def test_the_nodes_own_template_is_used(self, scorer: KeywordScorer, rerank) -> None:
        """As embeddings use it."""
        node = TextNode(text="bread", text_template="{content} ({metadata_str})", metadata={"by": "Ann"})
        rerank(ScorerReranker(scorer=scorer), [NodeWithScore(node=node)])
        assert scorer.seen == [["bread (by: Ann)"]]


class TestNodesWithoutText:
    """Images and blank pages are not sent, and never ranked by their file names."""

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("node", WITHOUT_TEXT, ids=lambda node: type(node).__name__)
    def test_they_are_not_sent(self, scorer: KeywordScorer, rerank, node: BaseNode, mode: MetadataMode) -> None:
        """They come last, without a score, whatever metadata they have and whatever score they came with."""
        nodes = [NodeWithScore(node=node, score=0.9), *found(["bread", "a panda"])]
        results = rerank(ScorerReranker(scorer=scorer, metadata_mode=mode), nodes, "panda.png")
        assert scorer.seen == [["bread", "a panda"]]
        assert results[-1].node is node
        assert scores(results) == [0.0, 0.0, None]

    def test_they_keep_their_order(self, scorer: KeywordScorer, rerank) -> None:
        """Behind the scored ones, in retrieval order."""
        nodes = found(["", "bread", " ", "panda", "\n"])
        assert ids(rerank(ScorerReranker(scorer=scorer), nodes, "panda")) == ["n3", "n1", "n0", "n2", "n4"]
        assert ids(rerank(ScorerReranker(scorer=scorer, top_n=4), nodes, "panda")) == ["n3", "n1", "n0", "n2"]
        assert ids(rerank(ScorerReranker(scorer=scorer, top_n=1), nodes, "panda")) == ["n3"]

    def test_they_may_be_dropped(self, scorer: KeywordScorer, rerank) -> None:
        """By `on_empty_text`, and under a threshold in any case: what has no score is not above it."""
        nodes = found(["", "bread", " ", "panda"])
        dropping = ScorerReranker(scorer=scorer, on_empty_text="drop")
        assert ids(rerank(dropping, nodes, "panda")) == ["n3", "n1"]
        for choice in ("last", "drop"):
            reranker = ScorerReranker(scorer=scorer, on_empty_text=choice, score_threshold=0.0)
            assert ids(rerank(reranker, nodes, "panda")) == ["n3", "n1"]

    def test_where_there_are_no_others_nobody_is_asked(self, scorer: KeywordScorer, events: EventLog, rerank) -> None:
        """No call to the back end, and both events."""
        assert ids(rerank(ScorerReranker(scorer=scorer), found(["", " "]))) == ["n0", "n1"]
        assert rerank(ScorerReranker(scorer=scorer, on_empty_text="drop"), found(["", " "])) == []
        assert scorer.calls == 0
        assert events.names() == ["ReRankStartEvent", "ReRankEndEvent"] * 2

    @pytest.mark.parametrize(("choice", "fate"), [("last", "are ranked last"), ("drop", "are dropped")])
    def test_they_are_counted_in_the_log(self, scorer: KeywordScorer, caplog, rerank, choice: str, fate: str) -> None:
        """Once a call, and only for those who debug; nothing of what they hold."""
        caplog.set_level(logging.DEBUG, "llama_index.postprocessor.rag_rerank")
        rerank(ScorerReranker(scorer=scorer, on_empty_text=choice), found(["", "panda", " "]))
        rerank(ScorerReranker(scorer=scorer, on_empty_text=choice), found())
        (record,) = [record for record in caplog.records if record.name.startswith("llama_index.postprocessor")]
        assert record.getMessage() == f"2 of 3 nodes have no text to score and {fate}"
        assert record.levelno == logging.DEBUG

    def test_a_failed_call_keeps_their_place(self, rerank) -> None:
        """Where all keep their retrieval order they do, too; dropped ones are gone even then."""
        nodes = found(["", "bread", " ", "panda"], [0.4, None, 0.2, 0.1])
        passing = ScorerReranker(scorer=BrokenScorer(), on_error="passthrough", top_n=3)
        assert rerank(passing, nodes) == nodes[:3]
        passing.on_empty_text = "drop"
        assert ids(rerank(passing, nodes)) == ["n1", "n3"]

    def test_they_follow_rejected_ones(self, rerank) -> None:
        """Neither has a score."""
        nodes = found(["", "Bread", "panda"])
        results = rerank(ScorerReranker(scorer=PickyScorer(), on_error="passthrough"), nodes, "panda")
        assert (ids(results), scores(results)) == (["n2", "n1", "n0"], [1.0, None, None])


class TestKeptScores:
    """`keep_retrieval_score` puts the score that a node came with into the metadata of a copy."""

    def test_it_stands_in_the_metadata(self, scorer: KeywordScorer, rerank) -> None:
        """Also where it was None; without the option, nothing does."""
        nodes = found(TEXTS, [0.5, None, 0.3, 0.2, 0.1])
        results = rerank(ScorerReranker(scorer=scorer, keep_retrieval_score=True), nodes)
        kept = {result.node_id: result.metadata["retrieval_score"] for result in results}
        assert kept == {"n0": 0.5, "n1": None, "n2": 0.3, "n3": 0.2, "n4": 0.1}
        assert ids(results) == ORDER
        assert all("retrieval_score" not in result.metadata for result in rerank(ScorerReranker(scorer=scorer), nodes))

    def test_nodes_without_text_keep_theirs_too(self, scorer: KeywordScorer, rerank) -> None:
        """And so do all nodes of a failed call."""
        (result,) = rerank(ScorerReranker(scorer=scorer, keep_retrieval_score=True), found([""], [0.7]))
        assert (result.score, result.metadata) == (None, {"retrieval_score": 0.7})
        passing = ScorerReranker(scorer=BrokenScorer(), on_error="passthrough", keep_retrieval_score=True)
        (result,) = rerank(passing, found(["panda"], [0.7]))
        assert (result.score, result.metadata) == (0.7, {"retrieval_score": 0.7})

    @pytest.mark.parametrize("node", [TextNode(text="a"), Document(text="a")], ids=lambda node: type(node).__name__)
    def test_nobody_gets_to_read_it(self, scorer: KeywordScorer, rerank, node: BaseNode) -> None:
        """Neither embeddings nor language models; what a node excluded before stays excluded."""
        node = node.model_copy(update={"metadata": {"by": "Ann"}, "excluded_llm_metadata_keys": ["by"]})
        (result,) = rerank(ScorerReranker(scorer=scorer, keep_retrieval_score=True), [NodeWithScore(node=node)])
        assert result.node.metadata == {"by": "Ann", "retrieval_score": None}
        for mode in (MetadataMode.EMBED, MetadataMode.LLM, MetadataMode.NONE):
            assert result.get_content(mode) == node.get_content(mode)
        assert (node.metadata, node.excluded_llm_metadata_keys) == ({"by": "Ann"}, ["by"])
        assert node.excluded_embed_metadata_keys == []

    @pytest.mark.parametrize("mode", MODES)
    def test_a_later_reranker_does_not_score_it(self, rerank, mode: MetadataMode) -> None:
        """Not even one that reads all metadata; and it keeps the score that the first one gave."""
        first, second = KeywordScorer(), KeywordScorer()
        once = rerank(ScorerReranker(scorer=first, metadata_mode=mode, keep_retrieval_score=True), found())
        twice = rerank(ScorerReranker(scorer=second, metadata_mode=mode, keep_retrieval_score=True), once)
        assert sorted(first.seen[0]) == sorted(second.seen[0]) == sorted(TEXTS)
        assert [node.metadata["retrieval_score"] for node in twice] == scores(once)

    def test_other_rerankers_scores_are_not_scored_either(self, cross_encoder, scorer: KeywordScorer, rerank) -> None:
        """LlamaIndex's own puts it into the node itself, which a retriever may find again."""
        nodes = found()
        theirs = SentenceTransformerRerank(model=str(cross_encoder), top_n=5, device="cpu", keep_retrieval_score=True)
        theirs.postprocess_nodes(nodes, query_str="panda")
        assert "retrieval_score" in nodes[0].get_content(MetadataMode.EMBED)
        rerank(ScorerReranker(scorer=scorer), nodes)
        assert sorted(scorer.seen[0]) == sorted(TEXTS)
