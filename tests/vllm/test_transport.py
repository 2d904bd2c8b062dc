"""Real sockets: what servers and networks do to a client, and what the caller gets."""

import asyncio
import contextlib
import gc
import json
import multiprocessing
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from rag_rerank import BackendRejected, BackendUnavailable, BadReply, DeadlineExceeded, VLLMScorer

Handler = Callable[[str, bytes], bytes]


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: application/json", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def oracle(query: str, document: str) -> float:
    """A score that depends on both texts, so that a mixed-up answer shows."""
    return len(query) + len(document) / 1000


def scores(path: str, body: bytes) -> bytes:
    """A well-behaved server."""
    if path == "/version":
        return http(b'{"version": "0.32.0"}')
    if path == "/v1/models":
        return http(b'{"data": [{"id": "m", "max_model_len": 1000000}]}')
    request = json.loads(body)
    data = [{"index": i, "score": oracle(request["text_1"], text)} for i, text in enumerate(request["text_2"])]
    return http(json.dumps({"data": data}).encode())


class Cut(bytes):
    """An answer after which the connection is closed."""


class Server:
    """An HTTP server of a few lines, so that it can misbehave in every way: `handler` returns the bytes to send."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._open: set[socket.socket] = set()
        self.base_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._open.add(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection, connection.makefile("rb") as stream:
            while line := stream.readline().decode():
                path = line.split()[1]
                headers = dict(header.lower().split(": ", 1) for header in self._headers(stream))
                body = stream.read(int(headers.get("content-length", 0)))
                self.requests.append((path, headers, body))
                answer = self.handler(path, body)
                connection.sendall(answer)
                if isinstance(answer, Cut):
                    break
        self._open.discard(connection)

    @property
    def open_connections(self) -> int:
        return len(self._open)

    @staticmethod
    def _headers(stream) -> Iterator[str]:
        while line := stream.readline().decode().rstrip("\r\n"):
            yield line

    def close(self) -> None:
        self._listener.close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def serve() -> Iterator[Callable[[Handler], Server]]:
    servers: list[Server] = []

    def start(handler: Handler) -> Server:
        servers.append(Server(handler))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def first_score(answer: bytes) -> Handler:
    """Well-behaved except for the first request for scores."""
    answers = iter([answer])
    return lambda path, body: (next(answers, None) if body else None) or scores(path, body)


def every_score(answer: Callable[[], bytes]) -> Handler:
    """Well-behaved except for scores."""
    return lambda path, body: answer() if body else scores(path, body)


@pytest.fixture(params=["sync", "async"])
def score(request: pytest.FixtureRequest) -> Callable[..., list[float]]:
    """`score` and `ascore`: every rule holds for both."""

    def run(scorer: VLLMScorer, *arguments, **options) -> list[float]:
        if request.param == "sync":
            with scorer:
                return scorer.score(*arguments, **options)

        async def call() -> list[float]:
            async with scorer:
                return await scorer.ascore(*arguments, **options)

        return asyncio.run(call())

    return run


class TestAnswers:
    """What a healthy server says is what the caller gets."""

    def test_scores_are_exact_and_in_order(self, serve, score):
        """For every document."""
        documents = ["x" * length for length in (5, 1, 3, 3, 0)]
        assert score(VLLMScorer(serve(scores).base_url), "query", documents) == [oracle("query", d) for d in documents]

    def test_what_is_known_about_the_server_is_asked_once(self, serve):
        """Version and model with the first call, then only scores, over one connection."""
        server = serve(scores)
        with VLLMScorer(server.base_url) as scorer:
            assert scorer.model_name == "unknown"
            for _ in range(3):
                scorer.score("q", ["a"])
            assert scorer.model_name == "m"
        assert [path for path, _, _ in server.requests] == ["/version", "/v1/models"] + ["/v1/score"] * 3
        assert server.connections == 1

    def test_no_documents_send_nothing(self, serve):
        """Not even the question for the version."""
        server = serve(scores)
        VLLMScorer(server.base_url).score("q", [])
        assert server.connections == 0

    def test_the_key_is_sent_as_bearer_token(self, serve, score, monkeypatch: pytest.MonkeyPatch):
        """From the argument, else from VLLM_API_KEY, and from no other variable."""
        monkeypatch.setenv("OPENAI_API_KEY", "another service's")
        server = serve(scores)
        score(VLLMScorer(server.base_url), "q", ["a"])
        assert all("authorization" not in headers for _, headers, _ in server.requests)
        monkeypatch.setenv("VLLM_API_KEY", "from-env")
        score(VLLMScorer(server.base_url), "q", ["a"])
        score(VLLMScorer(server.base_url, api_key="given"), "q", ["a"])
        tokens = [headers.get("authorization") for path, headers, _ in server.requests if path == "/v1/score"]
        assert tokens == [None, "bearer from-env", "bearer given"]  # this server lowers header lines


class TestFaults:
    """Each fault is the error that it is, in time."""

    def test_nobody_there(self, score):
        """Host and port, tries, and a remedy."""
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        with pytest.raises(BackendUnavailable, match=rf"127\.0\.0\.1:{port}, 1 attempt.*Is the vLLM server") as caught:
            score(VLLMScorer(f"http://127.0.0.1:{port}", max_retries=0), "q", ["a"])
        assert caught.value.__cause__ is not None

    def test_a_connection_that_closes_without_an_answer_is_tried_again(self, serve, score):
        """Once is not the end."""
        server = serve(first_score(Cut(b" ")))
        assert score(VLLMScorer(server.base_url), "q", ["a"]) == [oracle("q", "a")]

    def test_half_an_answer_is_no_answer(self, serve, score):
        """A body shorter than announced is tried again, nothing of it is used."""
        whole = http(b'{"data": [{"index": 0, "score": 99}]}' + b" " * 100)
        server = serve(first_score(Cut(whole[:-50])))
        assert score(VLLMScorer(server.base_url), "q", ["a"]) == [oracle("q", "a")]
        assert [path for path, _, _ in server.requests].count("/v1/score") == 2

    def test_a_server_that_never_answers_is_a_timeout(self, serve, score):
        """At the deadline, which the caller's argument sets."""
        released = threading.Event()
        server = serve(every_score(lambda: Cut(b"late" if released.wait(5) else b"")))
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            score(VLLMScorer(server.base_url), "q", ["a"], deadline=0.3)
        assert time.monotonic() - began < 1.5
        released.set()

    def test_a_server_that_drips_is_a_timeout(self, serve, score):
        """One byte now and then keeps every single read alive; the deadline is for the whole."""
        server = serve(scores)
        stop = threading.Event()

        def drip(path: str, body: bytes) -> bytes:
            if path != "/v1/score":
                return scores(path, body)
            connection = max(server._open, key=lambda open_socket: open_socket.fileno())
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not stop.wait(0.1):
                connection.sendall(b" ")
            return Cut()

        server.handler = drip
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            score(VLLMScorer(server.base_url), "q", ["a"], deadline=0.5)
        stop.set()
        assert time.monotonic() - began < 1.5

    def test_an_endless_answer_is_not_read_to_its_end(self, serve, score):
        """The bound is 64 KiB and 256 bytes a document."""
        server = serve(every_score(lambda: http(b" " * 1_000_000)))
        with pytest.raises(BadReply, match="longer than 65792 bytes"):
            score(VLLMScorer(server.base_url, max_retries=0), "q", ["a"])

    def test_a_compressed_answer_is_refused_unread(self, serve, score):
        """204 KB of gzip can be 200 MiB of memory."""
        server = serve(every_score(lambda: http(b"\x1f\x8b", "200 OK", "Content-Encoding: gzip")))
        with pytest.raises(BadReply, match="compressed"):
            score(VLLMScorer(server.base_url, max_retries=0), "q", ["a"])

    def test_redirects_are_not_followed(self, serve, score):
        """The other host never hears of the documents."""
        other = serve(scores)
        location = f"Location: {other.base_url}/v1/score"
        server = serve(every_score(lambda: http(b"", "307 Temporary Redirect", location)))
        with pytest.raises(BackendRejected, match="never followed"):
            score(VLLMScorer(server.base_url), "q", ["a"])
        assert other.connections == 0

    def test_a_cancelled_task_leaves_the_scorer_usable(self, serve):
        """The server sees the disconnect; the next call is answered."""
        slow = threading.Event()
        server = serve(every_score(lambda: Cut(b"late" if slow.wait(5) else b"")))

        async def cancel_then_call() -> list[float]:
            async with VLLMScorer(server.base_url) as scorer:
                task = asyncio.create_task(scorer.ascore("q", ["a"]))
                await asyncio.sleep(0.3)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                server.handler = scores
                return await scorer.ascore("q", ["b"])

        assert asyncio.run(cancel_then_call()) == [oracle("q", "b")]
        slow.set()


