"""The rerankers: `ScorerReranker` is given a scorer, the others have the settings of one as their fields."""

from collections.abc import Callable
from typing import Annotated, Any

from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.retrievers import RetrieverLike
from pydantic import Field, PrivateAttr, SecretStr, WithJsonSchema, field_validator
from pydantic.json_schema import SkipJsonSchema

import rag_rerank  # names are touched where they are needed: the package loads them, and what they import, lazily
from langchain_rag_rerank.base import BaseReranker
from langchain_rag_rerank.retriever import RerankingRetriever


class _CrossEncoder(BaseCrossEncoder):
    """A reranker's scorer, as it is at each call, for pairs of texts."""

    def __init__(self, reranker: BaseReranker) -> None:
        self._reranker = reranker

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Score each pair of query and document; an error is raised, for nothing could be passed through."""
        for position, pair in enumerate(text_pairs):
            if isinstance(pair, str) or len(pair) != 2:
                raise TypeError(f"text_pairs[{position}] must be a pair: (query, document)")
        queries, documents = [query for query, _ in text_pairs], [document for _, document in text_pairs]
        alike = all(query == queries[0] for query in queries)  # one query's documents, as a rule
        return self._reranker.scorer.score(queries[:1] if alike else queries, documents)


class _Reranker(BaseReranker):
    """A reranker that can also stand where something else is wanted."""

    def as_retriever(self, base_retriever: RetrieverLike, **kwargs: Any) -> RerankingRetriever:
        """Make a `RerankingRetriever` of this reranker; further fields are ``name``, ``tags`` and ``metadata``."""
        return RerankingRetriever(reranker=self, base_retriever=base_retriever, **kwargs)

    def as_cross_encoder(self) -> BaseCrossEncoder:
        """Give the scorer to what takes a `BaseCrossEncoder`: pairs of query and document in, scores out."""
        return _CrossEncoder(self)


class ScorerReranker(_Reranker):
    """Rerank with a scorer that you made, such as a `rag_rerank.FallbackScorer` or a `rag_rerank.Scorer` of your own.

    Args:
        scorer: Any `rag_rerank.Scorer`. It stays yours: closing the reranker leaves it open, and copies share it.
        top_n: How many documents to keep, at least 1; None keeps all.
        score_threshold: Keep only documents with this score or a higher one. Applied before `top_n`, so the result may
            be empty.
        min_precision: Keep as many as together have a mean score of at least this, the share of relevant documents to
            be expected among them. Needs probabilities: `calibration`, or a `rag_rerank.Calibrated`.
        min_n: Keep at least so many, whatever `score_threshold` and `min_precision` say.
        score_key: The key of a document's metadata that the score is put under. What was there is replaced. None leaves
            metadata as it is, for what compares documents by it, such as ``MultiQueryRetriever``.
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

    scorer: SkipJsonSchema[rag_rerank.Scorer] = Field(exclude=True)


class _OwnScorer(_Reranker):  # noqa: PLW1641 - no hash: fields can be changed
    """A reranker with a scorer that fits its fields; beside a class of settings from the core."""

    _built: Any = PrivateAttr(default=None)
    _paths = field_validator("*", mode="before")(rag_rerank.path_as_text)

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
        state = super().__getstate__()
        return {**state, "__pydantic_private__": state["__pydantic_private__"] | {"_built": None}}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Let LangChain's ``dumps`` and ``loads`` work, but for the fields described as not dumped."""
        return True


class LocalReranker(rag_rerank.LocalSettings, _OwnScorer):
    """Rerank in this process, on a GPU or the CPU. The first call loads the model.

    Rerankers with equal settings share one loaded model, in LlamaIndex too. It is given back when the last of them is
    closed or collected.

    Args:
        model, device, dtype, ...: As for `rag_rerank.LocalScorer`, all of its arguments.
        calibration: The file that ``rag-rerank calibrate`` has written: scores are then probabilities of relevance.
        top_n, score_threshold, ..., name: As for `ScorerReranker`. Dumps leave `document_formatter` out.

    Raises:
        pydantic.ValidationError: An unknown argument, or one of the wrong type or out of range.
        rag_rerank.ConfigError: A setting that the scorer refuses, or the extra `local` is not installed.
    """


class VLLMReranker(rag_rerank.VLLMSettings, _OwnScorer):
    """Rerank on a vLLM server, or several. Nothing is sent before the first call.

    Rerankers with equal settings share their connections, and what they know of the servers, in LlamaIndex too.

    Args:
        base_url, model, timeout, ...: As for `rag_rerank.VLLMScorer`, all of its arguments.
        api_key, http_client, default_headers, default_query: As there. Neither shown nor dumped nor pickled: an
            unpickled copy reads ``VLLM_API_KEY`` again, and has to be given the others.
        calibration: As for `LocalReranker`.
        top_n, score_threshold, ..., name: As for `ScorerReranker`. Dumps leave `document_formatter` out.

    Raises:
        pydantic.ValidationError: An unknown argument, or one of the wrong type or out of range.
        rag_rerank.ConfigError: A setting that the scorer refuses.
    """

    api_key: Annotated[
        SecretStr | Callable[[], str] | dict[str, SecretStr] | None, WithJsonSchema({"type": "string"})
    ] = None
    http_client: Any = Field(default=None, exclude=True, repr=False)
    default_headers: dict[str, str] | None = Field(default=None, exclude=True, repr=False)
    default_query: dict[str, str] | None = Field(default=None, exclude=True, repr=False)

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        hidden = dict.fromkeys(("api_key", "http_client", "default_headers", "default_query"))
        return {**state, "__dict__": state["__dict__"] | hidden}

    @property
    def lc_secrets(self) -> dict[str, str]:
        """The field that LangChain's ``dumps`` leaves out, and the environment variable it is read from instead."""
        return {"api_key": "VLLM_API_KEY"}
