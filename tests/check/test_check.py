"""The examination of a server: what is found with fake ones that have one fault each, and with real ones."""

import contextlib
import json
import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from rag_rerank import VLLMScorer
from rag_rerank.check import Finding, check
from rag_rerank.check.texts import CANDIDATES, KNOWN, TWINS, known_pairs, over_long, passages
from tests.faulty_server import CLOSE, HANG, FaultyServer, Request, Steps, http, oracle, refusal
from tests.vllm_server import VLLMServer

Score = Callable[[str, str, bool], float]
ANSWERS = dict(KNOWN)
TITLES = [
    *("Reachable", "Version", "Model", "Score API", "Key", "Scores", "Template", "Ranking", "Window"),
    *("Long documents", "Batches", "Request ids", "Speed"),
]


def relevant(query: str, document: str) -> bool:
    return document.startswith(ANSWERS.get(query, query))


def sigmoid_cross_encoder(query: str, document: str, logits: bool) -> float:
    logit = (3.0 if relevant(query, document) else -4.0) + oracle(query, document)
    return logit if logits else 1 / (1 + math.exp(-logit))


def raw_logits(query: str, document: str, logits: bool) -> float:
    return sigmoid_cross_encoder(query, document, True)


def cosine(query: str, document: str, logits: bool) -> float:
    if query == document:
        return 1.0000001
    return (0.6 if relevant(query, document) else -0.1) + 0.3 * oracle(query, document)


def max_sim(query: str, document: str, logits: bool) -> float:
    tokens = len(query.split()) + 2
    if query == document:
        return 7.3 * tokens if logits else tokens + 0.01
    return tokens * (0.8 if relevant(query, document) else 0.3)


def backwards(query: str, document: str, logits: bool) -> float:
    return 1 - sigmoid_cross_encoder(query, document, False)


def at_random(query: str, document: str, logits: bool) -> float:
    return 4 * oracle(query, document) if logits else oracle(query, document)


def so_many(right: int) -> Score:
    """A cross-encoder that knows the answers to the first so many questions."""
    known = {question for question, _ in KNOWN[:right]}

    def score(query: str, document: str, logits: bool) -> float:
        if query in known or query not in ANSWERS:
            return sigmoid_cross_encoder(query, document, logits)
        logit = -5.0 if relevant(query, document) else -4.0 - 2 * (document == KNOWN[0][1])
        return logit if logits else 1 / (1 + math.exp(-logit))

    return score


@dataclass
class Fake:
    """A vLLM server in good health, but for what a test changes.

    Attributes:
        models: Served name to checkpoint.
        tokens: What it counts for the shortest pair.
        noise: What half precision adds to a score in a batch.
        open: Paths that need no key.
        owner, headers: Of its models and of its answers to scoring requests, by which a program is known.
        instructed: What an instruction adds to a score.
        overrides: For anything else: steps for a request, or None.
    """

    score: Score = sigmoid_cross_encoder
    version: str | None = "0.32.0"
    models: dict[str, str] = field(default_factory=lambda: {"m": "someone/reranker"})
    window: int | None = 512
    tokens: int | None = 5
    noise: float = 0.0
    key: str | None = None
    open: Sequence[str] = ()
    apis: Sequence[str] = ("/v1/score", "/score", "/v1/rerank", "/rerank")
    echoes: bool = True
    owner: str | None = "vllm"
    headers: dict[str, str] = field(default_factory=dict)
    instructed: float = 0.0
    overrides: Callable[[Request], Steps | None] = lambda request: None

    def __call__(self, request: Request) -> Steps:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}" and request.path not in self.open:
            return [http('{"error": "Unauthorized"}', 401)]
        return self.overrides(request) or self.right(request)

    def right(self, request: Request) -> Steps:
        if request.path == "/version" and self.version is not None:
            return [http(json.dumps({"version": self.version}))]
        if request.path == "/v1/models":
            common = {"max_model_len": self.window, "owned_by": self.owner}
            cards = [{"id": name, "root": root} | common for name, root in self.models.items()]
            return [http(json.dumps({"data": cards}))]
        if request.path not in self.apis:
            return [http('{"detail": "Not Found"}', 404)]
        if "model" not in request.content:
            return [http('{"error": "Missing required parameter"}', 400, **self.headers)]
        if request.content["model"] not in self.models:
            return refusal(404, "The model does not exist.")
        return [http(json.dumps(self.answer(request)), **self.headers)]

    def answer(self, request: Request) -> dict[str, object]:
        content = request.content
        if rerank := "rerank" in request.path:
            queries, documents = [content["query"]] * len(content["documents"]), content["documents"]
        else:
            queries, documents = request.queries, request.documents
        logits = content.get("use_activation") is False
        noise = self.noise if len(documents) > 1 else 0.0
        noise += self.instructed * ("instruction" in content)
        scores = [self.score(*pair, logits) + noise for pair in zip(queries, documents, strict=True)]
        name = "relevance_score" if rerank else "score"
        return {
            "id": f"score-{request.headers.get('x-request-id')}" if self.echoes else "chatcmpl-1",
            "model": content["model"],
            "results" if rerank else "data": [{"index": i, name: score} for i, score in enumerate(scores)],
            "usage": {} if self.tokens is None else {"prompt_tokens": self.tokens},
        }


