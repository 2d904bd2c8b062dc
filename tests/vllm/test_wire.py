"""Requests in the form that each vLLM version knows; replies read strictly."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_rerank import BadReply, ConfigError
from rag_rerank.vllm.wire import (
    Options,
    Server,
    error_text,
    is_model_missing,
    read_models,
    read_scores,
    read_version,
    score_request,
)


def body_of(version: tuple[int, int] | None = (0, 32), **options: object) -> dict[str, object]:
    request = score_request(Server(version, "m"), ["q"], ["a", "b"], Options(**options))
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
        request = score_request(Server(None, "m"), ["q", "r"], ["a", "b"], Options())
        assert json.loads(request.body) == {"model": "m", "text_1": ["q", "r"], "text_2": ["a", "b"]}

    @pytest.mark.parametrize(("version", "field"), [((0, 32), "use_activation"), ((0, 11), "activation")])
    def test_the_activation_has_the_name_of_its_version(self, version: tuple[int, int], field: str):
        """use_activation from 0.12 on, activation before."""
        assert body_of(version, use_activation=False)[field] is False

    @pytest.mark.parametrize(
        ("version", "options", "need"),
        [
            ((0, 9), {"use_activation": False}, "0.10"),
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

    def test_an_unknown_version_is_taken_for_a_recent_one(self):
        """Gateways often hide /version."""
        assert body_of(None, use_activation=False)["use_activation"] is False


class TestScores:
    """Exactly one finite score for each index."""

    def test_scores_come_in_the_order_of_the_documents(self):
        """Whatever order the server chose; unknown fields don't matter."""
        assert read_scores(reply({"index": 1, "score": 0.5, "x": 1}, {"index": 0, "score": 1}), 2) == [1.0, 0.5]

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
            (b'{"data": [{"index": 0, "score": NaN}]}', "not JSON"),
            (b'{"data": [{"index": 0, "score": Infinity}]}', "not JSON"),
            (b'{"data": [{"index": 0, "score": 1e999}]}', "score inf"),
        ],
    )
    def test_anything_else_is_a_bad_reply(self, body: bytes, reason: str):
        """And says what is wrong with it."""
        with pytest.raises(BadReply, match=reason):
            read_scores(body, 1)

    def test_two_scores_for_one_document_are_a_bad_reply(self):
        """Then another has none."""
        with pytest.raises(BadReply, match=r"two scores for documents\[0\]"):
            read_scores(reply({"index": 0, "score": 1}, {"index": 0, "score": 2}), 2)

    @given(st.binary(max_size=200), st.integers(1, 3))
    def test_random_bytes_never_raise_anything_else(self, body: bytes, expected: int):
        """No exception of the JSON library gets out."""
        with pytest.raises(BadReply):
            read_scores(body, expected)

    @given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1), st.randoms())
    def test_any_permutation_is_put_back_in_order(self, scores: list[float], random):
        """The index decides, not the position."""
        entries = [{"index": index, "score": score} for index, score in enumerate(scores)]
        random.shuffle(entries)
        assert read_scores(reply(*entries), len(scores)) == scores
        assert all(math.isfinite(score) for score in scores)


class TestOtherReplies:
    """Versions, models and errors."""

    @pytest.mark.parametrize(
        ("body", "version"),
        [
            (b'{"version": "0.32.0"}', (0, 32)),
            (b'{"version": "0.11.1rc2.dev1+gabc"}', (0, 11)),
            (b'{"version": "dev"}', None),
            (b"{}", None),
            (b"nope", None),
        ],
    )
    def test_a_version_is_two_numbers_or_unknown(self, body: bytes, version: tuple[int, int] | None):
        """Nothing about it is an error."""
        assert read_version(body) == version

    def test_models_have_a_name_and_a_checkpoint(self):
        """Aliases share the checkpoint."""
        body = b'{"data": [{"id": "a", "root": "org/x"}, {"id": "b", "root": "org/x"}, {"id": "c"}]}'
        assert read_models(body) == [("a", "org/x"), ("b", "org/x"), ("c", "c")]
        with pytest.raises(BadReply):
            read_models(b'{"data": ["a"]}')

    @pytest.mark.parametrize(
        ("body", "text"),
        [
            (b'{"error": {"message": "m", "code": 400}}', "m"),
            (b'{"error": "Unauthorized"}', "Unauthorized"),
            (b'{"object": "error", "message": "old"}', "old"),
            (b'{"detail": "Not Found"}', "Not Found"),
            (b"<html>  Bad\n gateway", "<html> Bad gateway"),
            (b"\x1b[31mred", r"\x1b[31mred"),
        ],
    )
    def test_the_servers_words_are_found_in_all_known_shapes(self, body: bytes, text: str):
        """In one printable line."""
        assert error_text(body) == text

    def test_a_long_error_page_is_cut(self):
        """A megabyte of HTML does not belong in a message."""
        assert len(error_text(b"x" * 1_000_000)) == 300

    def test_an_unknown_model_and_an_unknown_path_are_told_apart(self):
        """Both are 404; the body differs."""
        assert is_model_missing(b'{"error": {"message": "The model `x` does not exist.", "code": 404}}')
        assert is_model_missing(b'{"object": "error", "message": "The model `x` does not exist."}')
        assert not is_model_missing(b'{"detail": "Not Found"}')
        assert not is_model_missing(b"nginx")
