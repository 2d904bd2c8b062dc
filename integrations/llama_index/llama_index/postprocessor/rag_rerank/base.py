"""What LlamaIndex sees of every reranker: fields, events, and the sync and the async hook. All else is the scorer's."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from llama_index.core.bridge.pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # not in an __all__
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from pydantic_core import InitErrorDetails, PydanticCustomError

import rag_rerank  # names are touched where they are needed: the package loads them, and what they import, lazily
from llama_index.postprocessor.rag_rerank.nodes import ImageSources, contents_of, result_of

logger = logging.getLogger(__name__)
dispatcher = get_dispatcher(__name__)

_NO_CALLBACKS = {"callback_manager": None}


@dataclass
class QueryWithInstruction(QueryBundle):
    """A query with an `instruction`, which takes the place of the reranker's own for this query.

    Query engines take it as any `QueryBundle`: ``engine.query(QueryWithInstruction("...", instruction="..."))``. What
    makes a query of its own, as chat engines and query transformations do, leaves the instruction behind.
    """

    instruction: str | None = field(default=None, kw_only=True)


class Reranker(BaseNodePostprocessor, rag_rerank.Closeable):
    """What all rerankers share; each says which scorer it uses and what closing means."""

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
    min_precision: float | None = Field(default=None, gt=0, le=1)
    min_n: int = Field(default=0, ge=0)
    metadata_mode: MetadataMode = MetadataMode.EMBED
    keep_retrieval_score: bool = False
    read_images: bool = False
    image_folder: str | None = None
    send_image_urls: bool = False
    on_empty_text: Literal["last", "drop"] = "last"
    on_error: Literal["raise", "passthrough"] = "raise"

    _paths = field_validator("*", mode="before")(rag_rerank.path_as_text)
    _built: Any = PrivateAttr(default=None)  # of `rag_rerank.LocalSettings` and `rag_rerank.VLLMSettings`

    # A field of one subclass, a property of the others. Not to be declared at run time: pydantic takes a field in the
    # place of an inherited property for a mistake, and LlamaIndex puts a span around what implements abstract methods.
    if TYPE_CHECKING:

        @property
        def scorer(self) -> rag_rerank.Scorer:
            """The scorer to use for a call that begins now."""

    def __init__(self, /, **fields: Any) -> None:
        kind = type(self)
        errors = [_unknown(kind, name) for name in fields if name not in kind.model_fields]
        if errors:
            raise ValidationError.from_exception_data(kind.__name__, errors, hide_input=True)
        super().__init__(**fields)
        # So that a wrong setting is reported where it stands. Here rather than in a validator or `model_post_init`:
        # pydantic turns a ValueError raised in those, and ConfigError is one, into its own ValidationError.
        _ = self.scorer

    @classmethod
    def class_name(cls) -> str:
        """Give the name that `to_dict` and the tracers know the class by."""
        return cls.__name__

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        # Some callers (ObjectRetriever, RetrieverEvaluator) come here from inside a running event loop.
        with self._call(nodes, query_bundle) as call:
            call.ranked = call.scorer.rerank(call.query, call.documents, **call.options)
        return call.results

    # LlamaIndex wraps the sync hook in a span by itself, but not this one: without a span of its own, its events would
    # carry the id of whatever called it.
    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        with self._call(nodes, query_bundle) as call:
            call.ranked = await call.scorer.arerank(call.query, call.documents, **call.options)
        return call.results

    @contextmanager
    def _call(self, nodes: Sequence[NodeWithScore], query: QueryBundle | None) -> Iterator["_Call"]:
        """Report a call to tracers and callbacks; yield what is to be ranked, and make results of what comes of it.

        An error ends the callback event and is raised on, so that the span is dropped with it; a `ReRankEndEvent` is
        sent after success only.
        """
        contents, empty = self._contents(nodes)
        if query is None or not query.query_str.strip():
            blank = "" if query is None else " The query that came is blank."
            raise ValueError(f"Missing query bundle in extra info. Pass query_bundle= or query_str=.{blank}")
        limits = {name: getattr(self, name) for name in ("top_n", "score_threshold", "min_precision", "min_n")}
        instruction = query.instruction if isinstance(query, QueryWithInstruction) else None
        options = {**limits, "on_error": self.on_error, "instruction": instruction}
        call = _Call(self.scorer, query.query_str, list(contents.values()), options)
        name = call.scorer.model_name
        top_n = len(nodes) if self.top_n is None else self.top_n  # neither kind of event can say "all"
        dispatcher.event(ReRankStartEvent(query=query, nodes=list(nodes), top_n=top_n, model_name=name))
        payload: dict[str, Any] = {EventPayload.NODES: list(nodes), EventPayload.MODEL_NAME: name}
        payload |= {EventPayload.QUERY_STR: query.query_str, EventPayload.TOP_K: top_n}
        with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
            yield call
            sent = list(contents)
            scores = {sent[item.index]: item.score for item in call.ranked} | dict.fromkeys(empty)
            # Scored nodes come first: where the first has no score, the whole call was passed through, and all keep
            # their order and retrieval scores. A few that were rejected among scored ones keep None, as those without
            # text do, because two scales in one list can't be compared.
            tags = {"passthrough": True} if call.ranked and call.ranked[0].score is None else {}
            if tags:
                scores = {position: nodes[position].score for position in sorted(scores)}
            call.results = [
                result_of(nodes[position], score, keep_retrieval_score=self.keep_retrieval_score)
                for position, score in list(scores.items())[: self.top_n]
            ]
            event.on_end(payload={EventPayload.NODES: list(call.results)})
        dispatcher.event(ReRankEndEvent(nodes=call.results, tags=tags))

    def _contents(self, nodes: Sequence[NodeWithScore]) -> "tuple[dict[int, rag_rerank.Input], list[int]]":
        """Collect what to score by its position in `nodes`, and which nodes without any follow behind."""
        with_images = self.read_images or self.image_folder is not None or self.send_image_urls
        sources = ImageSources(self.image_folder, self.send_image_urls) if with_images else None
        contents = contents_of(nodes, self.metadata_mode, sources)
        empty = [position for position in range(len(nodes)) if position not in contents]
        dropped = self.on_empty_text == "drop" or self.score_threshold is not None or self.min_precision is not None
        if empty:
            what = "no text and no image" if with_images else "no text"
            fate = "are dropped" if dropped else "are ranked last"
            logger.debug("%d of %d nodes have %s to score and %s", len(empty), len(nodes), what, fate)
        return contents, [] if dropped else empty

    # Pydantic's own would compare the scorers that were built, and the callbacks, which are equal only to themselves.
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) | _NO_CALLBACKS == vars(other) | _NO_CALLBACKS

    __hash__ = None  # type: ignore[assignment]  # fields can be changed

    # Callbacks lead to a tracer's connections and locks, which are neither to be copied nor can be.
    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        memo[id(self.callback_manager)] = self.callback_manager
        return super().__deepcopy__(memo)

    # LlamaIndex's own pickling deletes from the living object what can't be pickled (an engine's callbacks), and would
    # carry the key along; unpickling would call an `__init__` that may be a subclass's, with other arguments.
    def __getstate__(self) -> dict[Any, Any]:
        state: dict[Any, Any] = BaseModel.__getstate__(self)
        hidden = ("api_key", "http_client", "default_headers", "default_query")
        fields = {name: None if name in hidden else value for name, value in vars(self).items()}
        fields["callback_manager"] = CallbackManager()
        return {**state, "__dict__": fields, "__pydantic_private__": state["__pydantic_private__"] | {"_built": None}}

    __setstate__ = BaseModel.__setstate__


@dataclass(slots=True)
class _Call:
    scorer: rag_rerank.Scorer
    query: str
    documents: "list[rag_rerank.Input]"
    options: dict[str, Any]
    ranked: "Sequence[rag_rerank.Ranked]" = ()
    results: list[NodeWithScore] = field(default_factory=list)


def _unknown(kind: type[Reranker], name: str) -> InitErrorDetails:
    """Refuse a field that there is not as pydantic does, but say what may be meant, and not what was given."""
    hint = rag_rerank.did_you_mean(name, kind.model_fields)
    message = f"{kind.__name__} has no such field" + (f"; {hint}" if hint else "")
    return InitErrorDetails(type=PydanticCustomError("extra_forbidden", message), loc=(name,), input=None)
