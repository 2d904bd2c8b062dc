"""Answers that are none."""

import functools
import itertools
import json
import random
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from rag_rerank import (
    BackendUnavailable,
    BadReply,
)
from tests.faulty_server import (
    CLOSE,
    Behaviour,
    Request,
    Steps,
    http,
    on_scores,
    right,
    scores,
)
from tests.vllm.faults.common import (
    DOCUMENTS,
    EXACT,
    FEW,
    FIRST,
    Connect,
    Score,
    Serve,
    little_memory,
    soon,
    spoilt,
)


def entry(number: int, **changes: Any) -> Behaviour:
    """An answer in which one entry, or the only one, says something else; ... leaves a field out."""

    def change(content: dict[str, Any]) -> None:
        entries = content["data"]
        at = min(number, len(entries) - 1)
        entries[at] = {name: value for name, value in (entries[at] | changes).items() if value is not ...}

    return spoilt(change)


def raw_score(text: str) -> Behaviour:
    """An answer in which the last score is written so."""
    return spoilt(lambda content: json.dumps(content).replace(str(content["data"][-1]["score"]), text))


@functools.cache
def bomb(window_bits: int) -> bytes:
    """64 MiB in 64 KB."""
    packer = zlib.compressobj(level=1, wbits=window_bits)
    return b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(64)), packer.flush()])


