"""The rerankers: LlamaIndex's contract (`base`) around a `rag_rerank.Scorer`; they differ in where that comes from."""

import copy
import os
import threading
from abc import abstractmethod
from typing import Annotated, Any, Literal, cast

from llama_index.core.bridge.pydantic import BeforeValidator, Field, PrivateAttr, SecretStr, WithJsonSchema

import rag_rerank  # names are touched where they are needed: the package loads them, and what they import, lazily
from llama_index.postprocessor.rag_rerank.base import Reranker


class ScorerReranker(Reranker):
    """Reranks with any `rag_rerank.Scorer`, so that one loaded model can serve several rerankers and frameworks.

    Args:
        scorer: What scores. It stays the caller's: `close` does not close it, and copies, deep ones too, share it. It
            is not in `to_dict`: pass it again, ``ScorerReranker.from_dict(data, scorer=scorer)``. A pickle has it.
        top_n: How many nodes to return at most, at least 1. None returns all.
        score_threshold: Return only nodes with this score or a higher one; applied before `top_n`, so the result may be
            empty. On the scale of the scorer's scores.
        metadata_mode: Which metadata is scored together with a node's text: ``"embed"`` (what embeddings see),
            ``"llm"``, ``"all"`` or ``"none"``.
        on_error: ``"raise"``; or ``"passthrough"``, which turns a `rag_rerank.BackendError` into one logged warning and
            the first `top_n` nodes in retrieval order with their retrieval scores. Where only some nodes were rejected,
            the others are ranked and the rejected follow with score None.
        callback_manager: LlamaIndex's callbacks; query engines set it.

    Raises:
        pydantic.ValidationError: At construction, an unknown field or a value of the wrong type or out of range.
        TypeError, ValueError: From ``postprocess_nodes``, something that is no NodeWithScore; no query.
        rag_rerank.RerankError: From ``postprocess_nodes``, what the scorer raises.
    """

    scorer: Annotated[rag_rerank.Scorer, WithJsonSchema({"type": "object"})] = Field(exclude=True)

    def _current_scorer(self) -> rag_rerank.Scorer:
        return self.scorer

    def _pickled(self) -> dict[str, Any]:
        return {**super()._pickled(), "scorer": self.scorer}


# One lock for all: a scorer is built in microseconds, and a lock per reranker would have to be kept out of its copies.
_building = threading.Lock()


