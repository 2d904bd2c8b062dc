"""Requests in the form that each vLLM version knows; replies read strictly."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_rerank import BadReply, ConfigError
from rag_rerank.vllm.wire import (
    Answer,
    Card,
    Form,
    Options,
    Reply,
    Request,
    ServerFacts,
    error_text,
    is_model_missing,
    is_too_long,
    read_answer,
    read_models,
    read_version,
    scoring_request,
)

RERANK, TEI = Form("rerank", "/v1/rerank"), Form("tei", "/rerank")


def body_of(version: tuple[int, int] | None = (0, 32), **options: object) -> dict[str, object]:
    request = scoring_request(ServerFacts(version, "m"), ["q"], ["a", "b"], Options(**options))
    assert (request.method, request.path) == ("POST", "/v1/score")
    return json.loads(request.body)


def reply(*entries: object) -> bytes:
    return json.dumps({"data": list(entries)}).encode()


class TestRequest:
    """text_1 and text_2, no nulls, nothing that the server would silently ignore."""

    def test_the_plain_form(self):
        """What every version understands."""
        assert body_of() == {"model": "m", "text_1": "q", "text_2": ["a", "b"]}

    def test_many_queries_are_a_list(self):
        """N:N sends both sides as lists."""
        request = scoring_request(ServerFacts(None, "m"), ["q", "r"], ["a", "b"], Options())
        assert json.loads(request.body) == {"model": "m", "text_1": ["q", "r"], "text_2": ["a", "b"]}

    @pytest.mark.parametrize(
        ("version", "options", "need"),
        [
            ((0, 11), {"use_activation": False}, "0.12"),
            ((0, 7), {"truncate_prompt_tokens": 512}, "0.8"),
            ((0, 7), {"priority": 1}, "0.8"),
            ((0, 19), {"max_tokens_per_doc": 10}, "0.20"),
            ((0, 19), {"max_tokens_per_query": 10}, "0.20"),
            ((0, 21), {"instruction": "i"}, "0.22"),
            ((0, 21), {"chat_template_kwargs": {"x": 1}}, "0.22"),
        ],
    )
    def test_a_version_without_the_field_is_refused(self, version: tuple[int, int], options: dict, need: str):
        """vLLM ignores unknown fields: a score would come back, but not the one that was asked for."""
        with pytest.raises(ConfigError, match=f"does not know {next(iter(options))}; it needs {need} or newer"):
            body_of(version, **options)
        major, minor = map(int, need.split("."))
        assert set(body_of((major, minor), **options)) > {"model", "text_1", "text_2"}

    def test_other_fields_are_sent_as_they_are(self):
        """extra_body is for what we don't know."""
        assert body_of(priority=3, extra_body={"user": "me"}) == body_of() | {"priority": 3, "user": "me"}

    def test_cutting_at_the_maximum_is_only_asked_of_versions_that_know_it(self):
        """-1 came with 0.9; a number is older."""
        assert "truncate_prompt_tokens" not in body_of((0, 8), truncate_prompt_tokens=-1)
        assert body_of((0, 9), truncate_prompt_tokens=-1)["truncate_prompt_tokens"] == -1
        assert body_of((0, 8), truncate_prompt_tokens=512)["truncate_prompt_tokens"] == 512

    def test_cutting_at_the_maximum_is_all_that_may_be_left_out(self):
        """Without it over-long pairs are refused, which shows; other options would be missing silently."""
        with pytest.raises(ConfigError, match="priority"):
            body_of((0, 7), truncate_prompt_tokens=-1, priority=1)

    def test_an_unknown_version_is_taken_for_a_recent_one(self):
        """Gateways often hide /version."""
        assert body_of(None, use_activation=False)["use_activation"] is False
        assert body_of(None, truncate_prompt_tokens=-1)["truncate_prompt_tokens"] == -1

    def test_an_option_that_is_false_or_zero_is_said(self):
        """Only None says nothing."""
        assert body_of(priority=0, use_activation=False) == body_of() | {"priority": 0, "use_activation": False}

    @pytest.mark.parametrize(("version", "knows"), [((0, 16), True), ((1, 0), True), ((0, 15), False), (None, False)])
    def test_an_id_goes_in_the_body_too_where_that_is_known(self, version: tuple[int, int] | None, knows: bool):
        """From 0.16 on; a gateway may put an id of its own in the header. Others may refuse unknown fields."""
        request = scoring_request(ServerFacts(version, "m"), ["q"], ["a"], Options(), "id-1")
        assert request.id == "id-1"
        assert json.loads(request.body).get("request_id") == ("id-1" if knows else None)

    def test_without_an_id_none_is_sent(self):
        """Neither in the header nor in the body."""
        request = scoring_request(ServerFacts((0, 32), "m"), ["q"], ["a"], Options())
        assert request.id is None
        assert b"request_id" not in request.body

    def test_texts_go_as_utf_8(self):
        """Not as escapes, which are up to six times as long."""
        request = scoring_request(ServerFacts(None, "m"), ["Öl?"], ["日本\0"], Options())
        assert "Öl?".encode() in request.body
        assert "日本".encode() in request.body
        assert json.loads(request.body)["text_2"] == ["日本\0"]

    @given(st.lists(st.text(max_size=20), min_size=1, max_size=3))
    def test_any_text_arrives_as_it_is(self, texts: list[str]):
        """Quotes, control characters, astral planes."""
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        assert json.loads(scoring_request(ServerFacts(None, "m"), texts, texts, Options()).body)["text_2"] == texts

    @pytest.mark.parametrize("count", [1, 100])
    def test_an_answer_may_have_so_many_bytes_as_it_can_need(self, count: int):
        """64 KiB and 256 bytes for each document; a rerank answer also repeats them."""
        documents = ["abc"] * count
        limit = (64 << 10) + 256 * count
        assert scoring_request(ServerFacts(None, "m"), ["q"], documents, Options()).reply_limit == limit
        assert (
            scoring_request(ServerFacts(None, "m", form=RERANK), ["q"], documents, Options()).reply_limit
            == limit + 36 * count
        )
        assert Request("GET", "/version").reply_limit == 1 << 20