def examine(*fakes: Fake, **settings) -> dict[str, Finding]:
    """What is found, by title; of two with one title the last."""
    settings = {"max_retries": 0, "timeout": 10} | settings
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(FaultyServer(fake)).base_url for fake in fakes]
        with VLLMScorer(urls, **settings) as scorer:
            return {finding.title: finding for finding in check(scorer)}


def _without_key(request: Request, steps: Steps) -> Steps | None:
    return None if "authorization" in request.headers else steps


def verdicts(findings: dict[str, Finding]) -> dict[str, str]:
    return {title: finding.verdict for title, finding in findings.items() if finding.verdict != "good"}


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


class TestExamination:
    """As a whole."""

    def test_a_healthy_server(self):
        """Everything is looked at, in a fixed order, and nothing needs a remedy."""
        findings = examine(Fake())
        assert list(findings) == TITLES
        assert verdicts(findings) == {"Key": "note"}
        assert all(finding.remedy is None for finding in findings.values())
        assert all(finding.says.endswith(".") for finding in findings.values())

    def test_findings_come_as_they_are_made(self):
        """The first before the rest is asked for; the scorer works on when nobody wants more."""
        with FaultyServer(Fake()) as server, VLLMScorer(server.base_url) as scorer:
            findings = check(scorer)
            assert next(findings).title == "Reachable"
            assert server.score_requests == []
            findings.close()
            assert scorer.score("q", ["d"]) == [pytest.approx(sigmoid_cross_encoder("q", "d", False))]

    def test_the_scorer_stays_as_it_was(self):
        """It has learned nothing, and is not closed."""
        with FaultyServer(Fake()) as server, VLLMScorer(server.base_url, max_retries=0) as scorer:
            before = dict(vars(scorer))
            list(check(scorer))
            assert vars(scorer) == before
            assert scorer.model_name == "unknown"

    def test_the_scorers_settings_hold(self):
        """Model, instruction, chunk size and more: what is examined is what its users get."""
        settings = {"model": "m", "instruction": "Answer.", "query_prompt": "query: ", "extra_body": {"x": 1}}
        with FaultyServer(Fake()) as server, VLLMScorer(server.base_url, **settings, chunk_size=8) as scorer:
            list(check(scorer))
            contents = [request.content for request in server.score_requests]
        assert {content["instruction"] for content in contents} == {"Answer."}
        assert {content["x"] for content in contents} == {1}
        assert f"query: {KNOWN[0][0]}" in [content["text_1"] for content in contents]
        assert max(len(content["text_2"]) for content in contents) == 32  # for the comparison of batches only

    def test_a_server_that_dies_meanwhile(self):
        """The last finding says so; nothing is raised."""
        seen = iter(range(100))
        dying = Fake(overrides=lambda request: [CLOSE] if request.wants_scores and next(seen) > 3 else None)
        findings = list(examine(dying).values())
        assert (findings[-1].title, findings[-1].verdict) == ("Answers", "problem")
        assert "connection broke" in findings[-1].says

    def test_every_text_is_scored_against_one_that_it_can_be_told_from(self):
        """The examination's own material: answers first, none twice, nothing near the limits of small models."""
        queries, documents = known_pairs()
        assert len(KNOWN) == 12
        for start in range(0, len(queries), CANDIDATES):
            assert len(set(documents[start : start + CANDIDATES])) == CANDIDATES
            assert documents[start] == ANSWERS[queries[start]]
        assert all(len(text) < 110 for pair in KNOWN for text in pair)
        assert len({len(text.split()) for text in TWINS}) == len(TWINS)
        _, (long, _) = over_long(512)
        assert len(long.split()) > 512
        assert {len(passage.split()) for passage in passages(3, 0)} == {100}
        assert len({*passages(100, 0), *passages(100, 1)}) == 200


