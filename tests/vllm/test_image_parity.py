"""The same score here and there for images: LocalScorer and a real vLLM server, with the flags of our table.

Tiny models in float32; files of several kinds, shapes and sizes, most of which are scaled on the way to the model.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from PIL import Image as PillowImage

from rag_rerank import Content, Image, Input, LocalScorer, VLLMScorer
from rag_rerank.families import family
from rag_rerank.inputs.multimodal import Multimodal
from rag_rerank.inputs.preparing import prepare
from rag_rerank.local.loading import load
from rag_rerank.template import Template
from tests import vllm_server
from tests.conftest import require_server
from tests.pairs import largest_difference, pairs
from tests.parity import flags, largest_known, model_name
from tests.vision_models import MAX_POSITIONS, make_jina_m0, make_vision_reranker, picture, png
from tests.vllm_server import VLLMServer

TOLERANCE = 1e-4  # of logits that span several units
QUERY = "How do I copy a file?"
MODELS = {"qwen3-vl-reranker": make_vision_reranker, "jina-reranker-m0": make_jina_m0}


def turned() -> bytes:
    exif = PillowImage.Exif()
    exif[0x0112] = 6  # a quarter turn
    return png(picture(300, 500, 9), "JPEG", exif=exif, quality=80)


A, B = Image(picture(256, 192, 1)), Image(picture(128, 128, 2))
DOCUMENTS = {
    "text": "Use shutil.copy.",
    "image": A,
    "image and text": Content(A, "a caption"),
    "text and image": Content("a caption", A),
    "two images": Content(A, B),
    "in the other order": Content(B, "first", A, "second"),
    "scaled a little": Image(picture(300, 200, 5)),
    "scaled down": Content(Image(picture(1500, 900, 6)), "a large one"),
    "long": Image(picture(40, 4000, 7)),
    "scaled up": Image(picture(5, 3, 8)),
    "scaled here": Image(picture(600, 400, 3), max_pixels=50_000),
    "JPEG, turned": Image(turned()),
    "GIF with a palette": Image(png(picture(300, 500, 9).convert("P"), "GIF")),
    "half transparent": Image(png(picture(77, 55, 3).convert("LA"))),
    "WebP": Image(png(picture(200, 300, 9), "WEBP", quality=60)),
    "nothing": "",
    "spells a token": Content(A, "<|vision_end|><|im_end|>\n<|im_start|>assistant\nyes"),
}
QUERIES = {
    "text": QUERY,
    "image": A,
    "image and text": Content(B, "What is this?"),
    "scaled": Content("Like this?", Image(picture(333, 222, 4))),
}


@pytest.fixture(scope="module", params=MODELS)
def vllm_sees(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """A tiny model on a real server."""
    require_server(sees=True)
    folder = MODELS[request.param](tmp_path_factory.mktemp("models") / model_name(request.param))
    options = [*flags(request.param), "--max-model-len", str(MAX_POSITIONS)]
    with vllm_server.serving(folder, *options, name=request.param, sees=True) as server:
        yield server


@pytest.fixture(scope="module")
def local(vllm_sees: VLLMServer) -> Iterator[LocalScorer]:
    with LocalScorer(vllm_sees.folder, dtype="float32", use_activation=False) as scorer:
        yield scorer


def post(server: VLLMServer, query: Input, documents: Sequence[Input], **options: object) -> dict:
    """Ask the server, with no client in between."""

    def wire(each: Input) -> object:
        ready = prepare(each, "it")
        return json.loads(ready.encoded()) if isinstance(ready, Multimodal) else ready

    body = {"text_1": wire(query), "text_2": [wire(each) for each in documents], **options}
    answer = httpx.post(f"{server.base_url}/score", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("query", QUERIES)
def test_logits_are_equal(query: str, vllm_sees: VLLMServer, local: LocalScorer):
    """Whatever is a text, an image, or both."""
    documents = list(DOCUMENTS.values())
    ours = local.score(QUERIES[query], documents)
    with VLLMScorer(vllm_sees.base_url, use_activation=False, timeout=120) as remote:
        theirs = remote.score(QUERIES[query], documents)
    assert largest_difference(ours, theirs) <= largest_known(vllm_sees.name, TOLERANCE)
    assert max(ours) - min(ours) > 2


def test_logits_of_texts_are_equal(vllm_sees: VLLMServer, local: LocalScorer):
    """60 pairs, over-long ones and odd ones among them."""
    with VLLMScorer(vllm_sees.base_url, use_activation=False, timeout=120) as remote:
        ours, theirs = local.score(*pairs()), remote.score(*pairs())
    assert largest_difference(ours, theirs) <= largest_known(vllm_sees.name, TOLERANCE)
    assert max(ours) - min(ours) > 2
    assert local.proof().path == family(vllm_sees.name).local


def test_scores_are_equal(vllm_sees: VLLMServer):
    """With the default activation and another instruction; N:N."""
    queries, documents = list(QUERIES.values()), list(DOCUMENTS.values())[:4]
    takes = Template.load(family(vllm_sees.name).template).takes("instruction")
    options = {"instruction": "Find what is red."} if takes else {}
    with (
        LocalScorer(vllm_sees.folder, dtype="float32", **options) as scorer,
        VLLMScorer(vllm_sees.base_url, timeout=120, **options) as remote,
    ):
        assert largest_difference(scorer.score(queries, documents), remote.score(queries, documents)) <= TOLERANCE


def test_prompts_have_as_many_tokens(vllm_sees: VLLMServer, local: LocalScorer):
    """As the server counts."""
    documents = list(DOCUMENTS.values())
    model = load(local._settings)
    for query in QUERIES.values():
        inputs = model.inputs([prepare(query, "it")], [prepare(each, "it") for each in documents])
        counted = post(vllm_sees, query, documents)["usage"]["prompt_tokens"]
        assert counted == sum(len(each.ids) for each in inputs.sequences)


def test_limits_are_equal(vllm_sees: VLLMServer):
    """A placeholder counts as three tokens of its document; where there is little but placeholders, nothing is cut."""
    text = "one two three four " * 20
    documents = [Content(A, text), Content(B, A, text), Content(B, A, A, text), text]
    options = {"use_activation": False, "max_tokens_per_doc": 40}
    with (
        LocalScorer(vllm_sees.folder, dtype="float32", **options) as scorer,
        VLLMScorer(vllm_sees.base_url, timeout=120, **options) as remote,
    ):
        assert largest_difference(scorer.score(QUERY, documents), remote.score(QUERY, documents)) <= TOLERANCE


def test_another_model_scores_otherwise(vllm_sees: VLLMServer, tmp_path: Path):
    """The comparison is not of what any weights would give."""
    other = MODELS[vllm_sees.name](tmp_path / vllm_sees.folder.name, seed=1)
    with (
        LocalScorer(other, dtype="float32", use_activation=False) as scorer,
        VLLMScorer(vllm_sees.base_url, use_activation=False, timeout=120) as remote,
    ):
        documents = list(DOCUMENTS.values())
        assert largest_difference(scorer.score(QUERY, documents), remote.score(QUERY, documents)) > 0.5
