"""What lets requests in and how they go: the user's client, headers, keys and proxies."""

import asyncio
import itertools
import logging
import math
import pickle
import time
import traceback
import zlib
from typing import Any

import httpx
import pytest

from rag_rerank import AuthError, BackendRejected, BackendUnavailable, ConfigError, RerankError, VLLMScorer
from rag_rerank.vllm.keys import Keys, causes
from tests.faulty_server import HANG, RESET, FaultyServer, Request, Steps, http, on_scores, oracle, refusal, right
from tests.vllm.faults.common import soon

EXACT = [oracle("q", "a")]


def make_client() -> httpx.AsyncClient:
    return httpx.AsyncClient(headers={"X-Mine": "1"}, timeout=0.001)


def current_key() -> str:
    return "current"


class TestClient:
    """A user's own, as it is."""

    def test_it_is_made_once_for_each_event_loop(self):
        """Its headers go along, its time limit does not; it is closed with the loop."""
        made: list[httpx.AsyncClient] = []

        def make() -> httpx.AsyncClient:
            made.append(make_client())
            return made[-1]

        with FaultyServer() as server, VLLMScorer(server.base_url, http_client=make) as scorer:
            for _ in range(2):
                assert scorer.score("q", ["a"]) == EXACT
                assert asyncio.run(scorer.ascore("q", ["a"])) == EXACT
            assert [client.is_closed for client in made] == [False, True, True]
            assert {request.headers["x-mine"] for request in server.requests} == {"1"}
        assert soon(lambda: made[0].is_closed)

    def test_its_transport_and_hooks_are_used(self):
        """Ours checks what comes of it all the same, and follows no redirect."""
        seen: list[str] = []

        async def hook(request: httpx.Request) -> None:
            seen.append(request.url.path)

        def answer(request: httpx.Request) -> httpx.Response:
            return httpx.Response(307, headers={"Location": "http://elsewhere"})

        def make() -> httpx.AsyncClient:
            transport = httpx.MockTransport(answer)
            return httpx.AsyncClient(transport=transport, event_hooks={"request": [hook]}, follow_redirects=True)

        with VLLMScorer(model="m", http_client=make) as scorer, pytest.raises(Exception, match="a redirect"):
            scorer.score("q", ["a"])
        assert seen == ["/version", "/v1/models", "/v1/score"]

    @pytest.mark.parametrize(
        ("brings", "sent"),
        [
            ({"auth": ("me", "canary-1")}, "Basic "),
            ({"headers": {"Authorization": "Bearer canary-2"}}, "Bearer canary-2"),
        ],
    )
    @pytest.mark.parametrize("settings", [{}, {"api_key": "canary-3"}])
    def test_its_own_authorization(
        self, brings: dict[str, Any], sent: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ):
        """Goes before VLLM_API_KEY, but not before a key that is given; no error has it."""
        monkeypatch.setenv("VLLM_API_KEY", "canary-4")
        behave = on_scores(lambda request: refusal(401, f"wrong: {request.headers['authorization']}"))
        settings = {"http_client": lambda: httpx.AsyncClient(**brings), **settings}
        with FaultyServer(behave) as server, VLLMScorer(server.base_url, **settings) as scorer:
            with pytest.raises(AuthError, match="wrong") as caught:
                scorer.score("q", ["a"])
            authorization = server.requests[-1].headers["authorization"]
        assert authorization.startswith("Bearer canary-3" if "api_key" in settings else sent)
        assert authorization.split()[1] not in f"{caught.value} {caught.value.body}"

    @pytest.mark.parametrize("name", ["Authorization", "X-Api-Key"])
    @pytest.mark.parametrize("end", ["", "\n"])
    def test_its_secret_headers_are_in_no_error(self, name: str, end: str):
        """Whether the server repeats one, or no header can hold it: a key that was read from a file, with its end."""
        behave = on_scores(lambda request: refusal(401, f"wrong: {request.headers[name.lower()]}"))
        settings = {"http_client": lambda: httpx.AsyncClient(headers={name: f"canary-5ecret{end}"}), "max_retries": 0}
        with FaultyServer(behave) as server, VLLMScorer(server.base_url, **settings) as scorer:
            with pytest.raises(RerankError, match="Illegal header value" if end else "wrong: ") as caught:
                scorer.score("q", ["a"])
            assert "canary" not in "".join(traceback.format_exception(caught.value)) + f"{caught.value.body}"

    @pytest.mark.parametrize(
        ("behave", "outcome"),
        [
            (lambda request: None, EXACT),
            (lambda request: refusal(401), AuthError),
            (lambda request: refusal(400), BackendRejected),
            (lambda request: refusal(503), BackendUnavailable),
        ],
    )
    @pytest.mark.parametrize("reads", [True, False])
    def test_its_hooks_may_read_replies_and_raise(self, reads: bool, behave: Any, outcome: Any):
        """As those that log do, and `raise_for_status`: a refusal stays one."""

        async def hook(response: httpx.Response) -> None:
            await response.aread() if reads else response.raise_for_status()

        with FaultyServer(on_scores(behave)) as server:
            make = lambda: httpx.AsyncClient(event_hooks={"response": [hook]})  # noqa: E731
            with VLLMScorer(server.base_url, http_client=make, max_retries=0) as scorer:
                if outcome is EXACT:
                    assert scorer.score("q", ["a"]) == EXACT
                else:
                    with pytest.raises(outcome):
                        scorer.score("q", ["a"])

    def test_what_fails_in_it_is_named(self):
        """An exception of one's own hook, and of the function itself; without words that may hold a secret."""

        async def hook(_: httpx.Request) -> None:
            raise KeyError("canary")

        make = lambda: httpx.AsyncClient(event_hooks={"request": [hook]})  # noqa: E731
        with VLLMScorer("http://127.0.0.1:1", http_client=make, max_retries=0) as scorer:
            with pytest.raises(BackendUnavailable, match="http_client= failed: KeyError") as caught:
                scorer.score("q", ["a"])
            assert "canary" not in str(caught.value)
        with (
            VLLMScorer(http_client=lambda: 1 / 0) as scorer,
            pytest.raises(ConfigError, match="http_client= is a function"),
        ):
            scorer.score("q", ["a"])

    def test_a_proxy_that_it_can_not_read_is_not_repeated(self):
        """httpx quotes all of such an address."""
        with VLLMScorer(http_client=lambda: httpx.AsyncClient(proxy="me:canary@proxy:3128")) as scorer:
            with pytest.raises(ConfigError, match="http_client= is a function, which failed: ValueError") as caught:
                scorer.score("q", ["a"])
            assert "canary" not in "".join(traceback.format_exception(caught.value))

    @pytest.mark.parametrize("wrong", [httpx.AsyncClient(), 3, lambda: 3, httpx.Client])
    def test_anything_else_is_refused(self, wrong: Any):
        """As early as it shows."""
        with pytest.raises(ConfigError, match="http_client must"):
            VLLMScorer(http_client=wrong).score("q", ["a"])

    def test_one_client_for_two_loops_is_refused(self):
        """It would die with the first."""
        client = httpx.AsyncClient()
        with FaultyServer() as server, VLLMScorer(server.base_url, http_client=lambda: client) as scorer:
            assert scorer.score("q", ["a"]) == EXACT
            with pytest.raises(ConfigError, match="a new client each time"):
                asyncio.run(scorer.ascore("q", ["a"]))

    def test_copies_for_other_processes(self):
        """A function goes by its name; one without is refused, and so is what is secret."""
        with FaultyServer() as server:
            also = {"default_headers": {"X-Team": "search"}, "http_client": make_client}
            scorer = VLLMScorer(server.base_url, api_key=current_key, **also)
            with pickle.loads(pickle.dumps(scorer)) as copy:  # noqa: S301
                assert copy.score("q", ["a"]) == EXACT
            assert server.requests[-1].headers["x-mine"] == "1"
            assert server.requests[-1].headers["authorization"] == "Bearer current"
            assert server.requests[-1].headers["x-team"] == "search"
        over_http = VLLMScorer("http://rr", api_key=current_key, send_key_over_http=True, default_query={"v": "2"})
        assert pickle.loads(pickle.dumps(over_http)).client.transport.keys.query == {"v": "2"}  # noqa: S301
        for settings in ({"http_client": lambda: None}, {"api_key": lambda: "k"}):
            with pytest.raises(ConfigError, match=f"{next(iter(settings))} can't go to another process"):
                pickle.dumps(VLLMScorer(**settings))
        with pytest.raises(ConfigError, match="which no pickle carries"):
            pickle.dumps(VLLMScorer(default_headers={"X-Api-Key": "canary"}))


