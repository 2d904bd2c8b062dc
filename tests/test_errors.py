"""Errors say what failed, where, after how much, and what to do; and they survive pickling."""

import pickle

import pytest

from rag_rerank import errors
from rag_rerank.errors import BackendError, BackendUnavailable, ConfigError, DeadlineExceeded, DocumentRejected


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


@pytest.mark.parametrize("kind", [getattr(errors, name) for name in dir(errors) if name[0].isupper()])
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
