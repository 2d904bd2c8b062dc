"""Our very bytes, read by vLLM's own code: its request models take them, and its images are the ones that we see.

In vLLM's own environment, without a server and without a model: its modules are imported in a process of their own.
"""

import base64
import hashlib
import io
import json
import subprocess

import pytest
from PIL import Image as PILImage

from rag_rerank import Content, ContentError, Image, Video, VLLMScorer
from rag_rerank.inputs.images import read_image
from tests import drawn
from tests.faulty_server import FaultyServer, Request, http
from tests.vllm_server import PYTHON, ROOT, VLLMServer, why_not

READ_BY_VLLM = """
import base64, hashlib, json, sys
from pydantic import TypeAdapter
from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest
from vllm.entrypoints.pooling.scoring.utils import validate_score_input
from vllm.multimodal.media.image import ImageMediaIO

def plain(given):
    if isinstance(given, str):
        return given
    parts = [part if isinstance(part, dict) else dict(part) for part in given]
    return [part.get("text") or seen(next(part[key] for key in part if key.endswith("_url"))["url"]) for part in parts]

def seen(url):
    if not url.startswith("data:"):
        return url
    head, _, data = url.partition(",")
    image = ImageMediaIO().load_base64(head[5:].partition(";")[0], data).media
    return [image.mode, image.width, image.height, hashlib.sha256(image.tobytes()).hexdigest()]

results = []
for path, body in json.load(sys.stdin):
    request = TypeAdapter(ScoreRequest if path == "/v1/score" else RerankRequest).validate_json(base64.b64decode(body))
    if path == "/v1/score":
        queries, documents = request.data_1, request.data_2
    else:
        queries, documents = request.query, request.documents
    data = validate_score_input(queries, documents, True, "Qwen3VLForSequenceClassification")
    results.append({"class": type(request).__name__, "queries": [plain(each) for each in data.data_1],
                    "documents": [plain(each) for each in data.data_2],
                    "set": sorted(request.model_fields_set)})
print("results:", json.dumps(results))
"""


def looks(data: bytes) -> list[object]:
    """What a model sees, by our reading."""
    image = read_image(data).decoded()
    return [image.mode, image.width, image.height, hashlib.sha256(image.tobytes()).hexdigest()]


def kinds() -> dict[str, bytes]:
    """Files of every sort that Pillow reads alike on both sides."""
    exif = PILImage.Exif()
    exif[0x0112] = 6
    image = drawn.gradient((33, 21))
    palette = PILImage.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 220, 40, 30])
    clear = image.convert("RGBA")
    clear.putalpha(image.getchannel("R"))
    return {
        "PNG": drawn.encoded(image, "PNG"),
        "JPEG": drawn.encoded(image, "JPEG"),
        "WebP": drawn.encoded(image, "WEBP"),
        "GIF": drawn.encoded(image, "GIF"),
        "BMP": drawn.encoded(image, "BMP"),
        "TIFF": drawn.encoded(image, "TIFF"),
        "turned": drawn.encoded(image, "JPEG", exif=exif),
        "CMYK": drawn.encoded(image.convert("CMYK"), "JPEG"),
        "16 bits": drawn.encoded(PILImage.new("I;16", (9, 9), 40_000), "PNG"),
        "1 bit": drawn.encoded(image.convert("1"), "PNG"),
        "half transparent": drawn.encoded(clear, "PNG"),
        "transparent palette": drawn.encoded(palette, "PNG", transparency=1),
        "transparent grey": drawn.encoded(image.convert("L"), "PNG", transparency=40),
        "transparent colour": drawn.encoded(image, "PNG", transparency=(1, 2, 3)),
        "transparent WebP": drawn.encoded(clear, "WEBP", lossless=True),
        "animated": drawn.encoded(image, "GIF", save_all=True, append_images=[PILImage.new("RGB", (33, 21))]),
        "MPO": drawn.encoded(image, "MPO", save_all=True, append_images=[drawn.gradient((9, 9))]),
    }


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_vllm_reads_what_we_send():
    """Requests of both APIs, with everything in them; each image is to vLLM's reader what it is to ours, to the bit."""
    files = kinds()
    red, page = drawn.png(), drawn.encoded(PILImage.new("CMYK", (7, 7), (0, 200, 200, 10)), "JPEG")
    documents = [
        "text",
        *(Image(data) for data in files.values()),
        Image(PILImage.open(io.BytesIO(files["turned"]))),
        Image(files["PNG"], max_pixels=100),
        Content("before", Image(red), "after", Image(page)),
        Image(url="https://images.example/a.png"),
        Video("https://images.example/a.mp4"),
    ]
    bodies: list[tuple[str, str]] = []

    def keep(request: Request):
        if not request.wants_scores:
            return None
        bodies.append((request.path, base64.b64encode(request.body).decode()))
        body = request.content
        count = len(body.get("text_2") or body["documents"])
        entries = [{"index": n, "score": 0.5, "relevance_score": 0.5} for n in range(count)]
        return [http(json.dumps({"id": body["request_id"], "model": "m", "data": entries, "results": entries}))]

    options = {"use_activation": False, "instruction": "i", "priority": 1, "truncate_prompt_tokens": 9}
    with FaultyServer(keep) as server:
        for endpoint in ("score", "rerank"):
            with VLLMScorer(server.base_url, endpoint=endpoint, max_concurrency=1, **options) as scorer:
                scorer.score(Content("query", Image(red)), documents)
    done = subprocess.run(
        [PYTHON, "-c", READ_BY_VLLM], input=json.dumps(bodies), capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.partition("results: ")[2])
    assert {result["class"] for result in results} == {"ScoreTextRequest", "RerankRequest"}
    wanted = [
        "text",
        *([looks(data)] for data in files.values()),
        [looks(files["turned"])],
        [looks(read_image(files["PNG"], 100).data)],
        ["before", looks(red), "after", looks(page)],
        ["https://images.example/a.png"],
        ["https://images.example/a.mp4"],
    ]
    for kind in ("ScoreTextRequest", "RerankRequest"):
        parts = [result for result in results if result["class"] == kind]
        assert all(result["queries"] == [["query", looks(red)]] for result in parts)
        assert [document for result in parts for document in result["documents"]] == wanted
        assert all({"use_activation", "instruction", "priority"} <= set(result["set"]) for result in parts)
        assert all("truncate_prompt_tokens" not in result["set"] for result in parts)


def test_a_real_server_of_a_text_model_is_told(vllm_minilm: VLLMServer):
    """By its very words; texts beside it are scored."""
    with VLLMScorer(vllm_minilm.base_url, timeout=120) as scorer:
        for documents in ([Image(drawn.png())], ["a", Content("b", Image(drawn.png()))]):
            with pytest.raises(ContentError, match=rf"documents\[{len(documents) - 1}\] .* reads text only"):
                scorer.score("q", documents)
        with pytest.raises(ContentError, match=r"queries\[0\]"):
            scorer.score(Image(drawn.png()), "a")
        assert len(scorer.score("q", ["a", Content("b")])) == 2
