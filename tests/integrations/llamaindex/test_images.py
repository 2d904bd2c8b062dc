"""Images in nodes: which are scored, where they may come from, and that nothing else is ever opened or asked."""

import asyncio
import base64
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageDocument,
    ImageNode,
    MediaResource,
    Node,
    NodeWithScore,
    TextNode,
)
from pydantic import AnyUrl

from llama_index.postprocessor.rag_rerank import LocalReranker, ScorerReranker, VLLMReranker
from rag_rerank import ContentError
from tests import drawn
from tests.faulty_server import FaultyServer, oracle, spelled
from tests.integrations.llamaindex.support import QUERY, KeywordScorer, engine

RED, GREEN, BLUE = (drawn.png(colour) for colour in (drawn.RED, drawn.GREEN, drawn.BLUE))


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def sent(data: bytes, text: str | None = None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(data)}"}}]
    return {"content": parts if text is None else [*parts, {"type": "text", "text": text}]}


HOLDING: dict[str, tuple[BaseNode, Any]] = {
    "ImageNode": (ImageNode(image=b64(RED)), sent(RED)),
    "ImageNode with text": (ImageNode(image=b64(RED), text="a chart"), sent(RED, "a chart")),
    "ImageNode with metadata": (ImageNode(image=b64(RED), metadata={"file": "a.png"}), sent(RED)),
    "ImageNode, text and metadata": (
        ImageNode(image=b64(RED), text="a chart", metadata={"page": 3}),
        sent(RED, "page: 3\n\na chart"),
    ),
    "ImageNode, data URL": (ImageNode(image=f"data:image/png;base64,{b64(GREEN)}"), sent(GREEN)),
    "ImageNode, in lines": (ImageNode(image="\n".join([b64(GREEN)[:20], b64(GREEN)[20:]])), sent(GREEN)),
    "ImageNode, data URL as address": (ImageNode(image_url=f"data:image/png;base64,{b64(BLUE)}"), sent(BLUE)),
    "ImageDocument": (ImageDocument(image=b64(BLUE)), sent(BLUE)),
    "ImageDocument with text": (ImageDocument(image=b64(BLUE), text="a page"), sent(BLUE, "a page")),
    "Node": (Node(image_resource=MediaResource(data=GREEN)), sent(GREEN)),
    "Node with text": (
        Node(image_resource=MediaResource(data=GREEN), text_resource=MediaResource(text="both")),
        sent(GREEN, "both"),
    ),
    "Document": (Document(image_resource=MediaResource(data=b64(RED).encode()), text="scan"), sent(RED, "scan")),
    "TextNode": (TextNode(text="plain"), "plain"),
}


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        yield server


def rerank(reranker: Any, nodes: list[BaseNode], how: str = "sync") -> list[NodeWithScore]:
    given = [NodeWithScore(node=node, score=0.5) for node in nodes]
    if how == "sync":
        return reranker.postprocess_nodes(given, query_str=QUERY)

    async def ask() -> list[NodeWithScore]:
        async with reranker:
            return await reranker.apostprocess_nodes(given, query_str=QUERY)

    return asyncio.run(ask())


