"""What a query or document may be beside text: what is taken, what is refused, and what a back end gets."""

import asyncio
import base64
import copy
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_rerank import ConfigError, Content, ContentError, Image, Scorer, Video
from rag_rerank.display import described
from rag_rerank.inputs.images import ImageFile
from rag_rerank.inputs.multimodal import Link, Multimodal
from rag_rerank.inputs.preparing import prepare
from tests import drawn
from tests.faulty_server import FaultyServer
from tests.scorers import WordOverlap

PNG = drawn.png()
URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


class Eyes(Scorer):
    """Keeps what it gets; scores by the number of images."""

    model_name = "eyes"
    accepts_images = True

    def __init__(self) -> None:
        self.calls: list[tuple[list[Any], list[Any]]] = []

    def _score(self, queries: list[Any], documents: list[Any], until: float | None) -> list[float]:
        self.calls.append((queries, documents))
        return [float(len(each.images)) if isinstance(each, Multimodal) else 0.0 for each in documents]


class TestImage:
    """An image from a path, bytes, PIL image or URL, and from nothing else."""

    @pytest.mark.parametrize("source", ["page.png", "https://a.example/x.png", "file:///etc/passwd", URL])
    def test_a_string_is_neither_a_path_nor_an_address(self, source: str):
        """It could be meant as either, and come from anybody."""
        with pytest.raises(TypeError, match="needs a Path, from an address url="):
            Image(source)  # type: ignore[arg-type]

    @pytest.mark.parametrize("source", [5, io.BytesIO(PNG), [PNG], bytearray(PNG)])
    def test_other_sources_are_refused(self, source: object):
        """At once, where they are written."""
        with pytest.raises(TypeError, match="must be a Path, bytes or a PIL image"):
            Image(source)  # type: ignore[arg-type]

    @pytest.mark.parametrize("arguments", [{}, {"source": PNG, "url": URL}])
    def test_one_of_both(self, arguments: dict[str, Any]):
        """A source or a url."""
        with pytest.raises(ValueError, match="not both"):
            Image(**arguments)

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "page.png",
            "/etc/passwd",
            "file:///etc/passwd",
            "FILE:///etc/passwd",
            "ftp://a.example/x.png",
            "http://",
            "https:///x.png",
            "https://[::1/x.png",
            "javascript:alert(1)",
            "data:image/png,abc",
            "data:text/plain;charset=utf-8,abc",
            "https://a.example/\nx.png",
            "https://a.example/\ud800.png",
            "data:image/png;base64,é",
            " https://a.example/x.png",
        ],
    )
    def test_urls_that_are_refused(self, url: str):
        """Only https, http and base64; and nothing that no JSON could hold."""
        for kind in (lambda: Image(url=url), lambda: Video(url)):
            with pytest.raises(ValueError, match="URL|url"):
                kind()

    @pytest.mark.parametrize("most", [0, -1, 2.5, True, "9"])
    def test_max_pixels_is_a_number(self, most: object):
        """At least 1."""
        with pytest.raises(ValueError, match="max_pixels"):
            Image(PNG, max_pixels=most)  # type: ignore[arg-type]

    def test_what_is_shown_has_neither_pixels_nor_secrets(self):
        """A signed address ends in what gives access."""
        signed = "https://me:hunter2@store.example/page.png?signature=hunter2"
        for each in (Image(url=signed), Video(signed), Content("x" * 99, Image(url=signed)), Link("image_url", signed)):
            assert "hunter2" not in repr(each)
            assert "store.example/page.png" in repr(each)
            assert len(repr(each)) < 200
        assert repr(Image(PNG)) == f"Image(<{len(PNG)} bytes>)"
        assert len(repr(Image(url=URL + "A" * 999))) < 100
        assert described(Image(url=signed)) == "[image] https://store.example/page.png?..."

    def test_copies_and_pickles(self):
        """Datasets and workers hold them."""
        for each in (Image(PNG, max_pixels=9), Image(url=URL), Video("https://a.example/v.mp4")):
            for twin in (copy.deepcopy(each), pickle.loads(pickle.dumps(each))):  # noqa: S301 - our own
                assert all(getattr(twin, name) == getattr(each, name) for name in type(each).__slots__)


