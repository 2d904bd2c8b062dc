"""What goes over the wire: requests and replies of vLLM's score API, and the reading of replies.

The request uses ``text_1``/``text_2``, which every vLLM version knows (``queries``/``documents`` came in 0.16), leaves
fields out instead of sending null, and goes to ``/v1/score``: ``--api-key`` guards only paths under ``/v1``. A reply
becomes scores only when it holds exactly one finite number for each document.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rag_rerank.errors import BadReply, ConfigError

Version = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request.

    Attributes:
        path: Below the endpoint's root.
        body: JSON, or None for a GET.
        reply_limit: Most bytes to accept as the answer.
    """

    method: str
    path: str
    body: bytes | None = None
    reply_limit: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete HTTP answer; header names in lower case."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Server:
    """What a server told about itself.

    Attributes:
        version: Of vLLM; None where it doesn't say (then it is taken for a recent one).
        model: The name to ask for.
    """

    version: Version | None
    model: str


def score_request(
    server: Server,
    queries: Sequence[str],
    documents: Sequence[str],
    *,
    use_activation: bool | None,
    truncate_prompt_tokens: int | None,
) -> Request:
    """A score request in the form that the server's version knows.

    Unknown fields are ignored silently by vLLM, so a field that the version lacks must not be sent and hoped for.

    Raises:
        ConfigError: The server is too old for what is asked.
    """
    body: dict[str, Any] = {
        "model": server.model,
        "text_1": queries[0] if len(queries) == 1 else list(queries),
        "text_2": list(documents),
    }
    version = server.version or (1, 0)
    if truncate_prompt_tokens is not None and (version >= (0, 9) or truncate_prompt_tokens > 0):
        body["truncate_prompt_tokens"] = truncate_prompt_tokens  # -1 is known from 0.9.2 on
    if use_activation is not None:
        if version < (0, 10):
            raise ConfigError(f"vLLM {version[0]}.{version[1]} can't be told use_activation; it needs 0.10 or newer")
        body["use_activation" if version >= (0, 12) else "activation"] = use_activation
    return Request(
        "POST",
        "/v1/score",
        json.dumps(body, ensure_ascii=False).encode(),
        reply_limit=(64 << 10) + 256 * len(documents),  # an entry of the answer takes about 60 bytes
    )


def read_scores(body: bytes, expected: int) -> list[float]:
    """The scores of a reply, in the order of the documents.

    Raises:
        BadReply: Anything but one finite score for each index of ``range(expected)``.
    """
    entries = _object(body).get("data")
    if not isinstance(entries, list):
        raise BadReply("the answer has no list 'data'")
    if len(entries) != expected:
        raise BadReply(f"the answer has {len(entries)} scores for {expected} documents")
    scores: list[float | None] = [None] * expected
    for entry in entries:
        fields = entry if isinstance(entry, dict) else {}
        index: Any = fields.get("index")
        score: Any = fields.get("score")
        if type(index) is not int or not 0 <= index < expected:
            raise BadReply(f"the answer has the index {index!r} for {expected} documents")
        if scores[index] is not None:
            raise BadReply(f"the answer has two scores for documents[{index}]")
        if type(score) not in {int, float} or not math.isfinite(score):
            raise BadReply(f"documents[{index}] got the score {score!r}")
        scores[index] = float(score)
    return [score for score in scores if score is not None]


def read_version(body: bytes) -> Version | None:
    """Major and minor version from ``/version``; None where the answer doesn't tell."""
    try:
        match = re.match(r"(\d{1,9})\.(\d{1,9})", str(_object(body).get("version")))
    except BadReply:
        return None
    return (int(match[1]), int(match[2])) if match else None


def read_models(body: bytes) -> list[tuple[str, str]]:
    """(name, checkpoint) of every entry of ``/v1/models``; aliases are entries with the same checkpoint.

    Raises:
        BadReply: Not a model list.
    """
    entries = _object(body).get("data")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
        raise BadReply("the answer of /v1/models is no model list")
    return [(str(entry["id"]), str(entry.get("root") or entry["id"])) for entry in entries]


def error_text(body: bytes) -> str:
    """The server's own words in an error answer, in one short printable line.

    Four shapes are known: ``{"error": {"message"}}``, ``{"error": "text"}``, ``{"message"}`` (before 0.10.2) and
    FastAPI's ``{"detail"}``.
    """
    try:
        content = _object(body)
    except BadReply:
        text = body[:1000].decode("utf-8", "replace")
    else:
        error = content.get("error")
        nested = error.get("message") if isinstance(error, dict) else error
        text = str(nested or content.get("message") or content.get("detail") or content)
    line = " ".join(text.split())
    printable = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
    return printable if len(printable) <= 300 else printable[:297] + "..."


def is_model_missing(body: bytes) -> bool:
    """Whether a 404 means an unknown model (an ``error`` object), not an unknown path (``{"detail": "Not Found"}``)."""
    try:
        content = _object(body)
    except BadReply:
        return False
    return isinstance(content.get("error"), dict) or content.get("object") == "error"


def _object(body: bytes) -> dict[str, Any]:
    """A JSON object, strictly: Python's reader takes NaN and Infinity, and fails in four ways on hostile input."""
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadReply(f"the answer is not JSON: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise BadReply(f"the answer is a JSON {type(content).__name__}, not an object")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
