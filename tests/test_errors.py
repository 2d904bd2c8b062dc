"""Errors say what failed, where, after how much, and what to do; and they survive pickling."""

import json
import pickle
from pathlib import Path

import pytest

from rag_rerank import LocalScorer, errors
from rag_rerank.errors import (
    BackendError,
    BackendUnavailable,
    ConfigError,
    DeadlineExceeded,
    DocumentRejected,
    short_name,
)


def test_a_message_has_what_where_how_often_how_long_and_the_remedy():
    """All that is known stands in one line."""
    error = BackendUnavailable("can't connect", endpoint="host:1", attempts=3, elapsed=0.5, remedy="Start it.")
    assert str(error) == "can't connect (host:1, 3 attempts, 0.50 s). Start it."


def test_a_message_has_only_what_is_known():
    """Nothing is made up for a local model, which has neither endpoint nor attempts."""
    assert str(BackendError("it failed")) == "it failed."
    assert str(BackendError("it failed", attempts=1)) == "it failed (1 attempt)."


def test_errors_are_also_what_python_calls_them():
    """`except TimeoutError` and `except ValueError` work."""
    assert issubclass(DeadlineExceeded, TimeoutError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RerankError)]
)
def test_every_error_survives_pickling(kind: type[Exception]):
    """Workers in other processes send errors home."""
    if not issubclass(kind, BackendError):
        return
    error = kind("what", endpoint="host:1", attempts=2, elapsed=1.0, remedy="Do this.")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(copy) is kind
    assert str(copy) == str(error)


def test_a_rejected_document_keeps_the_scores_of_the_others_over_pickling():
    """The scores that were had are not lost with the error."""
    error = DocumentRejected("too long", indices=[1], scores=[0.5, None])
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (copy.indices, copy.scores) == ((1,), (0.5, None))


@pytest.mark.parametrize("kind", [BackendUnavailable, DeadlineExceeded, DocumentRejected])
def test_an_error_is_rebuilt_from_its_args_as_json(kind: type[BackendError]):
    """As Celery does: its JSON holds nothing but the class and `args`. What was set later is in it, too."""
    error = kind("what", endpoint="host:1", attempts=2, remedy="Do this.")
    error.message, error.query, error.status, error.retry_after = "queries[3]: what", 3, 503, 1.5
    error.indices, error.scores = (1,), (0.5, None)
    rebuilt = kind(*json.loads(json.dumps(error.args)))
    assert rebuilt.to_dict() == error.to_dict()
    assert (rebuilt.args, rebuilt.indices, rebuilt.scores) == (error.args, (1,), (0.5, None))


def test_a_message_that_was_changed_is_the_only_one():
    """What was taken out of it, a secret, is in no repr, pickle or args."""
    error = BackendUnavailable("can't fetch https://host/?key=s3cret")
    error.message = "can't fetch https://host/?..."
    assert "s3cret" not in f"{error!r} {error} {error.args} {pickle.dumps(error)!r} {error.to_dict()}"


def test_an_error_has_only_facts_in_its_args():
    """Where nothing but the message is known, that is all."""
    assert BackendError("what").args == ("what",)
    assert ConfigError("what").args == ("what",)


def test_an_error_as_json_values():
    """For an API's answer: type, text and what is known."""
    error = BackendUnavailable("can't connect", attempts=3, remedy="Start it.")
    error.retry_after = 2.0
    assert json.loads(json.dumps(error.to_dict())) == {
        "type": "BackendUnavailable",
        "text": "can't connect (3 attempts). Start it.",
        "message": "can't connect",
        "attempts": 3,
        "remedy": "Start it.",
        "retry_after": 2.0,
    }
    assert ConfigError("wrong").to_dict() == {"type": "ConfigError", "text": "wrong"}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("BAAI/bge-reranker-base", "BAAI/bge-reranker-base"),
        ("reranker", "reranker"),
        ("/srv/customers/acme/bge", "bge"),
        ("/srv/customers/acme/bge/", "bge"),
        ("./bge", "bge"),
        ("~/models/bge", "bge"),
        ("a/b/c", "c"),
        (r"C:\models\bge", "bge"),
        ("/cache/models--BAAI--bge-base/snapshots/0123", "BAAI/bge-base"),
        ("/", "/"),
    ],
)
def test_messages_name_a_model_without_the_folders_above_it(model: str, name: str):
    """What an API passes on tells nothing about the machine."""
    assert short_name(model) == name


def test_the_path_of_a_model_is_in_an_attribute(tmp_path: Path):
    """For those who run it: of every error of a back end, whoever made it."""
    with LocalScorer(tmp_path / "model") as scorer, pytest.raises(DeadlineExceeded) as caught:
        scorer.score("q", ["d"], deadline=0.0)
    assert caught.value.model == str(tmp_path / "model")
    assert str(tmp_path) not in str(caught.value)
