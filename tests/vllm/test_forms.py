"""Servers of other makes, each a small one with the paths and replies of its documentation: the same guarantees."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from rag_rerank import BackendRejected, ConfigError, DocumentRejected, VLLMScorer
from tests.faulty_server import FaultyServer, Request, Steps, http, oracle, refusal

DOCUMENTS = ["a", "b", "c"]
EXPECTED = [oracle("q", document) for document in DOCUMENTS]


def results(content: dict, scores: list[float]) -> dict:
    """Jina's, Cohere's, vLLM's and most others': by score, with the documents."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    entries = [
        {"index": index, "relevance_score": scores[index], "document": {"text": content["documents"][index]}}
        for index in order
    ]
    return {"id": "0197", "model": content.get("model"), "results": entries, "usage": {"total_tokens": 7}}


def bare_list(content: dict, scores: list[float]) -> list:
    """SGLang's and text-embeddings-inference's."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    return [{"score": scores[index], "index": index} for index in order]


def vllm(content: dict, scores: list[float]) -> dict:
    data = [{"index": index, "score": score} for index, score in enumerate(scores)]
    return {"id": "score-1", "model": content.get("model"), "data": data, "usage": {"prompt_tokens": 7}}


@dataclass
class Make:
    """A make of server.

    Attributes:
        paths: Where it takes requests for scores.
        texts: What documents are called in a request; a request without is refused.
        reply: Makes the reply.
        models: Path and body of its list of models.
        prefix: What all paths begin with.
        most: Documents that a request may have.
    """

    paths: tuple[str, ...] = ("/v1/rerank",)
    texts: str = "documents"
    reply: Callable[[dict, list[float]], object] = results
    models: tuple[str, str] | None = ("/v1/models", '{"object": "list", "data": [{"id": "m"}]}')
    prefix: str = ""
    most: int = 1000

    def __call__(self, request: Request) -> Steps:
        if self.models and request.path == self.prefix + self.models[0]:
            return [http(self.models[1])]
        if request.path not in [self.prefix + path for path in self.paths] or not request.wants_scores:
            return [http('{"detail": "Not Found"}', 404)]
        documents = request.content.get(self.texts)
        if documents is None:
            return [http(json.dumps({"error": f"missing field `{self.texts}`", "error_type": "Validation"}), 422)]
        if len(documents) > self.most:
            said = f"batch size {len(documents)} > maximum allowed batch size {self.most}"
            return [http(json.dumps({"error": said, "error_type": "Validation"}), 422)]
        if "refused" in documents:
            return refusal(400, "refused")
        query = request.content.get("query", request.content.get("text_1"))
        queries = query if isinstance(query, list) else [query] * len(documents)
        return [http(json.dumps(self.reply(request.content, list(map(oracle, queries, documents)))))]


@contextlib.contextmanager
def scoring(make: Callable[[Request], Steps], path: str = "", **settings: object):
    """The server, and a scorer that asks it."""
    with FaultyServer(make) as server, VLLMScorer(server.base_url + path, max_retries=0, **settings) as scorer:
        yield server, scorer


TEI = Make(("/rerank",), "texts", bare_list, ("/info", '{"model_id": "BAAI/bge", "max_input_length": 512}'))
MAKES = {
    "Cohere": (Make(("/v2/rerank",), models=None), "/v2", "rerank", {"model": "rerank-v4"}),
    "Cohere, whole address": (Make(("/v2/rerank",), models=None), "/v2/rerank", "rerank", {"model": "rerank-v4"}),
    "Jina": (Make(models=None), "/v1/rerank", "rerank", {"model": "jina-reranker-v2"}),
    "infinity": (Make(("/rerank",), models=("/models", '{"data": [{"id": "m"}]}')), "/rerank", "rerank", {}),
    "Docker Model Runner": (Make(("/rerank",), prefix="/engines"), "/engines/rerank", "rerank", {}),
    "llama.cpp": (Make(("/rerank", "/reranking", "/v1/rerank", "/v1/reranking")), "/v1/reranking", "rerank", {}),
    "LiteLLM, new-api, Xinference": (Make(("/rerank", "/v1/rerank")), "", "rerank", {}),
    "SGLang": (Make(reply=bare_list), "/v1", "rerank", {}),
    "text-embeddings-inference": (TEI, "", "tei", {}),
    "text-embeddings-inference, whole address": (TEI, "/rerank", "tei", {}),
    "vLLM below /rerank": (Make(("/v1/score",), "text_2", vllm, prefix="/rerank"), "/rerank", "score", {}),
    "vLLM below /score": (Make(("/v1/score",), "text_2", vllm, prefix="/team/score"), "/team/score/v1", "score", {}),
}


@pytest.mark.parametrize(("make", "path", "endpoint", "settings"), MAKES.values(), ids=MAKES)
class TestEachMake:
    """Asked as its documentation says, and found out."""

    def test_it_is_asked_in_its_own_form(self, make: Make, path: str, endpoint: str, settings: dict):
        """Each document gets its own score; 1:N and N:N."""
        with scoring(make, path, endpoint=endpoint, **settings) as (_, scorer):
            assert scorer.score("q", DOCUMENTS) == EXPECTED
            assert scorer.score(["q", "r", "q"], DOCUMENTS) == [EXPECTED[0], oracle("r", "b"), EXPECTED[2]]

    def test_auto_finds_it_out(self, make: Make, path: str, endpoint: str, settings: dict):
        """Once: the second call sends one request."""
        with scoring(make, path, endpoint="auto", **settings) as (server, scorer):
            assert scorer.score("q", DOCUMENTS) == EXPECTED
            before = len(server.requests)
            assert scorer.score("q", DOCUMENTS) == EXPECTED
            assert len(server.requests) == before + 1

    def test_one_refused_document_costs_only_itself(self, make: Make, path: str, endpoint: str, settings: dict):
        """As with vLLM."""
        with (
            scoring(make, path, endpoint=endpoint, **settings) as (_, scorer),
            pytest.raises(DocumentRejected) as caught,
        ):
            scorer.score("q", [*DOCUMENTS, "refused"])
        assert caught.value.scores == (*EXPECTED, None)


def test_more_documents_than_tei_takes_at_once():
    """32 by default: they go in more requests."""
    documents = [f"document {number}" for number in range(100)]
    tei = Make(TEI.paths, TEI.texts, TEI.reply, TEI.models, most=32)
    with scoring(tei, endpoint="tei") as (_, scorer):
        assert scorer.score("q", documents) == [oracle("q", document) for document in documents]


def test_tei_cuts_what_is_too_long():
    """Unless that is switched off, as elsewhere."""
    for setting, said in (("auto", {"truncate": True}), (None, {})):
        with scoring(TEI, endpoint="tei", truncate_prompt_tokens=setting) as (server, scorer):
            scorer.score("q", ["d"])
            assert server.score_requests[-1].content == {"query": "q", "texts": ["d"]} | said


def test_a_document_that_tei_fails_at():
    """It answers 424 to the whole request where one score is not a number: the others have theirs."""

    def fail(request: Request) -> Steps:
        failed = {"error": "score is NaN", "error_type": "Backend"}
        bad = request.wants_scores and "bad" in request.content["texts"]
        return [http(json.dumps(failed), 424)] if bad else TEI(request)

    with scoring(fail, endpoint="tei") as (_, scorer), pytest.raises(DocumentRejected, match="score is NaN") as caught:
        scorer.score("q", [*DOCUMENTS, "bad"])
    assert caught.value.scores == (*EXPECTED, None)


def test_an_option_that_tei_can_not_be_told_is_a_wrong_setting():
    """Not a score without it."""
    with scoring(TEI, endpoint="tei") as (_, scorer), pytest.raises(ConfigError, match="does not know instruction"):
        scorer.score("q", ["d"], instruction="i")


def test_nothing_that_auto_knows():
    """The error is the most telling one."""

    def refuse(request: Request) -> Steps | None:
        return refusal(400, "no channel for m") if request.path == "/v1/rerank" else http_404(request)

    def http_404(request: Request) -> Steps:
        return [http('{"error": {"message": "Invalid URL"}}', 404)]

    settings = {"model": "m", "endpoint": "auto"}
    with scoring(refuse, **settings) as (_, scorer), pytest.raises(BackendRejected, match="no channel for m"):
        scorer.score("q", ["d"])


def test_an_endpoint_that_is_none_of_these():
    """At construction."""
    with pytest.raises(ConfigError, match='"score", "rerank", "tei" or "auto", got \'v2\''):
        VLLMScorer("http://host", endpoint="v2")


class TestListwise:
    """jina-reranker-v3: each score depends on the other documents, so they are never split."""

    @staticmethod
    def served(request: Request) -> Steps | None:
        """vLLM 0.32: all documents of one query in one prompt; the score tells how many there were."""
        if request.path == "/v1/models":
            return [http('{"data": [{"id": "m", "root": "jinaai/jina-reranker-v3", "max_model_len": 131072}]}')]
        if not request.wants_scores:
            return None
        queries, count = request.content["text_1"], len(request.documents)
        if "refused" in request.documents:
            return refusal(400, "maximum context length")
        together = count if isinstance(queries, str) else 1
        return [http(json.dumps(vllm(request.content, [float(together)] * count)))]

    def test_all_documents_of_a_query_go_in_one_request(self):
        """Whatever chunk_size says, and uncut: the prompt's end holds the query."""
        with FaultyServer(self.served) as server, VLLMScorer(server.base_url, chunk_size=8) as scorer:
            assert scorer.score("q", ["d"] * 200) == [200.0] * 200
            assert len(server.score_requests) == 1
            assert "truncate_prompt_tokens" not in server.score_requests[0].content

    def test_each_query_of_a_batch_is_scored_as_alone(self):
        """Also before it is known what is served."""
        with FaultyServer(self.served) as server, VLLMScorer(server.base_url) as scorer:
            ranked = scorer.rerank_batch(["q", "r", "s"], [["a"] * 2, ["b"] * 3, ["c"]])
        assert [[item.score for item in items] for items in ranked] == [[2.0] * 2, [3.0] * 3, [1.0]]

    def test_pairs_are_scored_alone(self):
        """As vLLM does for N:N."""
        with FaultyServer(self.served) as server, VLLMScorer(server.base_url) as scorer:
            assert scorer.score(["q", "q"], ["a", "b"]) == [1.0, 1.0]

    def test_a_refusal_concerns_all(self):
        """Nothing is asked again with fewer documents: it would be another score."""
        with FaultyServer(self.served) as server, VLLMScorer(server.base_url) as scorer:
            with pytest.raises(BackendRejected, match="scores all documents of a query together") as caught:
                scorer.score("q", ["a", "refused"])
            assert not caught.value.scores
            assert len(server.score_requests) == 1