class TestRerankRequest:
    """The same, in the shape of Jina's and Cohere's APIs."""

    def test_the_plain_form(self):
        """Without top_n, all documents are scored."""
        request = scoring_request(ServerFacts((0, 15), "m", form=RERANK), ["q"], ["a", "b"], Options())
        assert (request.method, request.path) == ("POST", "/v1/rerank")
        assert json.loads(request.body) == {"model": "m", "query": "q", "documents": ["a", "b"]}

    def test_options_and_id_are_those_of_scores(self):
        """In the same fields."""
        request = scoring_request(ServerFacts((0, 32), "m", form=RERANK), ["q"], ["a"], Options(priority=3), "id-1")
        assert json.loads(request.body).items() >= {"priority": 3, "request_id": "id-1"}.items()
        assert request.id == "id-1"
        with pytest.raises(ConfigError):
            scoring_request(ServerFacts((0, 21), "m", form=RERANK), ["q"], ["a"], Options(instruction="i"))

    def test_several_queries_do_not_fit(self):
        """A call that was cut for a score API must not lose them at another server's rerank API."""
        with pytest.raises(ConfigError, match="asked by /v1/rerank, another otherwise"):
            scoring_request(ServerFacts(None, "m", form=RERANK), ["q", "r"], ["a", "b"], Options())


class TestTEIRequest:
    """The same, for text-embeddings-inference."""

    @staticmethod
    def body(**options: object) -> dict[str, object]:
        request = scoring_request(ServerFacts(None, "m", form=TEI), ["q"], ["a", "b"], Options(**options))
        assert request.path == "/rerank"
        return json.loads(request.body)

    def test_the_plain_form(self):
        """It serves one model, so none is named."""
        assert self.body() == self.body(use_activation=True) == {"query": "q", "texts": ["a", "b"]}

    def test_options_have_other_names(self):
        """Logits, and cutting at the window."""
        said = self.body(use_activation=False, truncate_prompt_tokens=-1, extra_body={"x": 1})
        assert said == self.body() | {"raw_scores": True, "truncate": True, "x": 1}

    @pytest.mark.parametrize(
        "option",
        [
            {"instruction": "i"},
            {"truncate_prompt_tokens": 7},
            {"max_tokens_per_doc": 7},
            {"chat_template_kwargs": {"a": 1}},
        ],
    )
    def test_an_option_that_it_does_not_know_is_refused(self, option: dict[str, object]):
        """It would be ignored: the score is not the one that is asked for."""
        with pytest.raises(ConfigError, match=f"does not know {next(iter(option))}"):
            self.body(**option)


