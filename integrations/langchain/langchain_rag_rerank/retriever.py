"""A retriever that reranks what another one finds; needs nothing but langchain-core."""

# ruff: noqa: A002 - LangChain calls it input
from typing import Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from langchain_core.runnables import RunnableConfig, ensure_config
from langchain_core.runnables.config import set_config_context
from langchain_core.runnables.utils import coro_with_context
from pydantic import ConfigDict

from langchain_rag_rerank.base import BaseReranker, CallOptions, NoOtherFields
from langchain_rag_rerank.documents import RerankInput


class RerankingRetriever(NoOtherFields, BaseRetriever):
    """Find documents with one retriever and rerank them; ``reranker.as_retriever(retriever)`` makes one.

    Beside what `ContextualCompressionRetriever` does, a call may have its own options:
    ``retriever.invoke(query, top_n=10, score_threshold=0.2)``. Keyword arguments that are not in `CallOptions` go to
    the base retriever. Traces show the search and the ranking as children of the retriever's run.

    Args:
        reranker: What ranks.
        base_retriever: What finds the documents; it should find more than the reranker keeps.
        name: The name in traces; None for the name of the class.
        tags, metadata: For traces.

    Raises:
        pydantic.ValidationError: An unknown argument, or one of the wrong type.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    reranker: BaseReranker
    base_retriever: RetrieverLike

    def invoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """Find documents for a query and rerank them.

        Args:
            input: The query.
            config: Callbacks, tags, metadata, and what the base retriever is configured with (``configurable``).
            **kwargs: What is in `CallOptions` for the reranker, the rest for the base retriever.
        """
        config = ensure_config(config)
        with set_config_context(_inherited(config)) as context:
            return context.run(super().invoke, input, config, **kwargs)

    async def ainvoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """Find and rerank without blocking the event loop; see `invoke`."""
        config = ensure_config(config)
        with set_config_context(_inherited(config)) as context:
            return await coro_with_context(super().ainvoke(input, config, **kwargs), context)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        options, rest = _split(kwargs)
        documents = self.base_retriever.invoke(query, {"callbacks": run_manager.get_child()}, **rest)
        given: RerankInput = {"query": query, "documents": documents}
        return self.reranker.invoke(given, {"callbacks": run_manager.get_child()}, **options)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        options, rest = _split(kwargs)
        documents = await self.base_retriever.ainvoke(query, {"callbacks": run_manager.get_child()}, **rest)
        given: RerankInput = {"query": query, "documents": documents}
        return await self.reranker.ainvoke(given, {"callbacks": run_manager.get_child()}, **options)


def _inherited(config: RunnableConfig) -> RunnableConfig:
    """Give what the base retriever finds in its context, for LangChain hands on a retriever's callbacks only.

    Not the name and id of the retriever's own run.
    """
    own = {"callbacks", "run_id", "run_name"}
    return cast("RunnableConfig", {key: value for key, value in config.items() if key not in own})


def _split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell what is for the reranker from what is for the base retriever."""
    options = {name: value for name, value in kwargs.items() if name in CallOptions.__annotations__}
    return options, {name: value for name, value in kwargs.items() if name not in options}
