"""The rerankers: LangChain on the outside (`langchain_rag_rerank.base`), one `rag_rerank.Scorer` on the inside.

They differ in where the scorer comes from: `ScorerReranker` is given one, the others build one from their fields.
"""

import os
import threading
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, SecretStr

import rag_rerank
from langchain_rag_rerank.base import Reranker
from rag_rerank import Scorer

# One lock for all rerankers: one in each of them could be neither copied nor pickled, and building takes microseconds.
_building = threading.Lock()


def _as_text(path: object) -> object:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


# Kept as text, for LangChain's dumps have no form for a pathlib.Path.
_PathText = Annotated[str, BeforeValidator(_as_text)]


class ScorerReranker(Reranker):
    """Reranks with a scorer that you made: one loaded model for several rerankers, or a `Scorer` of your own.

    Args:
        scorer: Any `rag_rerank.Scorer`. It stays yours: closing the reranker leaves it open, and copies share it.
        top_n: How many documents to keep, at least 1; None keeps all.
        score_threshold: Keep only documents with this score or a higher one. Applied before `top_n`, so the result may
            be empty.
        score_key: Under which name the score stands in a document's metadata. What was there is replaced.
        document_formatter: Makes the text that is scored from a document. None takes its ``page_content``.
        on_error: ``"raise"``; or ``"passthrough"``, which turns a `rag_rerank.BackendError` into one logged warning
            and the first `top_n` documents in retrieval order, without a score.
        name: The name in traces; None for the name of the class.

    Raises:
        pydantic.ValidationError: An unknown argument, or one of the wrong type or out of range.

    LangChain's ``dumps`` can't write a scorer: this class is marked there as "not implemented".
    """

    scorer: Scorer = Field(exclude=True)

    def _current_scorer(self) -> Scorer:
        return self.scorer


class _SettingsReranker(Reranker):  # noqa: PLW1641 - no hash: fields can be changed
    """Builds its scorer from fields and keeps it until one of them changes."""

    _scorer_fields: ClassVar[tuple[str, ...]]
    _built: tuple[dict[str, Any], Scorer] | None = PrivateAttr(default=None)

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        # Built now, so that a wrong setting is reported where it was written; it costs neither a request nor a model.
        # Not in a validator or model_post_init: pydantic would turn ConfigError, a ValueError, into a ValidationError.
        self._current_scorer()

    @property
    def scorer(self) -> Scorer:
        """The scorer in use, built again where fields have changed since the last call.

        Raises:
            rag_rerank.ConfigError: They were changed to something that can't work.
        """
        return self._current_scorer()

    def _current_scorer(self) -> Scorer:
        # Compared rather than reset by assignments, because model_copy(update=...) changes fields without telling.
        # What was built before is not closed: a copy may be using it.
        settings = {name: getattr(self, name) for name in self._scorer_fields}
        with _building:
            if self._built is None or self._built[0] != settings:
                self._built = settings, self._build(settings)
            return self._built[1]

    @abstractmethod
    def _build(self, settings: dict[str, Any]) -> Scorer:
        """A scorer with these settings; neither loads a model nor sends anything."""

    def close(self) -> None:
        """Close the scorer, for copies of this reranker too: they share it. Closing twice is harmless."""
        if self._built is not None:
            self._built[1].close()

    async def aclose(self) -> None:
        """As `close`, and the event loop's connections too."""
        if self._built is not None:
            await self._built[1].aclose()

    def __eq__(self, other: object) -> bool:
        # Pydantic's own would compare the scorers too, which are equal to none but themselves.
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        # The process that unpickles builds its own scorer.
        return {**state, "__pydantic_private__": {**(state["__pydantic_private__"] or {}), "_built": None}}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """LangChain's ``dumps`` and ``loads`` work, but for the fields described as not dumped."""
        return True