class TestScores:
    """Exactly one finite score for each index."""

    def test_scores_come_in_the_order_of_the_documents(self):
        """Whatever order the server chose; unknown fields don't matter."""
        answer = read_answer("score", reply({"index": 1, "score": 0.5, "x": 1}, {"index": 0, "score": 1}), range(2))
        assert answer == Answer([1.0, 0.5])
        assert [type(score) for score in answer.scores] == [float, float]

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            (b"", "not JSON"),
            (b"<html>", "not JSON"),
            (b"\xff\xfe", "not JSON"),
            (b"[" * 200_000, "not JSON"),
            (b'{"data": [{"index": 0, "score": ' + b"1" * 5000 + b"}]}", "not JSON"),
            (b"[1]", "not an object"),
            (b'{"data": {}}', "no list"),
            (b'{"score": 1}', "no list"),
            (reply(), "0 scores for 1"),
            (reply({"index": 0, "score": 1}, {"index": 1, "score": 1}), "2 scores for 1"),
            (reply({"index": 1, "score": 1}), "index 1"),
            (reply({"index": -1, "score": 1}), "index -1"),
            (reply({"index": "0", "score": 1}), "index '0'"),
            (reply({"index": 0.0, "score": 1}), "index 0.0"),
            (reply({"index": True, "score": 1}), "index True"),
            (reply({"score": 1}), "index None"),
            (reply("x"), "index None"),
            (reply({"index": 0}), "score None"),
            (reply({"index": 0, "score": "1"}), "score '1'"),
            (reply({"index": 0, "score": True}), "score True"),
            (b'{"data": [{"index": NaN, "score": 1}]}', "index nan"),
        ],
    )
    def test_anything_else_is_a_bad_reply(self, body: bytes, reason: str):
        """And says what is wrong with it."""
        with pytest.raises(BadReply, match=reason):
            read_answer("score", body, range(1))

    @pytest.mark.parametrize(
        "score", ["null", "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400, "-" + "9" * 4000]
    )
    def test_a_score_that_is_not_finite_costs_no_other_document_its_own(self, score: str):
        """It stays in its place, for the core to name it."""
        body = f'{{"data": [{{"index": 1, "score": {score}}}, {{"index": 0, "score": 0.5}}]}}'.encode()
        first, second = read_answer("score", body, range(2)).scores
        assert first == 0.5
        assert not math.isfinite(second)

    @pytest.mark.parametrize("wrong", [{"index": "x" * 60_000, "score": 1}, {"index": 0, "score": "\n" * 60_000}])
    def test_what_is_wrong_is_not_shown_without_end(self, wrong: dict[str, object]):
        """A message is a line, not a page."""
        with pytest.raises(BadReply) as caught:
            read_answer("score", reply(wrong), range(1))
        assert len(str(caught.value)) < 500

    @pytest.mark.parametrize(
        ("entries", "reason"),
        [
            ([{"index": 0, "score": 1}, {"index": 1}], r"documents\[3\] got the score None"),
            ([{"index": 0, "score": 1}, {"index": 0, "score": 2}], r"two scores for documents\[5\]"),
        ],
    )
    def test_documents_are_named_by_their_positions_in_the_call(self, entries: list[dict], reason: str):
        """Not by those in the request."""
        with pytest.raises(BadReply, match=reason):
            read_answer("score", reply(*entries), [5, 3])

    def test_two_scores_for_one_document_are_a_bad_reply(self):
        """Then another has none."""
        with pytest.raises(BadReply, match=r"two scores for documents\[0\]"):
            read_answer("score", reply({"index": 0, "score": 1}, {"index": 0, "score": 2}), range(2))

    @given(st.binary(max_size=200), st.integers(1, 3))
    def test_random_bytes_never_raise_anything_else(self, body: bytes, expected: int):
        """No exception of the JSON library gets out."""
        with pytest.raises(BadReply):
            read_answer("score", body, range(expected))

    @given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1), st.randoms())
    def test_any_permutation_is_put_back_in_order(self, scores: list[float], random):
        """The index decides, not the position."""
        entries = [{"index": index, "score": score} for index, score in enumerate(scores)]
        random.shuffle(entries)
        assert read_answer("score", reply(*entries), range(len(scores))).scores == scores
        assert all(math.isfinite(score) for score in scores)

    def test_a_rerank_answer_has_other_names(self):
        """Its order is by score, and it repeats the documents."""
        results = [{"index": 1, "relevance_score": 0.9, "document": {"text": "b"}}, {"index": 0, "relevance_score": 0}]
        body = json.dumps({"id": "rerank-1", "results": results}).encode()
        assert read_answer("rerank", body, range(2)) == Answer([0.0, 0.9], id="rerank-1")
        with pytest.raises(BadReply, match="no list 'results'"):
            read_answer("rerank", reply({"index": 0, "score": 1}), range(1))
        with pytest.raises(BadReply, match="no list 'data'"):
            read_answer("score", body, range(2))

    def test_a_bare_list_is_an_answer_of_a_rerank_api(self):
        """SGLang's, which repeats documents, and text-embeddings-inference's; as strict as any."""
        body = b'[{"index": 1, "score": 0.9, "document": "b"}, {"index": 0, "score": 0.1}]'
        assert (
            read_answer("rerank", body, range(2)) == read_answer("tei", b" \n" + body, range(2)) == Answer([0.1, 0.9])
        )
        with pytest.raises(BadReply, match="2 scores for 3"):
            read_answer("tei", body, range(3))
        with pytest.raises(BadReply, match=r"documents\[0\] got the score None"):
            read_answer("tei", b'[{"index": 0, "relevance_score": 0.5}]', range(1))

    def test_an_error_with_status_200_keeps_its_words(self):
        """Some gateways answer so."""
        with pytest.raises(BadReply, match="no list 'results': no such channel"):
            read_answer("rerank", b'{"error": {"message": "no such channel"}}', range(1))

    def test_an_answer_says_whose_it_is_and_how_much_was_read(self):
        """Where it says so in a form that makes sense."""
        data = [{"index": 0, "score": 1}]
        said = {"data": data, "id": "score-1", "model": "m", "usage": {"prompt_tokens": 7}}
        assert read_answer("score", json.dumps(said).encode(), range(1)) == Answer([1.0], "score-1", "m", 7)
        for usage in (None, 7, [], {}, *({"prompt_tokens": tokens} for tokens in (None, "7", True, 0, -1))):
            nonsense = {"data": data, "id": 1, "model": ["m"], "usage": usage}
            assert read_answer("score", json.dumps(nonsense).encode(), range(1)) == Answer([1.0])


