"""Images in LangChain: a formatter makes them from documents, `rerank` takes them as they are; nothing else does."""

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler

from langchain_rag_rerank import ScorerReranker, VLLMReranker
from rag_rerank import Content, ContentError, Image
from tests import drawn
from tests.faulty_server import FaultyServer, oracle, spelled
from tests.integrations.langchain.common import KeywordScorer

RED, BLUE = drawn.png(drawn.RED), drawn.png(drawn.BLUE)
URL = f"data:image/png;base64,{base64.b64encode(RED).decode()}"


def sent(data: bytes, text: str | None = None) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}}]
    return {"content": parts if text is None else [*parts, {"type": "text", "text": text}]}


def exact(query: Any, document: Any) -> float:
    return oracle(spelled(query), spelled(document))


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server


FORMATTERS: dict[str, tuple[Callable[[Document], Any], Any]] = {
    "Image": (lambda document: Image(RED), sent(RED)),
    "Content": (lambda document: Content(Image(RED), document.page_content), sent(RED, "a chart")),
    "parts": (lambda document: [Image(RED), document.page_content], sent(RED, "a chart")),
    "content": (lambda document: {"content": [{"type": "image_url", "image_url": {"url": URL}}]}, sent(RED)),
    "a message's content": (
        lambda document: (
            HumanMessage(
                [
                    {"type": "image", "base64": URL.partition(",")[2], "mime_type": "image/png"},
                    {"type": "text", "text": "x"},
                ]
            ).content
        ),
        sent(RED, "x"),
    ),
    "text": (lambda document: document.page_content.upper(), "A CHART"),
}


class TestFormatter:
    """What it makes of a document is what is scored; the document comes back as it was."""

    @pytest.mark.parametrize("name", FORMATTERS)
    def test_it_may_make_an_image(self, server: FaultyServer, name: str):
        """Alone or with text, in the forms of this package, of vLLM and of LangChain's messages; sync and async."""
        formatter, wanted = FORMATTERS[name]
        reranker = VLLMReranker(base_url=server.base_url, document_formatter=formatter)
        document = Document("a chart", metadata={"page": 3})
        results = [*reranker.compress_documents([document], "q")]

        async def ask() -> list[Document]:
            async with VLLMReranker(base_url=server.base_url, document_formatter=formatter) as reranker:
                return list(await reranker.acompress_documents([document], "q"))

        results += asyncio.run(ask())
        for result in results:
            assert result.page_content == "a chart"
            assert result.metadata == {"page": 3, "relevance_score": exact("q", wanted)}

    def test_texts_and_images_in_one_list(self, server: FaultyServer):
        """Where the image stands, the user's own code says: here base64 in the metadata."""

        def formatter(document: Document) -> Any:
            held = document.metadata.get("image")
            return document.page_content if held is None else [Image(base64.b64decode(held)), document.page_content]

        documents = [
            Document("a text"),
            Document("a page", metadata={"image": base64.b64encode(BLUE).decode()}),
        ]
        reranker = VLLMReranker(base_url=server.base_url, document_formatter=formatter, top_n=None)
        found = {
            each.page_content: each.metadata["relevance_score"] for each in reranker.compress_documents(documents, "q")
        }
        assert found == {"a text": exact("q", "a text"), "a page": exact("q", sent(BLUE, "a page"))}

    @pytest.mark.parametrize("made", [None, 5, {"text": "x"}, b"bytes", Path("a.png")])
    def test_anything_else_is_refused(self, made: object):
        """A path is no image: who wants the file read says Image(path)."""
        reranker = ScorerReranker(scorer=KeywordScorer(), document_formatter=lambda document: made)
        with pytest.raises(TypeError, match=r"must return str or content, got \w+ for documents\[0\]"):
            reranker.compress_documents([Document("a")], "q")

    def test_a_model_of_text_says_that_it_is_one(self):
        """Not passed through: the setting is wrong."""
        reranker = ScorerReranker(
            scorer=KeywordScorer(), document_formatter=lambda document: Image(RED), on_error="passthrough"
        )
        with pytest.raises(ContentError, match="keywords reads text only"):
            reranker.compress_documents([Document("a")], "q")

    def test_in_a_batch_a_broken_image_is_its_own_query_s(self, server: FaultyServer):
        """The others are ranked, in sync and async batches."""

        def formatter(document: Document) -> Any:
            return Image(RED[: int(document.page_content)])

        inputs = [{"query": "q", "documents": [Document(length)]} for length in ("10000", "40", "10000")]
        reranker = VLLMReranker(base_url=server.base_url, document_formatter=formatter)

        async def ask() -> list[Any]:
            async with VLLMReranker(base_url=server.base_url, document_formatter=formatter) as reranker:
                return await reranker.abatch(inputs, return_exceptions=True)

        inputs.insert(0, {"query": "q", "documents": []})  # ranked by nobody, but counted in the position
        for results in (reranker.batch(inputs, return_exceptions=True), asyncio.run(ask())):
            assert isinstance(results[2], ContentError)
            assert str(results[2]).startswith("documents[2][0] is ")
            assert [results[n][0].metadata["relevance_score"] for n in (1, 3)] == [exact("q", sent(RED))] * 2


