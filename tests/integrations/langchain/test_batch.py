"""Many queries at once: as few calls as can be, and each query with its own run and its own error."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.runnables import RunnablePassthrough

from langchain_rag_rerank import ScorerReranker, VLLMReranker
from rag_rerank import (
    BackendUnavailable,
    BadReply,
    ConfigError,
    ContentError,
    DocumentRejected,
    Image,
    LocalScorer,
)
from rag_rerank.batch import MOST_DOCUMENTS
from tests.faulty_server import FaultyServer, Request, on_scores, refusal
from tests.integrations.langchain.common import (
    BEST_FIRST,
    QUERY,
    TEXTS,
    BrokenScorer,
    Finds,
    Instructed,
    KeywordScorer,
    NativeScorer,
    Runs,
    found,
    keywords,
    numbers,
)

QUERIES = ["baking bread", QUERY, "how to sleep", "fish"]
INPUTS = [{"query": query, "documents": found()} for query in QUERIES]
OTHER = {"query": 3, "documents": found()}


class Refuses(KeywordScorer):
    """Refuses documents with the word poison, as a server does: all else it has scored."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def _score(self, queries, documents, until):
        self.sizes.append(len(documents))
        scores = super()._score(queries, documents, until)
        bad = [position for position, document in enumerate(documents) if "poison" in document]
        if bad:
            rest = [None if position in bad else score for position, score in enumerate(scores)]
            raise DocumentRejected("too long", indices=bad, scores=rest)
        return scores


class Garbles(KeywordScorer):
    """Has no number for documents with the word poison, as a model that overflows."""

    def _score(self, queries, documents, until):
        scores = super()._score(queries, documents, until)
        pairs = zip(scores, documents, strict=True)
        return [float("nan") if "poison" in document else score for score, document in pairs]


def by_threads(reranker: ScorerReranker, *given: Any, **options: Any) -> list[Any]:
    return reranker.batch(*given, **options)


def by_the_loop(reranker: ScorerReranker, *given: Any, **options: Any) -> list[Any]:
    return asyncio.run(reranker.abatch(*given, **options))


@pytest.fixture(params=[by_threads, by_the_loop], ids=["batch", "abatch"])
def batch(request) -> Callable[..., list[Any]]:
    """Both ways to ask."""
    return request.param


def poisoned(position: int) -> list[dict[str, Any]]:
    inputs = [{"query": query, "documents": found()} for query in QUERIES]
    inputs[position]["documents"][2] = Document("how to poison", metadata={"n": 2})
    return inputs


