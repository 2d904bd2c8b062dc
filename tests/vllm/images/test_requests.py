"""Images on a vLLM server: what is sent, byte by byte, in how many requests, and how long that may take."""

import asyncio
import base64
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_rerank import (
    Content,
    ContentError,
    DeadlineExceeded,
    Image,
    Input,
    Video,
    VLLMScorer,
)
from rag_rerank.inputs import preparing
from rag_rerank.inputs.images import ImageFile, read_image
from rag_rerank.inputs.multimodal import Multimodal
from rag_rerank.vllm import call
from tests import drawn
from tests.faulty_server import FaultyServer, Request, Steps, http, on_scores, oracle, refusal, spelled
from tests.vllm.images.common import BEYOND, BLUE, GREEN, RED, exact, image_part, sent, text


class TestRequests:
    """An image is a data URL in vLLM's form, wherever it comes from."""

    def test_every_way_to_pass_one(self, server: FaultyServer, score: Callable[..., list[float]], tmp_path: Path):
        """A file's bytes go as they are; a PIL image as PNG."""
        (tmp_path / "page.png").write_bytes(GREEN)
        url = image_part(BLUE)["image_url"]["url"]
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
    def test_a_mixed_list_keeps_its_order(self, shared: FaultyServer, found: list[Any], data: st.DataObject):
        """One score for each, however it is cut into requests."""
        chunk_size = data.draw(st.integers(1, 5))
        given_parts = [each if isinstance(each, tuple) else (each,) for each in found]
        documents = [Content(*(Image(p) if isinstance(p, bytes) else p for p in parts)) for parts in given_parts]
        wanted = [parts[0] if parts in {("a",), ("b",)} else sent(*parts) for parts in given_parts]
        with VLLMScorer(shared.base_url, chunk_size=chunk_size) as scorer:
            assert scorer.score("q", documents) == exact("q", *wanted)

    @given(st.lists(st.text(max_size=8), min_size=1, max_size=4), st.lists(st.text(max_size=8), min_size=1, max_size=4))
    def test_content_of_text_only_is_text(self, shared: FaultyServer, query: list[str], document: list[str]):
        """Joined by line breaks, as vLLM does."""
        with VLLMScorer(shared.base_url) as scorer:
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
        scorer.score("q", "a")  # that the model is not listwise, queries may go together
        server.requests.clear()
        ranked = scorer.rerank_batch([Image(RED), Image(BLUE)], [["a", "b", "c"], ["a", "b"]])
        assert [len(each) for each in ranked] == [3, 2]
        asked = {spelled(r.content["text_1"]): r.documents for r in server.score_requests}
        assert asked == {spelled(sent(RED)): ["a", "b", "c"], spelled(sent(BLUE)): ["a", "b"]}

    def test_the_prompt_is_not_truncated(self, server: FaultyServer):
        """vLLM answers 500 where the place of an image is cut off; texts in the same list are cut as ever."""
        scorer = VLLMScorer(server.base_url, truncate_prompt_tokens=100, use_activation=False)
        assert scorer.score("q", ["a", Image(RED)]) == exact("q", "a", sent(RED))
        plain, beside_image = sorted(
            (request.content for request in server.score_requests), key=lambda body: len(str(body))
        )
        assert plain.keys() - beside_image.keys() == {"truncate_prompt_tokens"}
        assert beside_image["use_activation"] is False

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
    """Requests with images are cut by bytes, and a request is encoded once."""

    def test_a_request_has_no_more_than_so_many_bytes(self, server: FaultyServer, monkeypatch: pytest.MonkeyPatch):
        """But one document, however large. Nothing is lost between them."""
        monkeypatch.setattr(call, "MAX_BYTES", 5000)
        pages = [drawn.encoded(drawn.gradient((10 + n, 20)).effect_spread(n), "PNG") for n in range(20)]
        large = drawn.encoded(drawn.gradient((60, 60)).effect_spread(30), "PNG", compress_level=0)
        pages.insert(7, large)
        found = VLLMScorer(server.base_url).score("q", [Image(page) for page in pages])
        assert found == exact("q", *(sent(page) for page in pages))
        sizes = [(len(request.body), len(request.documents)) for request in server.score_requests]
        assert max(size for size, count in sizes if count > 1) <= 5000 + 300
        assert len(sizes) >= 4
        assert any(count > 1 for _, count in sizes)

    def test_a_request_is_encoded_once(self, server: FaultyServer, monkeypatch: pytest.MonkeyPatch):
        """Though it is sent again after a 503."""
        encoded: list[bytes] = []
        encode = base64.b64encode

        def counting(data: bytes) -> bytes:
            encoded.append(data)
            return encode(data)

        server.behave = on_scores(lambda request: refusal(503), times=2)
        pages = [drawn.png((n, n, n)) for n in range(5)]
        monkeypatch.setattr(base64, "b64encode", counting)
        found = VLLMScorer(server.base_url).score(Image(BLUE), [Image(page) for page in pages])
        monkeypatch.undo()
        assert found == exact(sent(BLUE), *(sent(page) for page in pages))
        assert len(server.score_requests) == 3
        assert sorted(encoded) == sorted([BLUE, *pages])

    def test_what_has_its_score_is_let_go(self, server: FaultyServer, monkeypatch: pytest.MonkeyPatch):
        """Only those on their way are held encoded: here four requests of four at once, of 100."""
        monkeypatch.setattr(call, "MAX_BYTES", 4 * Multimodal((read_image(RED),)).size + 50)
        held: set[int] = set()
        most: list[int] = []
        encode = Multimodal.encoded

        class Encoded(bytes):
            def __del__(self) -> None:
                held.discard(id(self))

        def counting(mixed: Multimodal) -> bytes:
            encoded = Encoded(encode(mixed))
            held.add(id(encoded))
            most.append(len(held))
            return encoded

        monkeypatch.setattr(Multimodal, "encoded", counting)
        VLLMScorer(server.base_url, max_concurrency=4).score("q", [Image(RED) for _ in range(100)])
        assert len(most) == 100
        assert max(most) <= 20


class TestTime:
    """Reading images is part of a call's time, and holds nobody up."""

    def test_the_deadline_counts_reading(self, server: FaultyServer):
        """A call with many large ones reads no more after it: here 10 ms each, 50 ms in all."""
        page = drawn.encoded(drawn.gradient((2000, 2000)), "PNG", compress_level=1)
        with pytest.raises(DeadlineExceeded, match=r"documents\[(\d+)\] had been read") as caught:
            VLLMScorer(server.base_url).score("q", [Image(page) for _ in range(2000)], deadline=0.05)
        assert int(re.search(r"\[(\d+)\]", str(caught.value))[1]) < 100
        assert server.connections == 0

    def test_an_event_loop_runs_on(self, server: FaultyServer, monkeypatch: pytest.MonkeyPatch):
        """They are read in a thread: here each waits there for what is set in the loop meanwhile."""
        turned = threading.Event()

        def reading(source: Any, max_pixels: int | None = None) -> ImageFile:
            assert turned.wait(30)
            return read_image(source, max_pixels)

        async def call() -> list[float]:
            async with VLLMScorer(server.base_url) as scorer:
                asking = asyncio.ensure_future(scorer.ascore("q", [Image(RED), Image(BLUE)]))
                await asyncio.sleep(0.01)
                turned.set()
                return await asking

        monkeypatch.setattr(preparing, "read_image", reading)
        assert asyncio.run(call()) == exact("q", sent(RED), sent(BLUE))
