"""A failure concerns the query whose fault it is, and of its documents those: on every back end."""

import asyncio
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_rerank import (
    AuthError,
    BackendError,
    BackendRejected,
    BackendUnavailable,
    BadReply,
    ConfigError,
    ContentError,
    DeadlineExceeded,
    DocumentRejected,
    Image,
    Ranked,
    RerankError,
    Scorer,
)
from rag_rerank.inputs import NEUTRAL
from tests import drawn
from tests.forking import forked


def server_error() -> BackendUnavailable:
    error = BackendUnavailable("the server answered 500", endpoint="host:1", attempts=3)
    error.status = 500
    return error


FAULTS: dict[str, Callable[[], RerankError]] = {
    "refused": lambda: BackendRejected("odd"),
    "no reply": lambda: BadReply("the reply is no JSON"),
    "500": server_error,
    "local": lambda: BackendError("IndexError: 5"),
}
EVERYTHING: dict[str, Callable[[], RerankError]] = {
    "down": lambda: BackendUnavailable("can't connect"),
    "503": lambda: BackendUnavailable("the server answered 503"),
    "late": lambda: DeadlineExceeded("too late"),
    "key": lambda: AuthError("wrong key"),
}


class Moody(Scorer):
    """Fails for what has a bad word in it: NaN in the place of "nan", the error `fault` for a call with "bad" in it.

    Otherwise a document's score is its length. `calls` has what it was asked.
    """

    model_name = "moody"

    def __init__(self, fault: Callable[[], RerankError] = FAULTS["refused"], *, broken: bool = False) -> None:
        self.fault, self.broken = fault, broken
        self.calls: list[tuple[list[str], list[str]]] = []

    def _score(self, queries: Sequence[Any], documents: Sequence[Any], until: float | None) -> list[float]:
        self.calls.append((list(queries), list(documents)))
        if self.broken or any("bad" in text for text in (*queries, *documents)):
            raise self.fault()
        return [math.nan if "nan" in document else float(len(document)) for document in documents]


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls a method of a scorer, by its sync or its async door."""

    def call(scorer: Scorer, name: str, *args: Any, **options: Any) -> Any:
        if request.param == "sync":
            return getattr(scorer, name)(*args, **options)
        return asyncio.run(getattr(scorer, f"a{name}")(*args, **options))

    return call


def batch(bad: str, at: int = 6) -> tuple[list[str], list[list[str]]]:
    """Ten queries with three documents each, one of which is as it should not be."""
    documents = [["a", "ccc", "bb"] for _ in range(10)]
    documents[at] = ["a", bad, "bb"]
    return [f"query {number}" for number in range(10)], documents


RANKED = [Ranked(1, 3.0), Ranked(2, 2.0), Ranked(0, 1.0)]


class TestOneOfTenQueries:
    """Nine are ranked as if the tenth were not there."""

    @pytest.mark.parametrize("name", ["nan", *FAULTS])
    def test_return(self, name: str, run: Callable[..., Any]):
        """Its place has its error, with the positions of its own documents."""
        scorer = Moody(FAULTS.get(name, FAULTS["refused"]))
        results = run(scorer, "rerank_batch", *batch("nan" if name == "nan" else "bad"), on_error="return")
        error = results.pop(6)
        assert results == [RANKED] * 9
        assert type(error) is (BadReply if name in ("nan", "no reply") else DocumentRejected)
        assert (error.indices, error.scores) == ((1,), (1.0, None, 2.0))
        assert str(error).startswith("documents[1] ")

    @pytest.mark.parametrize("name", ["nan", *FAULTS])
    def test_passthrough(self, name: str, run: Callable[..., Any], caplog: pytest.LogCaptureFixture):
        """Its other documents are ranked, and that one follows; one warning for all."""
        scorer = Moody(FAULTS.get(name, FAULTS["refused"]))
        results = run(scorer, "rerank_batch", *batch("nan" if name == "nan" else "bad"), on_error="passthrough")
        assert results.pop(6) == [Ranked(2, 2.0), Ranked(0, 1.0), Ranked(1, None)]
        assert results == [RANKED] * 9
        assert [record.levelname for record in caplog.records] == ["WARNING"]

    @pytest.mark.parametrize("name", ["nan", *FAULTS])
    def test_raise(self, name: str, run: Callable[..., Any]):
        """The error names the query, in words and as a number."""
        scorer = Moody(FAULTS.get(name, FAULTS["refused"]))
        with pytest.raises(BackendError, match=r"^queries\[6\]: documents\[1\] ") as caught:
            run(scorer, "rerank_batch", *batch("nan" if name == "nan" else "bad"))
        assert (caught.value.query, caught.value.indices) == (6, (1,))

    def test_a_query_that_fails_with_any_document_costs_few_calls(self, run: Callable[..., Any]):
        """It is asked with a neutral document before its own documents are taken apart."""
        scorer = Moody()
        queries = ["a bad one" if number == 3 else f"query {number}" for number in range(10)]
        results = run(scorer, "rerank_batch", queries, [["a"] * 100] * 10, on_error="return")
        assert [position for position, result in enumerate(results) if isinstance(result, RerankError)] == [3]
        assert isinstance(results[3], BackendRejected)
        assert results[3].indices == ()
        assert len(scorer.calls) <= 3 + 2 * 4  # all, a neutral pair, four times two halves, the query alone

    @pytest.mark.parametrize("name", EVERYTHING)
    def test_what_no_query_has_caused_costs_one_call(self, name: str, run: Callable[..., Any]):
        """Asking for each alone would fail as often; the error names no query."""
        scorer = Moody(EVERYTHING[name], broken=True)
        results = run(scorer, "rerank_batch", *batch("b"), on_error="return")
        assert {type(result) for result in results} == {type(EVERYTHING[name]())}
        assert len(scorer.calls) == 1
        with pytest.raises(type(EVERYTHING[name]()), match=r"^(?!queries)"):
            run(scorer, "rerank_batch", *batch("b"))

    @pytest.mark.parametrize("name", FAULTS)
    def test_a_back_end_that_fails_at_anything_is_asked_once_more(self, name: str, run: Callable[..., Any]):
        """With a neutral pair: where that fails, too, it is no query's fault."""
        scorer = Moody(FAULTS[name], broken=True)
        results = run(scorer, "rerank_batch", *batch("b"), on_error="return")
        assert {type(result) for result in results} == {type(FAULTS[name]())}
        assert len(scorer.calls) == 2
        assert scorer.calls[1] == ([NEUTRAL], [NEUTRAL])

    def test_an_image_for_a_model_that_reads_text_only(self, run: Callable[..., Any]):
        """Is that query's error where errors are returned, and a mistake in the call elsewhere."""
        queries, documents = batch("b")
        documents[6] = ["a", Image(drawn.png())]  # type: ignore[list-item]
        results = run(Moody(), "rerank_batch", queries, documents, on_error="return")
        assert isinstance(results[6], ContentError)
        assert str(results[6]).startswith("documents[1] holds an image")
        assert results[:6] + results[7:] == [RANKED] * 9
        for on_error in ("raise", "passthrough"):
            with pytest.raises(ContentError, match=r"queries\[6\]: documents\[1\] holds an image"):
                run(Moody(), "rerank_batch", queries, documents, on_error=on_error)

    def test_an_image_that_can_not_be_read(self, run: Callable[..., Any]):
        """Likewise; nothing of that query is asked for."""
        queries, documents = batch("b")
        documents[6] = ["a", Image(b"no image")]  # type: ignore[list-item]
        scorer = Moody()
        results = run(scorer, "rerank_batch", queries, documents, on_error="return")
        assert isinstance(results[6], ContentError)
        assert "documents[6][1]" in str(results[6])
        assert len(scorer.calls) == 1
        assert "query 6" not in scorer.calls[0][0]

    def test_a_wrong_setting_is_raised_whatever_is_asked_for(self, run: Callable[..., Any]):
        """A ConfigError concerns all calls."""
        for on_error in ("raise", "passthrough", "return"):
            with pytest.raises(ConfigError, match="no such folder"):
                run(Moody(lambda: ConfigError("no such folder")), "rerank_batch", *batch("bad"), on_error=on_error)


