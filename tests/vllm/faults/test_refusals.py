"""What servers refuse: documents, requests, keys, models."""

import json
import traceback

import httpx
import pytest

from rag_rerank import (
    AuthError,
    BackendError,
    BackendRejected,
    BackendUnavailable,
    DocumentRejected,
    Ranked,
)
from tests.faulty_server import (
    CLOSE,
    Request,
    Steps,
    http,
    on_scores,
    oracle,
    refusal,
    scores,
)
from tests.vllm.faults.common import (
    CHUNKS,
    DOCUMENTS,
    EXACT,
    FEW,
    KEY,
    QUERY,
    Connect,
    Score,
    Serve,
    refusing,
)


class TestRefusals:
    """Answers that say: not this."""

    @pytest.mark.parametrize("status", [400, 422])
    @pytest.mark.parametrize("bad", [0, 57, 99])
    def test_a_bad_document(self, serve: Serve, connect: Connect, score: Score, bad: int, status: int):
        """Row 18: it is found with 12 requests, the others have their scores."""
        server = serve(refusing(DOCUMENTS[bad], status=status))
        with pytest.raises(DocumentRejected, match=rf"documents\[{bad}\].*too long") as caught:
            score(connect(server))
        assert caught.value.indices == (bad,)
        assert caught.value.status == status
        assert caught.value.scores == tuple(s if i != bad else None for i, s in enumerate(EXACT))
        assert len(server.score_requests) <= CHUNKS - 1 + 12

    def test_a_bad_document_is_ranked_last(self, serve: Serve, connect: Connect):
        """Row 18: where errors are passed through."""
        scorer = connect(serve(refusing(DOCUMENTS[57])))
        ranked = scorer.rerank(QUERY, DOCUMENTS, on_error="passthrough")
        assert ranked[-1] == Ranked(57, None)
        assert [(r.index, r.score) for r in ranked[:-1]] == sorted(
            ((i, s) for i, s in enumerate(EXACT) if i != 57), key=lambda pair: -pair[1]
        )

    def test_bad_documents_of_two_queries(self, serve: Serve, connect: Connect):
        """Each query's error has the reason of its own."""
        whys = {"long": "too long", "odd": "odd letters"}

        def behave(request: Request) -> Steps | None:
            return next((refusal(400, why) for bad, why in whys.items() if bad in request.documents), None)

        scorer = connect(serve(on_scores(behave)))
        errors = scorer.rerank_batch(["q", "r"], [["a", "long"], ["odd", "b"]], on_error="return")
        assert [error.indices for error in errors] == [(1,), (0,)]
        assert [error.reason for error in errors] == [f"the server answered 400: {why}" for why in whys.values()]
        assert [error.scores for error in errors] == [(oracle("q", "a"), None), (None, oracle("r", "b"))]

    def test_a_request_that_is_refused_with_any_document(self, serve: Serve, connect: Connect, score: Score):
        """Row 19: one request more tells that it is not the documents; the server says what it is."""
        server = serve(on_scores(lambda request: refusal(400, "the query is too long")))
        with pytest.raises(BackendRejected, match="400: the query is too long") as caught:
            score(connect(server), DOCUMENTS[:32])
        assert not isinstance(caught.value, DocumentRejected)
        assert [len(request.documents) for request in server.score_requests] == [32, 1]
        del server.requests[:]
        with pytest.raises(BackendRejected):
            score(connect(server))
        assert len(server.score_requests) <= 2 * CHUNKS

    def test_documents_that_are_all_bad(self, serve: Serve, connect: Connect, score: Score):
        """Row 19, where it is the documents after all: each has its index."""
        server = serve(refusing(*FEW))
        with pytest.raises(DocumentRejected) as caught:
            score(connect(server), FEW)
        assert caught.value.indices == (0, 1, 2, 3, 4)
        assert caught.value.scores == (None,) * 5
        assert len(server.score_requests) == 1 + 1 + 8  # the chunk, the probe, and the nodes of a tree of five leaves

    def test_three_bad_documents_in_three_chunks(self, serve: Serve, connect: Connect, score: Score):
        """Row 20: 97 scores with 37 requests."""
        server = serve(refusing(DOCUMENTS[5], DOCUMENTS[40], DOCUMENTS[99]))
        with pytest.raises(DocumentRejected, match=r"documents\[5\] and 2 more") as caught:
            score(connect(server))
        assert caught.value.indices == (5, 40, 99)
        assert caught.value.scores == tuple(None if i in {5, 40, 99} else s for i, s in enumerate(EXACT))
        assert len(server.score_requests) <= 37

    def test_a_bad_document_beside_one_whose_score_is_none(self, serve: Serve, connect: Connect, score: Score):
        """Rows 18 and 32: neither has a score, and no score that is not finite gets out."""
        bad, null = DOCUMENTS[3], DOCUMENTS[40]

        def answer(request: Request) -> Steps | None:
            if bad in request.documents:
                return refusal(400, "too long")
            content = scores(request)
            for entry, document in zip(content["data"], request.documents, strict=True):
                entry["score"] = None if document == null else entry["score"]
            return [http(json.dumps(content))]

        with pytest.raises(DocumentRejected, match=r"documents\[3\] and 1 more") as caught:
            score(connect(serve(on_scores(answer))))
        assert caught.value.indices == (3, 40)
        assert caught.value.scores == tuple(None if i in {3, 40} else s for i, s in enumerate(EXACT))

    def test_a_bad_document_that_is_there_twice(self, serve: Serve, connect: Connect, score: Score):
        """Row 20: both places are named."""
        documents = [*FEW, DOCUMENTS[2]]
        with pytest.raises(DocumentRejected) as caught:
            score(connect(serve(refusing(DOCUMENTS[2]))), documents)
        assert caught.value.indices == (2, 5)

    @pytest.mark.parametrize("status", [401, 403])
    @pytest.mark.parametrize("at", ["/v1/models", "/v1/score"])
    def test_a_wrong_key(self, serve: Serve, connect: Connect, score: Score, status: int, at: str):
        """Row 21: no retry, and no key in what is shown."""
        server = serve(lambda request: refusal(status, "Unauthorized") if request.path == at else None)
        with pytest.raises(AuthError, match=f"{status}: Unauthorized") as caught:
            score(connect(server, api_key=KEY))
        assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
        assert len(server.score_requests) <= (CHUNKS if at == "/v1/score" else 0)
        assert sum(request.path == "/v1/models" for request in server.requests) == 1
        assert KEY not in "".join(traceback.format_exception(caught.value)) + repr(caught.value)

    @pytest.mark.parametrize("status", [400, 401, 503])
    def test_a_server_that_repeats_the_key(self, serve: Serve, connect: Connect, score: Score, status: int):
        """Row 21 and R6: gateways do, in their error messages."""
        server = serve(on_scores(lambda request: refusal(status, request.headers["authorization"])))
        with pytest.raises(BackendError, match=str(status)) as caught:
            score(connect(server, api_key=KEY), FEW)
        assert KEY not in "".join(traceback.format_exception(caught.value)) + repr(caught.value)

    @pytest.mark.parametrize(
        "written",
        [
            r"canary\/5ecret\u002Bk3y\u003d\u003D",
            r"canary\\/5ecret\u002bk3y==",
            "canary%2F5ecret%2bk3y%3D=",
            "canary%252F5ecret%252Bk3y%253D%253D",
            "canary/5ecret&#43;k3y&#x3d;&#X3D;",
        ],
        ids=["JSON", "JSON in JSON", "URL", "URL in a URL", "page"],
    )
    def test_a_server_that_writes_the_key_otherwise(self, serve: Serve, connect: Connect, written: str):
        """In JSON, in a URL, in a page, in a header."""
        body = f'{{"detail": "wrong key: {written}"}}'
        server = serve(on_scores(lambda request: [http(body, 401, X_Request_Id=written)]))
        scorer = connect(server, default_headers={"X-Api-Key": "Token canary/5ecret+k3y=="})
        with pytest.raises(AuthError, match=r"wrong key: \[key\]") as caught:
            scorer.score(QUERY, FEW)
        told = "".join(traceback.format_exception(caught.value)) + str(vars(caught.value))
        assert "canary" not in told
        assert caught.value.request_id == "[key]"

    @pytest.mark.parametrize("line", ["HTTP/1.1 {}", "HTTP/1.1 200 OK\r\nX\0: {}", "HTTP/1.1 200 OK\r\nX: {}\0"])
    @pytest.mark.parametrize("client", [None, httpx.AsyncClient], ids=["ours", "httpx"])
    def test_a_server_that_repeats_the_key_outside_of_an_answer(
        self, serve: Serve, connect: Connect, score: Score, line: str, client: type | None
    ):
        """What is no HTTP is quoted by those who can't read it, but not without end."""
        server = serve(on_scores(lambda request: [f"{line.format(KEY)}{'x' * 50_000}\r\n\r\n".encode(), CLOSE]))
        with pytest.raises(BackendUnavailable, match="the connection broke") as caught:
            score(connect(server, api_key=KEY, http_client=client), FEW)
        told = "".join(traceback.format_exception(caught.value)) + str(vars(caught.value))
        assert KEY not in told
        assert len(str(caught.value)) < 1000

    def test_an_unknown_model(self, serve: Serve, connect: Connect, score: Score):
        """Row 22: no retry; the error names it, and what there is."""
        server = serve(
            on_scores(lambda request: refusal(404, f"The model `{request.content['model']}` does not exist."))
        )
        with pytest.raises(BackendRejected, match=r"'nosuch'.*serves: m\b"):
            score(connect(server, model="nosuch"), FEW)
        assert len(server.score_requests) == 1

    def test_a_request_that_is_too_large(self, serve: Serve, connect: Connect, score: Score):
        """Row 23: halved until it fits, with no probe; 413 tells enough."""
        server = serve(on_scores(lambda request: [http("", 413)] if len(request.documents) > 8 else None))
        assert score(connect(server), DOCUMENTS[:32]) == EXACT[:32]
        assert sorted(len(request.documents) for request in server.score_requests) == [8, 8, 8, 8, 16, 16, 32]

    def test_how_large_a_request_may_be_is_remembered(self, serve: Serve, connect: Connect, score: Score):
        """The next call does not meet nginx's limit again; what it says is its title, not its page."""
        page = "<html>\r\n<head><title>413 Request Entity Too Large</title></head>\r\n<body>...</body></html>"
        server = serve(on_scores(lambda request: [http(page, 413)] if len(request.body) > 200_000 else None))
        scorer, documents = connect(server), ["x" * 10_000 + document for document in DOCUMENTS[:32]]
        expected = [oracle(QUERY, document) for document in documents]
        assert score(scorer, documents) == expected
        before = len(server.score_requests)
        assert score(scorer, documents) == expected
        assert max(len(request.body) for request in server.score_requests[before:]) < 200_000
        with pytest.raises(DocumentRejected, match=r"answered 413: 413 Request Entity Too Large \(") as caught:
            score(scorer, ["x" * 200_000])
        assert "client_max_body_size" in str(caught.value.remedy)

    def test_a_document_that_is_too_large(self, serve: Serve, connect: Connect, score: Score):
        """Row 23: what does not fit alone is rejected alone."""
        server = serve(on_scores(lambda request: [http("", 413)] if len(request.body) > 5000 else None))
        with pytest.raises(DocumentRejected) as caught:
            score(connect(server), [*FEW, "x" * 5000])
        assert caught.value.indices == (5,)
        assert caught.value.scores == (*EXACT[:5], None)

    @pytest.mark.parametrize("status", [301, 302, 307, 308])
    def test_a_redirect(self, serve: Serve, connect: Connect, score: Score, status: int):
        """Row 24: the other host never hears of the documents."""
        other = serve()
        server = serve(on_scores(lambda request: [http("", status, Location=f"{other.base_url}/v1/score")]))
        with pytest.raises(BackendRejected, match="never followed"):
            score(connect(server))
        assert len(server.score_requests) <= CHUNKS
        assert other.connections == 0
