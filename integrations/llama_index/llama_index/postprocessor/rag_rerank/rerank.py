"""The rerankers: LlamaIndex's contract (`base`) around a `rag_rerank.Scorer`; they differ in where that comes from.

Settings, and the scorer that fits them, are `rag_rerank.LocalSettings` and `rag_rerank.VLLMSettings`: pydantic makes
fields of the annotations of these plain classes.
"""

from typing import Annotated, Any, cast

from llama_index.core.bridge.pydantic import Field, PrivateAttr, SecretStr, WithJsonSchema, field_validator

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
        keep_retrieval_score: Whether results keep the score that they came with: in ``metadata["retrieval_score"]`` of
            a copy of the node, where neither embeddings nor language models nor a later one of these rerankers read it.
        read_images: Score the images that nodes hold (base64 in an `ImageNode`, `ImageDocument` or a `Node`'s
            ``image_resource``), alone or together with their text; for models that see, needs
            ``pip install 'rag-rerank[images]'``. A model that reads text only then raises `rag_rerank.ContentError`.
            False, as by default, leaves images out: only their nodes' text is scored.
        image_folder: Read also the files that nodes name (``image_path``), if they really lie in this folder, links
            followed; a relative path counts from the folder, or from where the process runs. Implies `read_images`.
        send_image_urls: Pass on the http and https addresses of images (``image_url``) for the vLLM server to fetch.
            Implies `read_images`. Who fills the store then decides what the server asks for: see vLLM's
            ``--allowed-media-domains``.
        on_empty_text: What becomes of nodes without text, such as images that are not read and blank pages, which are
            not sent, whatever metadata they have: ``"last"`` puts them after the scored ones, in retrieval order, with
            score None; ``"drop"`` leaves them out, as `score_threshold` always does.
        on_error: ``"raise"``; or ``"passthrough"``, which turns a `rag_rerank.BackendError` into one logged warning and
            the first `top_n` nodes in retrieval order with their retrieval scores. Where only some nodes were rejected,
            the others are ranked and the rejected follow with score None.
        callback_manager: LlamaIndex's callbacks; query engines set it.

    Raises:
        pydantic.ValidationError: At construction, an unknown field (the message says which one may be meant) or a value
            of the wrong type or out of range. It shows no values: one may be a key.
        TypeError, ValueError: From ``postprocess_nodes``, something that is no NodeWithScore; no query, or a blank one;
            an image that can't be read (`rag_rerank.ContentError`).
        rag_rerank.RerankError: From ``postprocess_nodes``, what the scorer raises.
    """

    scorer: Annotated[rag_rerank.Scorer, WithJsonSchema({"type": "object"})] = Field(exclude=True)

    def _pickled(self) -> dict[str, Any]:
        return {**super()._pickled(), "scorer": self.scorer}


class _OwnScorer(Reranker):
    """A reranker that builds its scorer from its fields, and again when one of them has changed."""

    _built: Any = PrivateAttr(default=None)

    _paths = field_validator("*", mode="before")(rag_rerank.path_as_text)

    # Here rather than in a validator or `model_post_init`: pydantic turns a ValueError raised in those, and ConfigError
    # is one, into its own ValidationError.
    def __init__(self, /, **fields: Any) -> None:
        super().__init__(**fields)
        _ = self.scorer  # so that a wrong setting is reported where it stands


class LocalReranker(rag_rerank.LocalSettings, _OwnScorer):
    """Reranks with a model that runs in this process; needs ``pip install 'rag-rerank[local]'``.

    The model is loaded by the first call and stays loaded. Threads and event loops may share one reranker. Setting one
    of the model's fields loads it anew with the next call; a copy with the same fields shares the model.

    Args:
        model: A hub id or a folder: a cross-encoder (``*ForSequenceClassification`` with one label, or a causal model
            that answers with a known word), a bi-encoder (sentence-transformers) or late interaction (ColBERT).
        device: ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"cpu"``, ... None takes the first there is, in this order.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``, the fastest that the device runs natively.
        score_type: ``"cross-encoder"``, ``"bi-encoder"``, ``"late-interaction"``, or ``"auto"``, which reads it from
            the checkpoint.
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
        top_n, score_threshold, metadata_mode, keep_retrieval_score, read_images, image_folder, send_image_urls,
            on_empty_text, on_error, callback_manager: As in `ScorerReranker`.

    Raises:
        pydantic.ValidationError: At construction, an unknown field or a value of the wrong type.
        rag_rerank.ConfigError: At construction, a setting out of range, or torch or transformers not installed; from
            the first ``postprocess_nodes``, a model that can't be loaded as asked.
        TypeError, ValueError, rag_rerank.RerankError: From ``postprocess_nodes``, as in `ScorerReranker`.
    """

    @property
    def scorer(self) -> "rag_rerank.LocalScorer":
        """The scorer in use. It belongs to this reranker, which may replace or close it."""
        return cast("rag_rerank.LocalScorer", super().scorer)

    def warmup(self) -> None:
        """Load the model now, so that the first query doesn't wait for it.

        Raises:
            rag_rerank.ConfigError: It can't be loaded as asked.
        """
        self.scorer.warmup()


class VLLMReranker(rag_rerank.VLLMSettings, _OwnScorer):
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
        max_waiting_calls: How many calls may be unfinished at a time; one more is refused at once. None: any number.
        connect_timeout, attempt_timeout: Seconds for a connection, and for one try; None leaves a try the call's time,
            or its equal share where there are several servers.
        send_key_over_http: Allow the key to be sent unencrypted to another machine.
        top_n, score_threshold, metadata_mode, keep_retrieval_score, read_images, image_folder, send_image_urls,
            on_empty_text, on_error, callback_manager: As in `ScorerReranker`.

    Raises:
        pydantic.ValidationError: At construction, an unknown field or a value of the wrong type.
        rag_rerank.ConfigError: At construction, an address that is no http(s) address or holds a password, or a number
            out of range.
        TypeError, ValueError, rag_rerank.RerankError: From ``postprocess_nodes``, as in `ScorerReranker`; for example
            `rag_rerank.BackendUnavailable` where no server answers.
    """

    api_key: SecretStr | None = Field(default=None, exclude=True, repr=False)

    @property
    def scorer(self) -> "rag_rerank.VLLMScorer":
        """The scorer in use. It belongs to this reranker, which may replace or close it."""
        return cast("rag_rerank.VLLMScorer", super().scorer)
