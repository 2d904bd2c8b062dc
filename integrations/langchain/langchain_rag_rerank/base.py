"""What LangChain sees of every reranker: fields, documents in and out, one traced run per call.

Each reranker is a `BaseDocumentCompressor`, which retrievers accept, and a `Runnable`, which chains accept. All ways in
lead through `invoke` or `ainvoke`, so that every call appears once, and alike, in traces.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableConfig, RunnableSerializable, ensure_config
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict  # pydantic refuses typing's own before Python 3.12

from rag_rerank import Closeable, Ranked, Scorer


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


class Reranker(BaseDocumentCompressor, RunnableSerializable[RerankInput, list[Document]], Closeable):
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

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where LangChain finds the class again: the package, so that what was dumped outlives a move of modules."""
        return ["langchain_rag_rerank"]


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
