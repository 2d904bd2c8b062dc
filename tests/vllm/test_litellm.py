"""Behind LiteLLM's real proxy: the scores of the vLLM server behind it, or errors that say whose fault they are."""

from collections.abc import Iterator
from itertools import takewhile

import pytest

from rag_rerank import BackendRejected, BackendUnavailable, DocumentRejected, RerankError, VLLMScorer
from rag_rerank.check import check
from tests.conftest import require_server
from tests.other_servers import program, running
from tests.pairs import largest_difference, pairs
from tests.vllm_server import VLLMServer, free_port

TOLERANCE = 1e-4  # other pairs in a batch, other rounding
PROXY_KEY = "sk-canary-proxy"
CONFIG = """
model_list:
  - model_name: reranker
    litellm_params: {{model: "hosted_vllm/{name}", api_base: "{base_url}"}}
  - model_name: gone
    litellm_params: {{model: "hosted_vllm/gone", api_base: "http://127.0.0.1:{nobody}"}}
general_settings: {{master_key: "{proxy_key}"}}
"""


@pytest.fixture(scope="module")
def vllm_litellm(vllm_released: VLLMServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The proxy's address; it serves a reranker, and one whose server is down."""
    require_server()
    litellm = program(".venv-litellm", "litellm")
    folder = tmp_path_factory.mktemp("litellm")
    served = {"name": vllm_released.name, "base_url": vllm_released.base_url}
    (folder / "config.yaml").write_text(CONFIG.format(**served, nobody=free_port(), proxy_key=PROXY_KEY))
    port = free_port()
    command = [litellm, "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with running(command, f"{url}/health/liveliness", folder / "log", cwd=folder):
        yield url


def behind(proxy: str, model: str = "reranker", **options: object) -> VLLMScorer:
    settings = {"api_key": PROXY_KEY, "endpoint": "rerank", "timeout": 120.0} | options
    return VLLMScorer(proxy, model=model, **settings)


@pytest.mark.parametrize("endpoint", ["rerank", "auto"])
def test_scores_are_those_of_the_server_behind_it(vllm_litellm: str, vllm_released: VLLMServer, endpoint: str):
    """One query and several, each with its own documents."""
    queries, documents = pairs()
    queries, documents = [queries[0]] * 10 + queries[1:4], [text[:500] for text in documents[:13]]
    with VLLMScorer(vllm_released.base_url) as direct:
        expected = direct.score(queries, documents)
    with behind(vllm_litellm, endpoint=endpoint) as scorer:
        assert largest_difference(scorer.score(queries, documents), expected) <= TOLERANCE


async def test_from_an_event_loop(vllm_litellm: str):
    """The same as from a thread."""
    query, *documents = "q", "a", "b", "c"
    async with behind(vllm_litellm) as scorer:
        assert await scorer.ascore(query, documents) == pytest.approx(
            scorer.score(query, documents), rel=1e-6, abs=1e-6
        )


def test_a_document_that_is_too_long_is_named(vllm_litellm: str):
    """LiteLLM drops the limit on tokens, and wraps the server's refusal in words of its own."""
    with behind(vllm_litellm) as scorer, pytest.raises(DocumentRejected, match=r"^documents\[2\] rejected") as caught:
        scorer.score("q", ["a", "b", "word " * 5000, "d"])
    assert caught.value.indices == (2,)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "nobody's"}, BackendRejected),
        ({"model": "gone", "max_retries": 1}, BackendUnavailable),
        ({"api_key": "sk-canary-wrong"}, RerankError),
    ],
    ids=["unknown model", "server is down", "wrong key"],
)
def test_failures_are_told_apart(vllm_litellm: str, options: dict[str, object], error: type[RerankError]):
    """No key is in any of them."""
    with behind(vllm_litellm, **options) as scorer, pytest.raises(error) as caught:
        scorer.score("q", ["a"])
    assert "canary" not in repr(caught.value) + str(caught.value) + str(caught.value.to_dict())


def test_the_examination_names_it(vllm_litellm: str):
    """And says what it drops."""
    with behind(vllm_litellm) as scorer:
        findings = {
            finding.title: finding for finding in takewhile(lambda each: each.title != "Long documents", check(scorer))
        }
    assert findings["Version"].says.startswith("LiteLLM answers")
    assert findings["Options"].says == "LiteLLM drops instruction, usage, or the model has no place for it."
    assert not [finding for finding in findings.values() if finding.verdict == "problem"]