class TestContent:
    """Several parts are one query or document."""

    def test_parts_are_checked_at_once(self):
        """With the position of what is wrong."""
        with pytest.raises(ValueError, match="at least one part"):
            Content()
        with pytest.raises(TypeError, match="part 1 must be str, Image or Video, got bytes"):
            Content("a", PNG)  # type: ignore[arg-type]

    def test_what_a_back_end_gets(self, tmp_path: Path):
        """Texts, images read, and links; the order kept; texts joined as vLLM joins them."""
        (tmp_path / "a.png").write_bytes(PNG)
        scorer = Eyes()
        document = Content("one", Image(tmp_path / "a.png"), "two", Image(url=URL), Video("https://a.example/v.mp4"))
        assert scorer.score("q", ["plain", document]) == [0.0, 2.0]
        [(queries, [plain, mixed])] = scorer.calls
        assert (queries, plain) == (["q"], "plain")
        assert mixed.text == "one\ntwo"
        assert [type(part) for part in mixed.parts] == [str, ImageFile, str, ImageFile, Link]
        assert all(image.data == PNG for image in mixed.images)
        image = {"type": "image_url", "image_url": {"url": URL}}
        assert json.loads(mixed.encoded()) == {
            "content": [
                {"type": "text", "text": "one"},
                image,
                {"type": "text", "text": "two"},
                image,
                {"type": "video_url", "video_url": {"url": "https://a.example/v.mp4"}},
            ]
        }
        assert abs(mixed.size - len(mixed.encoded())) < 300

    @given(st.lists(st.text(max_size=20), min_size=1, max_size=5))
    def test_text_only_is_text(self, parts: list[str]):
        """Any back end gets it as such."""
        scorer = WordOverlap()
        assert scorer.score("a b", Content(*parts)) == scorer.score("a b", "\n".join(parts))
        assert scorer.calls[0] == scorer.calls[1]

    @given(st.lists(st.sampled_from(["text", "one", "two"]), max_size=9))
    def test_a_mixed_list_has_a_score_for_each(self, kinds: list[str]):
        """In order, sync and async."""
        made = {"text": "a", "one": Image(PNG), "two": Content(Image(PNG), "b", Image(PNG))}
        wanted = [{"text": 0.0, "one": 1.0, "two": 2.0}[kind] for kind in kinds]
        documents = [made[kind] for kind in kinds]
        assert Eyes().score("q", documents) == wanted
        assert asyncio.run(Eyes().ascore("q", documents)) == wanted

    def test_one_is_one_document(self):
        """Not a sequence of its parts."""
        for one in (Image(PNG), Content(Image(PNG), "a"), {"content": [{"type": "text", "text": "a"}, Image(PNG)]}):
            assert Eyes().score("q", one) == [1.0]
            assert Eyes().score(one, "a") == [0.0]
            with pytest.raises(TypeError, match=r"documents must be a sequence"):
                Eyes().rerank("q", one)  # type: ignore[arg-type]


class TestMappings:
    """The forms of vLLM, OpenAI and LangChain."""

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": {"url": URL}},
            {"type": "image_url", "image_url": {"url": URL, "detail": "high"}},
            {"type": "image_url", "image_url": URL},
            {"type": "image", "base64": URL.partition(",")[2], "mime_type": "image/png"},
            {"type": "image", "url": URL},
            Image(PNG),
        ],
    )
    def test_a_part_with_an_image(self, part: Any):
        """Read as if it came in an Image; any mapping will do."""
        for value in ({"content": [part]}, {"content": (part,), "role": "user"}, MappingProxyType({"content": [part]})):
            assert isinstance(value, Mapping)
            mixed = prepare(value, "documents[0]")
            assert isinstance(mixed, Multimodal)
            assert mixed.images[0].data == PNG

    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            ({"content": "text"}, ValueError, r"must be \{\"content\": \[part"),
            ({"content": []}, ValueError, "at least one part"),
            ({"content": [None]}, TypeError, r"content\[0\]: a part must be"),
            ({"content": ["a", {"type": "audio"}]}, ValueError, r"content\[1\]: 'audio' is no type of part"),
            ({"content": [{"type": "text"}]}, ValueError, r"content\[0\]: 'text' is no type"),
            (
                {"content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]},
                ValueError,
                "no https, http or data",
            ),
            ({"content": [{"type": "image", "path": "/etc/passwd"}]}, ValueError, "'image' is no type"),
            ({"content": [{"type": "image", "base64": "%%"}]}, ContentError, "base64 is damaged"),
            ({"content": [{"type": "image", "base64": "A" * (28 << 20)}]}, ContentError, "20,971,520 are the most"),
            ({"text": "a"}, TypeError, "must be str, got dict"),
            (PNG, TypeError, r"got bytes; wrap it in Image\(...\)"),
            (Path("a.png"), TypeError, r"Path; wrap it in Image\(...\)"),
            (PIL.Image.new("RGB", (3, 3)), TypeError, r"wrap it in Image\(...\)"),
            (Image(Path("none.png")), ContentError, "none.png, which is not there"),
            (Image(url="data:image/png;base64,AAAA"), ContentError, "is no PNG"),
            (Image(url="DATA:image/png;base64,AAAA"), ContentError, "is no PNG"),
        ],
    )
    def test_what_is_wrong_is_told_with_its_position(self, value: Any, error: type[Exception], message: str):
        """Before any score, whatever on_error says."""
        with pytest.raises(error, match=rf"^documents\[1\].*{message}") as caught:
            Eyes().rerank("q", ["a", value], on_error="passthrough")
        assert type(caught.value) is error