def score_in_child(scorer: VLLMScorer, name: str, results) -> None:
    results.put([scorer.score(f"{name}{i}", ["x" * i]) == [oracle(f"{name}{i}", "x" * i)] for i in range(20)])


class TestSharing:
    """Threads, event loops and processes may share one scorer."""

    def test_many_threads(self, serve):
        """Each gets its own answers."""
        with VLLMScorer(serve(scores).base_url) as scorer, ThreadPoolExecutor(16) as pool:
            right = pool.map(lambda i: scorer.score("q", ["x" * i]) == [oracle("q", "x" * i)], range(200))
            assert all(right)

    def test_one_event_loop_after_another(self, serve):
        """An async connection dies with its loop; the scorer lives on, and no connection is left behind."""
        server = serve(scores)
        scorer = VLLMScorer(server.base_url)
        assert [asyncio.run(scorer.ascore("q", ["a"])) for _ in range(5)] == [[oracle("q", "a")]] * 5
        until = time.monotonic() + 5
        while server.open_connections and time.monotonic() < until:
            time.sleep(0.01)
        assert (server.connections, server.open_connections) == (5, 0)

    def test_one_loop_keeps_its_connection(self, serve):
        """Calls in one event loop reuse it."""
        server = serve(scores)

        async def calls() -> None:
            scorer = VLLMScorer(server.base_url)
            for _ in range(3):
                await scorer.ascore("q", ["a"])

        asyncio.run(calls())
        assert server.connections == 1

    def test_event_loops_in_several_threads(self, serve):
        """Each has connections of its own."""
        scorer = VLLMScorer(serve(scores).base_url)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda i: asyncio.run(scorer.ascore("q", ["x" * i])), range(20)))
        assert answers == [[oracle("q", "x" * i)] for i in range(20)]

    def test_a_scorer_that_is_dropped_closes_its_connections(self, serve):
        """Nobody closes a retriever's compressor."""
        server = serve(scores)
        VLLMScorer(server.base_url).score("q", ["a"])
        gc.collect()
        until = time.monotonic() + 5
        while server.open_connections and time.monotonic() < until:
            time.sleep(0.01)
        assert (server.connections, server.open_connections) == (1, 0)

    def test_a_sync_call_inside_a_running_loop(self, serve):
        """As in a notebook."""

        async def call() -> list[float]:
            with VLLMScorer(serve(scores).base_url) as scorer:
                return scorer.score("q", ["a"])

        assert asyncio.run(call()) == [oracle("q", "a")]

    def test_forked_children_have_connections_of_their_own(self, serve):
        """Shared ones would hand out each other's answers."""
        scorer = VLLMScorer(serve(scores).base_url)
        scorer.score("warm", ["connection"])
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        children = [context.Process(target=score_in_child, args=(scorer, name, results)) for name in ("a", "bb")]
        for child in children:
            child.start()
        assert all(all(results.get(timeout=20)) for _ in children)
        for child in children:
            child.join()
        scorer.close()

    def test_pickles_work_and_carry_no_key(self, serve, monkeypatch: pytest.MonkeyPatch):
        """A pickle is read by whoever has the file; the copy takes its key from the environment."""
        server = serve(scores)
        scorer = VLLMScorer(server.base_url, model="m", api_key="canary-k3y")
        pickled = pickle.dumps(scorer)
        assert b"canary" not in pickled
        assert "canary" not in repr(scorer) + str(vars(scorer))
        monkeypatch.setenv("VLLM_API_KEY", "from-env")
        with pickle.loads(pickled) as copied:  # noqa: S301
            assert copied.score("q", ["a"]) == [oracle("q", "a")]
        assert {headers["authorization"] for path, headers, _ in server.requests} == {"bearer from-env"}

    @pytest.mark.parametrize("key", ["line\nbreak", "ключ", " padded "])
    def test_a_key_that_no_header_can_carry_is_refused_and_not_repeated(self, key: str):
        """At construction."""
        with pytest.raises(ValueError, match="api_key") as caught:
            VLLMScorer(api_key=key)
        assert key not in str(caught.value)
