"""What a scorer promises, and the only place where those promises are kept.

A back end writes one private hook, `Scorer._score`. Everything around it stands here, once, for all back ends: which
inputs pair up how (1:1, 1:N, N:N), what is refused before any model loads or any request leaves, the check that one
finite score came back for every pair, ranking that keeps ties in retrieval order, and what a failure becomes.
"""

import asyncio
import logging
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from rag_rerank.content import Checked, Content, Image, Input, Mixed, Prepared, Video, check, prepare, read
from rag_rerank.errors import BackendError, BadReply, ContentError, DeadlineExceeded, DocumentRejected, RerankError

logger = logging.getLogger(__name__)

OnError = Literal["raise", "passthrough"]


@dataclass(frozen=True, slots=True)
class Ranked:
    """One document of a reranked list.

    Attributes:
        index: Its position in the documents that were passed.
        score: Its relevance score, higher is better; None only after ``on_error="passthrough"``.
    """

    index: int
    score: float | None


class Closeable:
    """Something to be closed after use: by `close` or `aclose`, or by leaving a ``with`` or ``async with``."""

    def close(self) -> None:
        """Give back what is held. Closing twice is harmless."""

    async def aclose(self) -> None:
        """As `close`, from an event loop."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class Scorer(Closeable, ABC):
    """Scores how relevant documents are to queries.

    To add a back end, subclass, set `model_name`, and write `_score`; override `_ascore` where waiting can be done
    without a thread, `_score_mixed` (and `_ascore_mixed`) where the model sees images, and `_close` where something
    must be given back.
    """

    _closed = False
    _default_deadline: float | None = None  # seconds for a call that names no deadline

    @property
    @abstractmethod
    def model_name(self) -> str:
        """What answers, for traces and errors; ``"unknown"`` while a server has not been asked yet."""

    @abstractmethod
    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        """Score the pairs; called with checked input only.

        Args:
            queries: One query for all documents, or one per document.
            documents: At least one document.
            until: When the call must be over, on the clock of `time.monotonic`; None for no limit.

        Returns:
            One score per document, in order. The base class checks number and finiteness.
        """

    async def _ascore(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        """As `_score`, for callers in an event loop. By default it runs `_score` in a worker thread."""
        return await asyncio.to_thread(self._score, queries, documents, until)

    def _score_mixed(self, queries: list[Prepared], documents: list[Prepared], until: float | None) -> list[float]:
        """As `_score`, called where a query or document holds more than text; by default that is refused.

        What is more than text comes as `rag_rerank.mixed.Mixed`: its texts, its pictures, which were read and checked,
        and links to what was not.

        Raises:
            ContentError: The model reads text only.
        """
        raise text_only(self.model_name, queries, documents)

    async def _ascore_mixed(
        self, queries: list[Prepared], documents: list[Prepared], until: float | None
    ) -> list[float]:
        """As `_score_mixed`, for callers in an event loop. By default it runs that in a worker thread."""
        return await asyncio.to_thread(self._score_mixed, queries, documents, until)

    def _close(self) -> None:
        """Give back what the scorer holds; called once."""

    async def _aclose(self) -> None:
        """As `_close`, from an event loop."""
        self._close()

    def score(
        self, queries: Input | Sequence[Input], documents: Input | Sequence[Input], *, deadline: float | None = None
    ) -> list[float]:
        """Score documents against queries, paired as in vLLM's score API.

        Args:
            queries: One query, or as many as there are documents.
            documents: One document or many: 1:1, 1:N (one query for all) or N:N (like `zip`). Lone surrogates,
                which no tokenizer or JSON reader accepts, are read as U+FFFD; text that spells a special token, such
                as ``<|im_end|>``, is read with a space in it, so that it is not one. For models that see, each may be
                an `Image`, `Video` or `Content` instead of text; images are read and checked before anything is sent.
            deadline: Seconds from now that the whole call may take. None: the back end's own default.

        Returns:
            One finite float per pair, in the order of the documents; ``[]`` for no documents, with no model loaded
            and no request sent.

        Raises:
            TypeError: Something is not text nor an image; the message names the position.
            ValueError: The numbers of queries and documents do not go together.
            ContentError: An image can't be read, or is more than the model reads.
            ConfigError: The scorer can't work as configured.
            BackendError: No scores; the subclass says why.
        """
        asked, found = _pair_up(queries, documents)
        until = self._begin(deadline)
        if not found:
            return []
        texts = _all_text(asked), _all_text(found)
        if texts[0] is None or texts[1] is None:
            return _checked(self._score_mixed(*_read(asked, found, until), until), len(found))
        return _checked(self._score(texts[0], texts[1], until), len(found))

    async def ascore(
        self, queries: Input | Sequence[Input], documents: Input | Sequence[Input], *, deadline: float | None = None
    ) -> list[float]:
        """As `score`, without blocking the event loop; cancelling the task abandons the call."""
        asked, found = _pair_up(queries, documents)
        until = self._begin(deadline)
        if not found:
            return []
        texts = _all_text(asked), _all_text(found)
        if texts[0] is None or texts[1] is None:
            # In a thread: files are read, and pictures decoded, 10 ms a million pixels.
            mixed = await asyncio.to_thread(_read, asked, found, until)
            return _checked(await self._ascore_mixed(*mixed, until), len(found))
        return _checked(await self._ascore(texts[0], texts[1], until), len(found))

    def rerank(
        self,
        query: Input,
        documents: Sequence[Input],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
        on_error: OnError = "raise",
        deadline: float | None = None,
    ) -> list[Ranked]:
        """Order documents by relevance to a query, best first.

        Args:
            query: The query.
            documents: The documents, in retrieval order.
            top_n: How many to keep, at least 1. None keeps all.
            score_threshold: Keep only scores at or above it; applied before `top_n`, so the result may be empty.
            on_error: ``"raise"``; or ``"passthrough"``, which turns a `BackendError` into one logged warning and the
                first `top_n` documents in retrieval order with score None. Where only some documents were rejected,
                the others are ranked and the rejected follow with score None.
            deadline: As in `score`.

        Returns:
            Positions with scores. Equal scores stay in retrieval order.

        Raises:
            TypeError, ValueError, ConfigError, BackendError: As `score`; a wrong argument is never passed through.
        """
        texts = _rerank_input(query, documents, top_n, score_threshold, on_error)
        try:
            scores: Sequence[float | None] = self.score(query, texts, deadline=deadline)
        except BackendError as error:
            scores = _scores_of_failed(error, len(texts), on_error)
        return _rank(scores, top_n, score_threshold)

    async def arerank(
        self,
        query: Input,
        documents: Sequence[Input],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
        on_error: OnError = "raise",
        deadline: float | None = None,
    ) -> list[Ranked]:
        """As `rerank`, without blocking the event loop."""
        texts = _rerank_input(query, documents, top_n, score_threshold, on_error)
        try:
            scores: Sequence[float | None] = await self.ascore(query, texts, deadline=deadline)
        except BackendError as error:
            scores = _scores_of_failed(error, len(texts), on_error)
        return _rank(scores, top_n, score_threshold)

    def rerank_batch(
        self,
        queries: Sequence[Input],
        documents: Sequence[Sequence[Input]],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
        on_error: OnError = "raise",
        deadline: float | None = None,
    ) -> list[list[Ranked]]:
        """Order the documents of several queries, all in one call to the back end.

        Args:
            queries: The queries.
            documents: For each query its own documents, in retrieval order.
            top_n: How many to keep for each query.
            score_threshold: Keep only scores at or above it.
            on_error: As in `rerank`, for all queries together.
            deadline: Seconds for all of it.

        Returns:
            For each query what `rerank` returns.

        Raises:
            TypeError, ValueError, ConfigError, BackendError: As `rerank`. The positions that errors name count all
                documents, query by query.
        """
        rows, counts, texts = _batch_input(queries, documents, top_n, score_threshold, on_error)
        try:
            scores: Sequence[float | None] = self.score(rows, texts, deadline=deadline)
        except BackendError as error:
            scores = _scores_of_failed(error, len(texts), on_error)
        return [_rank(part, top_n, score_threshold) for part in _parts(scores, counts)]

    async def arerank_batch(
        self,
        queries: Sequence[Input],
        documents: Sequence[Sequence[Input]],
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
        on_error: OnError = "raise",
        deadline: float | None = None,
    ) -> list[list[Ranked]]:
        """As `rerank_batch`, without blocking the event loop."""
        rows, counts, texts = _batch_input(queries, documents, top_n, score_threshold, on_error)
        try:
            scores: Sequence[float | None] = await self.ascore(rows, texts, deadline=deadline)
        except BackendError as error:
            scores = _scores_of_failed(error, len(texts), on_error)
        return [_rank(part, top_n, score_threshold) for part in _parts(scores, counts)]

    def _begin(self, deadline: float | None) -> float | None:
        """Refuse work on a closed scorer and turn seconds from now into a moment on the monotonic clock."""
        if self._closed:
            raise RerankError(f"This {type(self).__name__} is closed. Create a new one to go on scoring.")
        if deadline is None:
            deadline = self._default_deadline
        if deadline is None:
            return None
        if isinstance(deadline, bool) or not isinstance(deadline, int | float):
            raise TypeError(f"deadline must be a number of seconds or None, got {type(deadline).__name__}")
        if math.isnan(deadline):
            raise ValueError("deadline must be a number of seconds, got nan")
        if deadline <= 0:
            # Callers pass on what is left of their own budget: nothing left is a time-out, not a wrong argument.
            raise DeadlineExceeded("the deadline had passed before the call began", elapsed=0.0)
        return None if math.isinf(deadline) else time.monotonic() + deadline

    def close(self) -> None:
        """Give back the model or the connections. Closing twice is harmless; scoring afterwards is an error."""
        if not self._closed:
            self._closed = True
            self._close()

    async def aclose(self) -> None:
        """As `close`, from an event loop."""
        if not self._closed:
            self._closed = True
            await self._aclose()

    # A scorer is a service, not a value: a copy that loaded the model again would be a surprise, deep or not. Pickles
    # are for other processes and do make a new one.
    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self


def _pair_up(
    queries: Input | Sequence[Input], documents: Input | Sequence[Input]
) -> tuple[list[Checked], list[Checked]]:
    """Check both sides and return (one query or N queries, N documents)."""
    asked, found = _all_checked(queries, "queries"), _all_checked(documents, "documents")
    if len(asked) not in (1, len(found)):
        raise ValueError(
            f"got {len(asked)} queries and {len(found)} documents; "
            "pass one query for all documents (1:N) or as many queries as documents (N:N)"
        )
    return asked, found


def _all_checked(value: Input | Iterable[Input], name: str) -> list[Checked]:
    """`value` as a list of what is right, or an error that names the position of what is nothing of the kind."""
    if isinstance(value, str | Image | Video | Content | Mixed) or (isinstance(value, Mapping) and "content" in value):
        return [check(value, name, _clean)]
    # Mappings iterate over keys, sets in no order, bytes as numbers: each would score something nobody meant.
    if not isinstance(value, Iterable) or isinstance(value, Mapping | AbstractSet | bytes | bytearray | memoryview):
        raise TypeError(f"{name} must be a string or a sequence of strings, got {type(value).__name__}")
    return [
        _clean(each) if isinstance(each, str) else check(each, f"{name}[{position}]", _clean)
        for position, each in enumerate(value)
    ]


def _all_text(inputs: list[Checked]) -> list[str] | None:
    """`inputs`, if all of them are text."""
    texts = [each for each in inputs if isinstance(each, str)]
    return texts if len(texts) == len(inputs) else None


def prepared(value: Input, where: str) -> Prepared:
    """One query or document, checked and read, for a scorer to take it as it is; `where` is its place, for errors.

    Raises:
        TypeError, ValueError, ContentError, ConfigError: As `Scorer.score`.
    """
    return prepare(value, where, _clean)


def _read(
    queries: list[Checked], documents: list[Checked], until: float | None
) -> tuple[list[Prepared], list[Prepared]]:
    """Both sides with their pictures read, those of an input that is there twice once, or DeadlineExceeded."""
    known: dict[int, Prepared] = {}  # by id: what is checked lives as long as the lists
    began = time.monotonic()

    def reading(each: Checked, where: str) -> Prepared:
        if isinstance(each, str):
            return each
        if id(each) not in known:
            if until is not None and time.monotonic() >= until:
                elapsed = time.monotonic() - began
                raise DeadlineExceeded(f"the deadline passed before {where} had been read", elapsed=elapsed)
            known[id(each)] = read(each, where)
        return known[id(each)]

    def all_of(inputs: list[Checked], name: str) -> list[Prepared]:
        return [reading(each, f"{name}[{position}]") for position, each in enumerate(inputs)]

    return all_of(queries, "queries"), all_of(documents, "documents")


def text_only(model: str, queries: Sequence[Prepared], documents: Sequence[Prepared]) -> ContentError:
    """The error for a model that reads text only, with the position of the first thing that is more."""
    for name, inputs in (("queries", queries), ("documents", documents)):
        for position, each in enumerate(inputs):
            if isinstance(each, Mixed):
                return ContentError(f"{name}[{position}] holds an image or a video, but {model} reads text only")
    raise AssertionError("all text")  # pragma: no cover - called for what is not


# How the tokenizers of rerankers spell their special tokens: <|im_end|> (Qwen, Llama 3, ModernBERT), </s> (RoBERTa,
# Mistral), <end_of_turn> (Gemma), [SEP] (BERT), [INST] (Mistral), |||EMAIL_ADDRESS||| (ModernBERT). What matches is the
# first character only.
_SPECIAL_TOKEN = re.compile(
    r"""<(?=\|[^<>|\s]{1,64}\|>)
    | <(?=/?(?:s|pad|unk|mask|bos|eos|cls|sep|think|tool_call|tool_response|2mass|unused\d+|image|IMG_CONTEXT
        |(?:start|end)_of_(?:turn|image)|image_soft_token)>)
    | \[(?=(?:PAD|UNK|CLS|SEP|MASK|unused\d+|@BOS@
        |/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|TOOL_CONTENT|IMG|PREFIX|MIDDLE|SUFFIX))\])
    | \|(?=\|\|[A-Z_]{1,32}\|\|\|)""",
    re.VERBOSE,
)


def _clean(text: str) -> str:
    """`text` as every tokenizer and JSON reader takes it, and with nothing in it that a tokenizer takes for a command.

    Surrogate pairs are joined, lone surrogates (seen in text from PDFs) become U+FFFD. The spelling of a special token
    gets a space behind its first character, ``< |im_end|>``: tokenizers read it as the token even in the middle of a
    document, which could so end its turn and answer for itself. Done here because a server can't be told to do it, and
    a pair must score the same everywhere.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if "<" in text or "[" in text or "|||" in text:
        text = _SPECIAL_TOKEN.sub(r"\g<0> ", text)
    return text


