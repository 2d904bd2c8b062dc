"""What a server can't take costs only itself, one that can't see says so once, and a call with images moves on."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_rerank import (
    BackendError,
    BackendRejected,
    BackendUnavailable,
    Content,
    ContentError,
    DocumentRejected,
    FallbackScorer,
    Image,
    Input,
    VLLMScorer,
)
from tests.faulty_server import FaultyServer, Request, Steps, on_scores, refusal, spelled
from tests.scorers import WordOverlap
from tests.vllm.images.common import BEYOND, BLUE, GREEN, RED, exact, sent

TEXT_ONLY = "MultiModalParam is not supported for BertForSequenceClassification"


class TestRefusals:
    """What the server can't take costs only itself, and a server that can't see says so once."""

    @pytest.mark.parametrize("status", [400, 413, 422, 500])
    def test_a_bad_image_costs_only_itself(self, server: FaultyServer, score: Callable[..., list[float]], status: int):
        """500 among these: vLLM's answer to images whose shape its model can't take in."""
        bad = spelled(sent(RED))

        def refuse(request: Request) -> Steps | None:
            if not request.wants_scores or all(spelled(each) != bad for each in request.documents):
                return None
            return refusal(status, "cannot identify image")

        server.behave = refuse
        documents = ["a", Image(GREEN), Image(RED), "b", Image(BLUE), Content("c", Image(GREEN))]
        with pytest.raises(DocumentRejected, match=r"documents\[2\] rejected.*cannot identify image") as caught:
            score(VLLMScorer(server.base_url), "q", documents)
        wanted = exact("q", "a", sent(GREEN), "-", "b", sent(BLUE), sent("c", GREEN))
        assert caught.value.indices == (2,)
        assert list(caught.value.scores) == [*wanted[:2], None, *wanted[3:]]

    @given(
        st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=9).filter(
            lambda kinds: any(bad for _, bad in kinds) and not all(bad for _, bad in kinds)
        ),
        st.sampled_from([400, 422, 500]),
        st.integers(1, 5),
    )
    @settings(max_examples=25)
    def test_exactly_the_bad_ones_are_rejected(
        self, shared: FaultyServer, kinds: list[tuple[bool, bool]], status: int, chunk_size: int
    ):
        """Images and texts, in any order and number."""
        documents: list[Input] = []
        for number, (has_image, bad) in enumerate(kinds):
            words = f"{'bad' if bad else 'good'} {number}"
            documents.append(Content(words, Image(RED)) if has_image else words)

        def refuse(request: Request) -> Steps | None:
            bad = request.wants_scores and any("bad" in spelled(each) for each in request.documents)
            return refusal(status, "can't") if bad else None

        shared.behave = refuse
        try:
            with (
                VLLMScorer(shared.base_url, chunk_size=chunk_size) as scorer,
                pytest.raises(DocumentRejected) as caught,
            ):
                scorer.score("q", documents)
        finally:
            shared.behave = lambda request: None
        assert caught.value.indices == tuple(n for n, (_, bad) in enumerate(kinds) if bad)
        wanted = [sent(f"good {n}", RED) if has_image else f"good {n}" for n, (has_image, _) in enumerate(kinds)]
        right = [None if bad else exact("q", each)[0] for each, (_, bad) in zip(wanted, kinds, strict=True)]
        assert list(caught.value.scores) == right

    def test_an_address_that_the_server_can_t_reach_costs_only_itself(self, server: FaultyServer):
        """It goes in a request of its own, so that the others neither wait for it nor are asked for again."""

        def unreachable(request: Request) -> Steps | None:
            if request.wants_scores and any(BEYOND in spelled(each) for each in request.documents):
                return refusal(500, "Internal server error")
            return None

        server.behave = unreachable
        ranked = VLLMScorer(server.base_url).rerank("q", ["a", Image(url=BEYOND), Image(RED)], on_error="passthrough")
        assert {item.index for item in ranked if item.score is None} == {1}
        with pytest.raises(DocumentRejected, match="Can the server reach its url"):
            VLLMScorer(server.base_url).score("q", ["a", Image(url=BEYOND), Image(RED)])

    def test_an_address_with_a_signature_is_not_told(self, server: FaultyServer):
        """vLLM quotes the address in its refusals, whole or from its path on, and error texts are cut somewhere."""
        secret = "signature=" + "h7" * 200
        signed = f"https://me:hunter2@images.example/a.png?{secret}"
        quotes = [f"HTTP 404 (value={signed})", f"Max retries exceeded with url: /a.png?{secret} (Caused by"]
        for quote, status in itertools.product(quotes, (422, 500)):
            server.behave = on_scores(
                lambda request, quote=quote, status=status: (
                    refusal(status, quote) if "hunter2" in str(request.content) else None
                )
            )
            scorer = VLLMScorer(server.base_url, max_retries=0)
            for asked in (("q", ["a", Image(url=signed)]), (Image(url=signed), ["a"])):
                with pytest.raises(BackendError) as caught:
                    scorer.score(*asked)
                error: BaseException | None = caught.value
                while error is not None:
                    told = f"{error} {error!r} {vars(error)}"
                    assert "h7h7" not in told
                    assert "hunter2" not in told
                    error = error.__cause__ or error.__context__

    def test_a_server_that_fails_at_every_image_is_unavailable(self, server: FaultyServer):
        """A blank one fails as well, so it is not for the documents; no more requests than that needs."""
        server.behave = on_scores(
            lambda request: refusal(500, "CUDA error") if "image_url" in str(request.content) else None
        )
        with pytest.raises(BackendUnavailable, match="CUDA error"):
            VLLMScorer(server.base_url, max_retries=1).score("q", [Image(RED), Image(BLUE)])
        assert len(server.score_requests) == 3

    def test_500_to_anything_costs_one_question(self, server: FaultyServer):
        """With one harmless document, once."""
        server.behave = on_scores(lambda request: refusal(500))
        with pytest.raises(BackendUnavailable):
            VLLMScorer(server.base_url, max_retries=1).score("q", ["b", "c"])
        assert [request.documents for request in server.score_requests] == [["b", "c"], ["b", "c"], ["a"]]

    def test_500_to_one_text_costs_only_itself(self, server: FaultyServer, score: Callable[..., list[float]]):
        """After its tries it is looked for, as one that is refused."""
        server.behave = on_scores(lambda request: refusal(500, "odd") if "bad" in request.documents else None)
        with pytest.raises(DocumentRejected, match=r"documents\[2\] rejected.*odd") as caught:
            score(VLLMScorer(server.base_url), "q", ["a", "b", "bad", "c"])
        wanted = exact("q", "a", "b", "-", "c")
        assert (caught.value.indices, caught.value.scores) == ((2,), (*wanted[:2], None, wanted[3]))
        assert caught.value.status == 500

    def test_a_model_that_reads_text_only(self, server: FaultyServer, score: Callable[..., list[float]]):
        """The error names the model and the first image; no document is rejected."""

        def blind(request: Request) -> Steps | None:
            return refusal(400, TEXT_ONLY) if "content" in str(request.content) else None

        server.behave = on_scores(blind)
        with pytest.raises(ContentError, match=r"documents\[1\] holds an image or a video, but m reads text only"):
            score(VLLMScorer(server.base_url), "q", ["a", Image(RED), Image(BLUE)])
        with pytest.raises(ContentError, match=r"queries\[0\]"):
            score(VLLMScorer(server.base_url), Image(RED), ["a"])

    def test_another_server_that_takes_no_images(self, server: FaultyServer):
        """In its own words, after one more request, with a blank image."""
        server.behave = on_scores(
            lambda request: refusal(422, "not a str") if "content" in str(request.content) else None
        )
        with pytest.raises(BackendRejected, match="not a str") as caught:
            VLLMScorer(server.base_url).score("q", [Image(RED), Image(BLUE)])
        assert not isinstance(caught.value, DocumentRejected)
        assert len(server.score_requests) == 2

    def test_text_that_is_too_long_beside_an_image(self, server: FaultyServer):
        """The remedy is not to ask for a truncation, which there is not."""
        long = "This model's maximum context length is 512 tokens. However, your prompt contains 513"
        server.behave = on_scores(lambda request: refusal(400, long) if "long" in str(request.content) else None)
        with pytest.raises(DocumentRejected, match="cut only by max_tokens_per_doc") as caught:
            VLLMScorer(server.base_url).score("q", [Content("long", Image(RED)), Image(BLUE)])
        assert caught.value.indices == (0,)

    def test_an_unreadable_image_is_found_before_anything_is_sent(self, server: FaultyServer):
        """With its position; it is never passed through."""
        for damaged in (Image(RED[:40]), Image(Path("nowhere.png")), Image(url="data:image/png;base64,!!")):
            with pytest.raises(ContentError, match=r"documents\[1\] "):
                VLLMScorer(server.base_url).rerank("q", ["a", damaged], on_error="passthrough")
        with pytest.raises(ContentError, match=r"^query is no PNG"):
            VLLMScorer(server.base_url).rerank(Image(b"GIF89a"), ["a"])
        assert server.connections == 0


class TestFallback:
    """A call with images moves as any other."""

    def test_it_moves_to_a_scorer_that_sees(self, server: FaultyServer, score: Callable[..., list[float]]):
        """From a server that is down, and past a model that reads text only; images are read once."""
        down = VLLMScorer("http://127.0.0.1:1", max_retries=0)
        scorer = FallbackScorer(down, WordOverlap(), VLLMScorer(server.base_url))
        assert score(scorer, "q", ["a", Image(RED)]) == exact("q", "a", sent(RED))

    def test_nobody_left(self):
        """What is wrong with the server that could have is told, not that the other can't see."""
        down = VLLMScorer("http://127.0.0.1:1", max_retries=0)
        with pytest.raises(BackendUnavailable):
            FallbackScorer(down, WordOverlap()).score("q", Image(RED))
        with pytest.raises(ContentError, match="word overlap reads text only"):
            FallbackScorer(WordOverlap()).score("q", Image(RED))