class TestReachable:
    """Whether anybody answers."""

    def test_nobody_is_there(self):
        """Nothing else is tried."""
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        with VLLMScorer(f"http://127.0.0.1:{port}") as scorer:
            (finding,) = check(scorer)
        assert (finding.title, finding.verdict) == ("Reachable", "problem")
        assert f"127.0.0.1:{port}" in finding.says
        assert "Start vLLM" in str(finding.remedy)

    @pytest.mark.parametrize(
        ("steps", "says", "remedy"),
        [
            ([HANG], "timed out", "Restart it"),
            ([CLOSE], "broke", "log"),
            (refusal(502, "Bad Gateway"), "502: Bad Gateway", "proxy"),
            ([http("", 307, Location="http://elsewhere/")], "redirects", "address that it redirects to"),
            ([http("x", Content_Encoding="gzip")], "compressed", "vLLM server"),
        ],
        ids=["hangs", "closes", "gateway", "redirect", "compressed"],
    )
    def test_no_answer_to_work_with(self, steps: Steps, says: str, remedy: str):
        """Each with what to do."""
        findings = examine(Fake(overrides=lambda request: steps), timeout=0.5)
        assert list(findings) == ["Reachable"]
        assert findings["Reachable"].verdict == "problem"
        assert says in findings["Reachable"].says
        assert remedy in str(findings["Reachable"].remedy)

    def test_one_of_two_is_down(self):
        """The other is examined all the same."""
        with socket.create_server(("127.0.0.1", 0)) as closed:
            down = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with FaultyServer(Fake()) as up, VLLMScorer([down, up.base_url], max_retries=0) as scorer:
            first, *others = check(scorer)
        assert first.verdict == "problem"
        assert [finding.title for finding in others] == TITLES


class TestVersion:
    """What an old server can't do."""

    @pytest.mark.parametrize(
        ("version", "verdict", "says"),
        [
            ("0.32.1rc2", "good", "vLLM 0.32 knows every option."),
            ("0.21.0", "note", "vLLM 0.21 is too old for instruction, chat_template_kwargs."),
            ("0.13.0", "note", "max_tokens_per_doc, instruction, chat_template_kwargs, score templates"),
            (None, "note", "does not tell its version"),
        ],
    )
    def test_what_is_missing(self, version: str | None, verdict: str, says: str):
        """By name, and with the version to upgrade to."""
        found = examine(Fake(version=version))["Version"]
        assert found.verdict == verdict
        assert says in found.says
        assert version is None or ("Upgrade vLLM to 0.22" in str(found.remedy)) == (verdict == "note")

    @pytest.mark.parametrize(("version", "settings"), [("0.7.3", {}), ("0.21.0", {"instruction": "x"})])
    def test_too_old_for_any_scores(self, version: str, settings: dict[str, str]):
        """For us, or for what the scorer is to ask."""
        findings = examine(Fake(version=version), **settings)
        assert verdicts(findings) == {"Version": "problem"}
        assert list(findings)[-1] == "Version"
        assert "Upgrade vLLM to 0.22" in str(findings["Version"].remedy)

    def test_a_gateways_own_version(self):
        """vLLM's router has one; its list of models tells no window."""
        found = examine(Fake(version="0.1.10", window=None))["Version"]
        assert (found.verdict, "does not tell its version" in found.says) == ("note", True)

    def test_without_use_activation(self):
        """The kind of score is told by the scores alone."""
        findings = examine(Fake(version="0.9.2"))
        assert "use_activation" in findings["Version"].says
        assert verdicts(findings) == {"Version": "note", "Key": "note", "Scores": "note"}
        assert "Cosines" in examine(Fake(cosine, version="0.9.2"))["Scores"].says


class TestModel:
    """What is served."""

    def test_one_model(self):
        """With its aliases and checkpoint."""
        found = examine(Fake(models={"a": "BAAI/bge-reranker-base", "b": "BAAI/bge-reranker-base"}))["Model"]
        assert (found.verdict, found.says) == ("good", "It serves a, b, from BAAI/bge-reranker-base.")

    def test_several_models(self):
        """Nothing goes on before one is chosen."""
        fake = Fake(models={"a": "x/a", "b": "x/b"})
        findings = examine(fake)
        assert list(findings)[-1] == "Model"
        assert verdicts(findings) == {"Model": "problem"}
        assert findings["Model"].says == "It serves 2 models: a, b."
        assert "--model NAME" in str(findings["Model"].remedy)
        assert verdicts(examine(fake, model="b")) == {"Key": "note"}

    def test_a_model_that_is_not_served(self):
        """Said twice: it is not in the list, and there are no scores for it."""
        findings = examine(Fake(), model="nope")
        assert verdicts(findings) == {"Model": "warning", "Score API": "problem"}
        assert findings["Model"].remedy == "Pass one of these: m."

    def test_no_list(self):
        """A gateway that forwards the score API only."""
        fake = Fake(overrides=lambda request: refusal(404) if request.path == "/v1/models" else None)
        findings = examine(fake)
        assert list(findings)[-1] == "Model"
        assert "--model NAME" in str(findings["Model"].remedy)
        named = examine(fake, model="m")
        assert verdicts(named) == {"Model": "note", "Key": "note", "Window": "note", "Long documents": "note"}


