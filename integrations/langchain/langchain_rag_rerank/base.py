"""What LangChain sees of every reranker: fields, documents in and out, one traced run per call.

Each reranker is a `BaseDocumentCompressor`, which retrievers accept, and a `Runnable`, which chains accept. All ways in
(more of them in `langchain_rag_rerank.ways`) open such a run, so that every call appears once, and alike, in traces.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableConfig, RunnableSerializable, ensure_config
from pydantic import ConfigDict, Field

from langchain_rag_rerank.documents import RerankInput, checked, in_order, texts_of
from langchain_rag_rerank.names import KnownNames
from rag_rerank import Closeable, Ranked, Scorer, did_you_mean

OnError = Literal["raise", "passthrough"]


class Limits(TypedDict, total=False):
    """What a call may set for itself, in place of the fields of these names."""

    top_n: int | None
    score_threshold: float | None


class Choice(TypedDict):
    """What is kept of a ranking; the scorer checks the values."""

    top_n: int | None
    score_threshold: float | None
    on_error: OnError


class Call(NamedTuple):
    """One input, checked."""

    given: RerankInput
    choice: Choice
    config: RunnableConfig


class BaseReranker(KnownNames, BaseDocumentCompressor, RunnableSerializable[RerankInput, list[Document]], Closeable):
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
    document_formatter: Callable[[Document], Any] | None = Field(default=None, exclude=True)
    on_error: OnError = "raise"

    if TYPE_CHECKING:  # a field of one subclass: at run time pydantic would warn of it

        @property
        def scorer(self) -> Scorer:
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
        call = self._prepare(input, config, kwargs)
        if not call.given["documents"]:
            return []

        def rerank(given: RerankInput) -> list[Document]:
            return in_order(given["documents"], self._rank(given, call.choice), self.score_key)

        return self._call_with_config(rerank, call.given, call.config)

    async def ainvoke(
        self,
        input: RerankInput,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """As `invoke`, without blocking the event loop and without a thread per call."""
        call = self._prepare(input, config, kwargs)
        if not call.given["documents"]:
            return []

        async def rerank(given: RerankInput) -> list[Document]:
            return in_order(given["documents"], await self._arank(given, call.choice), self.score_key)

        return await self._acall_with_config(rerank, call.given, call.config)

    def _prepare(self, given: Any, config: RunnableConfig | None, limits: Mapping[str, Any]) -> Call:
        """Check one input, and what its call sets for itself; add to `config` what a trace should tell about the run.

        Raises:
            TypeError: An input or an argument that is none.
        """
        given = checked(given, self.get_name())
        for name in sorted(limits.keys() - Limits.__annotations__.keys()):
            hint = did_you_mean(name, Limits.__annotations__) or "a call takes top_n and score_threshold"
            raise TypeError(f"unexpected keyword argument {name!r}: {hint}")
        choice: Choice = {
            "top_n": limits.get("top_n", self.top_n),
            "score_threshold": limits.get("score_threshold", self.score_threshold),
            "on_error": self.on_error,
        }
        config = ensure_config(config)
        config["metadata"] = {
            **config["metadata"],
            "ls_provider": "rag_rerank",  # LangSmith reads the names with ls_
            "ls_model_name": self.scorer.model_name,
            "rerank_top_n": choice["top_n"],
            "rerank_num_documents": len(given["documents"]),
        }
        return Call(given, choice, config)

    def _texts(self, documents: Sequence[Document]) -> list[Any]:
        return texts_of(documents, self.document_formatter)

    def _rank(self, given: RerankInput, choice: Choice) -> list[Ranked]:
        return self.scorer.rerank(given["query"], self._texts(given["documents"]), **choice)

    async def _arank(self, given: RerankInput, choice: Choice) -> list[Ranked]:
        return await self.scorer.arerank(given["query"], self._texts(given["documents"]), **choice)

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where LangChain finds the class again: the package, so that what was dumped outlives a move of modules."""
        return ["langchain_rag_rerank"]
