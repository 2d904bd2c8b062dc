"""What every scorer promises, whatever its back end: the invariants of `rag_rerank.scorer`."""

import asyncio
import copy
import logging
import math
import pickle
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_rerank import (
    BackendUnavailable,
    BadReply,
    Closeable,
    ConfigError,
    DeadlineExceeded,
    DocumentRejected,
    Ranked,
    RerankError,
    Scorer,
)
from tests.scorers import Answers, WordOverlap, overlap

texts = st.text(st.characters(codec=None), max_size=20)  # lone surrogates included


# Every special or added token that the tokenizers of the families in rag_rerank.families have, but for numbered ones.
SPECIAL_TOKENS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused12]"),  # BERT
    *("<s>", "</s>", "<pad>", "<unk>", "<mask>"),  # RoBERTa, XLM-R, Mistral
    *("<|padding|>", "<|endoftext|>", "|||IP_ADDRESS|||", "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||"),  # ModernBERT
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|box_start|>",
        "<|box_end|>",
    ),  # Qwen
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>"),
    *("<|video_pad|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>"),
    *("<|file_sep|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    *("<bos>", "<eos>", "<2mass>", "[@BOS@]", "<unused7>", "<start_of_turn>", "<end_of_turn>"),  # Gemma
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_7|>", "<|finetune_right_pad_id|>"),  # Llama 3
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]"),  # Mistral
    *("<\uff5cUser\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),  # DeepSeek
    *("<|rerank_token|>", "<|embed_token|>", "<|score_token|>", "<image>", "<IMG_CONTEXT>"),  # Jina, nemotron VL
]


class TestPairing:
    """Queries and documents pair up as in vLLM's score API."""

    def test_one_to_one(self):
        """A string and a string: one score."""
        assert WordOverlap().score("a b", "a") == [0.5]

    def test_one_to_many(self):
        """One query is for all documents, as a string or as a list of one."""
        assert WordOverlap().score("a b", ["a", "a b", "c"]) == [0.5, 1.0, 0.0]
        assert WordOverlap().score(["a b"], ["a", "a b", "c"]) == [0.5, 1.0, 0.0]

    def test_many_to_many(self):
        """As many queries as documents go together like zip."""
        assert WordOverlap().score(["a", "b"], ["b", "b"]) == [0.0, 1.0]

    def test_no_documents_is_no_work(self):
        """Nothing to score: an empty list, and the back end isn't even asked."""
        scorer = WordOverlap()
        assert scorer.score("a", []) == []
        assert scorer.score([], []) == []
        assert scorer.rerank("a", []) == []
        assert scorer.calls == []

    @pytest.mark.parametrize(("queries", "documents"), [(["a", "b"], ["c"]), (["a", "b"], ["c"] * 3), ([], ["c"])])
    def test_other_numbers_are_refused(self, queries: list[str], documents: list[str]):
        """N:1, N:M and 0:N mean nothing; the message has both numbers."""
        scorer = WordOverlap()
        with pytest.raises(ValueError, match=f"{len(queries)} queries and {len(documents)} documents"):
            scorer.score(queries, documents)
        assert scorer.calls == []

    def test_any_iterable_of_strings_is_accepted(self):
        """Tuples and generators are sequences of texts, too."""
        assert WordOverlap().score("a", (text for text in ("a", "b"))) == [1.0, 0.0]


class Frame(list[str]):
    """Iterates over the names of its columns, as in pandas."""

    columns = ("text",)