class TestScorers:
    """What all scorers do with it."""

    def test_one_without_eyes_says_so(self):
        """With the position of the first image; texts are scored as ever."""
        for ask in (WordOverlap().score, lambda *args: asyncio.run(WordOverlap().ascore(*args))):
            with pytest.raises(ContentError, match=r"documents\[2\] holds an image or a video, but word overlap reads"):
                ask("q", ["a", "b", Image(PNG)])
            with pytest.raises(ContentError, match=r"queries\[0\] holds an image"):
                ask(Image(PNG), ["a"])

    def test_ranking(self):
        """Images are documents like others: ties, top_n, batches."""
        documents = ["a", Image(PNG), Content(Image(PNG), Image(PNG)), Image(PNG)]
        assert [item.index for item in Eyes().rerank("q", documents, top_n=3)] == [2, 1, 3]
        ranked = asyncio.run(Eyes().arerank_batch(["q", Image(PNG)], [documents, [Image(PNG)]]))
        assert [[item.index for item in each] for each in ranked] == [[2, 1, 3, 0], [0]]

    def test_a_batch_reads_a_query_s_image_once(self):
        """Not once for each of its documents."""
        scorer = Eyes()
        scorer.rerank_batch([Image(PNG), "q"], [["a", "b", "c"], ["d"]])
        [(queries, _)] = scorer.calls
        assert queries[0] is queries[1] is queries[2]

    def test_one_scorer_gives_it_to_another(self):
        """As it was read."""
        scorer = Eyes()
        mixed = prepare(Image(PNG), "")
        assert scorer.score("q", [mixed]) == [1.0]  # type: ignore[list-item]
        assert scorer.calls[0][1][0] is mixed


class TestNothingIsRead:
    """Texts are texts."""

    def test_neither_files_nor_addresses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Whatever they look like."""
        canary = tmp_path / "canary.png"
        canary.write_bytes(PNG)
        opened: list[Path] = []
        monkeypatch.setattr(Path, "open", lambda self, *args, **options: opened.append(self))
        with FaultyServer() as beyond:
            address = f"{beyond.base_url}/a.png"
            texts = [str(canary), f"file://{canary}", address, URL, f"![]({address})", json.dumps({"content": [URL]})]
            scorer = Eyes()
            assert scorer.score(str(canary), texts) == [0.0] * 6
            assert scorer.score("q", [{"content": texts}]) == [0.0]
            assert scorer.score("q", [Image(url=address)]) == [0.0]  # a link, for a server to fetch
            assert beyond.connections == 0
        assert not opened


def test_pillow_is_needed_for_images_only():
    """The package works without it, and says what is missing where it is."""
    program = """
import sys
sys.modules["PIL"] = sys.modules["PIL.Image"] = None
from rag_rerank import Content, Image, ConfigError
from tests.scorers import WordOverlap
assert WordOverlap().score("a", [Content("a"), "b"]) == [1.0, 0.0]
try:
    WordOverlap().score("a", [Image(b"GIF89a")])
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "documents[0] images need Pillow: pip install 'rag-rerank[images]'\n"
    assert issubclass(ContentError, ConfigError)
