"""The same score here and there for decoders: one template file for LocalScorer and for a real vLLM server.

One server per way of serving: a causal model that vLLM turns into a classifier by ``--hf-overrides`` (two words, one
word, tied and untied output layers), and classifiers of two architectures. Each in float32, on 60 pairs.
"""

import contextlib
import json
import urllib.request
from collections.abc import Iterator

import pytest

from rag_rerank import LocalScorer, VLLMScorer
from rag_rerank.families import family
from rag_rerank.inputs.cleaning import clean
from rag_rerank.local.loading import load
from rag_rerank.template import Template
from tests import vllm_server
from tests.causal_models import MAX_POSITIONS, make_causal_lm, make_decoder_classifier
from tests.conftest import require_server
from tests.pairs import largest_difference, pairs
from tests.parity import flags, largest_known, model_name
from tests.vllm_server import VLLMServer

TOLERANCE = 1e-4  # of logits that span several units
CUTS = {"max_tokens_per_query": 60, "max_tokens_per_doc": 150}


CASES = {
    "qwen3-reranker": "qwen3",
    "mxbai-rerank-v2": "qwen2",
    "bge-reranker-v2-gemma": "gemma",
    "zerank-2": "qwen3",
    "qwen3-reranker-seq-cls": "qwen3",
}
"""From families of our table to the kind of a decoder; served with the flags of the table."""


@pytest.fixture(scope="module", params=CASES)
def vllm_decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """A case's model on a real server, prompted with the shipped file."""
    require_server()
    make = make_decoder_classifier if family(request.param).method == "head" else make_causal_lm
    folder = make(tmp_path_factory.mktemp("models") / model_name(request.param), CASES[request.param])
    options = [*flags(request.param), "--max-model-len", str(MAX_POSITIONS)]
    with vllm_server.serving(folder, *options, name=request.param) as server:
        yield server


@contextlib.contextmanager
def both(server: VLLMServer, **options: object) -> Iterator[tuple[LocalScorer, VLLMScorer]]:
    """Ours finds template, answers and scale by the folder's name."""
    with (
        LocalScorer(server.folder, dtype="float32", **options) as local,
        VLLMScorer(server.base_url, **options, timeout=120) as remote,
    ):
        yield local, remote


def template_of(server: VLLMServer) -> Template:
    return Template.load(family(server.name).template)


def test_logits_are_equal(vllm_decoder: VLLMServer):
    """On 60 pairs: odd texts, empty ones, and long ones that both sides cut at the same place."""
    with both(vllm_decoder, use_activation=False, **CUTS) as (local, remote):
        ours, theirs = local.score(*pairs()), remote.score(*pairs())
        assert local.proof().path == family(vllm_decoder.name).local
    assert largest_difference(ours, theirs) <= largest_known(vllm_decoder.name, TOLERANCE)
    assert max(ours) - min(ours) > 2 * family(vllm_decoder.name).logit_scale


def test_over_long_documents_are_cut_alike_by_default(vllm_decoder: VLLMServer):
    """Around each query and template, whose end the server alone would cut off: pairs of all lengths near the limit."""
    query = "How do I copy a file?"
    documents = ["word " * count for count in (10, *range(MAX_POSITIONS - 150, MAX_POSITIONS + 8, 3), 3000)]
    with both(vllm_decoder, use_activation=False) as (local, remote):
        ours, theirs = local.score(query, documents), remote.score(query, documents)
        assert largest_difference(ours, theirs) <= TOLERANCE
        real = [text[:200] for text in pairs()[0][:20]], pairs()[1][:20]
        assert largest_difference(local.score(*real), remote.score(*real)) <= TOLERANCE


def test_scores_are_equal(vllm_decoder: VLLMServer):
    """With the default activation, and another instruction where the template has a place for one."""
    takes = template_of(vllm_decoder).takes("instruction")
    with both(vllm_decoder, **({"instruction": "Find bread."} if takes else {}), **CUTS) as (local, remote):
        assert largest_difference(local.score(*pairs()), remote.score(*pairs())) <= TOLERANCE


def test_prompts_have_the_same_tokens(vllm_decoder: VLLMServer):
    """Ours, and what the server's tokenizer makes of the rendered template; and as many as the server counts."""
    queries, documents = ([clean(text[:100]) for text in texts[:5] + texts[-12:-6]] for texts in pairs())
    with both(vllm_decoder, **CUTS) as (local, _):
        model = load(local._settings)
        template = template_of(vllm_decoder)
        for query, document in zip(queries, documents, strict=True):
            [sequence] = model.inputs([query], [document]).sequences
            rendered = template.render(query, document)
            asked = post(vllm_decoder, "/tokenize", {"prompt": rendered, "add_special_tokens": True})
            assert asked["tokens"] == sequence.ids
            body = {"text_1": query, "text_2": document}
            assert post(vllm_decoder, "/score", body)["usage"]["prompt_tokens"] == len(sequence.ids)


@pytest.fixture(scope="module")
def vllm_untemplated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """A Qwen3 classifier on a server that nobody gave a template."""
    require_server()
    folder = make_decoder_classifier(tmp_path_factory.mktemp("models") / "qwen3-untemplated", "qwen3")
    with vllm_server.serving(folder, "--max-model-len", str(MAX_POSITIONS)) as server:
        yield server


def test_a_template_can_be_rendered_here(vllm_untemplated: VLLMServer):
    """In halves that the server joins: the same scores as with the template there, the same as locally."""
    server = vllm_untemplated
    queries = [query[:100] for query in pairs()[0]]
    documents = [document[:300] for document in pairs()[1]]
    options = {"template": "qwen3-reranker", "instruction": "Find it.", "use_activation": False}
    with (
        LocalScorer(server.folder, dtype="float32", **options) as local,
        VLLMScorer(server.base_url, **options) as remote,
    ):
        ours = local.score(queries, documents)
        assert largest_difference(ours, remote.score(queries, documents)) <= TOLERANCE
    with VLLMScorer(server.base_url, use_activation=False) as without:
        assert largest_difference(ours, without.score(queries, documents)) > 1  # what a forgotten template does


def post(server: VLLMServer, path: str, body: dict[str, object]) -> dict:
    """Ask the server, with no client in between."""
    request = urllib.request.Request(
        server.base_url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