class TestHeldImages:
    """With read_images, what a node holds is scored: an image, a text, or both together."""

    @pytest.mark.parametrize("how", ["sync", "async"])
    def test_every_kind_of_node(self, server: FaultyServer, how: str):
        """In one list; each gets the score of what it is. An image without text is sent without its metadata."""
        nodes = [node for node, _ in HOLDING.values()]
        results = rerank(VLLMReranker(base_url=server.base_url, read_images=True, top_n=None), nodes, how)
        found = {result.node_id: result.score for result in results}
        assert found == {node.node_id: oracle(QUERY, spelled(wanted)) for node, wanted in HOLDING.values()}
        assert [result.score for result in results] == sorted(found.values(), reverse=True)

    def test_in_a_query_engine(self, server: FaultyServer):
        """The nodes that come out are those that went in."""
        node = HOLDING["ImageNode with text"][0]
        reranker = VLLMReranker(base_url=server.base_url, read_images=True)
        [result] = engine(reranker, [NodeWithScore(node=node, score=0.1)]).query(QUERY).source_nodes
        assert result.node is node
        assert result.score == oracle(QUERY, spelled(sent(RED, "a chart")))

    def test_without_it_nothing_changes(self, caplog: pytest.LogCaptureFixture):
        """Models of text go on as ever: images are left out, their nodes' text is scored."""
        caplog.set_level(logging.DEBUG, "llama_index.postprocessor.rag_rerank")
        scorer = KeywordScorer()
        nodes = [HOLDING["ImageNode"][0], HOLDING["ImageNode with text"][0], TextNode(text="pandas feed")]
        results = rerank(ScorerReranker(scorer=scorer), nodes)
        assert scorer.seen == [["a chart", "pandas feed"]]
        assert [result.score for result in results] == [0.4, 0.0, None]
        assert "1 of 3 nodes have no text to score and are ranked last" in caplog.text

    def test_a_model_of_text_says_that_it_is_one(self):
        """Before anything is scored; not passed through, for it is the setting that is wrong."""
        reranker = ScorerReranker(scorer=KeywordScorer(), read_images=True, on_error="passthrough")
        with pytest.raises(ContentError, match="keywords reads text only"):
            rerank(reranker, [HOLDING["ImageNode"][0]])
        assert len(rerank(reranker, [TextNode(text="panda"), ImageNode(image_path="x.png")])) == 2

    def test_a_broken_image_is_named(self, server: FaultyServer):
        """With its position."""
        for broken in ("no base64!", "é", b64(RED[:50]), b64(b"%PDF-")):
            with pytest.raises(ContentError, match=r"(nodes|documents)\[1\]"):
                rerank(
                    VLLMReranker(base_url=server.base_url, read_images=True),
                    [TextNode(text="a"), ImageNode(image=broken)],
                )
        assert not server.score_requests


