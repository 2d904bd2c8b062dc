"""What must not get out, and what must not get in: keys, documents as code, other people's addresses."""

import asyncio
import copy
import json
import logging
import pickle
import socket
import subprocess
import sys
import traceback
from typing import Any

import httpx
import pytest

from rag_rerank import BackendRejected, ConfigError, RerankError, VLLMScorer
from tests.faulty_server import HANG, Behaviour, FaultyServer, http, on_scores

KEY = "sk-canary-5ecret-0123456789"


def everything_about(error: BaseException) -> str:
    """An error as logs, tracebacks with local variables, and debuggers show it, with all that it came from."""
    shown: list[str] = []
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            # Locals of this file hold the key; those of the libraries below must not. rich and Sentry look into dicts.
            if frame.f_code.co_filename != __file__:
                shown += [f"{dict(value) if isinstance(value, dict) else value!r}" for value in frame.f_locals.values()]
        shown += [str(error), repr(error), str(vars(error)), str(error.args), str(pickle.dumps(error))]
        error = error.__cause__ or error.__context__
    return "\n".join(shown)


class TestKeys:
    """A key is in the requests and nowhere else."""

    @pytest.mark.parametrize("settings", [{}, {"http_client": httpx.AsyncClient}])
    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_no_error_log_or_copy_shows_it(
        self,
        asynchronous: bool,
        settings: dict[str, Any],
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ):
        """A refused connection, a gateway that repeats the key it refuses, a broken answer: with logs at DEBUG."""
        caplog.set_level(logging.DEBUG)
        shown: list[str] = []

        def fail(base_url: str) -> None:
            scorer = VLLMScorer(base_url, api_key=KEY, model="m", max_retries=0, **settings)
            shown.extend([repr(scorer), str(scorer), str(vars(scorer)), str(pickle.dumps(scorer))])
            shown.append(repr(copy.deepcopy(scorer)))
            with pytest.raises(RerankError) as caught:
                asyncio.run(scorer.ascore("q", ["a"])) if asynchronous else scorer.score("q", ["a"])
            shown.append(everything_about(caught.value))

        fail("http://127.0.0.1:1")
        for answer in (
            answering(401, {"error": {"message": f"Invalid key. Received API Key = {KEY}"}}),
            on_scores(answering(400, {"error": {"message": f"header Authorization: Bearer {KEY}"}})),
            on_scores(answering(200, {"id": f"score-{KEY}", "data": [{"index": KEY, "score": 1.0}]})),
        ):
            with FaultyServer(answer) as server:
                fail(server.base_url)
                assert any(request.headers.get("authorization") == f"Bearer {KEY}" for request in server.requests)
        shown += [record.getMessage() for record in caplog.records]
        shown += list(capfd.readouterr())
        told = [text[max(0, text.index(KEY) - 200) : text.index(KEY) + 40] for text in shown if KEY in text]
        assert not told

    @pytest.mark.parametrize("settings", [{}, {"http_client": httpx.AsyncClient}])
    def test_no_call_that_is_given_up_shows_it(self, settings: dict[str, Any], caplog: pytest.LogCaptureFixture):
        """Nor a key in a header or in the query: the cancellation stands in the traceback of the caller's timeout."""
        caplog.set_level(logging.DEBUG)
        more = {"default_headers": {"x-token": KEY}, "default_query": {"token": KEY}}
        with FaultyServer(on_scores(lambda request: [HANG])) as server:
            scorer = VLLMScorer(server.base_url, api_key=KEY, model="m", **more, **settings)
            with pytest.raises(TimeoutError) as caught:
                asyncio.run(asyncio.wait_for(scorer.ascore("q", ["a"]), 0.5))
            assert server.requests[-1].wants_scores
            assert f"token={KEY}" in server.requests[-1].path
        assert KEY not in everything_about(caught.value)
        assert KEY not in "".join(record.getMessage() for record in caplog.records)

    @pytest.mark.parametrize(
        "settings",
        [
            {"base_url": "ftp://host", "api_key": KEY},
            {"api_key": KEY + "\n"},
            {"default_headers": {"a b": KEY}},
            {"default_query": {1: KEY}},
            {"chunk_size": 0, "default_headers": {"x-token": KEY}},
        ],
    )
    def test_no_wrong_setting_shows_it(self, settings: dict[str, Any]):
        """Nor that of another argument."""
        with pytest.raises(ConfigError) as caught:
            VLLMScorer(**settings)
        assert KEY not in everything_about(caught.value)

    async def test_what_the_caller_was_handling_keeps_its_frames(self):
        """Only our own errors, and what they came from, are without theirs."""
        handled = []
        try:
            raise LookupError("the caller's")  # noqa: TRY301 - a call that is made while it is handled
        except LookupError as error:
            handled.append(error)
            with pytest.raises(ConfigError):
                VLLMScorer("ftp://host")
            with pytest.raises(RerankError):
                await VLLMScorer("http://127.0.0.1:1", model="m", max_retries=0).ascore("q", ["a"])
        assert handled[0].__traceback__ is not None

    def test_the_command_line_has_no_place_for_it(self):
        """Every user of a machine sees its command lines; it comes from the environment."""
        asked = subprocess.run(
            [sys.executable, "-m", "rag_rerank", "score", "--help"], capture_output=True, text=True, check=True
        )
        assert "--api-key" not in asked.stdout
        assert "VLLM_API_KEY" in asked.stdout

    @pytest.mark.parametrize("host", ["10.0.0.7", "rerank.example", "192.168.1.1"])
    def test_it_is_not_sent_unencrypted_to_another_machine(self, host: str, monkeypatch: pytest.MonkeyPatch):
        """Unless that is asked for, whether the key comes as an argument or from the environment."""
        with pytest.raises(ConfigError, match="send_key_over_http"):
            VLLMScorer(f"http://{host}:8000", api_key=KEY)
        with pytest.raises(ConfigError, match="send_key_over_http"):
            VLLMScorer(["http://localhost:8000", f"http://{host}:8000"], api_key=KEY)
        VLLMScorer(f"http://{host}:8000", api_key=KEY, send_key_over_http=True)
        VLLMScorer(f"https://{host}", api_key=KEY)
        VLLMScorer(f"http://{host}:8000")
        monkeypatch.setenv("VLLM_API_KEY", KEY)
        with pytest.raises(ConfigError, match="send_key_over_http"):
            VLLMScorer(f"http://{host}:8000")

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "[::1]", "server.localhost"])
    def test_this_machine_may_have_it(self, host: str):
        """Nobody else can listen there."""
        VLLMScorer(f"http://{host}:8000", api_key=KEY)