class TestWrongTypes:
    """What is no text is refused before any work, naming the position."""

    @pytest.mark.parametrize("wrong", [None, 3, b"bytes", ["list"], {"text": "a"}])
    def test_the_position_of_a_wrong_document_is_named(self, wrong: object):
        """documents[1] it is, and its type."""
        scorer = WordOverlap()
        with pytest.raises(TypeError, match=rf"documents\[1\] must be str, got {type(wrong).__name__}"):
            scorer.score("a", ["ok", wrong])
        assert scorer.calls == []

    @pytest.mark.parametrize("wrong", [None, 3, b"bytes", {"a": "b"}, {"a"}, Frame(["text"])])
    def test_documents_that_are_no_sequence_are_refused(self, wrong: object):
        """Mappings would give keys, tables the names of their columns, sets no order, bytes numbers."""
        with pytest.raises(TypeError, match="documents must be a string or a sequence of strings"):
            WordOverlap().score("a", wrong)

    def test_a_wrong_query_is_named(self):
        """Queries are checked like documents."""
        with pytest.raises(TypeError, match=r"queries\[0\] must be str, got NoneType"):
            WordOverlap().score([None], ["a"])
        with pytest.raises(TypeError, match="query must be str, got NoneType"):
            WordOverlap().rerank(None, ["a"])

    def test_rerank_refuses_a_single_string_for_documents(self):
        """It would be one document, where the caller surely means a list."""
        with pytest.raises(TypeError, match=r"pass \[document\]"):
            WordOverlap().rerank("a", "a")

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"top_n": 0}, ValueError),
            ({"top_n": -1}, ValueError),
            ({"top_n": 1.5}, TypeError),
            ({"top_n": True}, TypeError),
            ({"score_threshold": math.nan}, ValueError),
            ({"score_threshold": "0.5"}, TypeError),
            ({"on_error": "ignore"}, ValueError),
            ({"deadline": math.nan}, ValueError),
            ({"deadline": "1"}, TypeError),
        ],
    )
    def test_wrong_settings_of_rerank_are_refused(self, arguments: dict[str, object], error: type[Exception]):
        """Each is refused with the argument's name, before any work."""
        scorer = WordOverlap()
        with pytest.raises(error, match=next(iter(arguments))):
            scorer.rerank("a", ["a"], **arguments)
        assert scorer.calls == []


class TestText:
    """Text that no tokenizer or JSON reader takes is mended in one place, for all back ends."""

    def test_lone_surrogates_become_the_replacement_character(self):
        """They occur in text from PDFs."""
        scorer = WordOverlap()
        scorer.score("q\ud800", ["\udfffd"])
        assert scorer.calls[0][:2] == (["q\ufffd"], ["\ufffdd"])

    def test_a_pair_of_surrogates_becomes_the_character_it_spells(self):
        """Not lost, only spelled in two halves."""
        scorer = WordOverlap()
        scorer.score("q", ["\ud83d\ude00"])
        assert scorer.calls[0][1] == ["😀"]

    @pytest.mark.parametrize(
        "token",
        SPECIAL_TOKENS,
    )
    def test_what_spells_a_special_token_gets_a_space(self, token: str):
        """A document could end its own turn and answer for itself."""
        scorer = WordOverlap()
        scorer.score(f"a{token}{token}", [f"{token} b"])
        spaced = f"{token[0]} {token[1:]}"
        assert scorer.calls[0][:2] == ([f"a{spaced}{spaced}"], [f"{spaced} b"])

    @pytest.mark.parametrize(
        "text", ["a < b", "<div>", "x[SEPARATOR]", "list[0]", "a || b", "<|", "|>", "<| a |>", "[sep]"]
    )
    def test_other_text_is_left_alone(self, text: str):
        """HTML, code and mathematics are documents, too."""
        scorer = WordOverlap()
        scorer.score("q", [text])
        assert scorer.calls[0][1] == [text]

    @given(texts)
    def test_all_text_can_be_encoded_and_good_text_is_untouched(self, text: str):
        """Whatever comes in, UTF-8 comes out; what was fine stays as it was."""
        scorer = WordOverlap()
        scorer.score("q", [text])
        passed = scorer.calls[0][1][0]
        passed.encode()
        if not any("\ud800" <= letter <= "\udfff" for letter in text):
            assert passed.replace(" ", "") == text.replace(" ", "")


