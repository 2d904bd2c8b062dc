"""What networks and half-dead servers do to a connection."""

import contextlib
import json
import os
import resource
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest

from rag_rerank import (
    BackendUnavailable,
    DeadlineExceeded,
)
from rag_rerank.vllm import exchange
from tests.faulty_server import (
    CLOSE,
    RESET,
    Behaviour,
    Request,
    Steps,
    http,
    on_scores,
    oracle,
    right,
    scores,
)
from tests.vllm.faults.common import (
    CHUNKS,
    EXACT,
    FEW,
    KEY,
    QUERY,
    TLS,
    Connect,
    Score,
    Serve,
    at_least,
    closed_port,
    drip,
    hang,
    reset,
    soon,
)


class TestConnections:
    """What goes wrong before there is an answer."""

    def test_a_healthy_server(self, serve: Serve, connect: Connect, score: Score):
        """No row: nothing more is sent than has to be."""
        server = serve()
        scorer = connect(server)
        assert score(scorer) == EXACT
        assert score(scorer) == EXACT
        assert [request.path for request in server.requests] == ["/version", "/v1/models"] + ["/v1/score"] * 2 * CHUNKS
        assert server.connections <= 4

    def test_nobody_listens(self, connect: Connect, score: Score):
        """Row 1: three tries; the error says where, how often and why."""
        label = closed_port()
        with pytest.raises(BackendUnavailable, match=f"{label}, 3 attempts") as caught:
            score(connect(f"http://{label}"))
        assert isinstance(caught.value.__cause__, ConnectionError)

    @pytest.fixture
    def hanging_lookup(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """The address of a host whose name is looked up for as long as the test takes."""
        over = threading.Event()
        look_up = socket.getaddrinfo

        def hanging(host, *arguments, **options):
            if "reranker" in str(host) and over.wait(60):
                raise socket.gaierror(socket.EAI_AGAIN, "over")
            return look_up(host, *arguments, **options)

        monkeypatch.setattr(socket, "getaddrinfo", hanging)
        yield "http://reranker.test:8000"
        over.set()

    def test_a_name_lookup_that_hangs(self, connect: Connect, score: Score, hanging_lookup: str):
        """Row 2: it is part of connecting, so it ends with each try, and in any case with the call.

        (The matrix has only the deadline: it was written for a client that can't end a lookup.)
        """
        with at_least(0.3), pytest.raises(BackendUnavailable, match="3 attempts"):
            score(connect(hanging_lookup, connect_timeout=0.1))
        with at_least(0.3), pytest.raises(DeadlineExceeded):
            score(connect(hanging_lookup, timeout=0.3))

    def test_no_file_is_left_for_a_connection(self, serve: Serve, connect: Connect, score: Score):
        """The process is to blame, not the server: it is asked again as soon as there is one."""
        server = serve()
        score(connect(server), FEW)  # what is needed but once is there
        scorer = connect(server, model="m", max_retries=0)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(lowest := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            with pytest.raises(BackendUnavailable, match=r"no file left .* Allow more \(ulimit -n\)"):
                score(scorer, FEW)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert score(scorer, FEW) == EXACT[:5]

    def test_no_thread_is_left_for_a_name(
        self, serve: Serve, connect: Connect, score: Score, monkeypatch: pytest.MonkeyPatch
    ):
        """As with files."""
        server = serve()
        connect(server).score(QUERY, FEW)  # the thread of the event loop is there
        scorer = connect(server.base_url.replace("127.0.0.1", "localhost"), max_retries=0)

        def refuse(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(BackendUnavailable, match="or no thread .*new thread"):
                score(scorer, FEW)
        assert score(scorer, FEW) == EXACT[:5]

    def test_nobody_accepts(self, connect: Connect, score: Score):
        """Row 3: a full backlog swallows the SYN; each try ends after connect_timeout."""
        with contextlib.ExitStack() as sockets:
            listener = sockets.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for _ in range(4):
                client = sockets.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(listener.getsockname())
            scorer = connect(f"http://127.0.0.1:{listener.getsockname()[1]}", connect_timeout=0.1)
            with at_least(0.3), pytest.raises(BackendUnavailable, match="3 attempts"):
                score(scorer)

    def test_an_address_where_nobody_accepts_beside_another(
        self, connect: Connect, score: Score, serve: Serve, monkeypatch: pytest.MonkeyPatch
    ):
        """A name may have several; each gets its share of the time."""
        server, look_up = serve(), socket.getaddrinfo
        port = int(server.label.rpartition(":")[2])

        def two(host, *arguments, **options):
            return [look_up(each, *arguments, **options)[0] for each in ("127.0.0.2", "127.0.0.1")]

        with contextlib.ExitStack() as sockets:
            listener = sockets.enter_context(socket.socket())
            listener.bind(("127.0.0.2", port))
            listener.listen(0)
            for _ in range(4):
                client = sockets.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(listener.getsockname())
            monkeypatch.setattr(socket, "getaddrinfo", two)
            scorer = connect(f"http://reranker.test:{port}", connect_timeout=0.4, max_retries=0)
            assert score(scorer, FEW) == EXACT[:5]

    @pytest.mark.parametrize("certificate", ["wrong_host", "expired", "self_signed"])
    def test_a_certificate_that_proves_nothing(
        self, serve: Serve, connect: Connect, score: Score, certificate: str, monkeypatch: pytest.MonkeyPatch
    ):
        """Row 4: one try, an error that names the certificate, and nothing sent."""
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "authority.pem"))
        server = serve(tls=server_side(certificate))
        with pytest.raises(BackendUnavailable, match=r"certificate.*1 attempt\b"):
            score(connect(server, api_key=KEY))
        assert (server.connections, server.requests) == (0, [])  # asyncio counts a connection after the handshake

    def test_a_certificate_of_a_trusted_authority(
        self, serve: Serve, connect: Connect, score: Score, monkeypatch: pytest.MonkeyPatch
    ):
        """Row 4, the other way round: SSL_CERT_FILE names the authorities."""
        monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "authority.pem"))
        assert score(connect(serve(tls=server_side("right")))) == EXACT

    def test_a_server_that_speaks_no_tls(self, connect: Connect, score: Score):
        """Its answer to the handshake is 400, in plain text: the error says what to change about the address."""
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def refuse() -> None:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(http("", 400))

            threading.Thread(target=refuse, daemon=True).start()
            scorer = connect(f"https://127.0.0.1:{listener.getsockname()[1]}", max_retries=0)
            with pytest.raises(BackendUnavailable, match=r"can't connect: \[SSL.*begins with http://"):
                score(scorer, FEW)

    def test_a_reset_before_the_answer(self, serve: Serve, connect: Connect, score: Score):
        """Row 5: one more request."""
        server = serve(on_scores(reset, times=1))
        assert score(connect(server)) == EXACT
        assert len(server.score_requests) == CHUNKS + 1

    def test_a_server_that_closes_idle_connections(self, serve: Serve, connect: Connect, score: Score):
        """Row 6: what is seen to be closed is not used again."""
        server = serve(lambda request: [*right(request), CLOSE])
        scorer = connect(server)
        for _ in range(3):
            assert score(scorer) == EXACT
            assert soon(lambda: server.open_connections == 0)
        assert len(server.score_requests) == 3 * CHUNKS
        assert server.connections == len(server.requests)

    @pytest.mark.parametrize("end", [CLOSE, RESET])
    def test_a_kept_connection_that_closes_as_it_is_used(
        self, serve: Serve, connect: Connect, score: Score, end, monkeypatch: pytest.MonkeyPatch
    ):
        """Row 6: one more request, at once."""
        monkeypatch.setattr(exchange, "FIRST_PAUSE", 1000.0)  # any back-off at all would show
        server = serve()
        scorer = connect(server)
        score(scorer, FEW)
        server.behave = lambda request: [end] if request.connection == 1 else None
        assert score(scorer, FEW) == EXACT[:5]
        assert len(server.score_requests) == 3

    def test_a_restarted_server(self, serve: Serve, connect: Connect, score: Score):
        """Row 6: the end of all kept connections costs a call nothing."""
        server = serve()
        scorer = connect(server)
        score(scorer)
        server.kill()
        server.revive()
        assert score(scorer) == EXACT
        assert len(server.score_requests) == 2 * CHUNKS

    @pytest.mark.parametrize("resets", [True, False])
    def test_an_answer_before_the_request_was_read(self, connect: Connect, score: Score, resets: bool):
        """413 to the first part of a large one: the connection is reset, or ends on one side and is read no more."""
        head = b"HTTP/1.1 413 Too large\r\n" + (b"Content-Length: 4" if resets else b"Connection: close")
        over = threading.Event()

        def serve(connection: socket.socket) -> None:
            with connection, connection.makefile("rwb") as file:
                while line := file.readline():
                    headers = dict(line.decode().strip().split(": ") for line in iter(file.readline, b"\r\n"))
                    length = int(headers.get("content-length", 0))
                    if length > 3_000_000:
                        connection.sendall(head + b"\r\n\r\nlong")
                        if not resets:
                            connection.shutdown(socket.SHUT_WR)
                            over.wait(30)
                        return
                    method, path, _ = line.decode().split()
                    connection.sendall(b"".join(right(Request(method, path, headers, file.read(length), 1, 1))))

        def listen(listener: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=listener.accept()[:1], daemon=True).start()

        documents = [f"{number}" * 1_000_000 for number in range(4)]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=listen, args=(listener,), daemon=True).start()
            scorer = connect(f"http://127.0.0.1:{listener.getsockname()[1]}", max_concurrency=1)
            found = score(scorer, documents, deadline=20)
            listener.shutdown(socket.SHUT_RDWR)
        over.set()
        assert found == [oracle(QUERY, document) for document in documents]

    @pytest.mark.parametrize("kept", [0, 20, -1], ids=["no body", "20 bytes", "all but one byte"])
    def test_half_an_answer(self, serve: Serve, connect: Connect, score: Score, kept: int):
        """Row 7: one more request, and nothing of the half answer is used."""

        def half(request: Request) -> Steps:
            content = scores(request)
            for entry in content["data"]:
                entry["score"] = 2.0
            answer = http(json.dumps(content))
            body = answer.index(b"\r\n\r\n") + 4
            return [answer[: body + kept if kept >= 0 else kept], CLOSE]

        server = serve(on_scores(half, times=1))
        assert score(connect(server)) == EXACT
        assert len(server.score_requests) == CHUNKS + 1

    def test_a_longer_content_length_than_body(self, serve: Serve, connect: Connect, score: Score):
        """Row 7: the rest never comes, so the try is cut off and repeated."""
        server = serve(on_scores(lambda request: [http(json.dumps(scores(request)), Content_Length=9999)], times=1))
        with at_least(1.0):
            assert score(connect(server, attempt_timeout=1.0)) == EXACT
        assert len(server.score_requests) == CHUNKS + 1

    def test_no_answer_until_the_last_try(self, serve: Serve, connect: Connect, score: Score):
        """Row 8: each try is cut at attempt_timeout; the server sees that nobody waits any more.

        (DeadlineExceeded in the matrix; it is BackendUnavailable where the tries end before the deadline.)
        """
        server = serve(on_scores(hang))
        with at_least(0.6), pytest.raises(BackendUnavailable, match="no answer within"):
            score(connect(server, attempt_timeout=0.2), FEW)
        assert len(server.score_requests) == 3
        assert soon(lambda: len(server.abandoned) == 3)

    @pytest.mark.parametrize("behave", [hang, on_scores(hang)], ids=["from the start", "for scores"])
    def test_no_answer_until_the_deadline(self, serve: Serve, connect: Connect, score: Score, behave: Behaviour):
        """Row 8: with one server, a try may take all of the call's time."""
        server = serve(behave)
        with at_least(0.4), pytest.raises(DeadlineExceeded):
            score(connect(server), deadline=0.4)
        assert len(server.score_requests) in {0, CHUNKS}
        assert soon(lambda: server.open_connections == 0)

    def test_one_request_without_an_answer_is_repeated(self, serve: Serve, connect: Connect, score: Score):
        """Row 8: once is not the end."""
        server = serve(on_scores(hang, times=1))
        with at_least(1.0):
            assert score(connect(server, attempt_timeout=1.0)) == EXACT
        assert len(server.score_requests) == CHUNKS + 1

    @pytest.mark.parametrize(
        ("start", "drop"),
        [(http("", Content_Length=1000), b" "), (b"HTTP/1.1 200 OK\r\n", b"X"), (b"", b"H")],
        ids=["body", "header", "status line"],
    )
    def test_a_drip(self, serve: Serve, connect: Connect, score: Score, start: bytes, drop: bytes):
        """Rows 9 and 10: a byte now and then keeps every single read alive; the deadline is for the whole."""
        server = serve(on_scores(lambda request: drip(start, drop)))
        with at_least(0.3), pytest.raises(DeadlineExceeded):
            score(connect(server), deadline=0.3)
        assert soon(lambda: server.open_connections == 0)

    def test_many_slow_requests(self, serve: Serve, connect: Connect, score: Score):
        """R2: a deadline is for all requests of a call together."""
        server = serve(on_scores(lambda request: [0.1, *right(request)]))
        with at_least(0.3), pytest.raises(DeadlineExceeded):
            score(connect(server, chunk_size=1), deadline=0.3)
        assert len(server.score_requests) <= 4 * 3


def server_side(certificate: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / f"{certificate}.pem")
    return context