def _checked(scores: Sequence[float], expected: int) -> list[float]:
    """The back end's scores as plain floats, or BadReply: never a short list, never NaN."""
    if len(scores) != expected:
        raise BadReply(f"the back end gave {len(scores)} scores for {expected} documents")
    checked = [float(score) for score in scores]
    for position, score in enumerate(checked):
        if not math.isfinite(score):
            raise BadReply(
                f"documents[{position}] got the score {score}",
                remedy='Half precision may have overflowed: try dtype="float32".',
            )
    return checked


def _rerank_input(
    query: Input, documents: Sequence[Input], top_n: int | None, score_threshold: float | None, on_error: OnError
) -> list[Any]:
    """Check the arguments of `rerank`; return the documents, checked, for `score` to take them as they are."""
    if not isinstance(query, str | Image | Video | Content | Mapping | Mixed):
        raise TypeError(f"query must be str, got {type(query).__name__}")
    if isinstance(documents, str | Image | Video | Content | Mapping):
        raise TypeError(f"documents must be a sequence of strings, got one {type(documents).__name__}; pass [document]")
    if top_n is not None and (isinstance(top_n, bool) or not isinstance(top_n, int)):
        raise TypeError(f"top_n must be an int or None, got {type(top_n).__name__}")
    if top_n is not None and top_n < 1:
        raise ValueError(f"top_n must be at least 1, got {top_n}; None keeps all documents")
    if score_threshold is not None and not isinstance(score_threshold, int | float):
        raise TypeError(f"score_threshold must be a number or None, got {type(score_threshold).__name__}")
    if score_threshold is not None and not math.isfinite(score_threshold):
        raise ValueError(f"score_threshold must be finite, got {score_threshold}; None keeps all documents")
    if on_error not in ("raise", "passthrough"):
        raise ValueError(f'on_error must be "raise" or "passthrough", got {on_error!r}')
    return _all_checked(documents, "documents")