class TestOneQuery:
    """Documents, when there is one query, by `score` and `rerank`."""

    @pytest.mark.parametrize("name", FAULTS)
    def test_a_bad_document_is_found(self, name: str, run: Callable[..., Any]):
        """The error has its position and the scores of the others; log2(n) pairs of calls find it."""
        scorer = Moody(FAULTS[name])
        documents = ["a" * (number + 1) for number in range(64)]
        documents[41] = "bad"
        with pytest.raises(BackendError) as caught:
            run(scorer, "score", "q", documents)
        assert caught.value.indices == (41,)
        assert [score for score in caught.value.scores if score is not None] == [
            float(len(document)) for document in documents if document != "bad"
        ]
        assert len(scorer.calls) <= 1 + 3 * 6

    def test_what_the_back_end_has_located_is_not_asked_again(self, run: Callable[..., Any]):
        """A DocumentRejected with scores is the whole answer, and is raised as it is."""
        own = DocumentRejected("documents[1] rejected: odd", indices=[1], scores=[1.0, None], reason="odd")
        scorer = Moody(lambda: own, broken=True)
        with pytest.raises(DocumentRejected) as caught:
            run(scorer, "score", "q", ["a", "b"])
        assert caught.value is own
        assert len(scorer.calls) == 1

    @pytest.mark.parametrize("documents", [["long"], ["a", "long", "cc", "odd"]])
    def test_errors_in_the_place_of_scores_are_not_asked_about_again(
        self, documents: list[str], run: Callable[..., Any]
    ):
        """They become one error, with the first one's reason; in a batch, each query has its own."""

        class Knowing(Moody):
            def _score(self, queries: Any, documents: Any, until: Any) -> list[Any]:
                self.calls.append((queries, documents))
                own = {
                    "long": DocumentRejected("too long", reason="too long"),
                    "odd": DocumentRejected("odd letters", reason="odd"),
                }
                return [own.get(document, 1.0) for document in documents]

        scorer = Knowing()
        with pytest.raises(DocumentRejected, match=r"^documents\[\d\].* rejected: too long") as caught:
            run(scorer, "score", "q", documents)
        assert caught.value.indices == tuple(i for i, document in enumerate(documents) if document in ("long", "odd"))
        assert caught.value.scores == tuple(1.0 if document in ("a", "cc") else None for document in documents)
        errors = run(scorer, "rerank_batch", ["q", "r"], [documents, ["odd", "b"]], on_error="return")
        assert [error.message.split(": ")[-1] for error in errors] == ["too long", "odd"]
        assert len(scorer.calls) == 2

    def test_one_document_is_not_looked_into(self, run: Callable[..., Any]):
        """There is nothing to find out: its error is raised as it came."""
        own = BackendRejected("odd")
        scorer = Moody(lambda: own)
        with pytest.raises(BackendRejected) as caught:
            run(scorer, "score", "q", ["bad"])
        assert caught.value is own
        assert len(scorer.calls) == 1

    def test_a_listwise_model_is_never_asked_for_a_part(self, run: Callable[..., Any]):
        """Its scores of some documents alone are other scores."""
        scorer = Moody()
        scorer.listwise = True
        results = run(scorer, "rerank_batch", *batch("bad"), on_error="return")
        assert isinstance(results[6], BackendRejected)
        assert results[6].indices == ()
        assert all(len(documents) % 3 == 0 or documents == [NEUTRAL] for _, documents in scorer.calls)

    def test_a_wrong_number_of_scores_is_never_made_right(self, run: Callable[..., Any]):
        """Not by asking for one at a time, which would bring one score each."""

        class Short(Moody):
            def _score(self, queries: Any, documents: Any, until: Any) -> list[float]:
                return [1.0]

        with pytest.raises(BadReply, match="gave 1 scores for 3 documents"):
            run(Short(), "score", "q", ["a", "b", "c"])

    def test_a_probe_that_raises_anything_hides_nothing(self, run: Callable[..., Any]):
        """A back end may not know what to do with a neutral text; what the call failed of is what is raised."""

        class Particular(Moody):
            def _score(self, queries: Any, documents: Any, until: Any) -> list[float]:
                if [*documents] == [NEUTRAL]:
                    raise KeyError("a")
                raise BackendRejected("odd")

        with pytest.raises(BackendRejected, match="odd"):
            run(Particular(), "score", "q", ["b", "c"])


