"""What goes over the wire: requests to score and rerank APIs, vLLM's and others', and the reading of replies.

A request to vLLM has ``text_1``/``text_2``, which every version knows (``queries``/``documents`` came in 0.16), leaves
fields out instead of sending null, and goes to ``/v1/score``: ``--api-key`` guards only paths under ``/v1``.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from rag_rerank.errors import BadReply, ConfigError
from rag_rerank.families import is_listwise

T = TypeVar("T")
Version = tuple[int, int]
# vLLM's; Jina's and Cohere's, which most other servers have; text-embeddings-inference's.
API = Literal["score", "rerank", "tei"]


class Form(NamedTuple):
    """Where a server is asked for scores, and in which words."""

    api: API
    path: str  # below the endpoint's root


VLLM_SCORE = Form("score", "/v1/score")


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request."""

    method: str
    path: str  # below the endpoint's root
    body: bytes | None = None  # JSON; None for a GET
    reply_limit: int = 1 << 20  # most bytes to accept as the answer
    id: str | None = None  # sent as X-Request-Id; vLLM gives it back in the answer


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete HTTP answer; header names in lower case."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    is_connected: Callable[[], bool] | None = None  # whether the server has left open what it came over

    @property
    def succeeded(self) -> bool:
        """Whether the status is one of success."""
        return 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class Failure:
    """No reply; ``unread`` if one came that must not be read (too large); ``local`` if this process is to blame."""

    kind: Literal["timeout", "connect", "certificate", "tls", "broken", "unread", "local"]
    text: str  # one clause
    cause: Exception | None = None  # the HTTP library's


@dataclass(frozen=True, slots=True)
class Answer:
    """What a score or rerank API answered."""

    scores: list[float]  # one for each document, in their order; not finite where the server gave null or such a number
    id: str | None = None  # of the request that it answers, as the server has it
    model: str | None = None
    prompt_tokens: int | None = None  # how many tokens the model read


@dataclass(frozen=True, slots=True)
class Card:
    """An entry of ``/v1/models``; aliases are entries with the same root."""

    name: str
    root: str  # the hub id or folder behind the name
    window: int | None = None  # how many tokens the model reads at most
    owner: str | None = None  # most servers put their own name there


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server told about itself."""

    version: Version | None  # of vLLM; None where it doesn't say (then it is taken for a recent one)
    model: str  # the name to ask for
    checkpoint: str | None = None  # the hub id or folder behind that name
    window: int | None = None  # how many tokens the model reads at most
    # Learned later, None before: whether it puts pairs into a score template; how many bytes the texts of a request may
    # have, where one was too large; what it answers to two letters, where there are others to compare it with.
    has_template: bool | None = field(default=None, compare=False)
    most_bytes: int | None = field(default=None, compare=False)
    form: Form = field(default=VLLM_SCORE, compare=False)
    letters: Answer | None = field(default=None, compare=False)

    @property
    def listwise(self) -> bool:
        """Whether the documents of a query are scored together: known by the model's name or architecture."""
        return any(map(is_listwise, filter(None, (self.model, self.checkpoint))))


@dataclass(frozen=True, slots=True)
class Options:
    """What a request may say beside query and documents; None says nothing. See `VLLMScorer` for the meanings."""

    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None
    max_tokens_per_query: int | None = None
    max_tokens_per_doc: int | None = None
    instruction: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = field(default=None, hash=False)
    priority: int | None = None
    extra_body: Mapping[str, Any] | None = field(default=None, hash=False)

    def given(self) -> dict[str, Any]:
        """List the fields that say something, but for `extra_body`."""
        return {name: getattr(self, name) for name in SINCE if getattr(self, name) is not None}

    def fields(self, version: Version | None) -> dict[str, Any]:
        """Make fields of a request to a server of this version; ConfigError where it does not know one of them."""
        version, given = version or (1, 0), self.given()
        if given.get("truncate_prompt_tokens") == -1 and version < (0, 9):
            del given["truncate_prompt_tokens"]  # -1 came with 0.9; without it, over-long pairs are refused, not missed
        for name in given:
            if version < SINCE[name]:  # it would ignore the field silently: the score is not the one asked for
                need = ".".join(map(str, SINCE[name]))
                raise ConfigError(f"vLLM {version[0]}.{version[1]} does not know {name}; it needs {need} or newer")
        return given | dict(self.extra_body or {})

    def tei_fields(self) -> dict[str, Any]:
        """Make fields of a request to text-embeddings-inference; ConfigError for what it can't be told."""
        given = self.given()
        fields = {"raw_scores": True} if given.pop("use_activation", True) is False else {}
        if given.get("truncate_prompt_tokens") == -1:
            fields["truncate"] = bool(given.pop("truncate_prompt_tokens"))
        if given:
            raise ConfigError(f"text-embeddings-inference does not know {', '.join(given)}")
        return fields | dict(self.extra_body or {})


