"""More ways to ask a reranker: positions instead of documents, many queries at once, as retriever, as cross-encoder."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack, cast

from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import Document
from langchain_core.retrievers import RetrieverLike
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list

from langchain_rag_rerank.base import BaseReranker, Call, Choice, Limits
from langchain_rag_rerank.batch import Batch, Result, merged
from langchain_rag_rerank.cross_encoder import RerankerCrossEncoder
from langchain_rag_rerank.documents import RerankInput, RerankResult, as_documents
from rag_rerank import BackendError, ContentError, Input, Ranked

if TYPE_CHECKING:
    from langchain_rag_rerank.retriever import RerankingRetriever


class Reranker(BaseReranker):
    """All that a reranker can be asked; the fields are described in the public classes."""

    def rerank(
        self, documents: Iterable[Document | Input], query: Input, **limits: Unpack[Limits]
    ) -> list[RerankResult]:
        """Positions and scores instead of documents, as other rerankers of LangChain have it.

        Args:
            documents: Texts, documents, or mappings with the text under ``text`` or ``page_content``. A
                `document_formatter` sees each as a document. For models that see, also `rag_rerank.Image`,
                `rag_rerank.Content`, or mappings with a list of parts under ``content``, which no formatter sees.
            query: The query; for models that see, it may be an image or content as well.
            **limits: ``top_n`` and ``score_threshold`` take the place of the fields of these names, for this call.

        Returns:
            ``{"index": ..., "relevance_score": ...}`` for each document that is kept, best first.

        Raises:
            TypeError, ValueError, rag_rerank.ConfigError, rag_rerank.BackendError: As `invoke`.
        """
        call = self._prepare({"query": query, "documents": as_documents(documents)}, None, limits)
        if not call.given["documents"]:
            return []

        def rerank(given: RerankInput) -> list[RerankResult]:
            return _results(self._rank(given, call.choice))

        run: Any = self._call_with_config  # typed for documents only
        return cast("list[RerankResult]", run(rerank, call.given, call.config))

    async def arerank(
        self, documents: Iterable[Document | Input], query: Input, **limits: Unpack[Limits]
    ) -> list[RerankResult]:
        """As `rerank`, without blocking the event loop and without a thread per call."""
        call = self._prepare({"query": query, "documents": as_documents(documents)}, None, limits)
        if not call.given["documents"]:
            return []

        async def rerank(given: RerankInput) -> list[RerankResult]:
            return _results(await self._arank(given, call.choice))

        run: Any = self._acall_with_config
        return cast("list[RerankResult]", await run(rerank, call.given, call.config))

    def batch(
        self,
        inputs: list[RerankInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """Rerank for many queries, in as few calls to the back end as possible.

        Each input is one run in traces. One that can't be scored does not concern the others. A call is for no more
        than 1,024 documents, where they are of several queries, and its time limit is for all of them together.

        Args:
            inputs: As `invoke` takes one.
            config: For all, or one each. ``max_concurrency`` is how many queries a call may have.
            return_exceptions: Return an input's error in the place of its documents, instead of raising the first.
            **kwargs: As `invoke`.

        Returns:
            For each input what `invoke` returns.

        Raises:
            TypeError, ValueError, rag_rerank.ConfigError, rag_rerank.BackendError: As `invoke`.
        """
        results, calls = self._prepare_all(inputs, config, kwargs, return_exceptions)
        if not calls:
            return results

        def rerank(inputs: list[RerankInput]) -> list[Result]:
            batch = Batch(inputs, self._texts, calls[0].config.get("max_concurrency"))
            for queries, texts in batch:
                try:
                    batch.succeeded(self._rank_together(queries, texts, calls[0].choice))
                except (BackendError, ContentError) as error:
                    batch.failed(error)
            return batch.results(self.score_key)

        given, configs = [call.given for call in calls], [call.config for call in calls]
        return merged(results, self._batch_with_config(rerank, given, configs, return_exceptions=return_exceptions))

    async def abatch(
        self,
        inputs: list[RerankInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[Document]]:
        """As `batch`, without blocking the event loop and without a thread per call."""
        results, calls = self._prepare_all(inputs, config, kwargs, return_exceptions)
        if not calls:
            return results

        async def rerank(inputs: list[RerankInput]) -> list[Result]:
            batch = Batch(inputs, self._texts, calls[0].config.get("max_concurrency"))
            for queries, texts in batch:
                try:
                    batch.succeeded(await self._arank_together(queries, texts, calls[0].choice))
                except (BackendError, ContentError) as error:
                    batch.failed(error)
            return batch.results(self.score_key)

        given, configs = [call.given for call in calls], [call.config for call in calls]
        return merged(
            results, await self._abatch_with_config(rerank, given, configs, return_exceptions=return_exceptions)
        )

    def as_retriever(self, base_retriever: RetrieverLike, **kwargs: Any) -> "RerankingRetriever":
        """A retriever that reranks what another one finds; `top_n` and `score_threshold` can be given per call.

        Args:
            base_retriever: What finds the documents; it should find more than `top_n`.
            **kwargs: Further fields of `RerankingRetriever`: ``name``, ``tags``, ``metadata``.
        """
        from langchain_rag_rerank.retriever import RerankingRetriever  # noqa: PLC0415 - it knows this class

        return RerankingRetriever(reranker=self, base_retriever=base_retriever, **kwargs)

    def as_cross_encoder(self) -> BaseCrossEncoder:
        """This reranker's scorer for whatever takes a `BaseCrossEncoder`; it knows no `top_n` and no threshold."""
        return RerankerCrossEncoder(self)

    def _prepare_all(
        self,
        inputs: Sequence[Any],
        config: RunnableConfig | list[RunnableConfig] | None,
        limits: Mapping[str, Any],
        return_exceptions: bool,
    ) -> tuple[list[Any], list[Call]]:
        """The results of a batch, as far as they are known without scoring (None: not yet), and the calls for the rest.

        Raises:
            Exception: What is wrong with an input, unless it is to be its result.
        """
        results: list[Any] = []
        calls: list[Call] = []
        for given, each in zip(inputs, get_config_list(config, len(inputs)), strict=True):
            try:
                call = self._prepare(given, each, limits)
            except Exception as error:
                if not return_exceptions:
                    raise
                results.append(error)
            else:
                results.append(None if call.given["documents"] else [])
                calls += [call] if call.given["documents"] else []
        return results, calls

    # A query that is asked alone is asked as `invoke` asks it: one that a server refuses gets the same error.
    def _rank_together(self, queries: list[Any], texts: list[list[Any]], choice: Choice) -> list[list[Ranked]]:
        if len(queries) == 1:
            return [self.scorer.rerank(queries[0], texts[0], **choice)]
        return self.scorer.rerank_batch(queries, texts, **choice)

    async def _arank_together(self, queries: list[Any], texts: list[list[Any]], choice: Choice) -> list[list[Ranked]]:
        if len(queries) == 1:
            return [await self.scorer.arerank(queries[0], texts[0], **choice)]
        return await self.scorer.arerank_batch(queries, texts, **choice)


def _results(ranked: Sequence[Ranked]) -> list[RerankResult]:
    return [{"index": place.index, "relevance_score": place.score} for place in ranked]