class TestKey:
    """Whether it is taken, and whether it guards."""

    @pytest.mark.parametrize(("key", "says"), [(None, "none is set"), ("wr0ng", "refuses the key")])
    def test_a_key_is_missing_or_wrong(self, key: str | None, says: str):
        """Nothing goes on; the key is not shown."""
        findings = examine(Fake(key="right", open=["/version"]), api_key=key)
        assert list(findings) == ["Reachable", "Version", "Key"]
        assert findings["Key"].verdict == "problem"
        assert says in findings["Key"].says
        assert "401: Unauthorized" in findings["Key"].says
        assert "wr0ng" not in str(findings)
        assert "VLLM_API_KEY" in str(findings["Key"].remedy)

    def test_a_key_for_scores_only(self):
        """Where the list of models is public."""
        findings = examine(Fake(key="right", open=["/version", "/v1/models"]))
        assert list(findings)[-2:] == ["Model", "Key"]
        assert findings["Key"].verdict == "problem"

    @pytest.mark.parametrize(
        ("fake", "verdict", "says"),
        [
            (Fake(key="right"), "good", "no scores without"),
            (Fake(key="right", open=["/score"]), "warning", "/score gives scores without one"),
            (Fake(), "warning", "gives scores without one, too"),
            (Fake(overrides=lambda request: _without_key(request, [CLOSE])), "note", "could not be seen"),
        ],
        ids=["all guarded", "as vLLM", "open", "not known"],
    )
    def test_what_it_guards(self, fake: Fake, verdict: str, says: str):
        """vLLM guards /v1 only."""
        found = examine(fake, api_key="right")["Key"]
        assert found.verdict == verdict
        assert says in found.says
        assert (found.remedy is not None) == (verdict == "warning")


class TestScoreAPI:
    """Whether there are scores at all."""

    def test_none(self):
        """As a model that generates text is served."""
        findings = examine(Fake(apis=()))
        assert verdicts(findings) == {"Score API": "problem"}
        assert list(findings)[-1] == "Score API"
        assert "--runner pooling" in str(findings["Score API"].remedy)

    def test_none_but_the_model_is_known(self):
        """The command that serves it so that it scores."""
        remedy = str(examine(Fake(apis=(), models={"m": "Qwen/Qwen3-Reranker-0.6B"}))["Score API"].remedy)
        assert "rag-rerank template show qwen3-reranker > qwen3-reranker.jinja;" in remedy
        assert "vllm serve Qwen/Qwen3-Reranker-0.6B --hf-overrides '{" in remedy
        assert "--chat-template qwen3-reranker.jinja" in remedy

    def test_a_command_to_paste_holds_no_other(self):
        """The name of the checkpoint is the server's."""
        remedy = str(examine(Fake(apis=(), models={"m": "$(x)/zerank-2-reranker-vllm"}))["Score API"].remedy)
        assert "; vllm serve '$(x)/zerank-2-reranker-vllm' --runner pooling" in remedy

    @pytest.mark.parametrize(
        ("path", "remedy"),
        [
            ("/v1/rerank", 'Pass --endpoint rerank (endpoint="rerank" in Python).'),
            ("/v2/rerank", 'Pass --endpoint rerank (endpoint="rerank" in Python), with the address http://127.0.0.1:'),
            ("/rerank", 'Pass --endpoint rerank (endpoint="rerank" in Python), with the address http://127.0.0.1:'),
        ],
    )
    def test_only_another_one(self, path: str, remedy: str):
        """Then that is what to ask."""
        found = examine(Fake(apis=[path]))["Score API"]
        assert f"no score API at /v1/score, but a rerank API at {path}." in found.says
        assert str(found.remedy).startswith(remedy)
        assert path == "/v1/rerank" or str(found.remedy).endswith(f"{path}.")

    def test_only_the_score_api(self):
        """Where another was asked for."""
        other = examine(Fake(apis=["/v1/score"]), endpoint="rerank")["Score API"]
        assert "Leave out" in str(other.remedy)

    def test_a_rerank_api_of_another_make(self):
        """Without version, what it drops is found out by trying."""
        findings = examine(Fake(version=None, apis=["/v1/rerank"]), endpoint="rerank")
        assert verdicts(findings) == {"Version": "note", "Key": "note", "Options": "note"}

    def test_it_gives_something_else(self):
        """No scores, but a page."""
        page = Fake(overrides=lambda request: [http("<html>")] if request.wants_scores else None)
        findings = examine(page)
        assert verdicts(findings) == {"Score API": "problem"}
        assert "not JSON" in findings["Score API"].says


