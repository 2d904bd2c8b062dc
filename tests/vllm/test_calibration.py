"""One calibration file on a real vLLM server, and the options by which the server gives its probabilities itself."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_index.core.schema import NodeWithScore, TextNode

import langchain_rag_rerank as langchain
import llama_index.postprocessor.rag_rerank as llama_index
from rag_rerank import Calibrated, LocalScorer, VLLMScorer
from rag_rerank.calibration import Calibration, Curve
from tests.conftest import require_server
from tests.pairs import pairs
from tests.test_calibration import calibration
from tests.vllm_server import VLLMServer, serving

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def fitted(cross_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for the tiny cross-encoder."""
    path = tmp_path_factory.mktemp("fitted") / "relevance.json"
    with LocalScorer(cross_encoder, dtype="float32") as scorer:
        curve = Curve("platt", [(0.0, 2.0), (1.0, 5.0)])  # this model's logits are about -1 to -0.4
        calibration(scorer, curve, scale="logit").save(path)
    return path


@pytest.fixture(scope="module")
def right(cross_encoder: Path, fitted: Path) -> list[float]:
    """Probabilities in this process."""
    with Calibrated(LocalScorer(cross_encoder, dtype="float32"), fitted) as scorer:
        found = scorer.score(*pairs())
    assert max(found) - min(found) > 0.2  # or equality would say little
    return found


def test_a_servers_probabilities_are_those_of_this_process(
    vllm_cross_encoder: VLLMServer, fitted: Path, right: list[float]
):
    """Of its scores and of its logits."""
    server = vllm_cross_encoder
    for use_activation in (None, False):
        remote = VLLMScorer(server.base_url, api_key=server.api_key, use_activation=use_activation)
        with Calibrated(remote, fitted) as scorer:
            assert scorer.score(*pairs()) == pytest.approx(right, abs=TOLERANCE)


def test_both_frameworks_give_them(vllm_cross_encoder: VLLMServer, fitted: Path, right: list[float]):
    server, (queries, documents) = vllm_cross_encoder, pairs()
    asked = [place for place, query in enumerate(queries) if query == queries[0]]
    settings = {"base_url": server.base_url, "api_key": server.api_key, "calibration": fitted, "top_n": None}
    with (
        langchain.VLLMReranker(**settings) as compressor,
        llama_index.VLLMReranker(**settings) as postprocessor,
    ):
        ranked = compressor.rerank([documents[place] for place in asked], queries[0])
        nodes = [NodeWithScore(node=TextNode(text=documents[place], id_=str(place))) for place in asked]
        results = postprocessor.postprocess_nodes(nodes, query_str=queries[0])
    of_langchain = {asked[each["index"]]: each["relevance_score"] for each in ranked}
    assert of_langchain == {int(each.node.node_id): each.score for each in results}
    assert of_langchain == pytest.approx({place: right[place] for place in asked}, abs=TOLERANCE)


@pytest.fixture
def vllm_calibrated(cross_encoder: Path, fitted: Path) -> Iterator[VLLMServer]:
    """A server that was started with the options that `rag-rerank calibrate` prints."""
    require_server()
    with serving(cross_encoder, *shlex.split(Calibration.load(fitted).pooler_options)) as server:
        yield server


def test_a_server_with_the_printed_options_gives_them_itself(vllm_calibrated: VLLMServer, right: list[float]):
    with VLLMScorer(vllm_calibrated.base_url) as scorer:
        assert scorer.score(*pairs()) == pytest.approx(right, abs=TOLERANCE)