# The versions from which a field is known (the sources of the releases; `make compat` runs some).
SINCE: dict[str, Version] = {
    "use_activation": (0, 12),  # 0.11.1 and 0.11.2 take the older activation=False for True
    "truncate_prompt_tokens": (0, 8),
    "max_tokens_per_query": (0, 20),
    "max_tokens_per_doc": (0, 20),
    "instruction": (0, 22),
    "chat_template_kwargs": (0, 22),
    "priority": (0, 8),
}


# In these versions use_activation=False leaves out the tanh in the head of BERT's cross-encoders, too (seen with 0.14
# and 0.20, read in the sources of the others).
WRONG_LOGITS: tuple[Version, Version] = (0, 14), (0, 30)


Sent = list[str | bytes]  # queries or documents in a request; bytes: the JSON of what holds more than text


def scoring_request(
    facts: ServerFacts, queries: Sent, documents: Sent, options: Options, request_id: str | None = None
) -> Request:
    """Make a request in the server's form; one query only, but to a score API, and without ``top_n``."""
    # An entry of a score answer takes about 60 bytes; a rerank answer echoes the documents, up to 12 bytes a character,
    # or three times what JSON takes in UTF-8.
    reply_limit = (64 << 10) + 256 * len(documents)
    api = facts.form.api
    body: dict[str, Any] = {} if api == "tei" else {"model": facts.model}
    if api == "score":
        body |= {"text_1": queries[0] if len(queries) == 1 else queries, "text_2": documents}
    elif len(queries) > 1:
        raise ConfigError(f"one of the servers is asked by {facts.form.path}, another otherwise; pass endpoint=")
    else:
        body |= {"query": queries[0], "texts" if api == "tei" else "documents": documents}
        reply_limit += sum(12 * len(each) if isinstance(each, str) else 3 * len(each) + 1024 for each in documents)
    body |= options.tei_fields() if api == "tei" else options.fields(facts.version)
    if request_id is not None and facts.version is not None and facts.version >= (0, 16):
        # Where the field is known, in the body too: a gateway may replace the header by an id of its own.
        body["request_id"] = request_id
    content = b"{" + b", ".join(_json(name) + b": " + _json(value) for name, value in body.items()) + b"}"
    return Request("POST", facts.form.path, content, reply_limit, request_id)


_to_json = json.JSONEncoder(ensure_ascii=False).encode


def _json(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, list) and any(isinstance(each, bytes) for each in value):
        return b"[" + b", ".join(map(_json, value)) + b"]"
    return _to_json(value).encode()  # lists of text at once: a tenth of the time


def read_answer(api: API, body: bytes, positions: Sequence[int]) -> Answer:
    """Read one score for each document; BadReply for anything else, with `positions` among the caller's documents."""
    if api != "score" and body.lstrip()[:1] == b"[":  # SGLang's rerank API, and text-embeddings-inference's
        return Answer(_scores(_parsed(body), positions, "score"))
    content = _object(body)
    usage = content.get("usage")
    list_name, score_name = ("data", "score") if api == "score" else ("results", "relevance_score")
    entries = content.get(list_name)
    if not isinstance(entries, list):
        raise _no_answer(body, f"has no list {list_name!r}")
    return Answer(
        scores=_scores(entries, positions, score_name),
        id=_of(str, content.get("id")),
        model=_of(str, content.get("model")),
        prompt_tokens=_of(int, usage.get("prompt_tokens")) if isinstance(usage, dict) else None,
    )


def _of(kind: type[T], value: object) -> T | None:
    """Give a text that is not empty or a number above 0, as gateways fill in what they don't know; else None."""
    return value if type(value) is kind and value > kind() else None  # type: ignore[operator]  # text or number


_NUMBERS = {int, float, type(None)}