def _rank(scores: Sequence[float | None], top_n: int | None, score_threshold: float | None) -> list[Ranked]:
    """Threshold, stable sort, cut. Documents without a score follow the scored ones, in retrieval order."""
    threshold = -math.inf if score_threshold is None else score_threshold
    scored = [(index, score) for index, score in enumerate(scores) if score is not None and score >= threshold]
    scored.sort(key=lambda pair: -pair[1])  # sorted on the negative, not reversed: reversing would turn ties around
    unscored = [Ranked(index, None) for index, score in enumerate(scores) if score is None]
    return ([Ranked(index, score) for index, score in scored] + unscored)[:top_n]


def _scores_of_failed(error: BackendError, count: int, on_error: OnError) -> Sequence[float | None]:
    """What a failed call is ranked by: the scores of the documents that were not rejected, or none at all.

    Raises:
        BackendError: The error, unless it is to be passed through.
    """
    if on_error == "raise":
        raise error
    if isinstance(error, DocumentRejected) and len(error.scores) == count:
        logger.warning(
            "%d of %d documents could not be scored and are ranked last: %s", len(error.indices), count, error
        )
        return error.scores
    logger.warning("reranking failed, %d documents keep their retrieval order: %s", count, error)
    return [None] * count


def _batch_input(
    queries: Sequence[Input],
    documents: Sequence[Sequence[Input]],
    top_n: int | None,
    score_threshold: float | None,
    on_error: OnError,
) -> tuple[list[Input], list[int], list[Any]]:
    """Check the arguments of `rerank_batch`; return a query for each document, the numbers of documents, and those."""
    if isinstance(queries, str) or isinstance(documents, str):
        raise TypeError("queries and documents must be sequences, the latter of sequences; for one query use rerank")
    lists = [
        _rerank_input(query, texts, top_n, score_threshold, on_error)
        for query, texts in zip(queries, documents, strict=True)
    ]
    asked: list[Any] = [check(query, f"queries[{position}]", _clean) for position, query in enumerate(queries)]
    # Each the same object for all of its documents: its pictures are read, and sent, once.
    rows = asked if len(asked) == 1 else [query for query, texts in zip(asked, lists, strict=True) for _ in texts]
    return rows, list(map(len, lists)), [text for texts in lists for text in texts]


def _parts(scores: Sequence[float | None], counts: Sequence[int]) -> Iterator[Sequence[float | None]]:
    """The scores of each query."""
    start = 0
    for count in counts:
        yield scores[start : start + count]
        start += count
