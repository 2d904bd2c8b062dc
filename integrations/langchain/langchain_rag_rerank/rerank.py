"""The rerankers: LangChain on the outside, one `rag_rerank.Scorer` on the inside.

`_Reranker` has everything that LangChain sees: fields, documents in and out, one traced run per call. Its subclasses
differ only in where the scorer comes from: `ScorerReranker` is given one, `_SettingsReranker` builds one from fields.

Each reranker is a `BaseDocumentCompressor`, which retrievers accept, and a `Runnable`, which chains accept. All ways in
lead through `invoke` or `ainvoke`, so that every call appears once, and alike, in traces.
"""

import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Annotated, Any, ClassVar, Literal, Self

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableConfig, RunnableSerializable, ensure_config
from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, SecretStr
from typing_extensions import TypedDict  # pydantic refuses typing's own before Python 3.12

import rag_rerank
from rag_rerank import Ranked, Scorer

# One lock for all rerankers: one in each of them could be neither copied nor pickled, and building takes microseconds.
_building = threading.Lock()


def _as_text(path: object) -> object:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


# Kept as text, for LangChain's dumps have no form for a pathlib.Path.
_PathText = Annotated[str, BeforeValidator(_as_text)]


class RerankInput(TypedDict):
    """What the rerankers take as Runnables.

    Attributes:
        query: The query.
        documents: What to rerank, in retrieval order.
    """

    query: str
    documents: Sequence[Document]


class _Limits(TypedDict):
    top_n: int | None
    score_threshold: float | None


