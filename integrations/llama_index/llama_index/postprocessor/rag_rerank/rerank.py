"""The rerankers, around a `rag_rerank.Scorer`; they differ in where it comes from.

Pydantic makes fields of the annotations of `rag_rerank.LocalSettings` and `rag_rerank.VLLMSettings`, plain classes.
"""

from collections.abc import Callable
from typing import Annotated, Any

from llama_index.core.bridge.pydantic import Field, SecretStr, WithJsonSchema

import rag_rerank  # names are touched where they are needed: the package loads them, and what they import, lazily
from llama_index.postprocessor.rag_rerank.base import Reranker


class ScorerReranker(Reranker):
    """Rerank with a `rag_rerank.Scorer` that you made.

    Args:
        scorer: Yours: `close` leaves it open, and copies, deep ones too, share it. It is in pickles but not in
            `to_dict`: pass it again, ``ScorerReranker.from_dict(data, scorer=scorer)``.
        top_n: How many nodes to return at most, at least 1. None returns all.
        score_threshold: Return only nodes with this score or a higher one; applied before `top_n`, so the result may be
            empty. On the scale of the scorer's scores.
        min_precision: Return as many as together have a mean score of at least this, the share of relevant nodes to be
            expected among them. Needs probabilities: `calibration`, or a `rag_rerank.Calibrated`.
        min_n: Return at least so many of the scored ones, whatever `score_threshold` and `min_precision` say.
        metadata_mode: Which metadata is scored together with a node's text: ``"embed"`` (what embeddings see),
            ``"llm"``, ``"all"`` or ``"none"``.
        keep_retrieval_score: Keep the score that a node came with, in ``metadata["retrieval_score"]`` of a copy of the
            node, where neither embeddings nor language models nor a later one of these rerankers read it.
        read_images: Score the images that nodes hold (base64 in an `ImageNode`, `ImageDocument` or a `Node`'s
            ``image_resource``), alone or with their text; needs ``pip install 'rag-rerank[images]'``. A model that
            reads text only then raises `rag_rerank.ContentError`. Without it, only the nodes' text is scored.
        image_folder: Read also the files that nodes name (``image_path``), if they really lie in this folder, links
            followed; a relative path counts from the folder, or from where the process runs. Implies `read_images`.
        send_image_urls: Pass on the http and https addresses of images (``image_url``) for the vLLM server to fetch.
            Implies `read_images`. Who fills the store then decides what the server asks for: see vLLM's
            ``--allowed-media-domains``.
        on_empty_text: Nodes without text, such as blank pages and images that are not read, are not scored, whatever
            metadata they have: ``"last"`` puts them after the scored ones, in retrieval order, with score None;
            ``"drop"`` leaves them out, as `score_threshold` and `min_precision` always do.
        on_error: ``"raise"``; or ``"passthrough"``, which turns a `rag_rerank.BackendError` into one logged warning and
            the first `top_n` nodes in retrieval order with their retrieval scores. Where only some nodes were rejected,
            the others are ranked and the rejected follow with score None.
        callback_manager: LlamaIndex's callbacks; query engines set it.

    Raises:
        pydantic.ValidationError: At construction, an unknown field (the message says which one may be meant) or a wrong
            value. It shows no values: one may be a key.
        TypeError, ValueError: From ``postprocess_nodes``, something that is no NodeWithScore; no query, or a blank one;
            an image that can't be read (`rag_rerank.ContentError`).
        rag_rerank.RerankError: From ``postprocess_nodes``, what the scorer raises.
    """

    scorer: Annotated[rag_rerank.Scorer, WithJsonSchema({"type": "object"})] = Field(exclude=True)


class LocalReranker(rag_rerank.LocalSettings, Reranker):
    """Rerank with a model that runs in this process; needs ``pip install 'rag-rerank[local]'``.

    The first call loads the model, unless `warmup` has. Setting one of its fields loads another with the next call.
    Rerankers with equal settings share one loaded model, and threads and event loops may share a reranker.

    Args:
        calibration: The file that ``rag-rerank calibrate`` has written: scores are then probabilities of relevance.
        **settings: The arguments of `rag_rerank.LocalScorer`, such as `model` and `dtype`, with its defaults; and the
            fields of `ScorerReranker`, such as `top_n`, but no `scorer`.

    Raises:
        rag_rerank.ConfigError: At construction, a setting that the scorer refuses, or torch or transformers not
            installed; from the first ``postprocess_nodes``, a model that can't be loaded as asked.
        pydantic.ValidationError, TypeError, ValueError, rag_rerank.RerankError: As `ScorerReranker`.
    """


class VLLMReranker(rag_rerank.VLLMSettings, Reranker):
    """Rerank with a model that a vLLM server (0.8 or newer) serves.

    Nothing is sent at construction. Async calls take no thread, on connections of the loop that they run in. Rerankers
    with equal settings share their connections, and threads and event loops may share a reranker.

    Args:
        api_key, http_client, default_headers, default_query: As for `rag_rerank.VLLMScorer`. They are in no repr,
            `to_dict` or pickle: pass them again, ``VLLMReranker.from_dict(data, api_key=key)``.
        calibration: As for `LocalReranker`.
        **settings: The other arguments of `rag_rerank.VLLMScorer`, such as `base_url` and `timeout`, with its defaults;
            and the fields of `ScorerReranker`, such as `top_n`, but no `scorer`.

    Raises:
        rag_rerank.ConfigError: At construction, a setting that the scorer refuses.
        pydantic.ValidationError, TypeError, ValueError, rag_rerank.RerankError: As `ScorerReranker`; for example
            `rag_rerank.BackendUnavailable` where no server answers.
    """

    api_key: Annotated[
        SecretStr | Callable[[], str] | dict[str, SecretStr] | None, WithJsonSchema({"type": "string"})
    ] = Field(default=None, exclude=True, repr=False)
    http_client: Any = Field(default=None, exclude=True, repr=False)
    default_headers: dict[str, str] | None = Field(default=None, exclude=True, repr=False)
    default_query: dict[str, str] | None = Field(default=None, exclude=True, repr=False)