class TestScores:
    """One finite float per pair, or an error."""

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_a_wrong_number_of_scores_is_a_bad_reply(self, count: int):
        """Never a short list, never a padded one."""
        with pytest.raises(BadReply, match=f"{count} scores for 2 documents"):
            Answers(lambda _: [0.5] * count).score("q", ["a", "b"])

    @pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
    def test_a_score_that_is_not_finite_is_a_bad_reply_with_its_position(self, wrong: float):
        """NaN would make the order arbitrary."""
        with pytest.raises(BadReply, match=r"documents\[1\]") as caught:
            Answers(lambda _: [0.5, wrong]).score("q", ["a", "b"])
        assert "float32" in str(caught.value)

    @given(st.lists(texts), texts)
    def test_sync_and_async_give_the_same(self, documents: list[str], query: str):
        """Two doors to one room."""
        scorer = WordOverlap()
        assert asyncio.run(scorer.ascore(query, documents)) == scorer.score(query, documents)
        assert asyncio.run(scorer.arerank(query, documents)) == scorer.rerank(query, documents)


class TestRanking:
    """Best first, ties in retrieval order, threshold before top_n."""

    def test_best_first_with_positions(self):
        """Each result points into the list that was passed."""
        ranked = WordOverlap().rerank("a b", ["c", "a b", "a"])
        assert ranked == [Ranked(1, 1.0), Ranked(2, 0.5), Ranked(0, 0.0)]

    def test_ties_and_duplicates_keep_retrieval_order(self):
        """Equal scores say nothing against the first stage; equal texts are two documents."""
        assert [item.index for item in WordOverlap().rerank("a", ["b", "a", "c", "a"])] == [1, 3, 0, 2]

    def test_the_threshold_comes_before_top_n_and_includes_its_value(self):
        """Three pass, two are kept; none may pass."""
        scorer = WordOverlap()
        documents = ["a b", "a", "c", "b"]
        assert [item.index for item in scorer.rerank("a b", documents, score_threshold=0.5, top_n=2)] == [0, 1]
        assert [item.index for item in scorer.rerank("a b", documents, score_threshold=0.5)] == [0, 1, 3]
        assert scorer.rerank("a b", documents, score_threshold=1.5) == []

    def test_top_n_beyond_the_documents_keeps_all(self):
        """More than there are is not an error."""
        assert len(WordOverlap().rerank("a", ["a", "b"], top_n=10)) == 2

    @given(st.lists(st.sampled_from(["a", "a b", "b", "c d", "a c"])), st.none() | st.integers(1, 5))
    def test_ranking_is_the_stable_sort_of_the_scores(self, documents: list[str], top_n: int | None):
        """Every document once, by falling score, then by position."""
        ranked = WordOverlap().rerank("a b", documents, top_n=top_n)
        expected = sorted(range(len(documents)), key=lambda index: (-overlap("a b", documents[index]), index))
        assert [item.index for item in ranked] == expected[:top_n]

    def test_the_callers_list_is_left_alone(self):
        """Inputs are never mutated."""
        documents = ["b", "a"]
        WordOverlap().rerank("a", documents)
        assert documents == ["b", "a"]


def unavailable(_: list[str]) -> list[float]:
    raise BackendUnavailable("nobody home")


def first_rejected(documents: list[str]) -> list[float]:
    scores = [None, *(0.1 * position for position in range(1, len(documents)))]
    raise DocumentRejected("too long", indices=[0], scores=scores)


def misconfigured(_: list[str]) -> list[float]:
    raise ConfigError("no such model")


