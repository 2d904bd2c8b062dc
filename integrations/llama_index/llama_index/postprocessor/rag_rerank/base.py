"""What LlamaIndex sees of every reranker: fields, events, and the sync and the async hook.

What pairs with what, the ranking and the errors are the scorer's.
"""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from llama_index.core.bridge.pydantic import ConfigDict, Field, ValidationError, field_validator
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # not in an __all__
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from pydantic_core import InitErrorDetails, PydanticCustomError

import rag_rerank  # names are touched where they are needed: the package loads them, and what they import, lazily
from llama_index.postprocessor.rag_rerank.images import Sources
from llama_index.postprocessor.rag_rerank.nodes import contents_of, result_of

logger = logging.getLogger(__name__)
dispatcher = get_dispatcher(__name__)

_NO_CALLBACKS = {"callback_manager": None}


class Reranker(BaseNodePostprocessor, rag_rerank.Closeable):
    """The behaviour that all rerankers share; each says which scorer it uses and what closing means."""

    # A typing error in a field name would otherwise be dropped in silence. What is wrong may be a key, so errors don't
    # show it. Fields called `model` and `model_kwargs` fall into pydantic's own namespace.
    model_config = ConfigDict(
        arbitrary_types_allowed=True,
        extra="forbid",
        validate_assignment=True,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    top_n: int | None = Field(default=5, ge=1)
    score_threshold: float | None = Field(default=None, allow_inf_nan=False)
    metadata_mode: MetadataMode = MetadataMode.EMBED
    keep_retrieval_score: bool = False
    read_images: bool = False
    image_folder: str | None = None
    send_image_urls: bool = False
    on_empty_text: Literal["last", "drop"] = "last"
    on_error: Literal["raise", "passthrough"] = "raise"

    _folder = field_validator("image_folder", mode="before")(rag_rerank.path_as_text)

    # A field of one subclass, a property of the others. Not to be declared at run time: pydantic takes a field in the
    # place of an inherited property for a mistake, and LlamaIndex puts a span around what implements abstract methods.
    if TYPE_CHECKING:

        @property
        def scorer(self) -> rag_rerank.Scorer:
            """The scorer to use for a call that begins now."""

    def __init__(self, /, **fields: Any) -> None:
        _check_names(type(self), fields)
        super().__init__(**fields)

    @classmethod
    def class_name(cls) -> str:
        """The name that `to_dict` and the tracers know the class by."""
        return cls.__name__

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        # Some callers (ObjectRetriever, RetrieverEvaluator) come here from inside a running event loop.
        query, contents = self._prepare(nodes, query_bundle)
        scorer = self.scorer
        with self._reported(scorer.model_name, nodes, query) as outcome:
            ranked = scorer.rerank(query.query_str, list(contents.values()), **self._choice())
            self._finish(outcome, nodes, contents, ranked)
        return outcome.nodes

    # LlamaIndex wraps the sync hook in a span by itself, but not this one: without a span of its own, its events would
    # carry the id of whatever called it.
    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query, contents = self._prepare(nodes, query_bundle)
        scorer = self.scorer
        with self._reported(scorer.model_name, nodes, query) as outcome:
            ranked = await scorer.arerank(query.query_str, list(contents.values()), **self._choice())
            self._finish(outcome, nodes, contents, ranked)
        return outcome.nodes

    def _prepare(
        self, nodes: Sequence[NodeWithScore], query: QueryBundle | None
    ) -> "tuple[QueryBundle, dict[int, rag_rerank.Input]]":
        """Check the input; return the query, and what to score by its position in `nodes`."""
        seeing = self.read_images or self.image_folder is not None or self.send_image_urls
        sources = Sources(self.image_folder, self.send_image_urls) if seeing else None
        contents = contents_of(nodes, self.metadata_mode, sources)
        if query is None or not query.query_str.strip():
            blank = "" if query is None else " The query that came is blank."
            raise ValueError(f"Missing query bundle in extra info. Pass query_bundle= or query_str=.{blank}")
        if len(contents) < len(nodes):
            fate = "are ranked last" if self._keeps_empty else "are dropped"
            what = "no text and no image" if seeing else "no text"
            logger.debug("%d of %d nodes have %s to score and %s", len(nodes) - len(contents), len(nodes), what, fate)
        return query, contents

    @property
    def _keeps_empty(self) -> bool:
        return self.on_empty_text == "last" and self.score_threshold is None

    def _choice(self) -> dict[str, Any]:
        return {"top_n": self.top_n, "score_threshold": self.score_threshold, "on_error": self.on_error}

    def _finish(
        self,
        outcome: "_Outcome",
        nodes: Sequence[NodeWithScore],
        contents: Mapping[int, Any],
        ranked: Sequence[rag_rerank.Ranked],
    ) -> None:
        """Put the results into `outcome`.

        Scored nodes come first, so a first one without a score means that the whole call was passed through: then all
        keep their order and their retrieval scores. A few nodes that were rejected among scored ones get None instead,
        as nodes without text do, because two scales in one list can't be compared.
        """
        outcome.passed_through = bool(ranked) and ranked[0].score is None
        sent = list(contents)
        scores = {sent[item.index]: item.score for item in ranked}
        order = [
            *scores,
            *(position for position in range(len(nodes)) if self._keeps_empty and position not in contents),
        ]
        if outcome.passed_through:
            order.sort()
            scores = {position: nodes[position].score for position in order}
        outcome.nodes.extend(
            result_of(nodes[position], scores.get(position), keep_retrieval_score=self.keep_retrieval_score)
            for position in order[: self.top_n]
        )

    @contextmanager
    def _reported(self, model_name: str, nodes: Sequence[NodeWithScore], query: QueryBundle) -> Iterator["_Outcome"]:
        """Report a call to tracers and callbacks; yields what the caller puts the results in.

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
        outcome = _Outcome()
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield outcome
            event.on_end(payload={EventPayload.NODES: list(outcome.nodes)})
        tags = {"passthrough": True} if outcome.passed_through else {}
        dispatcher.event(ReRankEndEvent(nodes=outcome.nodes, tags=tags))

    # Pydantic's own would compare the scorers that were built, and the callbacks, which are equal only to themselves.
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) | _NO_CALLBACKS == vars(other) | _NO_CALLBACKS

    __hash__ = None  # type: ignore[assignment]  # fields can be changed

    # Callbacks lead to a tracer's connections and locks, which are neither to be copied nor can be.
    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        memo[id(self.callback_manager)] = self.callback_manager
        return super().__deepcopy__(memo)

    def _pickled(self) -> dict[str, Any]:
        """The arguments that a pickle rebuilds the reranker from: what `to_dict` has, so no key and no callbacks."""
        fields = type(self).model_fields
        return {name: getattr(self, name) for name, field in fields.items() if not field.exclude}

    # LlamaIndex's own pickling deletes from the living object what can't be pickled (an engine's callbacks), and would
    # carry the key along.
    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), **self._pickled()), ()


@dataclass(slots=True)
class _Outcome:
    nodes: list[NodeWithScore] = field(default_factory=list)
    passed_through: bool = False


def _check_names(kind: type[Reranker], fields: Mapping[str, Any]) -> None:
    """Refuse fields that there are not as pydantic does, but say what may be meant, and nowhere what was given."""
    known = kind.model_fields
    errors = []
    for name in fields:
        if name not in known:
            hint = rag_rerank.did_you_mean(name, known)
            message = f"{kind.__name__} has no such field; {hint}" if hint else f"{kind.__name__} has no such field"
            error = PydanticCustomError("extra_forbidden", message)
            errors.append(InitErrorDetails(type=error, loc=(name,), input=None))
    if errors:
        raise ValidationError.from_exception_data(kind.__name__, errors, hide_input=True)
