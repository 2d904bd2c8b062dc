"""Images on a vLLM server: what is sent, byte by byte, and what becomes of what the server can't take."""

import asyncio
import base64
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rag_rerank import (
    BackendError,
    BackendRejected,
    BackendUnavailable,
    Content,
    ContentError,
    DeadlineExceeded,
    DocumentRejected,
    FallbackScorer,
    Image,
    Input,
    Video,
    VLLMScorer,
)
from rag_rerank.content import Mixed
from rag_rerank.pictures import read_picture
from rag_rerank.vllm import exchange, pieces, wire
from tests import drawn
from tests.faulty_server import FaultyServer, Request, Steps, http, on_scores, oracle, refusal, spelled
from tests.scorers import WordOverlap

RED, GREEN, BLUE = (drawn.png(colour) for colour in (drawn.RED, drawn.GREEN, drawn.BLUE))
TEXT_ONLY = "MultiModalParam is not supported for BertForSequenceClassification"
BEYOND = "https://pictures.example/a.png"


def sent(*parts: bytes | str) -> dict[str, Any]:
    """What vLLM's API takes for pictures and texts."""
    return {"content": [text(part) if isinstance(part, str) else picture(part) for part in parts]}


def text(part: str) -> dict[str, Any]:
    return {"type": "text", "text": part}


def picture(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def exact(query: Any, *documents: Any) -> list[float]:
    """The server's scores of what is sent."""
    return [oracle(spelled(query), spelled(document)) for document in documents]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "FIRST_PAUSE", 0.01)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server


@pytest.fixture(params=["sync", "async"])
def score(request: pytest.FixtureRequest) -> Callable[..., list[float]]:
    """Both ways to ask for scores."""
    if request.param == "sync":
        return lambda scorer, *args, **options: scorer.score(*args, **options)

    async def ask(scorer: VLLMScorer, *args: Any, **options: Any) -> list[float]:
        async with scorer:
            return await scorer.ascore(*args, **options)

    return lambda *args, **options: asyncio.run(ask(*args, **options))


