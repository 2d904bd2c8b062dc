"""What is refused, and what becomes of a call that gets no scores."""

import asyncio
import logging
from pathlib import Path

import pytest
from llama_index.core.schema import QueryBundle, TextNode

from llama_index.postprocessor.rag_rerank import LocalReranker, ScorerReranker, VLLMReranker
from rag_rerank import BackendUnavailable, ConfigError
from tests.integrations.llamaindex.support import (
    NOBODY,
    EventLog,
    KeywordScorer,
    PickyScorer,
    found,
    ids,
    scores,
)


def test_a_query_is_needed(scorer: KeywordScorer) -> None:
    """Without a query, the message says how to pass one."""
    reranker = ScorerReranker(scorer=scorer)
    with pytest.raises(ValueError, match=r"Missing query bundle in extra info\. Pass query_bundle= or query_str=\."):
        reranker.postprocess_nodes(found())
    with pytest.raises(ValueError, match="Missing query bundle"):
        asyncio.run(reranker.apostprocess_nodes([]))


@pytest.mark.parametrize("query", ["", " ", "\n\t"])
def test_a_blank_query_is_none(scorer: KeywordScorer, rerank, query: str) -> None:
    """It asks for nothing: no order would be right."""
    hint = r"Missing query bundle in extra info\. Pass query_bundle= or query_str=\. The query that came is blank\."
    with pytest.raises(ValueError, match=hint):
        rerank(ScorerReranker(scorer=scorer), found(), query)
    with pytest.raises(ValueError, match=hint):
        ScorerReranker(scorer=scorer).postprocess_nodes([], QueryBundle(query))
    assert scorer.calls == 0


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


def test_a_trace_tells_what_was_passed_through(scorer: KeywordScorer, events: EventLog, rerank) -> None:
    """By a tag of the end event, which other calls don't have."""
    rerank(VLLMReranker(base_url=NOBODY, max_retries=0, on_error="passthrough"), found())
    rerank(ScorerReranker(scorer=scorer, on_error="passthrough"), found())
    rerank(ScorerReranker(scorer=PickyScorer(), on_error="passthrough"), found())
    assert [event.tags for event in events.events] == [{}, {"passthrough": True}, {}, {}, {}, {}]


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