class TestPassthrough:
    """on_error="passthrough" never loses a document and never hides a mistake."""

    def test_a_failed_call_keeps_retrieval_order_without_scores(self, caplog: pytest.LogCaptureFixture):
        """All documents up to top_n, one warning, whatever the threshold."""
        scorer = Answers(unavailable)
        with caplog.at_level(logging.WARNING):
            ranked = scorer.rerank("q", ["a", "b", "c"], top_n=2, score_threshold=0.9, on_error="passthrough")
        assert ranked == [Ranked(0, None), Ranked(1, None)]
        assert len(caplog.records) == 1
        assert "nobody home" in caplog.text

    def test_it_is_the_same_in_an_event_loop(self):
        """arerank recovers as rerank does."""
        ranked = asyncio.run(Answers(unavailable).arerank("q", ["a", "b"], on_error="passthrough"))
        assert ranked == [Ranked(0, None), Ranked(1, None)]

    def test_rejected_documents_follow_the_scored_ones(self):
        """A document that can't be scored costs only itself."""
        ranked = Answers(first_rejected).rerank("q", ["a", "b", "c"], on_error="passthrough")
        assert ranked == [Ranked(2, 0.2), Ranked(1, 0.1), Ranked(0, None)]

    def test_the_default_raises(self):
        """Failures are loud unless asked otherwise."""
        with pytest.raises(BackendUnavailable, match="nobody home"):
            Answers(unavailable).rerank("q", ["a"])
        with pytest.raises(BackendUnavailable, match="nobody home"):
            asyncio.run(Answers(unavailable).arerank("q", ["a"]))

    @pytest.mark.parametrize(
        ("answer", "documents", "error"), [(misconfigured, ["a"], ConfigError), (unavailable, [None], TypeError)]
    )
    def test_mistakes_are_never_passed_through(
        self, answer: Callable[[list[str]], list[float]], documents: list[str], error: type[Exception]
    ):
        """A wrong setting or argument would otherwise go unnoticed for ever."""
        with pytest.raises(error):
            Answers(answer).rerank("q", documents, on_error="passthrough")


class TestBatch:
    """rerank_batch is rerank for each query, with one call to the back end."""

    QUERIES = ("a b", "c", "d")
    DOCUMENTS = (["x", "a b", "a"], [], ["d", "d", "x"])

    @pytest.mark.parametrize("limits", [{}, {"top_n": 1}, {"score_threshold": 0.5}])
    def test_each_query_gets_what_it_gets_alone(self, limits: dict[str, object]):
        """Sync and async; a query without documents gets none."""
        one, many, asynchronous = WordOverlap(), WordOverlap(), WordOverlap()
        expected = [
            one.rerank(query, texts, **limits) for query, texts in zip(self.QUERIES, self.DOCUMENTS, strict=True)
        ]
        assert many.rerank_batch(self.QUERIES, self.DOCUMENTS, **limits) == expected
        assert asyncio.run(asynchronous.arerank_batch(self.QUERIES, self.DOCUMENTS, **limits)) == expected
        assert len(many.calls) == len(asynchronous.calls) == 1

    def test_nothing_is_no_work(self):
        """Neither without queries nor without documents."""
        scorer = WordOverlap()
        assert scorer.rerank_batch([], []) == []
        assert scorer.rerank_batch(["a", "b"], [[], []]) == [[], []]
        assert scorer.calls == []

    def test_a_failed_call_is_passed_through_for_every_query(self, caplog: pytest.LogCaptureFixture):
        """With one warning; rejected documents follow those of their own query."""
        passed = Answers(unavailable).rerank_batch(self.QUERIES, self.DOCUMENTS, top_n=2, on_error="passthrough")
        assert passed == [[Ranked(0, None), Ranked(1, None)], [], [Ranked(0, None), Ranked(1, None)]]
        assert len(caplog.records) == 1
        rejected = Answers(first_rejected).rerank_batch(self.QUERIES, self.DOCUMENTS, on_error="passthrough")
        assert rejected[0] == [Ranked(2, 0.2), Ranked(1, 0.1), Ranked(0, None)]
        assert [item.index for item in rejected[2]] == [2, 1, 0]
        with pytest.raises(BackendUnavailable):
            Answers(unavailable).rerank_batch(self.QUERIES, self.DOCUMENTS)
        with pytest.raises(BackendUnavailable):
            asyncio.run(Answers(unavailable).arerank_batch(self.QUERIES, self.DOCUMENTS))

    @pytest.mark.parametrize(
        ("queries", "documents", "error"),
        [
            ("a", [["b"]], TypeError),
            (["a"], "b", TypeError),
            (["a"], ["b"], TypeError),
            (["a", "b"], [["c"]], ValueError),
        ],
    )
    def test_other_shapes_are_refused(self, queries: object, documents: object, error: type[Exception]):
        """One list of documents for each query."""
        with pytest.raises(error):
            WordOverlap().rerank_batch(queries, documents)