class TestHeadersAndKeys:
    """Go with each request."""

    def test_headers_query_and_our_name(self):
        """Gateways want them."""

        def behave(request: Any) -> Any:
            assert request.path.endswith("?api-version=2")
            return right(type(request)(**{**vars(request), "path": request.path.split("?")[0]}))

        settings = {"default_headers": {"X-Tenant": "search"}, "default_query": {"api-version": "2"}}
        with FaultyServer(behave) as server, VLLMScorer(server.base_url, **settings) as scorer:
            assert scorer.score("q", ["a"]) == EXACT
            headers = server.requests[-1].headers
        assert headers["x-tenant"] == "search"
        assert headers["user-agent"].startswith("rag-rerank/")

    @pytest.mark.parametrize("headers", [{"Content-Type": "x"}, {"a b": "x"}, {"X": "a\r\nb"}, {"X": 1}])
    def test_headers_that_can_not_be_sent_are_refused(self, headers: dict[str, Any]):
        """At construction."""
        with pytest.raises(ConfigError, match="default_headers"):
            VLLMScorer(default_headers=headers)

    def test_a_key_that_changes(self):
        """Asked for before each request; where that fails, no request is sent."""
        keys = iter(["one", "two", "three"])
        with FaultyServer() as server, VLLMScorer(server.base_url, api_key=lambda: next(keys)) as scorer:
            assert scorer.score("q", ["a"]) == EXACT
            sent = [request.headers["authorization"] for request in server.requests]
            assert sent == ["Bearer one", "Bearer two", "Bearer three"]
            with pytest.raises(BackendUnavailable, match="api_key= is a function, which failed"):
                scorer.score("q", ["a"])
        for key in (b"one", "one\n"):
            with pytest.raises(ConfigError, match="what the function api_key= gave"):
                VLLMScorer(server.base_url, api_key=lambda key=key: key).score("q", ["a"])

    def test_a_header_takes_the_keys_place(self):
        """Said twice, the header is meant."""
        settings = {"api_key": "canary-6", "default_headers": {"Authorization": "Basic canary-7"}}
        with FaultyServer() as server, VLLMScorer(server.base_url, **settings) as scorer:
            assert scorer.score("q", ["a"]) == EXACT
            assert {request.headers["authorization"] for request in server.requests} == {"Basic canary-7"}

    def test_a_key_for_each_server(self):
        """By address; one without gets none."""
        with FaultyServer() as one, FaultyServer() as two:
            with VLLMScorer([one.base_url, two.base_url], api_key={f"{one.base_url}/v1": "first"}) as scorer:
                for _ in range(2):
                    assert scorer.score("q", ["a"]) == EXACT
            assert {request.headers.get("authorization") for request in one.requests} == {"Bearer first"}
            assert {request.headers.get("authorization") for request in two.requests} == {None}
        with pytest.raises(ConfigError, match="api_key names servers"):
            VLLMScorer("http://localhost:1", api_key={"http://localhost:2": "x"})

    def test_a_secret_header_is_guarded_as_the_key_is(self):
        """Not sent unencrypted to another machine."""
        with pytest.raises(ConfigError, match="unencrypted"):
            VLLMScorer("http://reranker:8000", default_headers={"X-Api-Key": "canary"})

    def test_no_key_is_in_a_log_or_a_cause(self, caplog: pytest.LogCaptureFixture):
        """httpx logs addresses, with their query, and its errors hold the request."""
        caplog.set_level(logging.DEBUG, "httpx")
        settings = {"default_query": {"api_key": "canary-1"}, "api_key": "canary-2", "http_client": httpx.AsyncClient}
        with FaultyServer(lambda request: [RESET] if request.wants_scores else None) as server:
            settings |= {"model": "m", "max_retries": 0}
            with VLLMScorer(server.base_url, **settings) as scorer, pytest.raises(BackendUnavailable) as caught:
                scorer.score("q", ["a"])
        assert "/v1/models" in caplog.text
        assert "canary" not in caplog.text
        (request,) = [each.request for each in causes(caught.value) if isinstance(each, httpx.RequestError)]
        assert "canary" not in f"{request.url} {request.headers.raw}"

    def test_no_error_page_takes_long_to_search(self):
        """Backslashes, which a key may have before each letter that is none, and as many as are read."""
        keys = Keys([], headers={"X-Api-Key": "_canary-5"})
        began = time.thread_time()
        assert keys.scrub("\\" * (64 << 10), {}).count("\\") == 64 << 10
        assert time.thread_time() - began < 2

    def test_short_keys_do_not_spoil_answers(self):
        """Only what an error says is searched for the key, and only for one of a plausible length."""
        with FaultyServer() as server:
            for key in ("0", "x", "score"):
                with VLLMScorer(server.base_url, api_key=key) as scorer:
                    assert scorer.score("q", ["a"]) == EXACT

    def test_errors_tell_status_id_and_body(self):
        """Without the key."""
        key = "canary-5ecret"
        behave = on_scores(lambda request: refusal(401, f"bad key {key}", X_Request_Id="abc"))
        with (
            FaultyServer(behave) as server,
            VLLMScorer(server.base_url, api_key=key) as scorer,
            pytest.raises(AuthError) as caught,
        ):
            scorer.score("q", ["a"])
        assert (caught.value.status, caught.value.request_id) == (401, "abc")
        assert "bad key [key]" in str(caught.value.body)


