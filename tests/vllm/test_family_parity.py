"""Encoder families, poolings and ColBERTs: LocalScorer in float32 against one real vLLM server after the other."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from rag_rerank import LocalScorer, VLLMScorer
from tests.conftest import require_server
from tests.encoder_models import (
    make_bi_encoder,
    make_colbert,
    make_converted,
    make_encoder_cross_encoder,
    make_pylate_colbert,
)
from tests.models import MAX_LENGTH
from tests.native_models import (
    make_gte,
    make_jina_colbert,
    make_jina_reranker,
    make_jina_v3,
    make_lfm2_colbert,
    make_nemotron,
)
from tests.pairs import largest_difference, pairs
from tests.parity import flags, largest_known, model_name
from tests.vllm_server import VLLMServer, serving

TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Family:
    """A model to be compared.

    Attributes:
        make: Saves it into a folder.
        spread: How far its scores must be apart at least, or equality would say little.
        options: What its server must be told, beside the flags of our table.
    """

    make: Callable[[Path], Path]
    spread: float
    options: tuple[str, ...] = ()


FAMILIES = {
    "roberta": Family(partial(make_encoder_cross_encoder, kind="roberta"), 1),
    "xlm-roberta": Family(partial(make_encoder_cross_encoder, kind="xlm-roberta"), 1),
    "modernbert": Family(make_converted, 1),  # of a modular one, which the server would take for an embedding model
    "bi-encoder-cls": Family(partial(make_bi_encoder, pooling="cls_token"), 0.2),
    "bi-encoder-last": Family(partial(make_bi_encoder, pooling="lasttoken"), 0.2),
    "colbert-bert": Family(make_colbert, 10),
    "colbert-modernbert": Family(make_pylate_colbert, 10),
    "gte-multilingual-reranker": Family(make_gte, 1, ("--max-model-len", f"{MAX_LENGTH}")),
    "jina-reranker-v2": Family(make_jina_reranker, 1),
    "nemotron-rerank": Family(make_nemotron, 1),
    "jina-reranker-v3": Family(make_jina_v3, 0.2),
    "jina-colbert-v2": Family(make_jina_colbert, 10),
    # On a CPU, the server's own kernel for ropes misreads this model's queries.
    "lfm2-colbert": Family(
        make_lfm2_colbert, 10, ("--compilation-config", json.dumps({"custom_ops": ["-rotary_embedding"]}))
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def vllm_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    """A server for one model after the other."""
    require_server()
    name, family = request.param, FAMILIES[request.param]
    folder = family.make(tmp_path_factory.mktemp("models") / model_name(name))
    with serving(folder, *flags(name), *family.options, name=name) as server:
        yield server


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str]]:
    return pairs()


def scored(server: VLLMServer, *texts: str | list[str], **options: object) -> tuple[list[float], list[float]]:
    """The scores of both sides."""
    with (
        LocalScorer(server.folder, dtype="float32", late_interaction="vllm", **options) as local,
        VLLMScorer(server.base_url, **options) as remote,
    ):
        return local.score(*texts), remote.score(*texts)


class TestFamilies:
    """60 pairs, over-long, empty and odd texts among them."""

    def test_scores_are_equal(self, vllm_family: VLLMServer, texts):
        """As they come by default."""
        assert largest_difference(*scored(vllm_family, *texts)) <= TOLERANCE

    def test_scores_without_activation_are_equal(self, vllm_family: VLLMServer, texts):
        """Logits of a cross-encoder, plain dot products of a ColBERT, a bi-encoder's cosines as ever."""
        ours, theirs = scored(vllm_family, *texts, use_activation=False)
        assert largest_difference(ours, theirs) <= largest_known(vllm_family.name, TOLERANCE)
        assert max(ours) - min(ours) > FAMILIES[vllm_family.name].spread

    def test_one_query_for_all_is_equal(self, vllm_family: VLLMServer, texts):
        """As a reranker asks."""
        # In a listwise model's one prompt they must find room.
        limits = {"max_tokens_per_doc": 200} if vllm_family.name == "jina-reranker-v3" else {}
        ours, theirs = scored(vllm_family, "How do I copy a file?", texts[1], **limits)
        assert largest_difference(ours, theirs) <= largest_known(vllm_family.name, TOLERANCE)

    def test_texts_are_cut_at_the_same_place(self, vllm_family: VLLMServer, texts):
        """max_tokens_per_query and max_tokens_per_doc mean the same on both sides, for every kind of model."""
        ours, theirs = scored(vllm_family, *texts, max_tokens_per_query=12, max_tokens_per_doc=30)
        assert largest_difference(ours, theirs) <= TOLERANCE
        assert ours != scored(vllm_family, *texts)[0]

    @pytest.mark.parametrize("vllm_family", ["jina-reranker-v3"], indirect=True)
    def test_long_lists_are_equal(self, vllm_family: VLLMServer, texts):
        """More documents than the model's own code puts into a prompt."""
        documents = [f"{text[:60]} {number}" for number, text in enumerate(texts[1][:43] * 6)]
        ours, theirs = scored(vllm_family, "How do I copy a file?", documents)
        assert largest_difference(ours, theirs) <= largest_known(vllm_family.name, TOLERANCE)