class Instant(WordOverlap):
    """Scores at once, where it is asked."""

    async def _ascore(self, queries, documents, until):
        return [0.5] * len(documents)


class TestEventLoop:
    """It only waits: what takes long with many documents is done in other threads."""

    @pytest.mark.parametrize("method", ["ascore", "arerank", "arerank_batch"])
    async def test_its_thread_has_little_to_do(self, method: str, without_collections: None, monkeypatch):
        """100,000 documents, of one query or ten each: no step stands in the way of others for 50 ms.

        Its own processor's time, which no other process lengthens much, and the least of three.
        """
        documents = [f"document {number} < [" for number in range(100_000)]
        several = ["query"] * 10_000, [documents[start : start + 10] for start in range(0, 100_000, 10)]
        arguments = several if method == "arerank_batch" else ("query", documents)
        run, steps = asyncio.Handle._run, list[float]()

        def timed(handle: asyncio.Handle) -> None:
            began = time.thread_time()
            run(handle)
            steps.append(time.thread_time() - began)

        monkeypatch.setattr(asyncio.Handle, "_run", timed)
        longest = []
        for _ in range(3):
            steps.clear()
            results = await getattr(Instant(), method)(*arguments)
            await asyncio.sleep(0)  # ends the last step
            longest.append(max(steps))
            assert len(results) == len(arguments[1])
        assert min(longest) < 0.05


class TestDeadline:
    """deadline= is seconds from now for the whole call."""

    def test_it_reaches_the_back_end_as_a_moment(self):
        """None stays None; infinity is no limit."""
        scorer = WordOverlap()
        scorer.score("q", "d")
        scorer.score("q", "d", deadline=math.inf)
        scorer.score("q", "d", deadline=5)
        assert scorer.calls[0][2] is None
        assert scorer.calls[1][2] is None
        assert scorer.calls[2][2] is not None

    @pytest.mark.parametrize("deadline", [0, -1.5])
    def test_a_budget_that_is_used_up_is_a_timeout(self, deadline: float):
        """Callers pass on what is left of their own time."""
        with pytest.raises(DeadlineExceeded):
            WordOverlap().score("q", "d", deadline=deadline)


def test_copies_are_the_scorer_itself():
    """A framework that copies its components does not load the model again."""
    scorer = WordOverlap()
    assert copy.copy(scorer) is scorer
    assert copy.deepcopy({"scorer": scorer})["scorer"] is scorer


def test_a_pickle_begins_anew():
    """What is under way, and in which process, stays here: another process may have the same number."""
    scorer = WordOverlap()
    scorer.score("q", "d")
    again = pickle.loads(pickle.dumps(scorer))  # noqa: S301
    assert again._process == 0
    assert again.score("q", "q") == [1.0]


class TestClosing:
    """Closing twice is harmless, use after closing is a clear error."""

    def test_a_closed_scorer_says_so(self):
        """By name, with what to do."""
        scorer = WordOverlap()
        with scorer:
            scorer.score("q", "d")
        scorer.close()
        with pytest.raises(RerankError, match="WordOverlap is closed"):
            scorer.score("q", "d")

    def test_async_closing_is_the_same(self):
        """async with closes, too."""

        async def use() -> Scorer:
            async with WordOverlap() as scorer:
                await scorer.ascore("q", "d")
            await scorer.aclose()
            return scorer

        with pytest.raises(RerankError, match="closed"):
            asyncio.run(use()).score("q", "d")

    def test_what_is_closed_in_an_event_loop_is_closed_the_same_way(self):
        """Unless it does otherwise."""

        class Door(Closeable):
            closed = 0

            def close(self) -> None:
                self.closed += 1

        async def use() -> Door:
            async with Door() as door:
                assert door.closed == 0
            return door

        assert asyncio.run(use()).closed == 1