@pytest.mark.parametrize(("encoding", "bits"), [("gzip", 31), ("deflate", 15)])
def test_a_gateway_that_compresses_everything(encoding: str, bits: int):
    """Though it was asked for plain."""

    def behave(request: Request) -> Steps:
        packer = zlib.compressobj(wbits=bits)
        body = packer.compress(b"".join(right(request)).split(b"\r\n\r\n", 1)[1]) + packer.flush()
        return [http(body, Content_Encoding=encoding)]

    with FaultyServer(behave) as server, VLLMScorer(server.base_url) as scorer:
        assert scorer.score("q", ["a"]) == EXACT


class TestTimeLimits:
    """`timeout` is the call's; httpx's own are each try's."""

    def test_none_is_no_bound(self):
        """Only a deadline ends such a call."""
        with FaultyServer() as server, VLLMScorer(server.base_url, timeout=None) as scorer:
            assert scorer.score("q", ["a"]) == EXACT
            assert scorer.score("q", ["a"], deadline=10) == EXACT

    def test_httpx_limits_bound_each_try(self):
        """So there are three."""
        with FaultyServer(on_scores(lambda request: [HANG])) as server:
            scorer = VLLMScorer(server.base_url, timeout=httpx.Timeout(0.1))
            with scorer, pytest.raises(BackendUnavailable, match="no answer"):
                scorer.score("q", ["a"])
            assert len(server.score_requests) == 3

    def test_more_than_a_thread_can_wait(self):
        """300 years."""
        with FaultyServer() as server, VLLMScorer(server.base_url, timeout=1e10) as scorer:
            assert scorer.score("q", ["a"]) == EXACT