class TestTogether:
    """As long as nothing goes wrong."""

    def test_batches_keep_their_order(self, batch, local: LocalScorer):
        """Both answer in the order of the inputs, as `invoke` does."""
        reranker = ScorerReranker(scorer=local, top_n=1)
        queries = ["baking", "hibernation of bears", "a good night's rest", "fishing"]
        inputs = [{"query": query, "documents": found()} for query in queries]
        expected = [numbers(reranker.invoke(given)) for given in inputs]
        assert [numbers(result) for result in batch(reranker, inputs)] == expected

    def test_many_queries_are_one_call(self, batch):
        """Of any numbers of documents; where there are none, the result is empty."""
        scorer = KeywordScorer()
        reranker = ScorerReranker(scorer=scorer, top_n=None)
        inputs = [*INPUTS, {"query": "x", "documents": []}, {"query": "fish", "documents": found()[3:]}]
        expected = [reranker.invoke(given) for given in inputs]
        scorer.calls = 0
        assert batch(reranker, inputs) == expected
        assert scorer.calls == 1

    def test_an_async_batch_needs_no_thread(self):
        """It awaits the scorer itself."""
        assert numbers(by_the_loop(ScorerReranker(scorer=NativeScorer()), INPUTS)[1]) == [1, 3, 2]

    def test_nothing_in_nothing_out(self, batch):
        """Neither a call nor a run."""
        scorer, runs = KeywordScorer(), Runs()
        reranker = ScorerReranker(scorer=scorer)
        assert batch(reranker, []) == []
        assert batch(reranker, [{"query": QUERY, "documents": []}] * 2, {"callbacks": [runs]}) == [[], []]
        assert (scorer.calls, runs.starts) == (0, [])

    def test_limits_are_for_all(self, batch):
        """As arguments, or bound."""
        assert [len(result) for result in batch(keywords(), INPUTS, top_n=1)] == [1, 1, 1, 1]
        assert [len(result) for result in batch(keywords().bind(top_n=2, score_threshold=2), INPUTS)] == [0, 2, 1, 0]

    def test_an_instruction_is_for_all(self, batch):
        """In place of the scorer's own; a scorer with no place for one says so."""
        scorer = Instructed()
        batch(ScorerReranker(scorer=scorer), INPUTS, instruction="find recipes")
        assert scorer.instructions == ["find recipes"]
        with pytest.raises(ConfigError, match="no place for an instruction"):
            batch(keywords(), INPUTS, instruction="find recipes")

    def test_chains_and_maps_use_it(self):
        """Each step of a chain is given all inputs at once."""
        scorer = KeywordScorer()
        chain = {"query": RunnablePassthrough(), "documents": Finds(documents=found())} | ScorerReranker(scorer=scorer)
        assert numbers(chain.batch(QUERIES)[1]) == [1, 3, 2]
        assert scorer.calls == 1
        assert numbers(ScorerReranker(scorer=scorer).map().invoke(INPUTS)[1]) == [1, 3, 2]
        assert scorer.calls == 2

    def test_max_concurrency_is_how_many_queries_a_call_has(self, batch):
        """One that was meant for chat models does no harm."""
        for most, calls in ((1, 4), (3, 2), (4, 1), (99, 1)):
            scorer = KeywordScorer()
            results = batch(ScorerReranker(scorer=scorer, top_n=None), INPUTS, {"max_concurrency": most})
            assert numbers(results[1]) == BEST_FIRST
            assert scorer.calls == calls
        with pytest.raises(ValueError, match="max_concurrency must be at least 1, or None; got -1"):
            batch(ScorerReranker(scorer=KeywordScorer()), INPUTS, {"max_concurrency": -1})

    def test_a_call_is_not_for_any_number_of_documents(self, batch):
        """Its time is limited; one query's documents are not parted."""
        scorer = Refuses()
        half, whole = ["x"] * (MOST_DOCUMENTS // 2), ["x"] * (2 * MOST_DOCUMENTS)
        inputs = [{"query": "x", "documents": found(texts)} for texts in (half, half, half, whole, half)]
        results = batch(ScorerReranker(scorer=scorer, top_n=None), inputs)
        assert [len(result) for result in results] == [len(given["documents"]) for given in inputs]
        assert scorer.sizes == [MOST_DOCUMENTS, len(half), len(whole), len(half)]


class TestTraces:
    """Each input is a run."""

    def test_each_input_has_its_own_run(self, batch):
        """With its own input, output and metadata, and all with the name of the reranker."""
        runs = Runs()
        results = batch(keywords(name="Ranking"), INPUTS, {"callbacks": [runs], "tags": ["t"]})
        assert runs.names == ["Ranking"] * 4
        assert [start["inputs"]["query"] for start in runs.starts] == QUERIES
        assert runs.outputs == results
        expected = {"ls_model_name": "keywords", "rerank_top_n": 3, "rerank_num_documents": 5}
        assert all(expected.items() <= start["metadata"].items() and start["tags"] == ["t"] for start in runs.starts)

    def test_each_input_may_have_its_own_config(self, batch):
        """Also where some of the inputs have no run at all."""
        runs = [Runs() for _ in range(4)]
        inputs = [INPUTS[0], {"query": "x", "documents": []}, *INPUTS[2:]]
        batch(keywords(), inputs, [{"callbacks": [each], "run_name": f"r{n}"} for n, each in enumerate(runs)])
        assert [each.names for each in runs] == [["r0"], [], ["r2"], ["r3"]]
        with pytest.raises(ValueError, match="same length"):
            batch(keywords(), inputs, [{}])


class TestErrors:
    """One query's trouble is not another's."""

    def test_a_bad_input_concerns_only_itself(self, batch):
        """With return_exceptions the others are ranked, in one call; without, nothing is asked."""
        scorer, runs = KeywordScorer(), Runs()
        reranker = ScorerReranker(scorer=scorer)
        with pytest.raises(TypeError, match=r"query must be str, got int\nThis is about inputs\[4\]"):
            batch(reranker, [*INPUTS, OTHER])
        assert scorer.calls == 0
        first, second, third = batch(
            reranker, [OTHER, INPUTS[1], "text"], {"callbacks": [runs]}, return_exceptions=True
        )
        assert isinstance(first, TypeError)
        assert numbers(second) == [1, 3, 2]
        assert isinstance(third, TypeError)
        assert (scorer.calls, len(runs.starts)) == (1, 1)

    def test_a_wrong_argument_is_each_inputs_error(self, batch):
        """As with LangChain's own batch."""
        results = batch(keywords(), INPUTS, return_exceptions=True, top_k=3)
        assert all(isinstance(result, TypeError) and "top_n" in str(result) for result in results)
        results = batch(keywords(), INPUTS, return_exceptions=True, top_n=0)
        assert [type(result) for result in results] == [ValueError] * 4

    def test_a_rejected_document_concerns_only_its_query(self, batch):
        """The error names positions in its own list, and nothing is asked again."""
        scorer, runs = Refuses(), Runs()
        results = batch(ScorerReranker(scorer=scorer), poisoned(2), {"callbacks": [runs]}, return_exceptions=True)
        assert isinstance(results[2], DocumentRejected)
        assert results[2].indices == (2,)
        assert [numbers(results[n]) for n in (0, 1, 3)] == [[0, 1, 2], [1, 3, 2], [4, 0, 1]]
        assert scorer.sizes == [20]
        assert runs.errors == [results[2]]
        assert len(runs.outputs) == 3
        with pytest.raises(DocumentRejected) as caught:
            batch(ScorerReranker(scorer=scorer), [{"query": "x", "documents": []}, *poisoned(2)])
        assert caught.value.query == 3
        assert caught.value.__notes__ == ["This is about inputs[3]."]

    def test_a_rejected_document_that_is_passed_through_is_last(self, batch):
        """In its own query's list; the others are not asked again."""
        scorer = Refuses()
        results = batch(ScorerReranker(scorer=scorer, top_n=None, on_error="passthrough"), poisoned(1))
        assert numbers(results[1]) == [1, 3, 4, 0, 2]
        assert "relevance_score" not in results[1][-1].metadata
        assert scorer.sizes == [20]

    def test_a_score_that_is_no_number_concerns_only_its_query(self, batch):
        """Nine of ten are ranked as if the tenth were not there; also where failures are passed through."""
        inputs = [{"query": f"how to {verb}", "documents": found()} for verb in [*TEXTS, *QUERIES, "dig"]]
        expected = batch(ScorerReranker(scorer=KeywordScorer()), inputs)
        inputs[4]["documents"][2] = Document("how to poison", metadata={"n": 2})
        results = batch(ScorerReranker(scorer=Garbles()), inputs, return_exceptions=True)
        assert isinstance(results[4], BadReply)
        assert results[4].indices == (2,)
        assert results[:4] + results[5:] == expected[:4] + expected[5:]
        passed = batch(ScorerReranker(scorer=Garbles(), on_error="passthrough", top_n=5), inputs)
        assert numbers(passed[4])[-1] == 2
        assert [result[:3] for result in passed[:4] + passed[5:]] == expected[:4] + expected[5:]

    def test_a_server_that_fails_at_one_document(self, batch):
        """It says 500 to each request that holds it; nine of ten queries are ranked all the same."""

        def fail(request: Request) -> Any:
            return refusal(500) if any("poison" in document for document in request.documents) else None

        inputs = [{"query": f"q{n}", "documents": found()} for n in range(10)]
        with FaultyServer(on_scores(fail)) as server:
            settings = {"base_url": server.base_url, "max_retries": 0}
            expected = batch(VLLMReranker(**settings), inputs)
            inputs[7]["documents"][2] = Document("poison", metadata={"n": 2})
            results = batch(VLLMReranker(**settings), inputs, return_exceptions=True)
            assert isinstance(results[7], DocumentRejected)
            assert results[7].indices == (2,)
            assert results[:7] + results[8:] == expected[:7] + expected[8:]
            passed = batch(VLLMReranker(**settings, on_error="passthrough", top_n=None), inputs)
            assert numbers(passed[7])[-1] == 2
            assert [result[:3] for result in passed[:7] + passed[8:]] == expected[:7] + expected[8:]
            with pytest.raises(DocumentRejected) as caught:
                batch(VLLMReranker(**settings), inputs)
            assert caught.value.query == 7

    def test_an_image_that_cannot_be_read_concerns_only_its_query(self, batch):
        """Also under passthrough, where it is raised rather than passed through."""

        def formatter(document: Document) -> Any:
            return Image(b"broken") if "poison" in document.page_content else document.page_content

        for on_error in ("raise", "passthrough"):
            reranker = keywords(document_formatter=formatter, on_error=on_error)
            results = batch(reranker, poisoned(2), return_exceptions=True)
            assert [type(result) for result in results] == [list, list, ContentError, list]
            with pytest.raises(ContentError, match=r"inputs\[2\]"):
                batch(reranker, poisoned(2))

    def test_a_setting_that_cannot_work_is_tried_once(self, batch):
        """It fails for any query: a model's folder is looked for once, not for each."""

        class Misconfigured(KeywordScorer):
            def _score(self, queries, documents, until):
                self.calls += 1
                raise ConfigError("no such model")

        scorer = Misconfigured()
        results = batch(ScorerReranker(scorer=scorer, on_error="passthrough"), INPUTS, return_exceptions=True)
        assert [type(result) for result in results] == [ConfigError] * 4
        assert scorer.calls == 1

    def test_a_server_that_is_down_is_asked_once(self, batch):
        """Not once for each query: each would wait until its time is over."""
        scorer, runs = BrokenScorer(), Runs()
        results = batch(ScorerReranker(scorer=scorer), INPUTS, {"callbacks": [runs]}, return_exceptions=True)
        assert all(isinstance(result, BackendUnavailable) for result in results)
        assert scorer.calls == 1
        assert runs.errors == results
        with pytest.raises(BackendUnavailable):
            batch(ScorerReranker(scorer=scorer), INPUTS)
        scorer.calls = 0
        passed = batch(ScorerReranker(scorer=scorer, on_error="passthrough"), INPUTS)
        assert [numbers(result) for result in passed] == [[0, 1, 2]] * 4
        assert scorer.calls == 1

    def test_a_formatter_that_fails_concerns_only_its_query(self, batch):
        """Whatever it raises, and the run has it."""

        def formatter(document: Document) -> str:
            return {text: text for text in TEXTS}[document.page_content]

        runs = Runs()
        reranker = keywords(document_formatter=formatter)
        results = batch(reranker, poisoned(3), {"callbacks": [runs]}, return_exceptions=True)
        assert [type(result) for result in results] == [list, list, list, KeyError]
        assert runs.errors == [results[3]]

    def test_ctrl_c_is_nobodys_result(self):
        """LangChain's helper would return it."""

        class Interrupted(KeywordScorer):
            def _score(self, queries, documents, until):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            ScorerReranker(scorer=Interrupted()).batch(INPUTS, return_exceptions=True)

    def test_a_cancelled_batch_is_cancelled(self):
        """It does not return; its runs end with an error."""
        runs = Runs()

        class Slow(KeywordScorer):
            async def _ascore(self, queries, documents, until):
                await asyncio.sleep(60)

        async def cancel() -> None:
            reranker = ScorerReranker(scorer=Slow())
            task = asyncio.create_task(reranker.abatch(INPUTS, {"callbacks": [runs]}, return_exceptions=True))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(cancel())
        assert len(runs.errors) == 4
