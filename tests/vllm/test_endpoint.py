"""Users paste all kinds of addresses."""

import pytest

from rag_rerank import ConfigError, VLLMScorer
from rag_rerank.vllm.endpoint import Endpoint


@pytest.mark.parametrize(
    ("base_url", "root", "label"),
    [
        ("http://localhost:8000", "http://localhost:8000", "localhost:8000"),
        ("http://localhost:8000/", "http://localhost:8000", "localhost:8000"),
        ("http://localhost:8000/v1", "http://localhost:8000", "localhost:8000"),
        ("http://localhost:8000/v1/", "http://localhost:8000", "localhost:8000"),
        ("http://localhost:8000/score", "http://localhost:8000", "localhost:8000"),
        ("http://localhost:8000/v1/score", "http://localhost:8000", "localhost:8000"),
        ("http://localhost:8000/v1/rerank/", "http://localhost:8000", "localhost:8000"),
        ("https://gateway.example/team/reranker/v1", "https://gateway.example/team/reranker", "gateway.example:443"),
        (" http://[::1]:8000 ", "http://[::1]:8000", "[::1]:8000"),
        ("http://host", "http://host", "host:80"),
        ("http://host/v2", "http://host", "host:80"),
        ("http://host/v2/rerank", "http://host", "host:80"),
        ("http://host/v1/reranking", "http://host", "host:80"),
        ("http://host/rerank/v1", "http://host/rerank", "host:80"),
        ("http://host/score/v1/score", "http://host/score", "host:80"),
        ("http://host/reranker", "http://host/reranker", "host:80"),
    ],
)
def test_an_address_may_end_in_a_path_of_the_api(base_url: str, root: str, label: str):
    """What follows the server's root is dropped; a gateway's own path is kept."""
    assert Endpoint.parse(base_url) == Endpoint(root, label)


@pytest.mark.parametrize(
    ("base_url", "rerank", "first"),
    [
        ("http://host", "/v1/rerank", "/v1/score"),
        ("http://host/v1", "/v1/rerank", "/v1/score"),
        ("http://host/v1/score", "/v1/rerank", "/v1/score"),
        ("http://host/v2", "/v2/rerank", "/v2/rerank"),
        ("http://host/v2/rerank", "/v2/rerank", "/v2/rerank"),
        ("http://host/rerank", "/rerank", "/rerank"),
        ("http://host/v1/reranking", "/v1/reranking", "/v1/reranking"),
    ],
)
def test_the_path_says_where_the_rerank_api_is(base_url: str, rerank: str, first: str):
    """It is taken as it is; "auto" begins with it, and ends with text-embeddings-inference."""
    endpoint = Endpoint.parse(base_url)
    assert endpoint.forms("rerank") == [("rerank", rerank)]
    assert endpoint.forms("score")[0] == ("score", "/v1/score")
    forms = endpoint.forms("auto")
    assert (forms[0].path, forms[-1]) == (first, ("tei", "/rerank"))
    assert {form.path for form in forms} >= {"/v1/score", "/v1/rerank", "/v2/rerank", "/rerank"}
    assert len(set(forms)) == len(forms)


@pytest.mark.parametrize("path", ["/score", "/rerank"])
def test_a_server_may_be_below_a_path_that_is_called_so(path: str):
    """Where it is not one level above, as is more usual; a version behind the path makes it clear."""
    endpoint = Endpoint.parse(f"http://host{path}")
    assert [form.path for form in endpoint.forms("score")] == ["/v1/score", f"{path}/v1/score"]
    assert endpoint.lists("score") == ["/v1/models", f"{path}/v1/models"]
    assert Endpoint.parse(f"http://host{path}/v1").forms("score") == [("score", "/v1/score")]


def test_one_server_is_asked_once_however_its_address_is_written():
    """What follows the root does not make another server."""
    scorer = VLLMScorer(["http://host", "http://host/v1", "http://host/v1/score"])
    assert repr(scorer) == "VLLMScorer('http://host')"


@pytest.mark.parametrize(
    ("base_url", "reason"),
    [
        ("localhost:8000", "http://"),
        ("ftp://host", "http://"),
        ("file:///etc/passwd", "http://"),
        ("http://", "no host"),
        ("http://host:99999", "not a URL"),
        ("http://host:0", "port 0"),
        *((url, "not a URL") for url in ("http://☃.test", "http://xn--", "http://h\x7f", "http://h/\ud800")),
        ("http://host/?key=1", "query"),
        (3, "string"),
    ],
)
def test_what_is_no_address_is_refused_at_construction(base_url: str, reason: str):
    """With the reason, and nothing sent."""
    with pytest.raises(ConfigError, match=reason):
        VLLMScorer(base_url)


@pytest.mark.parametrize(
    "base_url",
    [
        "http://user:hunter2@host",
        "user:hunter2@host:8000",
        "http:/user:hunter2@host",
        "http://user:hunter2/x@host:80",
        "http://user:[hunter2]@host",
        "host/v1?key=hunter2",
    ],
)
def test_a_password_in_the_address_is_refused_and_not_repeated(base_url: str):
    """It would end up in logs, also where the address is wrong in other ways."""
    with pytest.raises(ConfigError, match="VLLM_API_KEY|query") as caught:
        VLLMScorer(base_url)
    assert "hunter2" not in str(caught.value)


def test_the_environment_names_the_server_where_the_caller_does_not(monkeypatch: pytest.MonkeyPatch):
    """An argument wins over VLLM_BASE_URL, which wins over localhost:8000."""
    assert "http://localhost:8000" in repr(VLLMScorer())
    monkeypatch.setenv("VLLM_BASE_URL", "http://elsewhere:9000/v1, ,")
    assert "http://elsewhere:9000'" in repr(VLLMScorer())
    assert "http://here:1'" in repr(VLLMScorer("http://here:1"))


@pytest.mark.parametrize(
    ("base_url", "private"),
    [
        ("https://gateway.example", True),
        ("http://localhost:8000", True),
        ("http://LOCALHOST", True),
        ("http://vllm.localhost", True),
        ("http://127.0.0.1:8000", True),
        ("http://127.9.9.9", True),
        ("http://[::1]:8000", True),
        ("http://gateway.example", False),
        ("http://notlocalhost", False),
        ("http://localhost.example", False),
        ("http://127.0.0.1.example", False),
        ("http://10.0.0.1", False),
        ("http://[::ffff:127.0.0.1]", True),
        ("http://localhost.", True),
        ("http://0.0.0.0:8000", True),  # what vLLM's log says
        ("http://[2001:db8::1]", False),
    ],
)
def test_what_is_encrypted_or_stays_here_is_private(base_url: str, private: bool):
    """A key may go there; a name that only looks like this machine's is another's."""
    assert Endpoint.parse(base_url).is_private is private