class TestOtherReplies:
    """Versions, models and errors."""

    @pytest.mark.parametrize(
        ("body", "version"),
        [
            (b'{"version": "0.32.0"}', (0, 32)),
            (b'{"version": "0.11.1rc2.dev1+gabc"}', (0, 11)),
            (b'{"version": "dev"}', None),
            (b'{"version": "1.2"}', (1, 2)),
            (b'{"version": "v0.32.0"}', None),
            (b'{"version": null}', None),
            (b'{"version": "0.' + b"1" * 5000 + b'"}', (0, 111111111)),
            (b'{"version": "' + b"1" * 5000 + b'.1"}', None),
            (b"[]", None),
            (b"{}", None),
            (b"nope", None),
        ],
    )
    def test_a_version_is_two_numbers_or_unknown(self, body: bytes, version: tuple[int, int] | None):
        """Nothing about it is an error."""
        assert read_version(body) == version

    def test_models_have_a_name_a_checkpoint_and_a_window(self):
        """Aliases share the checkpoint; adapters and gateways tell no window."""
        entries = [
            {"id": "a", "root": "org/x", "max_model_len": 512},
            {"id": "b", "root": "org/x", "max_model_len": None},
            {"id": "c", "max_model_len": "512"},
            {"id": "d", "root": None, "max_model_len": True},
            {"id": "e", "max_model_len": -1},
        ]
        cards = [Card("a", "org/x", 512), Card("b", "org/x"), Card("c", "c"), Card("d", "d"), Card("e", "e")]
        assert read_models(reply(*entries)) == cards
        assert read_models(b'{"data": []}') == []
        assert read_models(b'{"data": [{"id": "a", "owned_by": "sglang"}]}') == [Card("a", "a", owner="sglang")]
        tei = b'{"model_id": "BAAI/bge", "max_input_length": 512, "version": "1.9.0"}'
        assert read_models(tei) == [Card("BAAI/bge", "BAAI/bge", 512, "text-embeddings-inference")]

    @pytest.mark.parametrize(
        "body", [b'{"data": ["a"]}', b'{"data": [{"root": "x"}]}', b'{"data": {}}', b"{}", b"nginx"]
    )
    def test_what_is_no_model_list_is_a_bad_reply(self, body: bytes):
        """A gateway's page, say."""
        with pytest.raises(BadReply):
            read_models(body)

    def test_what_is_not_known_of_a_server_is_none(self):
        """Window, and whether it has a template."""
        server = ServerFacts(None, "m")
        assert (server.checkpoint, server.window, server.has_template) == (None, None, None)
        assert Reply(200, b"").headers == {}

    @pytest.mark.parametrize(
        ("body", "text"),
        [
            (b'{"error": {"message": "m", "code": 400}}', "m"),
            (b'{"error": "Unauthorized"}', "Unauthorized"),
            (b'{"object": "error", "message": "old"}', "old"),
            (b'{"detail": "Not Found"}', "Not Found"),
            (b"<html>  Bad\n gateway", "<html> Bad gateway"),
            (b"<html>\r\n<head><title>413 Too\n Large</title></head><body>nginx</body>", "413 Too Large"),
            (b"<H1 class=x>Bad gateway</H1>", "Bad gateway"),
            (b"\x1b[31mred", r"\x1b[31mred"),
            (b'{"error": {"message": ""}, "detail": "d"}', "d"),
            (b'{"error": {}, "message": "m", "detail": "d"}', "m"),
            (b'{"error": null}', "{'error': None}"),
            (b'{"detail": [{"loc": ["body"]}]}', "[{'loc': ['body']}]"),
            (b"[1]", "[1]"),
            (b"\xff", "\ufffd"),
            (b"", ""),
            (b"a\r\n\x00b\x7f\xc2\x85", r"a \x00b\x7f"),
            ("\u202eevil\u200b".encode(), r"\u202eevil\u200b"),
        ],
    )
    def test_the_servers_words_are_found_in_all_known_shapes(self, body: bytes, text: str):
        """In one printable line."""
        assert error_text(body) == text

    def test_a_long_error_page_is_cut(self):
        """A megabyte of HTML does not belong in a message."""
        assert error_text(b"x" * 300) == "x" * 300
        assert error_text(b"x" * 301) == error_text(b"x" * 1_000_000) == "x" * 297 + "..."
        assert len(error_text(b"\0" * 1_000_000)) == 300

    @pytest.mark.parametrize(
        ("said", "too_long"),
        [
            ("This model's maximum context length is 512 tokens. However, you requested 513", True),
            ("The decoder prompt (length 513) is longer than the maximum model length of 512", True),
            ("litellm.ContextWindowExceededError: HTTP 400", True),
            ("The input (513 tokens) is longer than the model's context length (512 tokens)", True),
            ("Input validation error: `inputs` must have less than 512 tokens. Given: 513", True),
            ("the request exceeds the available context size", True),
            ("input is too large to process. increase the physical batch size", True),
            ("context_length_exceeded", True),
            ("too many tokens: max tokens per document", True),
            ("The model `x` does not exist.", False),
            ("Input lengths must be either 1:1, 1:N or N:N", False),
            ("Input should be a valid string", False),
            ("max_tokens_per_doc (512) must be less than max_model_len (512).", False),
        ],
    )
    def test_what_is_too_long_is_said_in_many_words(self, said: str, too_long: bool):
        """By vLLM's versions, gateways and other servers."""
        assert is_too_long(said) is too_long

    def test_an_unknown_model_and_an_unknown_path_are_told_apart(self):
        """Both are 404; the body differs."""
        assert is_model_missing(b'{"error": {"message": "The model `x` does not exist.", "code": 404}}')
        assert is_model_missing(b'{"object": "error", "message": "The model `x` does not exist."}')
        assert not is_model_missing(b'{"detail": "Not Found"}')
        assert not is_model_missing(b'{"error": "Not Found"}')
        assert not is_model_missing(b"nginx")


class TestListwise:
    """Models that score the documents of a query together."""

    @pytest.mark.parametrize(
        ("model", "checkpoint", "listwise"),
        [
            ("jinaai/jina-reranker-v3", None, True),
            ("reranker", "/models/Jina-Reranker-v3.5", True),
            ("jina-reranker-v2-base-multilingual", None, False),
            ("m", "BAAI/bge-reranker-base", False),
        ],
    )
    def test_they_are_known_by_name(self, model: str, checkpoint: str | None, listwise: bool):
        """The served one, or the checkpoint's."""
        assert ServerFacts(None, model, checkpoint).listwise is listwise

    def test_they_are_known_by_architecture(self, tmp_path: Path):
        """Where the checkpoint lies on this machine."""
        (tmp_path / "config.json").write_text('{"architectures": ["JinaForRanking"]}')
        assert ServerFacts(None, "m", str(tmp_path)).listwise
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "config.json").write_text("[1]")
        assert not ServerFacts(None, "m", str(tmp_path / "other")).listwise
