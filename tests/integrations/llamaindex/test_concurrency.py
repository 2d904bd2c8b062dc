"""Event loops, threads, cancelling and closing."""

import asyncio
import threading

import pytest
from llama_index.core.schema import NodeWithScore

import rag_rerank
from llama_index.postprocessor.rag_rerank import LocalReranker, ScorerReranker, VLLMReranker
from rag_rerank import LocalScorer, RerankError
from tests.integrations.llamaindex.support import (
    ORDER,
    QUERY,
    AnyReranker,
    KeywordScorer,
    WaitingScorer,
    engine,
    expected,
    found,
    ids,
    until,
)


class TestLoops:
    """Any event loop, and the sync methods inside of one."""

    def test_one_reranker_serves_several_loops(self, local: LocalScorer) -> None:
        """Two `asyncio.run` in a row work with one reranker."""
        reranker = ScorerReranker(scorer=local)
        first, second = (asyncio.run(reranker.apostprocess_nodes(found(), query_str=QUERY)) for _ in range(2))
        assert first == second

    def test_the_sync_method_works_inside_a_running_loop(self, local: LocalScorer) -> None:
        """Some of LlamaIndex's async code calls the sync method."""

        async def call() -> list[NodeWithScore]:
            return ScorerReranker(scorer=local).postprocess_nodes(found(), query_str=QUERY)

        assert ids(asyncio.run(call())) == expected(local)[0]

    def test_both_ways_work_in_one_loop(self, minilm, local: LocalScorer) -> None:
        """In turn, and while an async call is under way."""

        async def call() -> list[list[NodeWithScore]]:
            with LocalReranker(model=minilm, dtype="float32") as reranker:
                task = asyncio.create_task(reranker.apostprocess_nodes(found(), query_str=QUERY))
                await asyncio.sleep(0)
                return [reranker.postprocess_nodes(found(), query_str=QUERY), await task]

        assert [ids(nodes) for nodes in asyncio.run(call())] == [expected(local)[0]] * 2

    def test_threads_share_a_reranker(self, local: LocalScorer) -> None:
        """Each with a loop of its own."""
        reranker, results = ScorerReranker(scorer=local), []

        def work() -> None:
            results.append(ids(asyncio.run(reranker.apostprocess_nodes(found(), query_str=QUERY))))
            results.append(ids(reranker.postprocess_nodes(found(), query_str=QUERY)))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [expected(local)[0]] * 8


class TestManyQueries:
    """None waits for another, and the loop goes on."""

    def test_fifty_queries_wait_at_the_same_time(self) -> None:
        """All are with the scorer before it answers the first: none stands in line for a thread of a pool."""

        async def ask() -> list[list[str]]:
            scorer = WaitingScorer()
            queried = engine(ScorerReranker(scorer=scorer), found())
            tasks = [asyncio.create_task(queried.aquery(QUERY)) for _ in range(50)]
            await until(lambda: scorer.waiting == 50)
            scorer.go.set()
            return [ids((await task).source_nodes) for task in tasks]

        assert asyncio.run(ask()) == [ORDER] * 50

    def test_a_cancelled_query_harms_no_other(self, local: LocalScorer) -> None:
        """The reranker stays usable, for others in the loop and afterwards."""

        async def ask(reranker: AnyReranker) -> list[str]:
            queried = engine(reranker, found())
            tasks = [asyncio.create_task(queried.aquery(QUERY)) for _ in range(10)]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[::2])
            assert all(ids(answer.source_nodes) == expected(local)[0] for answer in answers[1::2])
            return ids((await queried.aquery(QUERY)).source_nodes)

        reranker = ScorerReranker(scorer=local)
        assert asyncio.run(ask(reranker)) == expected(local)[0]
        assert ids(reranker.postprocess_nodes(found(), query_str=QUERY)) == expected(local)[0]

    def test_a_query_may_run_out_of_time(self) -> None:
        """`asyncio.timeout` around it is honoured, and the next query is answered."""

        async def ask() -> list[str]:
            scorer = WaitingScorer()
            queried = engine(ScorerReranker(scorer=scorer), found())
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(queried.aquery(QUERY), 0.05)
            assert scorer.waiting == 0
            scorer.go.set()
            return ids((await queried.aquery(QUERY)).source_nodes)

        assert asyncio.run(ask()) == ORDER


class TestLife:
    """From warming up to closing."""

    def test_a_model_is_warmed_up_before_the_first_query(self, minilm, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is loaded then, and only then."""
        load, loaded = rag_rerank.local.scorer._load, []
        monkeypatch.setattr(
            rag_rerank.local.scorer, "_load", lambda settings: loaded.append(settings) or load(settings)
        )
        with LocalReranker(model=minilm, dtype="float32") as reranker:
            assert loaded == []
            reranker.warmup()
            assert len(loaded) == 1
            reranker.postprocess_nodes(found(), query_str=QUERY)
            assert len(loaded) == 1

    def test_closing_ends_what_the_reranker_built(self, scorer: KeywordScorer) -> None:
        """A closed reranker scores no more; a scorer that was passed in stays open for its owner."""
        with VLLMReranker() as own:
            pass
        with pytest.raises(RerankError, match="closed"):
            own.postprocess_nodes(found(), query_str=QUERY)
        with ScorerReranker(scorer=scorer) as given:
            pass
        assert len(given.postprocess_nodes(found(), query_str=QUERY)) == 5

    def test_closing_works_in_an_event_loop(self, scorer: KeywordScorer) -> None:
        """``async with`` closes as ``with`` does."""

        async def use() -> VLLMReranker:
            async with ScorerReranker(scorer=scorer), VLLMReranker() as own:
                return own

        with pytest.raises(RerankError, match="closed"):
            asyncio.run(use()).postprocess_nodes(found(), query_str=QUERY)