def chunked(*parts: bytes) -> bytes:
    """An answer in parts, with something before and behind each that need not be understood."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x;a=b\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\nX: y\r\n\r\n"


NO_ANSWERS: dict[str, Behaviour] = {
    # row 25
    "html": lambda request: [http("<html>Welcome</html>", Content_Type="text/html")],
    "empty": lambda request: [http("")],
    "204": lambda request: [http("", 204)],
    # row 26
    "truncated JSON": spoilt(lambda content: json.dumps(content)[:-7]),
    "invalid UTF-8": spoilt(lambda content: json.dumps(content).encode().replace(b"list", b"\xff\xfe")),
    "deep": lambda request: [http("[" * 60_000)],
    "deeper": lambda request: [http("[" * 66_000)],
    "a score of 5,000 digits": raw_score("1" * 5000),
    # row 29
    "one result less": spoilt(lambda content: content["data"].pop() and None),
    "one result more": spoilt(lambda content: content["data"].append({"index": 5, "score": 0.5})),
    "no result": spoilt(lambda content: content["data"].clear()),
    "no list": spoilt(lambda content: content.pop("data") and None),
    # row 31
    **{f"index {json.dumps(i)}": entry(1, index=i) for i in (-1, 5, "1", 1.0, True, None, [1])},
    "no index": entry(1, index=...),
    # row 32
    **{f"score {json.dumps(x)}": entry(1, score=x) for x in ("0.9", True, [0.5], {"value": 0.5})},
    "no score": entry(1, score=...),
}


NO_HTTP: dict[str, Behaviour] = {
    "another protocol": lambda request: [b"SSH-2.0-OpenSSH_9.2\r\n", CLOSE],
    "no status line": lambda request: [json.dumps(scores(request)).encode(), CLOSE],
    "HTTP/2": lambda request: [b"HTTP/2 200 OK\r\n\r\n", CLOSE],
    "status 99999": lambda request: [http("{}", 99999)],
    "status 101": lambda request: [http("", 101, Upgrade="websocket", Connection="Upgrade")],
    "negative length": lambda request: [http("{}", Content_Length=-1)],
    "two lengths": lambda request: [http("{}").replace(b"Content-Length", b"Content-Length: 5\r\nContent-Length")],
    "no chunk size": lambda request: [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", CLOSE],
    "NUL in a header": lambda request: [http("{}", X="a\0b")],
    "a header of 1 MB": lambda request: [http("{}", X="x" * 1_000_000)],
    "endless headers": lambda request: itertools.chain([b"HTTP/1.1 200 OK"], itertools.repeat(b"\r\nX: " + b"x" * 999)),
}


def cases(behaviours: dict[str, Behaviour]) -> list:
    return [pytest.param(behave, id=name) for name, behave in behaviours.items()]


class TestReplies:
    """Answers that are not one finite score per document."""

    @pytest.mark.parametrize("behave", cases(NO_ANSWERS))
    def test_no_answer(self, serve: Serve, connect: Connect, score: Score, behave: Behaviour):
        """Rows 25, 26, 29, 31 and 32: three tries, one with a harmless document, then BadReply; nothing is guessed.

        One good one is enough, for those documents that it has.
        """
        server = serve(on_scores(behave))
        scorer = connect(server)
        with pytest.raises(BadReply):
            score(scorer, FEW)
        assert [request.documents for request in server.score_requests] == [FEW] * 3 + [["a"]]
        server.behave = on_scores(behave, times=1)
        assert score(connect(server), FEW) == EXACT[:5]
        assert len(server.score_requests) == 4 + 2

    @pytest.mark.parametrize(
        "error", [{"error": {"message": "no GPU left"}}, {"error": "no GPU left"}, {"detail": "no GPU left"}], ids=str
    )
    def test_an_error_with_a_status_of_success(self, serve: Serve, connect: Connect, score: Score, error: dict):
        """As some gateways send them: tried again, and the error has the server's words, once."""
        server = serve(on_scores(lambda request: [http(json.dumps(error))]))
        with pytest.raises(BadReply, match=r"no list 'data': no GPU left \(.*5 attempts") as caught:
            score(connect(server, model="m"), FEW[:1])
        assert (caught.value.status, caught.value.body) == (200, json.dumps(error))
        server.behave = on_scores(lambda request: [http(json.dumps(error))], times=1)
        assert score(connect(server), FEW) == EXACT[:5]

    def test_an_answer_with_one_index_twice(self, serve: Serve, connect: Connect, score: Score):
        """Row 30: three tries; nothing of it is used, and what is asked for alone can't be mixed up so."""

        def change(content: dict[str, Any]) -> None:
            content["data"] = [result | {"index": min(result["index"], 1), "score": 2.0} for result in content["data"]]

        spoilt_if_many = spoilt(change)
        server = serve(on_scores(lambda request: spoilt_if_many(request) if len(request.documents) > 2 else None))
        assert score(connect(server), FEW) == EXACT[:5]
        assert [len(request.documents) for request in server.score_requests] == [5, 5, 5, 1, 2, 3, 3, 3, 1, 1, 2]

    @pytest.mark.parametrize("text", ["null", "NaN", "Infinity", "-Infinity", "1e999", "1" * 400])
    def test_a_score_that_is_not_finite(self, serve: Serve, connect: Connect, score: Score, text: str):
        """Row 32: three tries, for another may do better; then that document has none, and the others have theirs."""
        server = serve(on_scores(raw_score(text)))
        with pytest.raises(BadReply, match=r"documents\[4\]") as caught:
            score(connect(server), FEW)
        assert (caught.value.indices, caught.value.scores) == ((4,), (*EXACT[:4], None))
        assert len(server.score_requests) == 3
        server.behave = on_scores(raw_score(text), times=2)
        assert score(connect(server), FEW) == EXACT[:5]
        assert len(server.score_requests) == 6

    @pytest.mark.parametrize("behave", cases(NO_HTTP))
    def test_no_http(self, serve: Serve, connect: Connect, score: Score, behave: Behaviour):
        """R1: what can't be read as HTTP is a broken connection."""
        server = serve(on_scores(behave))
        scorer = connect(server)
        with pytest.raises(BackendUnavailable, match="the connection broke"):
            score(scorer, FEW)
        assert len(server.score_requests) == 3
        server.behave = on_scores(behave, times=1)
        assert score(connect(server), FEW) == EXACT[:5]  # a new one: the old one takes the server for down
        assert len(server.score_requests) == 5

    def test_the_document_without_a_score_is_named(self, serve: Serve, connect: Connect, score: Score):
        """Row 32: by its place in the call, not in the request."""
        server = serve(on_scores(entry(1, score=None), having=DOCUMENTS[33]))  # the second of the second chunk
        with pytest.raises(BadReply, match=r"documents\[33\]") as caught:
            score(connect(server))
        assert caught.value.scores == (*EXACT[:33], None, *EXACT[34:])

    def test_an_endless_answer(self, serve: Serve, connect: Connect, score: Score):
        """Row 27: it is read up to 64 KiB and 256 bytes a document."""
        part = b" " * 10_000
        server = serve(
            on_scores(lambda request: itertools.chain([http("", Content_Length=10**12)], itertools.repeat(part)))
        )
        scorer = connect(server)
        with little_memory(), pytest.raises(BadReply, match=f"longer than {65536 + 256 * 5} bytes"):
            score(scorer, FEW)
        assert len(server.score_requests) == 3
        assert soon(lambda: server.open_connections == 0)

    @pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "deflate", "br", "zstd", "identity, gzip"])
    def test_a_compressed_answer(self, serve: Serve, connect: Connect, score: Score, encoding: str):
        """Row 28: a small one can unpack to a thousand times its size: within bounds, and only in two ways."""
        body = bomb(15 if encoding == "deflate" else 31)
        server = serve(on_scores(lambda request: [http(body, Content_Encoding=encoding)]))
        scorer = connect(server)
        with little_memory(), pytest.raises(BadReply, match="compressed"):
            score(scorer, FEW)
        assert len(server.score_requests) == 3
        assert {request.headers["accept-encoding"] for request in server.requests} == {"identity"}

    def test_another_order_and_unknown_fields(self, serve: Serve, connect: Connect, score: Score):
        """Row 33: an answer has its order in its indices, and newer servers say more."""

        def change(content: dict[str, Any]) -> None:
            random.Random(0).shuffle(content["data"])  # noqa: S311
            content["data"] = [result | {"text": "x", "new": [None]} for result in content["data"]]
            content["new"] = {"score": 1}

        assert score(connect(serve(on_scores(spoilt(change))))) == EXACT

    @pytest.mark.parametrize(
        "answer",
        [
            lambda body: [http(b"\xef\xbb\xbf" + body)],
            lambda body: [http(body, Content_Encoding="")],
            lambda body: [http(body, Content_Type="text/html")],
            lambda body: [http(body, 201)],
            lambda body: [b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100, http(body)],
            lambda body: [b"HTTP/1.0 200 OK\r\n\r\n" + body, CLOSE],
            lambda body: [b"HTTP/1.1 200 OK\r\n\r\n", *(body[i : i + 1] for i in range(len(body))), CLOSE],
            lambda body: [chunked(body[:50], body[50:])],
        ],
        ids=["byte order mark", "no encoding", "html", "201", "hints", "HTTP/1.0", "a byte at a time", "chunked"],
    )
    def test_an_answer_in_an_odd_dress(self, serve: Serve, connect: Connect, score: Score, answer: Callable):
        """Gateways may; it is read all the same, in one request each."""
        server = serve(on_scores(lambda request: answer(json.dumps(scores(request)).encode())))
        scorer = connect(server)
        for _ in range(2):
            assert score(scorer, FEW) == EXACT[:5]
        assert len(server.score_requests) == 2

    def test_a_long_answer_with_another_status_of_success(self, serve: Serve, connect: Connect, score: Score):
        """203 of a proxy, say; only pages of errors are cut."""
        server = serve(on_scores(lambda request: [http(json.dumps(scores(request) | {"x": "x" * 60_000}), 203)]))
        assert score(connect(server, chunk_size=128)) == EXACT

    def test_what_nobody_asked_for_while_idle(self, serve: Serve, connect: Connect, score: Score):
        """Row 34: a connection on which the server goes on talking is dropped, and no memory filled."""
        flood = itertools.repeat(b"x" * 100_000)
        server = serve(on_scores(lambda request: itertools.chain(right(request), [0.01], flood), times=1))
        scorer = connect(server)
        with little_memory():
            for _ in range(2):
                assert score(scorer, FEW) == EXACT[:5]
            assert soon(lambda: server.open_connections == 1)

    def test_the_answer_to_another_request(self, serve: Serve, connect: Connect, score: Score):
        """Row 34: its id gives it away; that connection is not used again, and the request is repeated."""
        server = serve()
        scorer = connect(server)
        score(scorer, FEW)
        stale = right(server.score_requests[0])  # as many scores, of the same query
        server.behave = on_scores(lambda request: stale, times=1)
        assert score(scorer, DOCUMENTS[5:10]) == EXACT[5:10]
        _, swapped, repeated = server.score_requests
        assert swapped.connection != repeated.connection
        server.behave = on_scores(lambda request: stale)
        with pytest.raises(BadReply, match="is for the request"):
            score(scorer, DOCUMENTS[5:10])
        assert len(server.score_requests) == 6

    def test_a_dropped_connection_is_nobody_elses(self, serve: Serve, connect: Connect, score: Score):
        """Row 34: the one that is dropped may not have another request on it already."""
        seen: set[str] = set()

        def first_wrong(request: Request) -> Steps:
            wrong = {} if request.documents[0] in seen else {"id": "score-rag-rerank-other"}
            seen.add(request.documents[0])
            return [http(json.dumps(scores(request) | wrong))]

        server = serve(on_scores(first_wrong))
        assert score(connect(server, chunk_size=1, max_concurrency=32)) == EXACT
        assert len(server.score_requests) == 2 * len(DOCUMENTS)

    @pytest.mark.parametrize("client", [None, httpx.AsyncClient], ids=["ours", "httpx"])
    @pytest.mark.parametrize("has_id", [True, False])
    def test_an_answer_that_nobody_asked_for(
        self, serve: Serve, connect: Connect, score: Score, has_id: bool, client: type | None
    ):
        """Row 34: it comes behind another and waits in the connection for the next request."""
        answer = right if has_id else spoilt(lambda content: content.pop("id") and None)
        before = itertools.count()
        server = serve(on_scores(lambda request: [b"".join(answer(request)) * (1 if next(before) else 2)]))
        scorer = connect(server, http_client=client)
        assert score(scorer, FEW) == EXACT[:5]
        assert score(scorer, DOCUMENTS[5:10]) == EXACT[5:10]
        assert len(server.score_requests) <= 3

    def test_an_answer_without_an_id(self, serve: Serve, connect: Connect, score: Score):
        """Row 34: servers of other makes need not give it back."""
        assert score(connect(serve(on_scores(spoilt(lambda content: content.pop("id") and None))))) == EXACT
        assert score(connect(serve(on_scores(spoilt(lambda content: content.update(id="x-1")))))) == EXACT

    def test_cookies(self, serve: Serve, connect: Connect, score: Score):
        """R8: none are kept, for there is no bound on what a server may set."""
        server = serve(on_scores(lambda request: [http(json.dumps(scores(request)), Set_Cookie=f"n{request.nth}=x")]))
        scorer = connect(server)
        for _ in range(3):
            score(scorer, FEW)
        assert {request.headers.get("cookie") for request in server.requests} == {None}

    def test_answers_by_two_models(self, serve: Serve, connect: Connect, score: Score):
        """Row 35: their scores can't be compared."""

        def other(request: Request) -> Steps:
            return [http(json.dumps(scores(request) | {"model": "other"}))]

        with pytest.raises(BadReply, match="'m'.*'other'|'other'.*'m'"):
            score(connect(serve(on_scores(other, having=FIRST))))