words = st.sampled_from(["x", "yy", "bad", "nan", "zzz"])


@given(
    st.lists(st.tuples(st.sampled_from(["q", "r", "bad query"]), st.lists(words, max_size=6)), min_size=1, max_size=6),
    st.sampled_from(sorted(FAULTS)),
)
def test_whatever_is_bad_the_rest_is_scored(queries: list[tuple[str, list[str]]], fault: str):
    """Every query alone, with what is bad in it left out, gets the same scores as in the batch."""
    results = Moody(FAULTS[fault]).rerank_batch(
        [query for query, _ in queries], [documents for _, documents in queries], on_error="return"
    )
    for (query, documents), result in zip(queries, results, strict=True):
        bad = [position for position, word in enumerate(documents) if word in ("bad", "nan")]
        if not documents:
            assert result == []
        elif "bad" in query:
            assert isinstance(result, BackendError)
            assert all(score is None for score in result.scores)
        elif not bad:
            assert result == Moody().rerank(query, documents)
        else:
            assert isinstance(result, BackendError)
            expected = [None if position in bad else float(len(word)) for position, word in enumerate(documents)]
            if len(documents) > 1:
                assert list(result.scores) == expected
                assert list(result.indices) == bad


class TestBatches:
    """Many queries are asked about in calls of about 1,024 documents."""

    def test_calls_are_neither_too_large_nor_too_many(self, run: Callable[..., Any]):
        """Whole queries at a time; a query of more is a call of its own."""
        scorer = Moody()
        sizes = [500, 500, 30, 2000, 1, 1023]
        run(scorer, "rerank_batch", [f"q{n}" for n in range(6)], [["a"] * size for size in sizes])
        assert [len(documents) for _, documents in scorer.calls] == [1000, 30, 2000, 1024]

    def test_each_call_has_the_back_ends_own_time(self, run: Callable[..., Any]):
        """Ten thousand queries need not be answered in the time of one call; a deadline that is named bounds all."""
        untils: list[float | None] = []

        class Timed(Moody):
            _default_deadline = 100.0

            def _score(self, queries: Any, documents: Any, until: float | None) -> list[float]:
                untils.append(until)
                return super()._score(queries, documents, until)

        scorer = Timed()
        many = ["q", "r"], [["a"] * 1000] * 2
        run(scorer, "rerank_batch", *many)
        assert untils[0] != untils[1]
        run(scorer, "rerank_batch", *many, deadline=50.0)
        assert untils[2] == untils[3]

    def test_lists_of_different_lengths_are_told(self):
        """Also where one is a generator."""
        with pytest.raises(ValueError, match="got 2 queries and documents for 1"):
            Moody().rerank_batch(["a", "b"], [["c"]])
        with pytest.raises(ValueError, match="got 1 queries and documents for 2"):
            Moody().rerank_batch((text for text in ["a"]), [["c"], ["d"]])  # type: ignore[arg-type]

    def test_a_wrong_argument_is_raised_and_placed(self):
        """Never returned: it is a mistake in the program."""
        with pytest.raises(TypeError, match=r"documents\[1\]\[0\] must be str, got int"):
            Moody().rerank_batch(["a", "b"], [["c"], [3]], on_error="return")  # type: ignore[list-item]
        with pytest.raises(TypeError, match=r"queries\[1\] must be str, got NoneType"):
            Moody().rerank_batch(["a", None], [["c"], ["d"]], on_error="return")  # type: ignore[list-item]

    def test_return_is_for_batches(self):
        """Of one query the error would stand for its ranking."""
        with pytest.raises(ValueError, match="on_error must be 'raise' or 'passthrough', got 'return'"):
            Moody().rerank("a", ["b"], on_error="return")  # type: ignore[arg-type]