class _Reranker(BaseDocumentCompressor, RunnableSerializable[RerankInput, list[Document]]):
    """All that does not depend on where the scorer comes from; the fields are described in the public classes."""

    model_config = ConfigDict(
        extra="forbid",  # a mistyped setting must not be ignored
        validate_assignment=True,
        hide_input_in_errors=True,  # the input may be a key
        arbitrary_types_allowed=True,
        protected_namespaces=(),  # model_kwargs is what LangChain's users call it
    )

    top_n: int | None = Field(default=3, ge=1)
    score_threshold: float | None = Field(default=None, allow_inf_nan=False)
    score_key: str = Field(default="relevance_score", min_length=1)
    document_formatter: Callable[[Document], str] | None = Field(default=None, exclude=True)
    on_error: Literal["raise", "passthrough"] = "raise"

    @abstractmethod
    def _current_scorer(self) -> Scorer:
        """The scorer that fits the fields as they are now."""

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Rerank documents: what `ContextualCompressionRetriever` calls.

        Args:
            documents: What to rerank, in retrieval order.
            query: The query.
            callbacks: Who is told about the run.

        Returns:
            Copies, best first, with their score in ``metadata[score_key]``; the documents passed in stay as they are.
            Equal scores stay in retrieval order. ``[]`` for no documents, with no run, no model loaded and no request.

        Raises:
            TypeError: The query or a document is of the wrong type; the message names the position.
            rag_rerank.ConfigError: The reranker can't work as configured.
            rag_rerank.BackendError: No scores; the subclass says why. Not raised under ``on_error="passthrough"``.
        """
        return self.invoke({"query": query, "documents": documents}, {"callbacks": callbacks})

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """As `compress_documents`, without blocking the event loop and without a thread per call."""
        return await self.ainvoke({"query": query, "documents": documents}, {"callbacks": callbacks})

    def invoke(
        self,
        input: RerankInput,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Rerank the documents of one query.

        Args:
            input: A mapping with ``query`` and ``documents``; other keys, which chains carry along, are ignored.
            config: Callbacks, tags, metadata and the like.
            **kwargs: ``top_n`` and ``score_threshold`` take the place of the fields of these names, for this call.

        Returns:
            As `compress_documents`.

        Raises:
            TypeError, rag_rerank.ConfigError, rag_rerank.BackendError: As `compress_documents`.
            ValueError: `top_n` or `score_threshold` is out of range.
        """
        given, limits = _checked(input, self.get_name()), self._limits(kwargs)
        if not given["documents"]:
            return []

        def rerank(given: RerankInput) -> list[Document]:
            texts = self._texts(given["documents"])
            ranked = self._current_scorer().rerank(given["query"], texts, on_error=self.on_error, **limits)
            return self._in_order(given["documents"], ranked)

        return self._call_with_config(rerank, given, self._traced(config, given, limits))

    async def ainvoke(
        self,
        input: RerankInput,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """As `invoke`, without blocking the event loop and without a thread per call."""
        given, limits = _checked(input, self.get_name()), self._limits(kwargs)
        if not given["documents"]:
            return []

        async def rerank(given: RerankInput) -> list[Document]:
            texts = self._texts(given["documents"])
            ranked = await self._current_scorer().arerank(given["query"], texts, on_error=self.on_error, **limits)
            return self._in_order(given["documents"], ranked)

        return await self._acall_with_config(rerank, given, self._traced(config, given, limits))

    def _limits(self, given: Mapping[str, Any]) -> _Limits:
        """What one call keeps: its own arguments before the fields; the scorer checks their values."""
        unknown = sorted(given.keys() - {"top_n", "score_threshold"})
        if unknown:
            raise TypeError(f"unexpected keyword argument {unknown[0]!r}: a call takes top_n and score_threshold")
        return {
            "top_n": given.get("top_n", self.top_n),
            "score_threshold": given.get("score_threshold", self.score_threshold),
        }

    def _traced(self, config: RunnableConfig | None, given: RerankInput, limits: _Limits) -> RunnableConfig:
        """`config` with what a trace should tell about the run; ``ls_`` are the names that LangSmith reads."""
        config = ensure_config(config)
        config["metadata"] = {
            **config["metadata"],
            "ls_provider": "rag_rerank",
            "ls_model_name": self._current_scorer().model_name,
            "rerank_top_n": limits["top_n"],
            "rerank_num_documents": len(given["documents"]),
        }
        return config

    def _texts(self, documents: Sequence[Document]) -> list[str]:
        if self.document_formatter is None:
            return [document.page_content for document in documents]
        texts = [self.document_formatter(document) for document in documents]
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise TypeError(f"document_formatter must return str, got {kind} for documents[{position}]")
        return texts

    def _in_order(self, documents: Sequence[Document], ranked: Sequence[Ranked]) -> list[Document]:
        return [self._with_score(documents[place.index], place.score) for place in ranked]

    def _with_score(self, document: Document, score: float | None) -> Document:
        """A copy with its own metadata dict. The values are shared: a deep copy fails on a lock or a client in them."""
        # Without a score, one from an earlier reranker must not stay behind and be taken for ours.
        metadata = {key: value for key, value in document.metadata.items() if key != self.score_key}
        if score is not None:
            metadata[self.score_key] = score
        return document.model_copy(update={"metadata": metadata})

    def close(self) -> None:
        """Give back what the reranker itself holds. Closing twice is harmless."""

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

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        # The copy shares the scorer: a second one would load the model again, and a VLLMScorer's copies have no key.
        memo = {} if memo is None else memo
        scorer = self._current_scorer()
        memo[id(scorer)] = scorer
        return super().__deepcopy__(memo)

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where LangChain finds the class again: the package, so that what was dumped outlives a move of modules."""
        return ["langchain_rag_rerank"]


class ScorerReranker(_Reranker):
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


class _SettingsReranker(_Reranker):  # noqa: PLW1641 - no hash: fields can be changed
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
        use_activation: None or True applies the checkpoint's own activation (sigmoid unless its config names another);
            False gives logits. Without effect on a bi-encoder, whose scores are cosines.
        max_length: Longest input in tokens; None for what the model was made for. Longer pairs are cut.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code from the checkpoint may run.
        local_files_only: Never ask the hub.
        cache_dir: Where hub files are kept; None for the usual place.
        model_kwargs, tokenizer_kwargs: Passed on to ``from_pretrained``. Neither shown nor dumped: they may hold a
            token.
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
    use_activation: bool | None = None
    max_length: int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    local_files_only: bool = False
    cache_dir: _PathText | None = None
    model_kwargs: dict[str, Any] | None = Field(default=None, exclude=True, repr=False)
    tokenizer_kwargs: dict[str, Any] | None = Field(default=None, exclude=True, repr=False)

    _scorer_fields: ClassVar[tuple[str, ...]] = (
        "model",
        "device",
        "dtype",
        "score_type",
        "use_activation",
        "max_length",
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
        base_url: The server's address, with or without ``/v1`` or ``/score`` at its end. None reads ``VLLM_BASE_URL``
            from the environment, and is ``http://localhost:8000`` where that is not set.
        model: The name that the server serves the model under. None takes the only one.
        api_key: Sent as bearer token. None reads ``VLLM_API_KEY`` from the environment, never another service's
            variable. Neither shown nor dumped nor pickled: an unpickled copy reads the environment again.
        use_activation: None leaves the score to the model's own activation; False asks for logits.
        timeout: Seconds that a call may take in all, tries and waits included.
        max_retries: How often a request is repeated after a failure that may pass.
        truncate_prompt_tokens: Where the server cuts a pair that is longer than the model allows: -1 at the model's
            maximum, an int at that many tokens, None not at all. See `rag_rerank.VLLMScorer`.
        top_n, score_threshold, score_key, document_formatter, on_error, name: As for `ScorerReranker`. Dumps leave
            `document_formatter` out.

    Raises:
        pydantic.ValidationError: An unknown argument, or one of the wrong type or out of range.
        rag_rerank.ConfigError: An address that is no http(s) address or holds a password, or another setting that the
            scorer refuses.
    """

    base_url: str | None = None
    model: str | None = None
    api_key: SecretStr | None = None
    use_activation: bool | None = None
    timeout: float = 30.0
    max_retries: int = 2
    truncate_prompt_tokens: int | None = -1

    _scorer_fields: ClassVar[tuple[str, ...]] = (
        "base_url",
        "model",
        "api_key",
        "use_activation",
        "timeout",
        "max_retries",
        "truncate_prompt_tokens",
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


def _checked(given: Any, name: str) -> RerankInput:
    """The input of a run, its documents as a list, or a TypeError that says what is wrong and where."""
    if not isinstance(given, Mapping) or not {"query", "documents"} <= given.keys():
        got = f"the keys {sorted(map(str, given))}" if isinstance(given, Mapping) else type(given).__name__
        raise TypeError(
            f'{name} takes {{"query": ..., "documents": [...]}}, got {got}. To rerank what a retriever finds: '
            '{"query": RunnablePassthrough(), "documents": retriever} | reranker, or '
            'RunnablePassthrough.assign(documents=itemgetter("query") | retriever) | reranker'
        )
    query, documents = given["query"], given["documents"]
    if not isinstance(query, str):
        raise TypeError(f"query must be str, got {type(query).__name__}")
    if not isinstance(documents, Iterable):
        raise TypeError(f"documents must be a sequence of Document, got {type(documents).__name__}")
    documents = list(documents)
    for position, document in enumerate(documents):
        if not isinstance(document, Document):
            raise TypeError(f"documents[{position}] must be a Document, got {type(document).__name__}")
        text: object = document.page_content  # Document.model_construct lets anything in
        if not isinstance(text, str):
            raise TypeError(
                f"documents[{position}] (id={document.id!r}): page_content must be str, got {type(text).__name__}"
            )
    return {"query": query, "documents": documents}
