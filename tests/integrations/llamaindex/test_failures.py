"""What is refused, and what becomes of a call that gets no scores."""

import asyncio
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from llama_index.postprocessor.rag_rerank import LocalReranker, ScorerReranker, VLLMReranker
from rag_rerank import BackendError, BackendUnavailable, ConfigError
from tests.faulty_server import FaultyServer, Request, Steps, refusal
from tests.integrations.llamaindex.support import (
    NOBODY,
    TEXTS,
    AnyReranker,
    EventLog,
    KeywordScorer,
    PickyScorer,
    found,
    ids,
    scores,
)
from tests.models import spoil


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


class TestTenQueriesAtOnce:
    """One has a node that can't be scored: nine are ranked as if it were not there."""

    @pytest.fixture(params=["NaN", "500"])
    def reranker(self, request, cross_encoder: Path, tmp_path: Path) -> Iterator[AnyReranker]:
        """A model that has NaN for some words about bread, and a server that answers 500 to them."""
        if request.param == "NaN":
            others = [*TEXTS[:3], TEXTS[4], "panda 0 1 2 3 4 5 6 7 8 9"]
            folder = spoil(cross_encoder, tmp_path / "model", TEXTS[3], others)
            with LocalReranker(model=folder, dtype="float32") as reranker:
                yield reranker
        else:

            def behave(http_request: Request) -> Steps | None:
                wants = http_request.wants_scores and any("Bread" in text for text in http_request.documents)
                return refusal(500) if wants else None

            with FaultyServer(behave) as server, VLLMReranker(base_url=server.base_url, max_retries=0) as reranker:
                yield reranker

    @pytest.fixture(params=["threads", "tasks"])
    def at_once(self, request):
        """Ten calls, the fourth with all nodes, the others without the bad one; what became of each."""

        def nodes(number: int) -> list[NodeWithScore]:
            return found([f"{text} {number}" for text in (TEXTS if number == 3 else TEXTS[:3])])

        async def ask(reranker: AnyReranker) -> list:
            calls = (reranker.apostprocess_nodes(nodes(number), query_str=f"panda {number}") for number in range(10))
            return await asyncio.gather(*calls, return_exceptions=True)

        def ask_one(reranker: AnyReranker, number: int) -> object:
            try:
                return reranker.postprocess_nodes(nodes(number), query_str=f"panda {number}")
            except BackendError as error:
                return error

        def call(reranker: AnyReranker) -> tuple[list, list]:
            """The ten at once, and the nine that are well one by one."""
            if request.param == "tasks":
                results = asyncio.run(ask(reranker))
            else:
                with ThreadPoolExecutor(10) as pool:
                    results = list(pool.map(lambda number: ask_one(reranker, number), range(10)))
            return results, [ask_one(reranker, number) for number in range(10) if number != 3]

        return call

    @pytest.mark.parametrize("on_error", ["raise", "passthrough"])
    def test_nine_are_ranked_as_if_it_were_not_there(self, reranker: AnyReranker, at_once, on_error: str) -> None:
        """The tenth raises, or its other nodes are ranked and that one follows."""
        reranker.on_error = on_error
        results, expected = at_once(reranker)
        tenth = results.pop(3)
        assert [ids(result) for result in results] == [ids(result) for result in expected]
        for result, alone in zip(results, expected, strict=True):
            assert scores(result) == pytest.approx(scores(alone), abs=1e-5)
        if on_error == "raise":
            assert isinstance(tenth, BackendError)
            assert (tenth.indices, tenth.scores[3]) == ((3,), None)
        else:
            assert sorted(ids(tenth)) == [f"n{number}" for number in range(5)]
            assert (ids(tenth)[-1], scores(tenth)[-1]) == ("n3", None)
            assert None not in scores(tenth)[:-1]
