"""A real infinity server: the scores of its model in this process, one query and several."""

import os
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest

from rag_rerank import LocalScorer, VLLMScorer
from rag_rerank.check import check
from tests.other_servers import program, running
from tests.pairs import largest_difference, pairs
from tests.vllm_server import free_port

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def vllm_infinity(cross_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address; it serves the tiny cross-encoder."""
    infinity = program(".venv-peers-infinity", "infinity_emb")
    port, log = free_port(), tmp_path_factory.mktemp("infinity") / "log"
    options = {"model-id": cross_encoder, "host": "127.0.0.1", "port": port, "engine": "torch", "device": "cpu"}
    command = [infinity, "v2", *(f"--{name}={value}" for name, value in options.items())]
    command += ["--dtype=float32", "--no-bettertransformer", "--no-model-warmup"]
    environment = os.environ | {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    environment.pop("PYTHONPATH", None)
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/health", log, env=environment):
        yield url


@pytest.mark.parametrize(("endpoint", "path"), [("rerank", "/rerank"), ("auto", "")])
def test_scores_are_those_of_its_model(vllm_infinity: str, local_cross_encoder: LocalScorer, endpoint: str, path: str):
    """Over-long documents are cut there as here."""
    queries, documents = pairs()
    queries, documents = [queries[0]] * 10 + queries[1:4], documents[:13]
    with VLLMScorer(vllm_infinity + path, endpoint=endpoint) as scorer:
        assert (
            largest_difference(scorer.score(queries, documents), local_cross_encoder.score(queries, documents))
            <= TOLERANCE
        )


def test_the_examination_names_it(vllm_infinity: str):
    with VLLMScorer(f"{vllm_infinity}/rerank", endpoint="rerank") as scorer:
        findings = {each.title: each for each in takewhile(lambda each: each.title != "Long documents", check(scorer))}
    assert findings["Version"].says.startswith("infinity answers")