class TestFilesAndAddresses:
    """Stores are filled by others: a path or an address in a node is followed only where the user says so."""

    @pytest.mark.parametrize("read_images", [False, True])
    def test_by_default_none_is_followed(
        self, server: FaultyServer, tmp_path: Path, read_images: bool, monkeypatch: pytest.MonkeyPatch
    ):
        """Neither opened here, nor asked for, nor passed on. The nodes come last."""
        canary = tmp_path / "canary.png"
        canary.write_bytes(GREEN)
        opened: list[str] = []
        open_path = Path.open

        def opening(self: Path, *args: Any, **options: Any) -> Any:
            opened.append(str(self))
            return open_path(self, *args, **options)

        with FaultyServer() as beyond:
            url = f"{beyond.base_url}/canary.png"
            nodes: list[BaseNode] = [
                ImageNode(image_path=str(canary)),
                ImageNode(image_url=url),
                ImageNode(image_url=f"file://{canary}"),
                Node(image_resource=MediaResource(path=canary)),
                Node(image_resource=MediaResource(url=AnyUrl(url))),
                TextNode(
                    text=str(canary), metadata={"image_path": str(canary), "image_url": url, "image": str(canary)}
                ),
                TextNode(text=url),
            ]
            monkeypatch.setattr(Path, "open", opening)
            results = rerank(VLLMReranker(base_url=server.base_url, read_images=read_images, top_n=None), nodes)
            assert beyond.connections == 0
        assert opened == []
        assert [result.score for result in results[2:]] == [None] * 5
        [request] = server.score_requests
        assert all(isinstance(document, str) for document in request.documents)

    def test_files_of_the_folder_and_no_others(self, server: FaultyServer, tmp_path: Path):
        """Really in it: neither by "..", nor by an absolute path, nor by a link that leads out."""
        folder = tmp_path / "pages"
        (folder / "deep").mkdir(parents=True)
        (folder / "a.png").write_bytes(RED)
        (folder / "deep" / "b.png").write_bytes(BLUE)
        outside = tmp_path / "secret.png"
        outside.write_bytes(GREEN)
        (folder / "link.png").symlink_to(outside)
        (folder / "circle.png").symlink_to(folder / "circle.png")
        (folder / "within.png").symlink_to(folder / "a.png")
        (tmp_path / "pages-of-others").mkdir()
        (tmp_path / "pages-of-others" / "c.png").write_bytes(GREEN)
        inside = {"a.png": RED, str(folder / "a.png"): RED, "deep/b.png": BLUE, "within.png": RED, "deep/../a.png": RED}
        barred = [
            "../secret.png",
            str(outside),
            "link.png",
            "circle.png",
            "deep",
            "none.png",
            "../pages-of-others/c.png",
        ]
        barred += [str(tmp_path / "pages-of-others" / "c.png"), "/dev/zero", "a\0.png"]
        nodes: list[BaseNode] = [ImageNode(image_path=path, id_=path) for path in [*inside, *barred]]
        nodes += [Node(image_resource=MediaResource(path=folder / "a.png"), id_="resource")]
        reranker = VLLMReranker(base_url=server.base_url, image_folder=folder, top_n=None)
        scores = {result.node_id: result.score for result in rerank(reranker, nodes)}
        assert scores == {
            **{path: oracle(QUERY, spelled(sent(data))) for path, data in inside.items()},
            **dict.fromkeys(barred),
            "resource": oracle(QUERY, spelled(sent(RED))),
        }

    def test_a_path_may_count_from_where_the_process_runs(
        self, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """As readers of folders write it."""
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "a.png").write_bytes(RED)
        monkeypatch.chdir(tmp_path)
        reranker = VLLMReranker(base_url=server.base_url, image_folder="data")
        [result] = rerank(reranker, [ImageNode(image_path="data/a.png")])
        assert result.score == oracle(QUERY, spelled(sent(RED)))

    def test_addresses_are_passed_on_where_asked_for(self, server: FaultyServer):
        """Never asked for here; and no other kind of address."""
        with FaultyServer() as beyond:
            url = f"{beyond.base_url}/a.png"
            nodes = [
                ImageNode(image_url=url),
                ImageNode(image_url="file:///etc/passwd"),
                ImageNode(image_url="ftp://x/y"),
            ]
            nodes += [Node(image_resource=MediaResource(url=AnyUrl(url)))]
            results = rerank(VLLMReranker(base_url=server.base_url, send_image_urls=True), nodes)
            assert beyond.connections == 0
        assert [result.score is None for result in results] == [False, False, True, True]
        assert [r.documents for r in server.score_requests] == 2 * [
            [{"content": [{"type": "image_url", "image_url": {"url": url}}]}]
        ]

    def test_what_it_holds_comes_first(self, server: FaultyServer, tmp_path: Path):
        """Then its file, then its address."""
        (tmp_path / "a.png").write_bytes(RED)
        settings = {"base_url": server.base_url, "image_folder": tmp_path, "send_image_urls": True}
        for node, data in (
            (ImageNode(image=b64(BLUE), image_path="a.png", image_url="http://x/y.png"), BLUE),
            (ImageNode(image_path="a.png", image_url="http://x/y.png"), RED),
        ):
            [result] = rerank(VLLMReranker(**settings), [node])
            assert result.score == oracle(QUERY, spelled(sent(data)))


def test_the_settings_are_dumped(tmp_path: Path):
    """As text, so that JSON can hold them."""
    for kind in (VLLMReranker, LocalReranker):
        reranker = kind(read_images=True, image_folder=tmp_path, send_image_urls=True)
        data = json.loads(reranker.to_json())
        assert (data["read_images"], data["image_folder"], data["send_image_urls"]) == (True, str(tmp_path), True)
        assert kind.from_dict(data) == reranker