class _OwnScorer(Reranker):
    """A reranker that builds its scorer from its fields, and again when one of them has changed."""

    _built: tuple[dict[str, Any], rag_rerank.Scorer] | None = PrivateAttr(default=None)  # settings, and what they made

    # Here rather than in a validator or `model_post_init`: pydantic turns a ValueError raised in those, and ConfigError
    # is one, into its own ValidationError. The arguments remain those of the fields.
    def __init__(self, /, **fields: Any) -> None:
        super().__init__(**fields)
        self._current_scorer()

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The fields that the scorer depends on."""

    @staticmethod
    @abstractmethod
    def _build(settings: dict[str, Any]) -> rag_rerank.Scorer:
        """A new scorer. It must cost nothing yet: no model is loaded and nothing is sent."""

    def _current_scorer(self) -> rag_rerank.Scorer:
        # Settings are compared, not assignments caught: this also sees model_copy(update=...). A scorer that is no
        # longer wanted is left to the calls that still use it, and closes itself with the last of them.
        settings = self._settings()
        with _building:
            if self._built is None or self._built[0] != settings:
                self._built = settings, self._build(settings)
            return self._built[1]

    def close(self) -> None:
        """Give back the model or the connections, for copies of this reranker too: they share them.

        Closing twice is harmless; reranking afterwards raises `rag_rerank.RerankError`.
        """
        if self._built is not None:
            self._built[1].close()

    async def aclose(self) -> None:
        """As `close`, from an event loop; this also closes the connections that the running loop has."""
        if self._built is not None:
            await self._built[1].aclose()


def _added_fields(reranker: _OwnScorer, kind: type[_OwnScorer]) -> dict[str, Any]:
    """The fields that `kind` adds to the common ones; those that a user's subclass adds are none of the scorer's."""
    # Copied, so that a later change inside of `model_kwargs` is seen too.
    return {
        name: copy.copy(getattr(reranker, name)) for name in kind.model_fields.keys() - _OwnScorer.model_fields.keys()
    }


def _path_as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


_PathText = Annotated[str, BeforeValidator(_path_as_text)]


class LocalReranker(_OwnScorer):
    """Reranks with a model that runs in this process; needs ``pip install 'rag-rerank[local]'``.

    The model is loaded by the first call and stays loaded. Threads and event loops may share one reranker. Setting one
    of the model's fields loads it anew with the next call; a copy with the same fields shares the model.

    Args:
        model: A hub id or a folder: a cross-encoder (``*ForSequenceClassification`` with one label) or a bi-encoder
            (sentence-transformers).
        device: ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"cpu"``, ... None takes the first there is, in this order.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``, the fastest that the device runs natively.
        score_type: ``"cross-encoder"``, ``"bi-encoder"``, or ``"auto"``, which reads it from the checkpoint.
        template: The score template: a shipped name, a path or the text. ``"auto"`` takes the one that the model was
            trained with; None is query and document as a plain pair. See `rag_rerank.LocalScorer` for this and the
            next ones.
        instruction: The task, for a template with a place for it.
        chat_template_kwargs: More variables for the template.
        classifier_tokens: For a causal model that is not known: ``(true,)`` or ``(false, true)``.
        query_prompt, document_prompt: Text to put before each query or document, as some embedding models want it.
        use_activation: None or True applies the checkpoint's own activation (mostly sigmoid: scores from 0 to 1), as
            vLLM does; False gives logits. Without effect on a bi-encoder, whose scores are cosines.
        max_length: Longest input in tokens, special tokens included. None: what the model was made for.
        max_tokens_per_query, max_tokens_per_doc: Cut each query or document at so many tokens first.
        long_documents: ``"truncate"`` reads the beginning of a document longer than the model's window;
            ``"max-passage"`` reads all of it and takes its best passage's score.
        max_waiting_calls: How many calls may be unfinished at a time; one more is refused at once.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code from the checkpoint may run.
        local_files_only: Never ask the hub.
        cache_dir: Where hub files are kept; None for the usual place.
        model_kwargs, tokenizer_kwargs: Passed on to ``from_pretrained``; no access tokens (set ``HF_TOKEN``).
        top_n, score_threshold, metadata_mode, on_error, callback_manager: As in `ScorerReranker`.

    Raises:
        pydantic.ValidationError: At construction, an unknown field or a value of the wrong type.
        rag_rerank.ConfigError: At construction, a setting out of range, or torch or transformers not installed; from
            the first ``postprocess_nodes``, a model that can't be loaded as asked.
        TypeError, ValueError, rag_rerank.RerankError: From ``postprocess_nodes``, as in `ScorerReranker`.
    """

    # Names, defaults and allowed values are LocalScorer's; it also checks them, so they are written down once only.
    model: _PathText = "cross-encoder/ms-marco-MiniLM-L6-v2"
    device: str | None = None
    dtype: str = "auto"
    score_type: str = "auto"
    template: _PathText | None = "auto"
    instruction: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    classifier_tokens: tuple[str, ...] | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    use_activation: bool | None = None
    max_length: int | None = None
    max_tokens_per_query: int | None = None
    max_tokens_per_doc: int | None = None
    long_documents: str = "truncate"
    max_waiting_calls: int = 1024
    revision: str | None = None
    trust_remote_code: bool = False
    local_files_only: bool = False
    cache_dir: _PathText | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    tokenizer_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def scorer(self) -> "rag_rerank.LocalScorer":
        """The scorer in use. It belongs to this reranker, which may replace or close it."""
        return cast("rag_rerank.LocalScorer", self._current_scorer())

    def _settings(self) -> dict[str, Any]:
        return _added_fields(self, LocalReranker)

    @staticmethod
    def _build(settings: dict[str, Any]) -> rag_rerank.Scorer:
        return rag_rerank.LocalScorer(**settings)


class VLLMReranker(_OwnScorer):
    """Reranks with a model that a vLLM server (0.8 or newer) serves.

    Nothing is sent at construction. Async calls are truly asynchronous, on connections of the loop that they run in.
    Threads and event loops may share one reranker, and copies share its connections.

    Args:
        base_url: The server's address, with or without ``/v1`` or ``/score`` at its end; or a list of servers that
            serve the same model. None reads ``VLLM_BASE_URL`` from the environment, and is ``http://localhost:8000``
            where that is not set.
        model: The name that the servers serve the model under. None takes the only one; traces call it ``"unknown"``
            until the first call has asked.
        api_key: Sent as bearer token. None reads ``VLLM_API_KEY`` from the environment. The key is in no repr,
            `to_dict` or pickle: pass it again, ``VLLMReranker.from_dict(data, api_key=key)``.
        template: A score template to render here, for a server without ``--chat-template``; a shipped name, a path or
            the text. See `rag_rerank.VLLMScorer` for this and the next ones.
        instruction: The task, for a reranker whose template has a place for it.
        chat_template_kwargs: More variables for the template.
        query_prompt, document_prompt: Text to put before each query or document, as some embedding models want it.
        use_activation: None leaves the score to the model's own activation; False asks for logits.
        truncate_prompt_tokens: Where the server cuts a pair that is longer than the model allows: -1 at the model's
            maximum, an int at that many tokens, None not at all; ``"auto"`` is -1, but cuts the document only where
            the server has a score template.
        max_tokens_per_query, max_tokens_per_doc: Cut each query or document at so many tokens (vLLM 0.20).
        priority: Of the requests, where the server schedules by it; lower goes first.
        extra_body: More fields for the request, as they are.
        endpoint: ``"score"``; or ``"rerank"`` for other servers, which have only a rerank API.
        timeout: Seconds that a call may take in all, tries and waits included.
        max_retries: How often a request is repeated after a failure that may pass.
        chunk_size, max_concurrency: Most documents in one request, and most requests of one call at once.
        connect_timeout, attempt_timeout: Seconds for a connection, and for one try; None leaves a try the call's time,
            or its equal share where there are several servers.
        send_key_over_http: Allow the key to be sent unencrypted to another machine.
        top_n, score_threshold, metadata_mode, on_error, callback_manager: As in `ScorerReranker`.

    Raises:
        pydantic.ValidationError: At construction, an unknown field or a value of the wrong type.
        rag_rerank.ConfigError: At construction, an address that is no http(s) address or holds a password, or a number
            out of range.
        TypeError, ValueError, rag_rerank.RerankError: From ``postprocess_nodes``, as in `ScorerReranker`; for example
            `rag_rerank.BackendUnavailable` where no server answers.
    """

    # Names, defaults and allowed values are VLLMScorer's.
    base_url: str | list[str] | None = None
    model: str | None = None
    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)
    template: _PathText | None = None
    instruction: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | Literal["auto"] | None = "auto"
    max_tokens_per_query: int | None = None
    max_tokens_per_doc: int | None = None
    priority: int | None = None
    extra_body: dict[str, Any] | None = None
    endpoint: str = "score"
    timeout: float = 30.0
    max_retries: int = 2
    chunk_size: int = 128
    max_concurrency: int = 4
    connect_timeout: float = 2.0
    attempt_timeout: float | None = None
    send_key_over_http: bool = False

    @property
    def scorer(self) -> "rag_rerank.VLLMScorer":
        """The scorer in use. It belongs to this reranker, which may replace or close it."""
        return cast("rag_rerank.VLLMScorer", self._current_scorer())

    def _settings(self) -> dict[str, Any]:
        return _added_fields(self, VLLMReranker)

    @staticmethod
    def _build(settings: dict[str, Any]) -> rag_rerank.Scorer:
        key: SecretStr | None = settings["api_key"]
        plain = None if key is None else key.get_secret_value()
        return rag_rerank.VLLMScorer(**{**settings, "api_key": plain})