class TestRequests:
    """An image is a data URL in vLLM's form, wherever it comes from."""

    def test_every_way_to_pass_one(self, server: FaultyServer, score: Callable[..., list[float]], tmp_path: Path):
        """A file's bytes go as they are; a PIL image as PNG."""
        (tmp_path / "page.png").write_bytes(GREEN)
        url = picture(BLUE)["image_url"]["url"]
        documents: dict[str, tuple[Input, Any]] = {
            "text": ("plain text", "plain text"),
            "bytes": (Image(RED), sent(RED)),
            "file": (Image(tmp_path / "page.png"), sent(GREEN)),
            "data URL": (Image(url=url), sent(BLUE)),
            "address": (Image(url=BEYOND), {"content": [{"type": "image_url", "image_url": {"url": BEYOND}}]}),
            "video": (Video(BEYOND), {"content": [{"type": "video_url", "video_url": {"url": BEYOND}}]}),
            "several": (Content("Figure 2", Image(RED), Image(BLUE)), sent("Figure 2", RED, BLUE)),
            "OpenAI's form": (sent("a", RED), sent("a", RED)),
            "LangChain's form": (
                {"content": ["a", {"type": "image", "base64": base64.b64encode(RED).decode()}]},
                sent("a", RED),
            ),
            "text only": ({"content": [text("a"), text("b")]}, "a\nb"),
        }
        found = score(VLLMScorer(server.base_url), "q", [given for given, _ in documents.values()])
        assert found == exact("q", *(wanted for _, wanted in documents.values()))

    def test_a_query_may_be_one(self, server: FaultyServer, score: Callable[..., list[float]]):
        """1:1, 1:N and N:N."""
        scorer = VLLMScorer(server.base_url)
        assert score(scorer, Image(RED), Image(BLUE)) == exact(sent(RED), sent(BLUE))
        scorer = VLLMScorer(server.base_url)
        assert score(scorer, Image(RED), ["a", Image(BLUE)]) == exact(sent(RED), "a", sent(BLUE))
        pairs = [("q", Image(RED)), (Image(GREEN), "a"), ("q", "a"), (Content("c", Image(BLUE)), Image(BLUE))]
        found = score(VLLMScorer(server.base_url), [query for query, _ in pairs], [document for _, document in pairs])
        wanted = [("q", sent(RED)), (sent(GREEN), "a"), ("q", "a"), (sent("c", BLUE), sent(BLUE))]
        assert found == [exact(query, document)[0] for query, document in wanted]

    @given(st.lists(st.sampled_from(["a", "b", RED, GREEN, (RED, "c"), ("d", BLUE, RED)]), max_size=12), st.data())
    def test_a_mixed_list_keeps_its_order(self, found: list[Any], data: st.DataObject):
        """One score for each, however it is cut into requests."""
        chunk_size = data.draw(st.integers(1, 5))
        given_parts = [each if isinstance(each, tuple) else (each,) for each in found]
        documents = [Content(*(Image(p) if isinstance(p, bytes) else p for p in parts)) for parts in given_parts]
        wanted = [parts[0] if parts in {("a",), ("b",)} else sent(*parts) for parts in given_parts]
        with VLLMScorer(_shared().base_url, chunk_size=chunk_size) as scorer:
            assert scorer.score("q", documents) == exact("q", *wanted)

    @given(st.lists(st.text(max_size=8), min_size=1, max_size=4), st.lists(st.text(max_size=8), min_size=1, max_size=4))
    def test_content_of_text_only_is_text(self, query: list[str], document: list[str]):
        """Joined by line breaks, as vLLM does."""
        with VLLMScorer(_shared().base_url) as scorer:
            plain = scorer.score("\n".join(query), "\n".join(document))
            assert scorer.score(Content(*query), {"content": [text(part) for part in document]}) == plain

    def test_what_spells_a_special_token_is_none_beside_an_image_either(self, server: FaultyServer):
        """A model's own place for an image in the prompt, in a text, would make vLLM miss an image."""
        document = Content("<|vision_start|><|image_pad|><|vision_end|>", Image(RED))
        VLLMScorer(server.base_url).score("q", document)
        [part, _] = server.score_requests[-1].documents[0]["content"]
        assert part["text"] == "< |vision_start|>< |image_pad|>< |vision_end|>"

    def test_a_query_goes_once_a_request_not_once_a_document(self, server: FaultyServer):
        """In a batch, too, and its file is read once."""
        scorer = VLLMScorer(server.base_url)
        ranked = scorer.rerank_batch([Image(RED), Image(BLUE)], [["a", "b", "c"], ["a", "b"]])
        assert [len(each) for each in ranked] == [3, 2]
        asked = {spelled(r.content["text_1"]): r.documents for r in server.score_requests}
        assert asked == {spelled(sent(RED)): ["a", "b", "c"], spelled(sent(BLUE)): ["a", "b"]}

    def test_the_prompt_is_not_truncated(self, server: FaultyServer):
        """vLLM answers 500 where the place of an image is cut off; texts in the same list are cut as ever."""
        scorer = VLLMScorer(server.base_url, truncate_prompt_tokens=100, use_activation=False)
        assert scorer.score("q", ["a", Image(RED)]) == exact("q", "a", sent(RED))
        plain, seen = sorted((request.content for request in server.score_requests), key=lambda body: len(str(body)))
        assert plain.keys() - seen.keys() == {"truncate_prompt_tokens"}
        assert seen["use_activation"] is False

    @pytest.mark.parametrize(("limit", "kept"), [(40, 2), (31, 1), (32, 2), (16, 1), (15, 0)])
    def test_texts_beside_images_are_cut_where_that_leaves_their_places(
        self, server: FaultyServer, limit: int, kept: int
    ):
        """Each image stands before the text, in a few tokens; a limit that might cut one off is not sent."""
        documents = [Content(*[Image(RED)] * count, "long") for count in range(1, 4)]
        VLLMScorer(server.base_url, max_tokens_per_doc=limit).score(Image(BLUE), ["text", *documents])
        limits = {spelled(d): r.content.get("max_tokens_per_doc") for r in server.score_requests for d in r.documents}
        wanted = [sent(*[RED] * count, "long") for count in range(1, 4)]
        assert limits == {"text": limit} | {spelled(d): limit if n <= kept else None for n, d in enumerate(wanted, 1)}
        scorer = VLLMScorer(server.base_url, max_tokens_per_query=limit)
        server.requests.clear()
        scorer.score(Image(BLUE), "text")
        assert server.score_requests[0].content.get("max_tokens_per_query") == (limit if kept else None)

    def test_long_text_beside_an_image_is_not_measured(self, server: FaultyServer):
        """Nor does the automatic truncation touch it."""
        VLLMScorer(server.base_url).score(Image(RED), ["x" * 2_000_000])
        [request] = server.score_requests
        assert "truncate_prompt_tokens" not in request.content

    def test_a_rerank_api_takes_them_too(self, server: FaultyServer):
        """Its answer repeats them, which may be as many bytes again."""

        def answer(request: Request) -> Steps | None:
            if not request.wants_scores:
                return None
            body = request.content
            results = [
                {"index": i, "document": each, "relevance_score": oracle(spelled(body["query"]), spelled(each))}
                for i, each in enumerate(body["documents"])
            ]
            return [http(json.dumps({"id": f"score-{body['request_id']}", "model": "m", "results": results[::-1]}))]

        server.behave = answer
        large = drawn.encoded(drawn.gradient((700, 700)).effect_spread(90), "PNG", compress_level=0)
        assert len(large) > 1 << 20
        scorer = VLLMScorer(server.base_url, endpoint="rerank")
        assert scorer.score(Image(BLUE), ["a", Image(large)]) == exact(sent(BLUE), "a", sent(large))

    def test_prompts_that_vllm_would_put_behind_the_image_are_refused(self, server: FaultyServer):
        """An image comes before all text of its side. Texts on the other side have their prompt as ever."""
        with pytest.raises(ContentError, match=r"template=.*--chat-template"):
            VLLMScorer(server.base_url, template="qwen3-reranker").score("q", Image(RED))
        with pytest.raises(ContentError, match="document_prompt"):
            VLLMScorer(server.base_url, document_prompt="passage: ").score("q", ["a", Image(RED)])
        with pytest.raises(ContentError, match="query_prompt"):
            VLLMScorer(server.base_url, query_prompt="query: ").score(Image(RED), "a")
        assert not server.score_requests
        assert VLLMScorer(server.base_url, query_prompt="query: ").score("q", Image(RED)) == exact(
            "query: q", sent(RED)
        )


