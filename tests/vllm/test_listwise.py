"""Long lists of a listwise model: what is asked of a server, and how vectors of several blocks are compared.

A real server is asked in ``test_family_parity.py``.
"""

import json

import numpy as np
import pytest

from rag_rerank import BadReply, ConfigError
from rag_rerank.vllm.listwise import check_options, compared
from rag_rerank.vllm.wire import Options, ServerFacts, read_vectors, vectors_request


def test_documents_are_compared_with_the_mean_of_the_queries():
    """As in the code of jina-reranker-v3, with numpy."""
    random = np.random.default_rng(0)
    blocks = [random.normal(size=(count, 7)) for count in (4, 2)]  # the query is the last

    def cosines(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
        return vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)

    weights = [max((1 + cosines(block[:-1], block[-1])) / 2) for block in blocks]
    query = np.average([block[-1] for block in blocks], axis=0, weights=weights)
    expected = cosines(np.concatenate([block[:-1] for block in blocks]), query)
    assert compared([block.tolist() for block in blocks]) == pytest.approx(expected.tolist(), abs=1e-12)


def test_the_query_is_asked_last():
    request = vectors_request(ServerFacts((0, 32), "m"), ["a", "b", "q"], "id")
    assert (request.method, request.path, request.id) == ("POST", "/pooling", "id")
    assert json.loads(request.body) == {"model": "m", "task": "token_embed", "input": ["a", "b", "q"]}


def test_vectors_are_read():
    body = {"id": "x", "model": "m", "data": [{"index": 0, "data": [[1, 2.5], [3, 4]]}]}
    answer = read_vectors(json.dumps(body).encode(), 2)
    assert (answer.scores, answer.id, answer.model) == ([1, 2.5, 3, 4], "x", "m")


@pytest.mark.parametrize(
    "data", [None, [], [3], [{}], [{"data": [[1], [2]]}], [{"data": [[1], [2, 3], [4]]}], [{"data": [["1"], [2], [3]]}]]
)
def test_anything_else_is_a_bad_reply(data: object):
    with pytest.raises(BadReply, match="the answer has"):
        read_vectors(json.dumps({"data": data}).encode(), 3)


@pytest.mark.parametrize("name", ["instruction", "max_tokens_per_doc", "max_tokens_per_query"])
def test_what_pooling_cannot_be_told_is_refused(name: str):
    """It would be ignored."""
    with pytest.raises(ConfigError, match="only with up to 125 documents"):
        check_options(Options(**{name: "Find." if name == "instruction" else 7}))
    check_options(Options())