class LocalReranker(_SettingsReranker):
    """Reranks in this process, on a GPU or the CPU. The first call loads the model.

    Args:
        model: A hub id or a folder: a cross-encoder with one label, or a sentence-transformers bi-encoder.
        device: ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"cpu"``, ... None takes the first there is, in this order.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: the fastest that the device runs natively.
        score_type: ``"cross-encoder"`` or ``"bi-encoder"``; ``"auto"`` reads it from the checkpoint.
        template: The score template: a shipped name, a path or the text. ``"auto"`` takes the one that the model was
            trained with; None is query and document as a plain pair. See `rag_rerank.LocalScorer` for this and the
            next ones.
        instruction: The task, for a template with a place for it.
        chat_template_kwargs: More variables for the template.
        classifier_tokens: For a causal model that is not known: ``(true,)`` or ``(false, true)``.
        query_prompt, document_prompt: Text to put before each query or document, as some embedding models want it.
        use_activation: None or True applies the checkpoint's own activation (sigmoid unless its config names another);
            False gives logits. Without effect on a bi-encoder, whose scores are cosines.
        max_length: Longest input in tokens; None for what the model was made for. Longer pairs are cut.
        max_tokens_per_query, max_tokens_per_doc: Cut each query or document at so many tokens first.
        long_documents: ``"truncate"`` reads the beginning of a document longer than the model's window;
            ``"max-passage"`` reads all of it and takes its best passage's score.
        max_waiting_calls: How many calls may be unfinished at a time; one more is refused at once.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code from the checkpoint may run.
        local_files_only: Never ask the hub.
        cache_dir: Where hub files are kept; None for the usual place.
        model_kwargs, tokenizer_kwargs: Passed on to ``from_pretrained``; no access tokens (set ``HF_TOKEN``).
        top_n, score_threshold, score_key, document_formatter, on_error, name: As for `ScorerReranker`. Dumps leave
            `document_formatter` out.

    Raises:
        pydantic.ValidationError: An unknown argument, or one of the wrong type or out of range.
        rag_rerank.ConfigError: A setting that the scorer refuses, or the extra `local` is not installed.
    """

    # dtype and score_type are plain text here: their values stand in one place, the scorer, which checks them.
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
    model_kwargs: dict[str, Any] | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    _scorer_fields: ClassVar[tuple[str, ...]] = (
        "model",
        "device",
        "dtype",
        "score_type",
        "template",
        "instruction",
        "chat_template_kwargs",
        "classifier_tokens",
        "query_prompt",
        "document_prompt",
        "use_activation",
        "max_length",
        "max_tokens_per_query",
        "max_tokens_per_doc",
        "long_documents",
        "max_waiting_calls",
        "revision",
        "trust_remote_code",
        "local_files_only",
        "cache_dir",
        "model_kwargs",
        "tokenizer_kwargs",
    )

    def _build(self, settings: dict[str, Any]) -> Scorer:
        return rag_rerank.LocalScorer(**settings)


class VLLMReranker(_SettingsReranker):
    """Reranks on a vLLM server. Nothing is sent before the first call.

    Args:
        base_url: The server's address, with or without ``/v1`` or ``/score`` at its end; or a list of servers that
            serve the same model. None reads ``VLLM_BASE_URL`` from the environment, and is ``http://localhost:8000``
            where that is not set.
        model: The name that the servers serve the model under. None takes the only one.
        api_key: Sent as bearer token. None reads ``VLLM_API_KEY`` from the environment, never another service's
            variable. Neither shown nor dumped nor pickled: an unpickled copy reads the environment again.
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
        top_n, score_threshold, score_key, document_formatter, on_error, name: As for `ScorerReranker`. Dumps leave
            `document_formatter` out.

    Raises:
        pydantic.ValidationError: An unknown argument, or one of the wrong type or out of range.
        rag_rerank.ConfigError: An address that is no http(s) address or holds a password, or another setting that the
            scorer refuses.
    """

    base_url: str | list[str] | None = None
    model: str | None = None
    api_key: SecretStr | None = None
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

    _scorer_fields: ClassVar[tuple[str, ...]] = (
        "base_url",
        "model",
        "api_key",
        "template",
        "instruction",
        "chat_template_kwargs",
        "query_prompt",
        "document_prompt",
        "use_activation",
        "truncate_prompt_tokens",
        "max_tokens_per_query",
        "max_tokens_per_doc",
        "priority",
        "extra_body",
        "endpoint",
        "timeout",
        "max_retries",
        "chunk_size",
        "max_concurrency",
        "connect_timeout",
        "attempt_timeout",
        "send_key_over_http",
    )

    def _build(self, settings: dict[str, Any]) -> Scorer:
        key: SecretStr | None = settings["api_key"]
        return rag_rerank.VLLMScorer(**{**settings, "api_key": None if key is None else key.get_secret_value()})

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], "api_key": None}}

    @property
    def lc_secrets(self) -> dict[str, str]:
        """The field that LangChain's ``dumps`` leaves out, and the environment variable it is read from instead."""
        return {"api_key": "VLLM_API_KEY"}