class TestSizes:
    """Requests with images are cut by bytes, and what was encoded once is not encoded again."""

    def test_a_request_has_no_more_than_so_many_bytes(self, server: FaultyServer, monkeypatch: pytest.MonkeyPatch):
        """But one document, however large. Nothing is lost between them."""
        monkeypatch.setattr(pieces, "MOST_BYTES", 5000)
        pages = [drawn.encoded(drawn.gradient((10 + n, 20)).effect_spread(n), "PNG") for n in range(20)]
        large = drawn.encoded(drawn.gradient((60, 60)).effect_spread(30), "PNG", compress_level=0)
        pages.insert(7, large)
        found = VLLMScorer(server.base_url).score("q", [Image(page) for page in pages])
        assert found == exact("q", *(sent(page) for page in pages))
        sizes = [(len(request.body), len(request.documents)) for request in server.score_requests]
        assert max(size for size, count in sizes if count > 1) <= 5000 + 300
        assert len(sizes) >= 4
        assert any(count > 1 for _, count in sizes)

    def test_each_image_is_encoded_once(self, server: FaultyServer, monkeypatch: pytest.MonkeyPatch):
        """Though each is sent several times: after a 503, and in halves until the bad one is found."""
        encoded: list[bytes] = []
        encode = base64.b64encode

        def counting(data: bytes) -> bytes:
            encoded.append(data)
            return encode(data)

        bad = spelled(sent(RED))

        def behave(request: Request) -> Steps | None:
            if not request.wants_scores:
                return None
            if len(server.score_requests) == 1:
                return refusal(503)
            return refusal(400) if any(spelled(each) == bad for each in request.documents) else None

        server.behave = behave
        pages = [drawn.png((n, n, n)) for n in range(15)]
        wanted = [None, *exact(sent(BLUE), *(sent(page) for page in pages))]
        monkeypatch.setattr(base64, "b64encode", counting)
        with pytest.raises(DocumentRejected) as caught:
            VLLMScorer(server.base_url).score(Image(BLUE), [Image(RED), *(Image(page) for page in pages)])
        assert list(caught.value.scores) == wanted
        assert len(server.score_requests) > 5
        assert sorted(encoded.count(page) for page in [BLUE, RED, *pages]) == [1] * 17

    def test_what_has_its_score_is_let_go(self, server: FaultyServer, monkeypatch: pytest.MonkeyPatch):
        """Only those on their way are held encoded: here four requests of four at once, of 100."""
        monkeypatch.setattr(pieces, "MOST_BYTES", 4 * Mixed((read_picture(RED),)).size + 50)
        held: list[int] = []
        encode = wire.Encoded.of

        def counting(mixed: Mixed) -> wire.Encoded:
            held.append(sum(isinstance(each, wire.Encoded) for each in gc.get_objects()))
            return encode(mixed)

        monkeypatch.setattr(wire.Encoded, "of", counting)
        VLLMScorer(server.base_url, max_concurrency=4).score("q", [Image(RED) for _ in range(100)])
        assert len(held) == 100
        assert max(held) <= 20


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
    def test_exactly_the_bad_ones_are_rejected(self, kinds: list[tuple[bool, bool]], status: int, chunk_size: int):
        """Images and texts, in any order and number; texts at 400, for to 500 nobody blames a text."""
        assume(status != 500 or all(pictured for pictured, bad in kinds if bad))
        documents: list[Input] = []
        for number, (pictured, bad) in enumerate(kinds):
            words = f"{'bad' if bad else 'good'} {number}"
            documents.append(Content(words, Image(RED)) if pictured else words)

        def refuse(request: Request) -> Steps | None:
            bad = request.wants_scores and any("bad" in spelled(each) for each in request.documents)
            return refusal(status, "can't") if bad else None

        server = _shared()
        server.behave = refuse
        try:
            with (
                VLLMScorer(server.base_url, chunk_size=chunk_size) as scorer,
                pytest.raises(DocumentRejected) as caught,
            ):
                scorer.score("q", documents)
        finally:
            server.behave = lambda request: None
        assert caught.value.indices == tuple(n for n, (_, bad) in enumerate(kinds) if bad)
        wanted = [sent(f"good {n}", RED) if pictured else f"good {n}" for n, (pictured, _) in enumerate(kinds)]
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
        signed = f"https://me:hunter2@pictures.example/a.png?{secret}"
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
        assert len(server.score_requests) == 4

    def test_500_to_text_is_as_ever(self, server: FaultyServer):
        """Nobody looks for a document to blame."""
        server.behave = on_scores(lambda request: refusal(500))
        with pytest.raises(BackendUnavailable):
            VLLMScorer(server.base_url, max_retries=1).score("q", ["a", "b"])
        assert len(server.score_requests) == 2

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
        with pytest.raises(ContentError, match=r"queries\[0\]|queries "):
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


