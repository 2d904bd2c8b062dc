"""What LlamaIndex sees of every reranker: fields, input checks, events and results, for the sync and the async hook.

What pairs with what, the ranking and the errors are the scorer's.
"""

import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from llama_index.core.bridge.pydantic import ConfigDict, Field
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # not in an __all__
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

import rag_rerank  # names are touched where they are needed: the package loads them, and what they import, lazily

dispatcher = get_dispatcher(__name__)


class Reranker(BaseNodePostprocessor, rag_rerank.Closeable):
    """The behaviour that all rerankers share; each says which scorer it uses and what closing means."""

    # A typing error in a field name would otherwise be dropped in silence. Fields called `model` and `model_kwargs`
    # fall into pydantic's own namespace.
    model_config = ConfigDict(
        arbitrary_types_allowed=True, extra="forbid", validate_assignment=True, protected_namespaces=()
    )

    top_n: int | None = Field(default=5, ge=1)
    score_threshold: float | None = Field(default=None, allow_inf_nan=False)
    metadata_mode: MetadataMode = MetadataMode.EMBED
    on_error: Literal["raise", "passthrough"] = "raise"

    @abstractmethod
    def _current_scorer(self) -> rag_rerank.Scorer:
        """The scorer to use for a call that begins now."""

    @classmethod
    def class_name(cls) -> str:
        """The name that `to_dict` and the tracers know the class by."""
        return cls.__name__

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        # Some callers (ObjectRetriever, RetrieverEvaluator) come here from inside a running event loop.
        scorer, query, texts = self._prepare(nodes, query_bundle)
        with self._reported(scorer.model_name, nodes, query) as results:
            results.extend(_results(nodes, scorer.rerank(query.query_str, texts, **self._choice())))
        return results

    # LlamaIndex wraps the sync hook in a span by itself, but not this one: without a span of its own, its events would
    # carry the id of whatever called it.
    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        scorer, query, texts = self._prepare(nodes, query_bundle)
        with self._reported(scorer.model_name, nodes, query) as results:
            ranked = await scorer.arerank(query.query_str, texts, **self._choice())
            results.extend(_results(nodes, ranked))
        return results

    def _prepare(
        self, nodes: Sequence[NodeWithScore], query_bundle: QueryBundle | None
    ) -> tuple[rag_rerank.Scorer, QueryBundle, list[str]]:
        """Check the input; return the scorer, the query and the nodes' texts."""
        for position, node in enumerate(nodes):
            if not isinstance(node, NodeWithScore):
                got = type(node).__name__
                raise TypeError(f"nodes[{position}] must be NodeWithScore, got {got}; wrap it: NodeWithScore(node=...)")
        if query_bundle is None:
            raise ValueError("Missing query bundle in extra info. Pass query_bundle= or query_str=.")
        texts = [node.get_content(metadata_mode=self.metadata_mode) for node in nodes]
        return self._current_scorer(), query_bundle, texts

    def _choice(self) -> dict[str, Any]:
        return {"top_n": self.top_n, "score_threshold": self.score_threshold, "on_error": self.on_error}

    @contextmanager
    def _reported(
        self, model_name: str, nodes: Sequence[NodeWithScore], query: QueryBundle
    ) -> Iterator[list[NodeWithScore]]:
        """Report a call to tracers and callbacks; yields the empty list that the caller puts the results in.

        An error ends the callback event and is raised on, so that the span is dropped with it; a `ReRankEndEvent` is
        sent after success only.
        """
        top_n = len(nodes) if self.top_n is None else self.top_n  # neither kind of event can say "all"
        dispatcher.event(ReRankStartEvent(query=query, nodes=list(nodes), top_n=top_n, model_name=model_name))
        payload: dict[str, Any] = {
            EventPayload.NODES: list(nodes),
            EventPayload.MODEL_NAME: model_name,
            EventPayload.QUERY_STR: query.query_str,
            EventPayload.TOP_K: top_n,
        }
        results: list[NodeWithScore] = []
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield results
            event.on_end(payload={EventPayload.NODES: list(results)})
        dispatcher.event(ReRankEndEvent(nodes=results))

    def _pickled(self) -> dict[str, Any]:
        """The arguments that a pickle rebuilds the reranker from: what `to_dict` has, so no key and no callbacks."""
        fields = type(self).model_fields
        return {name: getattr(self, name) for name, field in fields.items() if not field.exclude}

    # LlamaIndex's own pickling deletes from the living object what can't be pickled (an engine's callbacks), and would
    # carry the key along.
    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), **self._pickled()), ()


def _results(nodes: Sequence[NodeWithScore], ranked: Sequence[rag_rerank.Ranked]) -> list[NodeWithScore]:
    """Copies of the ranked nodes with their new scores: the caller's objects, which events hold too, stay as they are.

    Scored nodes come first, so a first one without a score means that the whole call was passed through: then all keep
    their retrieval scores. A few nodes that were rejected among scored ones get None instead, because two scales in one
    list can't be compared.
    """
    passed_through = bool(ranked) and ranked[0].score is None
    return [
        nodes[item.index].model_copy(update=None if passed_through else {"score": item.score})  # keeps subclasses
        for item in ranked
    ]
