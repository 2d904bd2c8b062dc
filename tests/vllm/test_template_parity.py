"""The same score here and there for decoders: one template file for LocalScorer and for a real vLLM server.

One server per way of serving: a causal model that vLLM turns into a classifier by ``--hf-overrides`` (two words, one
word, tied and untied output layers), and classifiers of two architectures. Each in float32, on 60 pairs.
"""

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from rag_rerank import LocalScorer, VLLMScorer
from rag_rerank.inputs.cleaning import clean
from rag_rerank.local.loading import load
from rag_rerank.template import SHIPPED, Template
from tests import vllm_server
from tests.causal_models import MAX_POSITIONS, make_causal_lm, make_decoder_classifier
from tests.conftest import require_server
from tests.pairs import largest_difference, pairs
from tests.vllm_server import VLLMServer

TOLERANCE = 1e-4  # of logits that span several units
CUTS = {"max_tokens_per_query": 60, "max_tokens_per_doc": 150}


@dataclass(frozen=True)
class Case:
    """A way of serving a reranker, and the local arguments that mean the same."""

    kind: str
    template: str
    overrides: dict[str, object] = field(default_factory=dict)
    tokens: tuple[str, ...] | None = None

    def make(self, folder: Path) -> Path:
        return make_causal_lm(folder, self.kind) if self.tokens else make_decoder_classifier(folder, self.kind)

    def options(self) -> list[str]:
        return ["--hf-overrides", json.dumps(self.overrides)] if self.overrides else []


CASES = {
    "Qwen3, two words": Case(
        "qwen3",
        "qwen3-reranker",
        {
            "architectures": ["Qwen3ForSequenceClassification"],
            "classifier_from_token": ["no", "yes"],
            "is_original_qwen3_reranker": True,
        },
        ("no", "yes"),
    ),
    "Qwen2, two words, as mxbai": Case(
        "qwen2",
        "mxbai-rerank-v2",
        {
            "architectures": ["Qwen2ForSequenceClassification"],
            "classifier_from_token": ["0", "1"],
            "method": "from_2_way_softmax",
        },
        ("0", "1"),
    ),
    "Gemma, one word": Case(
        "gemma",
        "bge-reranker-v2-gemma",
        {
            "architectures": ["GemmaForSequenceClassification"],
            "classifier_from_token": ["Yes"],
            "method": "no_post_processing",
        },
        ("Yes",),
    ),
    "Llama classifier, as nemotron": Case("llama", "nemotron-rerank"),
    "Qwen3 classifier": Case("qwen3", "qwen3-reranker"),
}


@pytest.fixture(scope="module", params=CASES)
def vllm_decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """A case's model on a real server, prompted with the shipped file."""
    require_server()
    case = CASES[request.param]
    folder = case.make(tmp_path_factory.mktemp("models") / case.kind)
    options = ["--chat-template", str(SHIPPED / f"{case.template}.jinja"), "--max-model-len", str(MAX_POSITIONS)]
    with vllm_server.serving(folder, *options, *case.options()) as server:
        yield server


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    """The one whose model the server has."""
    return CASES[request.node.callspec.params["vllm_decoder"]]


@contextlib.contextmanager
def both(case: Case, server: VLLMServer, **options: object) -> Iterator[tuple[LocalScorer, VLLMScorer]]:
    local_options = {"dtype": "float32", "template": case.template, "classifier_tokens": case.tokens}
    with (
        LocalScorer(server.folder, **local_options, **options) as local,
        VLLMScorer(server.base_url, **options, timeout=120) as remote,
    ):
        yield local, remote


def test_logits_are_equal(case: Case, vllm_decoder: VLLMServer):
    """On 60 pairs: odd texts, empty ones, and long ones that both sides cut at the same place."""
    with both(case, vllm_decoder, use_activation=False, **CUTS) as (local, remote):
        ours, theirs = local.score(*pairs()), remote.score(*pairs())
    assert largest_difference(ours, theirs) <= TOLERANCE
    assert max(ours) - min(ours) > 2


def test_over_long_documents_are_cut_alike_by_default(case: Case, vllm_decoder: VLLMServer):
    """Around each query and template, whose end the server alone would cut off: pairs of all lengths near the limit."""
    query = "How do I copy a file?"
    documents = ["word " * count for count in (10, *range(MAX_POSITIONS - 150, MAX_POSITIONS + 8, 3), 3000)]
    with both(case, vllm_decoder, use_activation=False) as (local, remote):
        ours, theirs = local.score(query, documents), remote.score(query, documents)
        assert largest_difference(ours, theirs) <= TOLERANCE
        real = [text[:200] for text in pairs()[0][:20]], pairs()[1][:20]
        assert largest_difference(local.score(*real), remote.score(*real)) <= TOLERANCE


def test_scores_are_equal(case: Case, vllm_decoder: VLLMServer):
    """With the default activation, and another instruction where the template has a place for one."""
    takes = Template.load(case.template).takes("instruction")
    with both(case, vllm_decoder, **({"instruction": "Find bread."} if takes else {}), **CUTS) as (local, remote):
        assert largest_difference(local.score(*pairs()), remote.score(*pairs())) <= TOLERANCE


def test_prompts_have_the_same_tokens(case: Case, vllm_decoder: VLLMServer):
    """Ours, and what the server's tokenizer makes of the rendered template; and as many as the server counts."""
    queries, documents = ([clean(text[:100]) for text in texts[:5] + texts[-12:-6]] for texts in pairs())
    with both(case, vllm_decoder, **CUTS) as (local, _):
        model = load(local._settings)
        template = Template.load(case.template)
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