class TestProxies:
    """From the environment, for other machines only."""

    @pytest.fixture(autouse=True)
    def _no_other(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
    def test_this_machine_is_asked_directly(self, host: str, monkeypatch: pytest.MonkeyPatch):
        """The proxy would get the key."""
        with FaultyServer() as proxy, FaultyServer() as server:
            monkeypatch.setenv("HTTP_PROXY", proxy.base_url)
            url = server.base_url.replace("127.0.0.1", host)
            with VLLMScorer(url, api_key="canary-5ecret") as scorer:
                assert scorer.score("q", ["a"]) == EXACT
            assert proxy.requests == []

    def test_another_machine_is_asked_through_it(self, monkeypatch: pytest.MonkeyPatch):
        """Unless NO_PROXY names it: by name, domain, address, network."""
        with FaultyServer() as proxy:
            monkeypatch.setenv("HTTP_PROXY", proxy.label)  # without http://, as many write it
            with VLLMScorer("http://10.1.2.3:8000", max_retries=0) as scorer, pytest.raises(Exception, match="404"):
                scorer.score("q", ["a"])
            assert proxy.requests[0].path == "http://10.1.2.3:8000/version"

    @pytest.mark.parametrize(
        "exception",
        [
            "*",
            "gpu.test",
            "GPU.test.",
            ".gpu.test",
            ".test",
            "*.test",
            "http://gpu.test:8000",
            "gpu.test:8000, x",
            "x gpu.test",
        ],
    )
    def test_exceptions(self, exception: str, monkeypatch: pytest.MonkeyPatch):
        """A proxy that can't be used does no harm where it does not apply."""
        monkeypatch.setenv("ALL_PROXY", "socks://proxy:1")
        monkeypatch.setenv("NO_PROXY", exception)
        VLLMScorer("http://gpu.test:8000")
        with pytest.raises(ConfigError):
            VLLMScorer("http://other:8000") if exception != "*" else VLLMScorer("ftp://x")

    def test_the_one_for_the_scheme_goes_before_the_one_for_all(self, monkeypatch: pytest.MonkeyPatch):
        """As curl has it; and the dot that may end a name is none of an exception's business."""
        monkeypatch.setenv("HTTP_PROXY", "http://proxy:1")
        monkeypatch.setenv("ALL_PROXY", "socks://other:1")
        monkeypatch.setenv("NO_PROXY", "other.test")
        VLLMScorer("http://gpu.test")
        VLLMScorer("https://other.test.")
        with pytest.raises(ConfigError, match="ALL_PROXY"):
            VLLMScorer("https://gpu.test")

    @pytest.mark.parametrize("exception", ["10.0.0.0/8", "10.1.2.3", "10.1.2.3:8000", "x,[fd00::1],10.1.0.0/16"])
    def test_networks(self, exception: str, monkeypatch: pytest.MonkeyPatch):
        """As curl and Go read them."""
        monkeypatch.setenv("ALL_PROXY", "socks://proxy:1")
        monkeypatch.setenv("NO_PROXY", exception)
        VLLMScorer("http://10.1.2.3:8000")

    @pytest.mark.parametrize(
        "proxy", ["socks://proxy:1", "socks4://proxy:1", "http://proxy:x", "http://", "http://[::1"]
    )
    def test_one_that_can_not_be_used_names_its_variable(self, proxy: str, monkeypatch: pytest.MonkeyPatch):
        """At construction, without what may be a password."""
        monkeypatch.setenv("HTTPS_PROXY", proxy.replace("//", "//user:canary@"))
        with pytest.raises(ConfigError, match="HTTPS_PROXY") as caught:
            VLLMScorer("https://reranker.test")
        assert "canary" not in str(caught.value)

    @pytest.mark.parametrize("proxy", ["http://☃.test:1", "http://h\x7f:1"])
    def test_one_that_no_url_can_hold(self, proxy: str, monkeypatch: pytest.MonkeyPatch):
        """At construction, too."""
        monkeypatch.setenv("HTTP_PROXY", proxy)
        with pytest.raises(ConfigError, match=r"the proxy that the environment names for gpu\.test:80 is not a URL"):
            VLLMScorer("http://gpu.test")

    @pytest.mark.parametrize(
        ("url", "answer", "error", "words"),
        [
            ("http://gpu.test", 407, BackendRejected, "407.*HTTP_PROXY=http://user:password@"),
            ("https://gpu.test", 407, BackendUnavailable, "connect through the proxy that the environment names: 407"),
            ("https://gpu.test", 403, BackendUnavailable, "connect through the proxy that the environment names: 403"),
        ],
    )
    def test_one_that_refuses(self, url: str, answer: int, error: type, words: str, monkeypatch: pytest.MonkeyPatch):
        """The error says that there is a proxy in between."""
        with FaultyServer(lambda request: [http("", answer)]) as proxy:
            monkeypatch.setenv("ALL_PROXY", proxy.base_url)
            with VLLMScorer(url, max_retries=0) as scorer, pytest.raises(error, match=words):
                scorer.score("q", ["a"])

    def test_authorities_that_can_not_be_read(self, monkeypatch: pytest.MonkeyPatch):
        """Told before anything is sent."""
        monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
        with pytest.raises(ConfigError, match="SSL_CERT_FILE"):
            VLLMScorer("https://127.0.0.1:1").score("q", ["a"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_url": []}, "empty list"),
        ({"extra_body": {"text_2": ["x"], "request_id": "1"}}, "must not hold request_id, text_2"),
        ({"template": "qwen3-reranker", "max_tokens_per_query": 9}, "lose its end"),
        ({"template": "qwen3-reranker", "max_tokens_per_doc": 9}, "lose its end"),
        ({"template": "qwen3-reranker", "truncate_prompt_tokens": 9}, "lose its end"),
    ],
)
def test_what_would_score_something_else_is_refused(settings: dict[str, Any], words: str):
    """At construction."""
    with pytest.raises(ConfigError, match=words):
        VLLMScorer(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "\ud800"},
        {"instruction": "\ud800"},
        {"query_prompt": "\ud800"},
        {"template": "\ud800"},
        {"extra_body": {"x": {1}}},
        {"chat_template_kwargs": {"x": object()}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_no_request_can_hold_is_refused(settings: dict[str, Any]):
    """At construction, by name."""
    with pytest.raises(ConfigError, match="can't be sent as JSON"):
        VLLMScorer(**settings)


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (("model", "instruction", "query_prompt", "document_prompt"), (3, b"x", ["x"])),
        (("default_headers", "default_query", "chat_template_kwargs", "extra_body"), ("x", 3, [("a", "b")])),
        (("use_activation", "send_key_over_http"), ("false", 0)),
        (("max_retries", "chunk_size", "max_concurrency"), ("3", 1.5, True, None, -1)),
        (("max_waiting_calls", "max_tokens_per_query", "max_tokens_per_doc"), ("3", 1.5, True, 0)),
        (("truncate_prompt_tokens",), ("3", 1.5, True, 0, -2)),
        (("timeout", "connect_timeout", "attempt_timeout"), ("3", True, 0, -1, math.nan)),
        (("template",), (3, b"x")),
        (("priority",), ("high", 1.5)),
    ],
    ids=lambda given: given[0] if isinstance(given[0], str) else "",
)
def test_arguments_of_the_wrong_type_or_out_of_range(names: tuple[str, ...], values: tuple[Any, ...]):
    """At construction, by name; text such as "false" is not taken for a switch."""
    for name, value in itertools.product(names, values):
        with pytest.raises(ConfigError, match=f"^{name} must be"):
            VLLMScorer(**{name: value})


def test_the_usage_of_the_last_call():
    """Of this thread: how many requests, how many tokens."""
    with FaultyServer() as server, VLLMScorer(server.base_url) as scorer:
        scorer.score("q", ["a", "b"])
        assert scorer.usage is not None
        assert (scorer.usage.requests, scorer.usage.prompt_tokens) == (3, 2)
        scorer.score("q", ["a", "b"])
        assert (scorer.usage.requests, scorer.usage.prompt_tokens) == (1, 2)


def test_the_log_tells_of_retries_and_rests(caplog: pytest.LogCaptureFixture):
    """At INFO, with no text of the user's."""
    caplog.set_level(logging.INFO, "rag_rerank.vllm")
    with (
        FaultyServer(on_scores(lambda request: refusal(503), times=1)) as server,
        VLLMScorer(server.base_url) as scorer,
    ):
        assert scorer.score("a secret question", ["a"]) == [oracle("a secret question", "a")]
    told = " ".join(record.getMessage() for record in caplog.records if record.name == "rag_rerank.vllm")
    assert "503" in told
    assert "Attempt 2 follows" in told
    assert "rests" in told
    assert "secret" not in told
