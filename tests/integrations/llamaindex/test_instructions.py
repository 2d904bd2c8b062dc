"""The instruction: the reranker's own, or one that comes with the query."""

import asyncio

import pytest
from llama_index.core.schema import QueryBundle

from llama_index.postprocessor.rag_rerank import QueryWithInstruction, ScorerReranker, VLLMReranker
from rag_rerank import ConfigError, VLLMScorer
from tests.faulty_server import FaultyServer
from tests.integrations.llamaindex.support import QUERY, EventLog, KeywordScorer, engine, found, ids

OWN = "Find the page of the zoo."
NEW = "Find the diet of the animal."


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("of_an_engine", [False, True])
def test_a_query_may_bring_its_instruction(events: EventLog, is_async: bool, of_an_engine: bool) -> None:
    """For itself only; without one, and with None, the reranker's own is used."""
    with (
        FaultyServer() as server,
        VLLMReranker(base_url=server.base_url, template="qwen3-reranker", instruction=OWN) as reranker,
    ):

        def ask(query: QueryBundle) -> str:
            before = len(server.score_requests)
            target, name = (engine(reranker), "query") if of_an_engine else (reranker, "postprocess_nodes")
            arguments = [query] if of_an_engine else [found(), query]
            if is_async:
                asyncio.run(getattr(target, f"a{name}")(*arguments))
            else:
                getattr(target, name)(*arguments)
            return str([request.content for request in server.score_requests[before:]])

        for query in (QueryBundle(QUERY), QueryWithInstruction(QUERY)):
            assert (OWN in ask(query), NEW in ask(query)) == (True, False)
        with_instruction = QueryWithInstruction(QUERY, instruction=NEW)
        assert (OWN in ask(with_instruction), NEW in ask(with_instruction)) == (False, True)
        assert events.events[-2].query is with_instruction
        assert OWN in ask(QueryBundle(QUERY))


def test_it_gives_the_scores_of_a_reranker_that_has_it() -> None:
    """The same prompt, whichever way the instruction came."""
    with FaultyServer() as server:
        settings = {"base_url": server.base_url, "template": "qwen3-reranker"}
        own = VLLMReranker(**settings, instruction=NEW).postprocess_nodes(found(), query_str=QUERY)
        reranker = ScorerReranker(scorer=VLLMScorer(**settings, instruction=OWN))
        assert reranker.postprocess_nodes(found(), QueryWithInstruction(QUERY, instruction=NEW)) == own
        assert ids(reranker.postprocess_nodes(found(), query_str=QUERY)) != ids(own)


@pytest.mark.parametrize("on_error", ["raise", "passthrough"])
def test_a_model_without_a_place_for_it_refuses(scorer: KeywordScorer, on_error: str) -> None:
    """Never passed through: the scores would be those of another question."""
    reranker = ScorerReranker(scorer=scorer, on_error=on_error)
    with pytest.raises(ConfigError, match="no place for an instruction"):
        reranker.postprocess_nodes(found(), QueryWithInstruction(QUERY, instruction=NEW))
    assert scorer.calls == 0