class TestAddresses:
    """Only the servers that the caller named are ever spoken to."""

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_a_redirect_sends_nothing_to_anybody(self, status: int):
        """Neither documents nor the key."""
        with FaultyServer() as other, FaultyServer() as server:
            server.behave = answering(status, {}, Location=f"{other.base_url}/v1/score")
            with pytest.raises(BackendRejected, match="redirect"):
                VLLMScorer(server.base_url, api_key=KEY, model="m").score("q", ["a"])
            assert other.connections == 0

    def test_addresses_in_texts_are_never_opened(self, monkeypatch: pytest.MonkeyPatch):
        """Nor files: a document may come from anybody."""
        asked: list[object] = []
        connect = socket.socket.connect

        def connecting(self: socket.socket, address: object) -> None:
            asked.append(address)
            connect(self, address)

        monkeypatch.setattr(socket.socket, "connect", connecting)
        documents = ["http://127.0.0.1:9/x.png", "file:///etc/passwd", "/etc/passwd", "data:image/png;base64,AAAA"]
        with FaultyServer() as server, VLLMScorer(server.base_url) as scorer:
            assert len(scorer.score("https://127.0.0.1:9/query", documents)) == 4
            port = int(server.base_url.rsplit(":", 1)[1])
            sent = json.loads(server.requests[-1].body)
        assert sent["text_2"] == documents
        assert {address[1] for address in asked if isinstance(address, tuple)} <= {port}


def answering(status: int, content: object, **headers: str) -> Behaviour:
    """A server that says the same to everything."""
    return lambda request: [http(json.dumps(content), status, **headers)]