class TestRerank:
    """`rerank` takes images beside texts, and an image as the query."""

    def test_positions_and_scores(self, server: FaultyServer):
        """A formatter sees the documents, not what is content already."""
        reranker = VLLMReranker(
            base_url=server.base_url, top_n=None, document_formatter=lambda document: document.page_content + "!"
        )
        given = ["text", Image(RED), Content("c", Image(BLUE)), {"content": [Image(BLUE)]}, {"text": "mapped"}]
        both = {"content": [{"type": "text", "text": "c"}, *sent(BLUE)["content"]]}
        wanted = ["text!", sent(RED), both, sent(BLUE), "mapped!"]
        mixed = {"content": [{"type": "text", "text": "q"}, *sent(RED)["content"]]}
        for query, asked in (("q", "q"), (Image(RED), sent(RED)), ({"content": ["q", Image(RED)]}, mixed)):
            results = reranker.rerank(given, query)
            assert {each["index"]: each["relevance_score"] for each in results} == {
                position: exact(asked, document) for position, document in enumerate(wanted)
            }

    def test_traces_don_t_hold_the_pixels(self, server: FaultyServer):
        """A run that is written as JSON stays small."""
        collector = RunCollectorCallbackHandler()
        large = drawn.encoded(drawn.gradient((200, 200)).effect_spread(50), "PNG")
        reranker = VLLMReranker(base_url=server.base_url).with_config(callbacks=[collector])
        reranker.invoke({"query": Image(large), "documents": [Document("a")]})
        [run] = collector.traced_runs
        assert len(json.dumps(run.inputs, default=repr)) < 2000


class TestNothingIsRead:
    """Documents come from anywhere: what looks like a file or an address in them is text."""

    def test_neither_files_nor_addresses(self, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """In page_content or metadata, in any spelling; nor are they passed on for the server to fetch."""
        canary = tmp_path / "canary.png"
        canary.write_bytes(RED)
        opened: list[Path] = []
        monkeypatch.setattr(Path, "open", lambda self, *args, **options: opened.append(self))
        with FaultyServer() as beyond:
            address = f"{beyond.base_url}/canary.png"
            texts = [str(canary), f"file://{canary}", address, URL, f"![chart]({address})", f'<img src="{canary}">']
            documents = [
                Document(text, metadata={"image": str(canary), "image_url": address, "source": str(canary)})
                for text in texts
            ]
            reranker = VLLMReranker(base_url=server.base_url, top_n=None)
            reranker.compress_documents(documents, str(canary))
            reranker.rerank([*texts, {"text": address, "image_url": address}], address)
            assert beyond.connections == 0
        assert not opened
        for request in server.score_requests:
            assert all(isinstance(document, str) for document in request.documents)

    def test_no_address_of_a_file_is_passed_on(self, server: FaultyServer):
        """A server may have been allowed to read its own files; that is not for documents to ask."""
        part = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
        reranker = VLLMReranker(base_url=server.base_url, document_formatter=lambda document: [part])
        with pytest.raises(ValueError, match="no https, http or data URL"):
            reranker.compress_documents([Document("a")], "q")
        assert not server.score_requests