class TestOtherPrograms:
    """Servers and gateways that are not vLLM: which, and what they drop."""

    @pytest.mark.parametrize(
        ("fake", "program"),
        [
            (Fake(headers={"x_litellm_call_id": "9ed64222"}, owner="openai"), "LiteLLM"),
            (Fake(headers={"X_New_Api_Version": "v1"}, owner="custom"), "new-api"),
            (Fake(owner="llamacpp"), "llama.cpp"),
            (Fake(owner="sglang"), "SGLang"),
            (Fake(owner="infinity"), "infinity"),
            (Fake(owner="xinference"), "Xinference"),
            (Fake(owner="docker"), "Docker Model Runner"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_they_are_named(self, fake: Fake, program: str):
        """By a header, or the owner of their models; what they call their version is not vLLM's."""
        findings = examine(fake)
        assert (findings["Version"].verdict, findings["Version"].says[: len(program)]) == ("note", program)
        assert findings["Options"].says == f"{program} drops instruction, or the model has no place for it."

    def test_vllm_itself_is_not_another(self):
        """Nothing is tried that its version tells."""
        assert verdicts(examine(Fake(owner="vllm"))) == {"Key": "note"}

    def test_text_embeddings_inference(self):
        """It tells itself in /info, and has other words for everything."""

        def tei(request: Request) -> Steps:
            if request.path == "/info":
                return [http('{"model_id": "BAAI/bge-reranker-base", "max_input_length": 512}')]
            if request.path != "/rerank":
                return [http("", 404)]
            if "texts" not in request.content:
                return refusal(422, "missing field `texts`")
            pairs = [(request.content["query"], text) for text in request.content["texts"]]
            scores = [sigmoid_cross_encoder(*pair, request.content.get("raw_scores", False)) for pair in pairs]
            return [http(json.dumps([{"index": index, "score": score} for index, score in enumerate(scores)]))]

        findings = examine(Fake(overrides=tei), endpoint="auto")
        assert findings["Version"].says.startswith("text-embeddings-inference answers")
        assert findings["Model"].says == "It serves BAAI/bge-reranker-base."
        assert findings["Score API"].says == "POST /rerank gives scores."
        assert "0 to 1 by its activation" in findings["Scores"].says
        assert "drops usage" in findings["Options"].says
        asked_wrongly = examine(Fake(overrides=tei), endpoint="rerank", model="m")["Score API"]
        assert 'endpoint="tei"' in str(asked_wrongly.remedy)

    def test_nothing_is_dropped(self):
        """Then that is said."""
        found = examine(Fake(version=None, instructed=0.1))["Options"]
        assert (found.verdict, found.says[:9]) == ("good", "It minds ")

    def test_everything_is_dropped(self):
        """use_activation shows in scores that stay between 0 and 1."""
        fake = Fake(lambda q, d, logits: sigmoid_cross_encoder(q, d, False), version=None, tokens=None)
        assert "It drops use_activation, instruction, usage" in examine(fake)["Options"].says

    def test_dropping_what_the_scorer_needs_is_a_problem(self):
        """An instruction, or logits: what comes back is not what was asked for."""
        assert examine(Fake(version=None), instruction="Answer.")["Options"].verdict == "problem"
        dropping = Fake(lambda q, d, logits: sigmoid_cross_encoder(q, d, False))
        found = examine(dropping, use_activation=False)["Scores"]
        assert (found.verdict, "use_activation=False is dropped" in found.says) == ("problem", True)


class TestScores:
    """What kind they are."""

    @pytest.mark.parametrize(
        ("score", "verdict", "words"),
        [
            (sigmoid_cross_encoder, "good", "0 to 1 by its activation"),
            (cosine, "good", "Cosines of embeddings, -1 to 1"),
            (raw_logits, "note", "Raw logits"),
            (max_sim, "note", "no score_threshold suits all queries"),
            (lambda q, d, logits: sigmoid_cross_encoder(q, d, False), "note", "0 to 1 (use_activation changes nothing"),
        ],
        ids=["sigmoid", "cosine", "logits", "MaxSim", "bounded"],
    )
    def test_their_kind(self, score: Score, verdict: str, words: str):
        """With what relevant and other documents got."""
        found = examine(Fake(score))["Scores"]
        assert found.verdict == verdict
        assert words in found.says
        assert "right answers got" in found.says

    def test_logits_that_the_scorer_asks_for(self):
        """The scale is that of its users."""
        assert "Raw logits" in examine(Fake(), use_activation=False)["Scores"].says

    @pytest.mark.parametrize("signs", [(1, -1), (1, 1)])
    def test_a_modular_cross_encoder_that_is_served_as_an_embedding_model(self, signs: tuple[int, int]):
        """Its one number a text is an embedding there: its cosine is 1 or -1."""
        fake = Fake(lambda query, document, _: float(query == document or signs[relevant(query, document)]))
        found = examine(fake)["Scores"]
        assert (found.verdict, "All scores are 1 or -1" in found.says) == ("problem", True)
        assert found.remedy == "Serve what this makes: rag-rerank convert someone/reranker OUT"

    def test_a_reranker_that_is_served_as_an_embedding_model(self):
        """vllm serve --runner pooling without the overrides does that."""
        found = examine(Fake(cosine, models={"m": "/models/Qwen3-Reranker-0.6B"}))["Scores"]
        assert found.verdict == "problem"
        assert "vllm serve /models/Qwen3-Reranker-0.6B --hf-overrides" in str(found.remedy)


class TestTemplate:
    """Whether pairs are prompted as the model was trained."""

    @pytest.mark.parametrize(
        ("checkpoint", "tokens", "verdict", "says"),
        [
            ("Qwen/Qwen3-Reranker-0.6B", 80, "good", "as qwen3-reranker needs it"),
            ("Qwen/Qwen3-Reranker-0.6B", 2, "problem", "ranks at random without"),
            ("Alibaba-NLP/gte-multilingual-reranker-base", 6, "good", "needed none"),
            ("Alibaba-NLP/gte-multilingual-reranker-base", 30, "note", "was trained without one"),
            ("mine/reranker", 5, "good", "needed none"),
            ("mine/reranker", 80, "good", "uses a score template"),
            ("mine/reranker", 2, "note", "looks as if it needed one"),
            ("mine/reranker", None, "note", "does not count tokens"),
        ],
    )
    def test_in_use_or_not(self, checkpoint: str, tokens: int | None, verdict: str, says: str):
        """By the tokens of a pair, and by what is known of the model."""
        found = examine(Fake(models={"m": checkpoint}, tokens=tokens))["Template"]
        assert found.verdict == verdict
        assert says in found.says

    def test_the_remedy_is_a_command(self):
        """With the files and flags that the model needs."""
        found = examine(Fake(models={"m": "polaria-tech/zerank-2-reranker-vllm"}, tokens=2))["Template"]
        assert found.remedy == (
            "Serve it so: rag-rerank template show zerank-2-seq-cls > zerank-2.jinja; "
            "vllm serve polaria-tech/zerank-2-reranker-vllm --runner pooling --chat-template zerank-2.jinja"
        )

    def test_a_server_that_knows_no_templates(self):
        """Is to be upgraded first."""
        fake = Fake(models={"m": "Qwen/Qwen3-Reranker-0.6B"}, tokens=2, version="0.12.0")
        assert "Upgrade vLLM to 0.14" in str(examine(fake)["Template"].remedy)

    def test_a_model_that_nobody_knows_ranks_at_random(self):
        """A missing template is the likely cause with a causal model's tokenizer; not with an encoder's."""
        findings = examine(Fake(at_random, tokens=2))
        assert (findings["Template"].verdict, findings["Ranking"].verdict) == ("warning", "problem")
        assert "said above" in str(findings["Ranking"].remedy)
        findings = examine(Fake(at_random, tokens=5))
        assert (findings["Template"].verdict, findings["Ranking"].verdict) == ("good", "problem")
        assert "--model CHECKPOINT" in str(findings["Ranking"].remedy)

    def test_a_template_that_is_rendered_here(self):
        """Is one too many if the server has one, too."""
        settings = {"template": "qwen3-reranker", "truncate_prompt_tokens": None}
        fake = Fake(lambda q, d, logits: float("blue" in q and "blue" in d), tokens=2)
        assert examine(fake, **settings)["Template"].verdict == "good"
        found = examine(Fake(fake.score, tokens=80), **settings)["Template"]
        assert (found.verdict, "two score templates" in found.says) == ("problem", True)

    def test_embeddings_need_none(self):
        """However few tokens there are."""
        assert examine(Fake(cosine, tokens=2))["Template"].verdict == "good"


class TestRanking:
    """Whether right answers come out on top."""

    @pytest.mark.parametrize(
        ("right", "verdict"), [(12, "good"), (11, "good"), (10, "warning"), (6, "warning"), (5, "problem")]
    )
    def test_how_many(self, right: int, verdict: str):
        """Of 12; 5 are no better than chance."""
        found = examine(Fake(so_many(right)))["Ranking"]
        assert found.verdict == verdict
        assert found.says.startswith(f"{right} of 12 known answers")

    def test_which_were_missed(self):
        """They may be in a language that the model never saw."""
        missed = f'"{KNOWN[9][0]}" and "{KNOWN[10][0]}" and 1 more.'
        assert examine(Fake(so_many(9)))["Ranking"].says.endswith(missed)

    def test_the_same_score_for_all(self):
        """Is no ranking."""
        found = examine(Fake(lambda query, document, logits: 0.5))["Ranking"]
        assert (found.verdict, found.says[:7]) == ("problem", "0 of 12")

    def test_backwards(self):
        """Worse than chance has another cause."""
        found = examine(Fake(backwards))["Ranking"]
        assert found.verdict == "problem"
        assert "12 scored lowest" in found.says
        assert "classifier_from_token" in str(found.remedy)

    def test_at_random_with_its_template(self):
        """Nothing above explains it, so the remedy says how to find out."""
        found = examine(Fake(at_random, models={"m": "Qwen/Qwen3-Reranker-0.6B"}, tokens=80))["Ranking"]
        assert found.verdict == "problem"
        assert "--model CHECKPOINT" in str(found.remedy)


class TestLength:
    """The window, and what is longer."""

    @pytest.mark.parametrize(
        ("window", "verdict", "remedy"),
        [
            (512, "good", None),
            (514, "problem", "Start it with --max-model-len 512."),
            (8194, "problem", "Start it with --max-model-len 8192."),
            (None, "note", None),
        ],
    )
    def test_the_window(self, window: int | None, verdict: str, remedy: str | None):
        """Two more than 512 or 8192 is a RoBERTa whose positions vLLM miscounts."""
        found = examine(Fake(window=window))["Window"]
        assert (found.verdict, found.remedy) == (verdict, remedy)

    @pytest.mark.parametrize("tokens", [5, 80], ids=["plain", "templated"])
    def test_over_long_documents_are_scored(self, tokens: int):
        """And what is at their beginning counts."""
        found = examine(Fake(tokens=tokens))["Long documents"]
        assert (found.verdict, "outscores a wrong one" in found.says) == ("good", True)

    def test_over_long_documents_are_refused(self):
        """As by a server that is told not to cut them."""

        def refuse(request: Request) -> Steps | None:
            if request.wants_scores and max(map(len, request.documents)) > 2000:
                return refusal(400, "This model's maximum context length is 512 tokens.")
            return None

        found = examine(Fake(overrides=refuse), truncate_prompt_tokens=None)["Long documents"]
        assert found.verdict == "problem"
        assert "maximum context length" in found.says
        assert "max_tokens_per_doc=" in str(found.remedy)

    @pytest.mark.parametrize(("tokens", "remedy"), [(5, "passages"), (80, "max_tokens_per_doc")])
    def test_the_cut_takes_what_counts(self, tokens: int, remedy: str):
        """A prompt's end, most likely."""

        def score(query: str, document: str, logits: bool) -> float:
            return 0.0 if len(document) > 2000 else sigmoid_cross_encoder(query, document, logits)

        found = examine(Fake(score, tokens=tokens))["Long documents"]
        assert (found.verdict, remedy in str(found.remedy)) == ("problem", True)

    def test_a_document_that_takes_too_long(self):
        """Is said to; the examination goes on."""

        def hang(request: Request) -> Steps | None:
            return [HANG] if request.wants_scores and max(map(len, request.documents)) > 2000 else None

        findings = examine(Fake(overrides=hang), timeout=1.0)
        assert (findings["Long documents"].verdict, findings["Speed"].verdict) == ("warning", "good")

    def test_a_window_too_long_to_fill(self):
        """Is not tried."""
        assert "Not tried" in examine(Fake(window=1 << 20))["Long documents"].says


class TestService:
    """Batches, ids and speed."""

    @pytest.mark.parametrize(("noise", "verdict"), [(0.0, "good"), (9e-4, "good"), (2e-3, "warning")])
    def test_a_score_depends_on_the_batch(self, noise: float, verdict: str):
        """More than single precision explains."""
        found = examine(Fake(noise=noise))["Batches"]
        assert found.verdict == verdict
        assert ("--dtype float32" in str(found.remedy)) == (verdict == "warning")

    def test_a_listwise_model(self):
        """Known by its name: it is not half precision that makes scores differ."""
        found = examine(Fake(models={"m": "jinaai/jina-reranker-v3"}))["Batches"]
        assert (found.verdict, "listwise" in found.says) == ("note", True)
        assert "In the opposite order, 12 documents score up to 0 otherwise" in found.says  # by this server

    def test_a_listwise_model_of_another_name(self):
        """Seen in documents of one query, whose scores change each other's."""

        def together(request: Request) -> Steps | None:
            if not request.wants_scores or isinstance(request.content["text_1"], list) or len(request.documents) == 1:
                return None
            answer = Fake().answer(request)
            answer["data"] = [entry | {"score": entry["score"] / 2} for entry in answer["data"]]
            return [http(json.dumps(answer))]

        found = examine(Fake(overrides=together))["Batches"]
        assert (found.verdict, "as a listwise model's does" in found.says) == ("warning", True)

    def test_ids_do_not_come_back(self):
        """Behind a gateway."""
        assert examine(Fake(echoes=False))["Request ids"].verdict == "note"

    @staticmethod
    def _slow(seconds: float) -> Callable[[Request], Steps | None]:
        def behave(request: Request) -> Steps | None:
            if not request.wants_scores or len(request.documents) != 100:
                return None
            return [seconds, *Fake().right(request)]

        return behave

    @pytest.mark.parametrize(
        ("seconds", "verdict", "says"),
        [
            (0.0, "good", "Documents of 100 words: 1 in "),
            (1.5, "warning", "more than a third of the 4 s"),
            (5, "problem", "100 documents of 100 words took longer"),
        ],
    )
    def test_speed(self, seconds: float, verdict: str, says: str):
        """Against the time that a call may take."""
        found = examine(Fake(overrides=self._slow(seconds)), timeout=4)["Speed"]
        assert found.verdict == verdict
        assert says in found.says

    def test_a_refusal(self):
        """Of so many documents."""
        fake = Fake(
            overrides=lambda request: refusal(403) if request.wants_scores and len(request.documents) > 50 else None
        )
        assert examine(fake)["Speed"].verdict == "problem"


class TestSeveral:
    """Servers that are to stand in for each other."""

    def test_alike(self):
        """One finding more."""
        findings = examine(Fake(), Fake(), Fake())
        assert verdicts(findings) == {"Key": "note"}
        assert findings["Same"].says.count("127.0.0.1") == 3

    @pytest.mark.parametrize(
        ("other", "verdict", "says"),
        [
            (Fake(cosine), "problem", "scores that differ by up to"),
            (Fake(noise=3e-3), "warning", "scores that differ by up to 0.003"),
            (Fake(models={"n": "someone/reranker"}), "problem", "serve m and n"),
            (Fake(version="0.31.0"), "warning", "different versions: 0.32 and 0.31"),
            (Fake(version=None), "warning", "0.32 and one that is not told"),
            (Fake(window=256), "warning", "read 512 and 256 tokens"),
            (Fake(apis=()), "problem", "404"),
        ],
        ids=["scores", "precision", "model", "version", "no version", "window", "no scores"],
    )
    def test_not_alike(self, other: Fake, verdict: str, says: str):
        """Each difference with what to do."""
        found = examine(Fake(), other)["Same"]
        assert found.verdict == verdict
        assert says in found.says
        assert found.remedy


class TestRealServers:
    """vLLM itself."""

    def test_minilm_is_well(self, vllm_minilm: VLLMServer):
        """A bi-encoder that understands questions."""
        with VLLMScorer(vllm_minilm.base_url, timeout=600) as scorer:  # on a busy machine it may be slow
            of_minilm = {finding.title: finding for finding in check(scorer)}
        assert list(of_minilm) == TITLES
        assert verdicts(of_minilm) == {"Key": "note"}
        assert "Cosines" in of_minilm["Scores"].says
        assert of_minilm["Ranking"].says.startswith("12 of 12")
        assert "256" in of_minilm["Window"].says

    def test_random_weights_do_not_pass(self, vllm_cross_encoder: VLLMServer):
        """All is well with that server but its model; and its key guards /v1 only."""
        with VLLMScorer(vllm_cross_encoder.base_url, api_key=vllm_cross_encoder.api_key, timeout=600) as scorer:
            of_cross_encoder = {finding.title: finding for finding in check(scorer)}
        assert list(of_cross_encoder) == TITLES
        # The model is another one in each run: one in twenty gets 6 answers of 12 right, which is a warning.
        assert of_cross_encoder["Ranking"].verdict in {"problem", "warning"}
        assert {"Key", "Ranking"} <= verdicts(of_cross_encoder).keys() <= {"Key", "Ranking", "Long documents"}
        assert "0 to 1 by its activation" in of_cross_encoder["Scores"].says
        assert of_cross_encoder["Key"].verdict == "warning"
        assert "/score gives scores without one" in of_cross_encoder["Key"].says

    def test_without_its_key(self, vllm_cross_encoder: VLLMServer):
        """It ends early."""
        with VLLMScorer(vllm_cross_encoder.base_url) as scorer:
            findings = list(check(scorer))
        assert [finding.title for finding in findings] == ["Reachable", "Version", "Key"]
        assert findings[-1].verdict == "problem"

    def test_two_servers_of_different_models(self, vllm_minilm: VLLMServer, vllm_cross_encoder: VLLMServer):
        """As after a mistake in a deployment."""
        urls = [vllm_cross_encoder.base_url, vllm_minilm.base_url]
        with VLLMScorer(urls, api_key=vllm_cross_encoder.api_key) as scorer:
            said = [finding.says for finding in check(scorer) if finding.title == "Same"]
        assert any(f"serve {vllm_cross_encoder.name} and {vllm_minilm.name}" in text for text in said)
        assert any("scores that differ" in text for text in said)
