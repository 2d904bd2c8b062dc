"""Every error that rag_rerank raises on purpose.

    RerankError
    ├── ConfigError (ValueError)         a wrong setting: mend the call or the installation, then try again
    │   └── ContentError                 an image that can't be read, or one for a model that reads text only
    └── BackendError                     a well-formed call that got no scores
        ├── BackendUnavailable           nobody answered, or the server said that it can't at the moment
        ├── DeadlineExceeded (TimeoutError)
        ├── BackendRejected              an answer that repeating the same request can't change
        │   ├── AuthError                the key is missing or wrong
        │   └── DocumentRejected         some documents only: `indices` names them, `scores` has the others'
        └── BadReply                     an answer that is not one finite score per document

Beside these stand Python's own `TypeError` and `ValueError` for arguments of the wrong type or shape; their messages
name the position, as in ``documents[3] must be str, got NoneType``.
"""

import re
from collections.abc import Mapping
from typing import Any

FAILED_STATUSES = (424, 500)
"""Of a server that has failed, as it may over one document; text-embeddings-inference's is 424."""


class RerankError(Exception):
    """Base of all errors below: catch it to catch anything that rag_rerank reports."""

    def to_dict(self) -> dict[str, Any]:
        """Make JSON values of it: its ``type``, its ``text``, and each attribute that says something."""
        facts = {name: value for name, value in vars(self).items() if name[0] != "_" and value not in (None, (), False)}
        facts = {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}
        return {"type": type(self).__name__, "text": str(self), **facts}


class ConfigError(RerankError, ValueError):
    """A setting is wrong, a model can't be loaded as asked, or an optional dependency is missing."""


class ContentError(ConfigError):
    """A query or document holds an image that can't be read, or anything but text for a model that reads text only."""


class BackendError(RerankError):
    """A back end did not give the scores that it was asked for.

    Args:
        message: What failed, in one clause.
        facts: Any of the attributes below, by name; `args` has them so.
        **more: The same.

    ``str(error)`` puts message, `endpoint`, `attempts`, `elapsed` and `remedy` in one line.

    Attributes:
        endpoint: Where, as ``host:port`` (never with credentials). None for a local model.
        attempts: How many requests were sent for it. None where requests don't apply.
        elapsed: Seconds from the beginning of the call to the failure.
        remedy: What to do next, as a sentence.
        model: What was to give the scores: the model's full name or path, of which messages have the last part.
        indices: Positions of the documents that have no score, where the others of their query have one.
        scores: With `indices`: one entry per document in the caller's order, its score or None.
        query: In a batch, the position of the query that failed.
        reason: With `indices`: why, without the positions that are in the message.
        whole: Whether the back end knows that no single query or document is to blame; then none is looked for.
        status: The HTTP status, where there was one.
        request_id: The request's id: the server's (``x-request-id``), else ours.
        body: The beginning of what the server answered, without keys.
    """

    endpoint: str | None = None
    attempts: int | None = None
    elapsed: float | None = None
    remedy: str | None = None
    model: str | None = None
    indices: tuple[int, ...] = ()
    scores: tuple[float | None, ...] = ()
    query: int | None = None
    reason: str | None = None
    whole: bool = False
    status: int | None = None
    request_id: str | None = None
    body: str | None = None

    def __init__(self, message: str, facts: Mapping[str, Any] | None = None, **more: Any) -> None:
        super().__init__(message)
        self.message = message
        if unknown := [name for name in more if not hasattr(type(self), name)]:
            raise TypeError(f"{type(self).__name__} has no attribute {unknown[0]!r}")
        for name, value in {**(facts or {}), **more}.items():
            setattr(self, name, tuple(value) if isinstance(value, list) else value)

    @property
    def args(self) -> tuple[Any, ...]:  # type: ignore[override]  # follows the attributes, which are set later, too
        """The message and all other facts: Celery, for one, makes JSON of nothing else, and an error of that."""
        facts = self.to_dict()
        del facts["type"], facts["text"], facts["message"]
        return (self.message, facts) if facts else (self.message,)

    # Python's own would use the message that the error was made with, which may have held a secret.
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.message!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message,), vars(self)

    def __str__(self) -> str:
        facts = []
        if self.endpoint is not None:
            facts.append(self.endpoint)
        if self.attempts is not None:
            facts.append(f"{self.attempts} attempt{'' if self.attempts == 1 else 's'}")
        if self.elapsed is not None:
            facts.append(f"{self.elapsed:.2f} s")
        where = f" ({', '.join(facts)})" if facts else ""
        return f"{self.message}{where}." + (f" {self.remedy}" if self.remedy else "")


class BackendUnavailable(BackendError):
    """No answer (connection refused, reset, TLS failure), or answers such as 503 until the attempts were used up.

    Attributes:
        retry_after: Seconds after which to try again: what a server asked for (Retry-After); or about how long calls
            take at present, where too many of them wait in this process.
    """

    retry_after: float | None = None


class DeadlineExceeded(BackendError, TimeoutError):
    """The call's deadline passed before every document had its score."""


class BackendRejected(BackendError):
    """The server understood the request and refused it; the same request would be refused again."""


class AuthError(BackendRejected):
    """The server wants an API key, or another one (HTTP 401 or 403)."""


class DocumentRejected(BackendRejected):
    """Some documents can't be scored; the others can.

    `indices` names them, and `scores` has the others'; `reason` says why, without the positions.
    """


class BadReply(BackendError):
    """The back end answered, but not with exactly one finite score per document.

    Where single documents got scores that are not finite, `indices` names them and `scores` has the others'.
    """


def short_name(model: str) -> str:
    """Name a model as messages do: one in a folder by the folder's name, without what lies above it."""
    parts = [part for part in re.split(r"[/\\]", model) if part]
    if len(parts) <= 2 and not re.match(r"[~./\\]|\w:[/\\]", model):  # a hub id, or the name on a server
        return model
    cached = next((part for part in parts if part.startswith("models--")), "")  # the hub's cache
    return cached[8:].replace("--", "/") or (parts or [model])[-1]