def _scores(entries: list[Any], positions: Sequence[int], score_name: str) -> list[float]:
    expected = len(positions)
    if len(entries) != expected:
        raise BadReply(f"the answer has {len(entries)} scores for {expected} documents")
    scores: dict[int, float] = {}
    for entry in entries:
        fields = entry if isinstance(entry, dict) else {}
        index, score = fields.get("index"), fields.get(score_name)
        if type(index) is not int or not 0 <= index < expected:
            raise BadReply(f"the answer has the index {printable(repr(index))} for {expected} documents")
        if index in scores:
            raise BadReply(f"the answer has two scores for documents[{positions[index]}]")
        if score_name not in fields or type(score) not in _NUMBERS:
            raise BadReply(f"documents[{positions[index]}] got the score {printable(repr(score))}")
        try:
            scores[index] = math.nan if score is None else float(score)
        except OverflowError:  # an int of more than 308 digits
            scores[index] = math.inf
    return [scores[index] for index in range(expected)]


def read_version(body: bytes) -> Version | None:
    """Read major and minor version from ``/version``; None where the answer doesn't tell."""
    match = re.match(r"(\d{1,9})\.(\d{1,9}+)(?!\.dev)", str(_fields(body).get("version")))
    return (int(match[1]), int(match[2])) if match else None


def read_models(body: bytes) -> list[Card]:
    """Read the entries of ``/v1/models``, or text-embeddings-inference's ``/info``; BadReply for anything else."""
    content = _object(body)
    if isinstance(model := content.get("model_id"), str):
        return [Card(model, model, _of(int, content.get("max_input_length")), "text-embeddings-inference")]
    entries = content.get("data")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
        raise _no_answer(body, "of /v1/models is no model list")
    cards = []
    for each in entries:
        name = str(each["id"]).encode(errors="replace").decode()  # a lone surrogate could not be sent
        window = _of(int, each.get("max_model_len"))
        cards.append(Card(name, str(each.get("root") or name), window, each.get("owned_by")))
    return cards


def error_text(body: bytes) -> str:
    """Find the server's own words in an error answer, in one short printable line."""
    content = _fields(body)
    # Known are {"error": {"message"}}, {"error": "text"}, {"message"} (before 0.10.2) and FastAPI's {"detail"}.
    error = content.get("error")
    nested = error.get("message") if isinstance(error, dict) else error
    text = str(nested or content.get("message") or content.get("detail") or content)
    return printable(text) if content else _page_words(body)


def _page_words(body: bytes) -> str:
    """Find what a page says (a proxy's, nginx's say), or the beginning of a text that is none."""
    text = body[:1000].decode("utf-8", "replace")
    page = re.search(r"(?is)<(title|h1)[^>]*>(.*?)</\1>", text)
    return printable(page[2] if page else text)


# vLLM's words and those of gateways and other servers (SGLang, TEI, llama.cpp, OpenAI's) for a prompt that is too long.
_TOO_LONG = re.compile(
    r"(maximum|model'?s?) (context|model|input|sequence) length|context[ _]?(length|size|window)[ _]?exceed"
    r"|exceeds? [\w ]*context|less than \d+ tokens|too many tokens|too large to process",
    re.IGNORECASE,
)


def is_too_long(said: str) -> bool:
    """Tell whether a server refuses a prompt that is longer than its model reads."""
    return _TOO_LONG.search(said) is not None


def printable(text: str) -> str:
    """Make one short line, which does nothing to a terminal, of what a server says."""
    line = " ".join(text.split())
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
    return shown if len(shown) <= 300 else shown[:297] + "..."


def is_model_missing(body: bytes) -> bool:
    """Tell a 404 for an unknown model (an ``error`` object) from one for a path (``{"detail": "Not Found"}``)."""
    content = _fields(body)
    return isinstance(content.get("error"), dict) or content.get("object") == "error"


def _no_answer(body: bytes, said: str) -> BadReply:
    """Make the error for an answer that is none, with its words: some send an error as a success."""
    return BadReply(f"the answer {said}: {error_text(body)}")


def _fields(body: bytes) -> dict[str, Any]:
    """Read a JSON object; anything else has no fields."""
    with contextlib.suppress(BadReply):
        return _object(body)
    return {}


def _parsed(body: bytes) -> Any:
    """Read JSON. Python's reader fails in four ways on hostile input, and reads NaN and Infinity as floats."""
    try:
        return json.loads(body.decode().removeprefix("\ufeff"))  # the byte order mark of some gateways
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        said = f": {_page_words(body)}" if body.lstrip()[:1] == b"<" else ""
        raise BadReply(f"the answer is not JSON ({type(error).__name__}){said}") from error


def _object(body: bytes) -> dict[str, Any]:
    content = _parsed(body)
    if not isinstance(content, dict):
        raise BadReply(f"the answer is a JSON {type(content).__name__}, not an object")
    return content
