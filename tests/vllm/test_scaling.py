"""More than one server, and one server with more than one engine: every part of a call is scored, by all of them."""

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from rag_rerank import LocalScorer, VLLMScorer
from tests.conftest import require_server
from tests.pairs import largest_difference, pairs
from tests.soak import Servers
from tests.vllm_server import VLLMServer, serving

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def query_and_documents() -> tuple[str, list[str]]:
    queries, documents = pairs()
    return queries[0], [f"{number} {text}" for number in range(10) for text in documents]


def finished(base_url: str) -> dict[str, float]:
    """How many documents each engine of a server has scored, as vLLM counts requests."""
    with urllib.request.urlopen(f"{base_url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    counts: dict[str, float] = {}
    for line in lines:
        if line.startswith("vllm:request_success_total{"):
            engine = re.search(r'engine="(\d+)"', line)[1]
            counts[engine] = counts.get(engine, 0) + float(line.rpartition(" ")[2])
    return counts


class TestTwoServers:
    """A list in base_url."""

    def test_a_call_is_shared_out_among_them(
        self, vllm_pair: Servers, local_cross_encoder: LocalScorer, query_and_documents
    ):
        """600 documents in 12 requests: 6 to each, the scores in their places.

        Both are compared by two letters before, and one is asked what a template takes.
        """
        query, documents = query_and_documents
        before = [sum(finished(url).values()) for url in vllm_pair.base_urls]
        with VLLMScorer(vllm_pair.base_urls, chunk_size=50, timeout=120) as scorer:
            scores = scorer.score(query, documents)
        after = [sum(finished(url).values()) for url in vllm_pair.base_urls]
        assert largest_difference(scores, local_cross_encoder.score(query, documents)) <= TOLERANCE
        assert all(301 <= now - then <= 302 for now, then in zip(after, before, strict=True))


@pytest.fixture(scope="module")
def vllm_data_parallel(cross_encoder: Path) -> Iterator[VLLMServer]:
    require_server()
    with serving(cross_encoder, "--data-parallel-size", "2") as server:
        yield server


class TestDataParallel:
    """``--data-parallel-size 2``: one address, two engines behind it."""

    def test_both_engines_take_part_and_the_scores_are_the_same(
        self, vllm_data_parallel: VLLMServer, local_cross_encoder: LocalScorer, query_and_documents
    ):
        """Nothing about it is the client's business."""
        query, documents = query_and_documents
        with VLLMScorer(vllm_data_parallel.base_url, timeout=120) as scorer:
            scores = scorer.score(query, documents)
        assert largest_difference(scores, local_cross_encoder.score(query, documents)) <= TOLERANCE
        counts = finished(vllm_data_parallel.base_url)
        assert counts.keys() == {"0", "1"}
        assert min(counts.values()) >= 100