class TestTime:
    """Reading images is part of a call's time, and holds nobody up."""

    def test_the_deadline_counts_reading(self, server: FaultyServer):
        """A call with many large ones ends soon after it."""
        page = drawn.encoded(drawn.gradient((2000, 2000)), "PNG", compress_level=1)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"documents\[\d+\] had been read"):
            VLLMScorer(server.base_url).score("q", [Image(page)] * 2000, deadline=0.05)
        assert time.monotonic() - began < 2
        assert server.connections == 0

    def test_an_event_loop_runs_on(self, server: FaultyServer):
        """They are read in a thread."""
        page = drawn.encoded(drawn.gradient((2000, 2000)), "PNG", compress_level=1)

        async def longest_gap() -> float:
            gap, last = 0.0, time.monotonic()
            async with scorer, asyncio.TaskGroup() as group:
                asking = group.create_task(scorer.ascore("q", [Image(page) for _ in range(10)]))
                while not asking.done():
                    await asyncio.sleep(0.005)
                    gap, last = max(gap, time.monotonic() - last), time.monotonic()
            return gap

        scorer = VLLMScorer(server.base_url)
        began = time.monotonic()
        gap = asyncio.run(longest_gap())
        assert gap < (time.monotonic() - began) / 2


def _shared() -> FaultyServer:
    """One server for all examples of a property, which fixtures can't give."""
    if not _servers:
        _servers.append(FaultyServer())
    return _servers[0]


_servers: list[FaultyServer] = []


@pytest.fixture(scope="module", autouse=True)
def _end_shared() -> Iterator[None]:
    yield
    while _servers:
        _servers.pop().close()