class TestInstructions:
    """A call may bring an instruction, where the model has a place for it."""

    class Told(Moody):
        accepts_instruction = True

        def _score(self, queries: Any, documents: Any, until: Any, instruction: str | None = None) -> list[float]:
            return [float(len(instruction or ""))] * len(documents)

    def test_it_reaches_the_back_end(self, run: Callable[..., Any]):
        """By every way of asking, and not the next call."""
        scorer = self.Told()
        assert run(scorer, "score", "q", ["a"], instruction="abc") == [3.0]
        assert run(scorer, "rerank", "q", ["a"], instruction="abc") == [Ranked(0, 3.0)]
        assert run(scorer, "rerank_batch", ["q"], [["a"]], instruction="abc") == [[Ranked(0, 3.0)]]
        assert run(scorer, "score", "q", ["a"]) == [0.0]

    @pytest.mark.parametrize("name", ["score", "rerank", "rerank_batch"])
    def test_no_place_for_it_is_a_mistake(self, name: str, run: Callable[..., Any]):
        """It would be ignored: the scores would be of another task."""
        arguments = (["q"], [["a"]]) if name == "rerank_batch" else ("q", ["a"])
        with pytest.raises(ConfigError, match="moody has no place for an instruction"):
            run(Moody(), name, *arguments, instruction="abc")
        with pytest.raises(TypeError, match="instruction must be str"):
            run(Moody(), name, *arguments, instruction=3)


