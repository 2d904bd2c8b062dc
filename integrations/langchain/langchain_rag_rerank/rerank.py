"""The rerankers: LangChain on the outside (`langchain_rag_rerank.ways`), one `rag_rerank.Scorer` on the inside.

They differ in where the scorer comes from: `ScorerReranker` is given one, the others build one from their fields, which
are `rag_rerank.LocalSettings` and `rag_rerank.VLLMSettings`.
"""

from typing import Any, cast

from pydantic import Field, PrivateAttr, SecretStr, field_validator

import rag_rerank  # names are touched where they are needed: the package loads them, and what they import, lazily
from langchain_rag_rerank.ways import Reranker


class ScorerReranker(Reranker):
    """Reranks with a scorer that you made: one loaded model for several rerankers, or a `Scorer` of your own.

    Args:
        scorer: Any `rag_rerank.Scorer`. It stays yours: closing the reranker leaves it open, and copies share it.
        top_n: How many documents to keep, at least 1; None keeps all.
        score_threshold: Keep only documents with this score or a higher one. Applied before `top_n`, so the result may
            be empty.
        score_key: Under which name the score stands in a document's metadata. What was there is replaced.
        document_formatter: Makes what is scored from a document: a text; or, for models that see, an image: a
            `rag_rerank.Image` or `rag_rerank.Content`, ``{"content": [part, ...]}`` or a list of such parts, as
            LangChain's messages have them. None takes its ``page_content``, and nothing is read because a document says
            where it lies.
        on_error: ``"raise"``; or ``"passthrough"``, which turns a `rag_rerank.BackendError` into one logged warning
            and the first `top_n` documents in retrieval order, without a score.
        name: The name in traces; None for the name of the class.

    Raises:
        pydantic.ValidationError: An unknown argument, or one of the wrong type or out of range.

    LangChain's ``dumps`` can't write a scorer: this class is marked there as "not implemented".
    """

    scorer: rag_rerank.Scorer = Field(exclude=True)


class _OwnScorer(Reranker):  # noqa: PLW1641 - no hash: fields can be changed
    """A reranker that builds its scorer from its fields; beside a class of settings from the core."""

    _built: Any = PrivateAttr(default=None)

    def __init__(self, /, **fields: Any) -> None:
        super().__init__(**fields)
        # Built now, so that a wrong setting is reported where it was written; it costs neither a request nor a model.
        # Not in a validator or model_post_init: pydantic would turn ConfigError, a ValueError, into a ValidationError.
        _ = self.scorer

    def __eq__(self, other: object) -> bool:
        # Pydantic's own would compare the scorers too, which are equal to none but themselves.
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __getstate__(self) -> dict[Any, Any]:
        # The process that unpickles builds its own scorer.
        return {**super().__getstate__(), "__pydantic_private__": {"_built": None}}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """LangChain's ``dumps`` and ``loads`` work, but for the fields described as not dumped."""
        return True


class LocalReranker(rag_rerank.LocalSettings, _OwnScorer):
    """Reranks in this process, on a GPU or the CPU. The first call loads the model.

    Args:
        model: A hub id or a folder: a cross-encoder with one label, a language model made into a reranker, a
            sentence-transformers bi-encoder, or ColBERT.
        device: ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"cpu"``, ... None takes the first there is, in this order.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: the fastest that the device runs natively.
        score_type: ``"cross-encoder"``, ``"bi-encoder"`` or ``"late-interaction"``; ``"auto"`` reads it from the
            checkpoint.
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

    _paths = field_validator("model", "template", "cache_dir", mode="before")(rag_rerank.path_as_text)

    def warmup(self) -> None:
        """Load the model and score a pair now, so that the first call doesn't pay for it.

        Raises:
            rag_rerank.ConfigError: It can't be loaded as asked.
        """
        cast("rag_rerank.LocalScorer", self.scorer).warmup()


class VLLMReranker(rag_rerank.VLLMSettings, _OwnScorer):
    """Reranks on a vLLM server. Nothing is sent before the first call.

    Args:
        base_url: The server's address, with or without ``/v1`` or ``/score`` at its end; or a list of servers that
            serve the same model. None reads ``VLLM_BASE_URL`` from the environment (several are parted by commas), and
            is ``http://localhost:8000`` where that is not set.
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
        max_waiting_calls: How many calls may be unfinished at a time; one more is refused at once. None: any number.
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

    api_key: SecretStr | None = None

    _paths = field_validator("template", mode="before")(rag_rerank.path_as_text)

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], "api_key": None}}

    @property
    def lc_secrets(self) -> dict[str, str]:
        """The field that LangChain's ``dumps`` leaves out, and the environment variable it is read from instead."""
        return {"api_key": "VLLM_API_KEY"}