class TestAdmission:
    """So many calls may be unfinished at a time; one more is refused at once."""

    def test_one_more_is_refused_and_a_place_is_given_back(self):
        """Also by a call that failed or was cancelled."""

        class Slow(Moody):
            _max_waiting_calls = 2

            async def _ascore(self, *call: Any) -> list[float]:  # type: ignore[override]
                started.release()
                await event.wait()
                return [1.0]

        async def main() -> None:
            scorer = Slow()
            first, second = (asyncio.create_task(scorer.ascore("q", ["a"])) for _ in range(2))
            await started.acquire()
            await started.acquire()
            with pytest.raises(BackendUnavailable, match="2 calls waiting already"):
                await scorer.ascore("q", ["a"])
            assert await scorer.arerank("q", ["a", "b"], on_error="passthrough") == [Ranked(0, None), Ranked(1, None)]
            second.cancel()
            await asyncio.wait([second])
            third = asyncio.create_task(scorer.ascore("q", ["a"]))
            await started.acquire()
            event.set()
            assert await asyncio.gather(first, third) == [[1.0], [1.0]]

        event, started = asyncio.Event(), asyncio.Semaphore(0)
        asyncio.run(main())

    def test_a_forked_child_has_none_of_its_parents_calls(self):
        """`_start` is called there again, before the first call."""
        import threading

        class Slow(Moody):
            _max_waiting_calls = 1
            starts = 0

            def _start(self) -> None:
                self.starts += 1

            def _score(self, queries: Any, documents: Any, until: Any) -> list[float]:
                if documents == ["slow"]:
                    begun.set()
                    go_on.wait()
                return [1.0]

        begun, go_on = threading.Event(), threading.Event()
        scorer = Slow()
        thread = threading.Thread(target=functools.partial(scorer.score, "q", ["slow"]))
        thread.start()
        begun.wait()

        def child() -> None:
            assert scorer.score("q", ["a"]) == [1.0]
            assert scorer.starts == 2

        try:
            assert forked(child) == 0
            with pytest.raises(BackendUnavailable):
                scorer.score("q", ["a"])
        finally:
            go_on.set()
            thread.join()
        assert scorer.score("q", ["a"]) == [1.0]
        assert scorer.starts == 1
