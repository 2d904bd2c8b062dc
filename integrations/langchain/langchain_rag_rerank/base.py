"""What all rerankers share: fields, documents in and out, and one traced run for each query.

A reranker is a `BaseDocumentCompressor`, which retrievers accept, and a `Runnable`, which chains accept.
"""

# ruff: noqa: A002 - LangChain calls it input
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, TypeVar, Unpack

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableConfig, RunnableSerializable, ensure_config
from langchain_core.runnables.config import get_config_list
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import InitErrorDetails, PydanticCustomError

from langchain_rag_rerank.documents import RerankInput, RerankResult, as_documents, check, contents_of, copies, places
from rag_rerank import BackendError, Closeable, ContentError, Input, Ranked, RerankError, Scorer, did_you_mean

T = TypeVar("T")
Configs = RunnableConfig | list[RunnableConfig] | None
_ABOUT = "This is about inputs[{}]."


class CallOptions(TypedDict, total=False):
    """What a call may set for itself."""

    top_n: int | None  # in place of the fields of these names
    score_threshold: float | None
    min_precision: float | None
    min_n: int
    instruction: str | None  # in place of the scorer's own; ConfigError where its model has no place for one


class _Call(NamedTuple):
    """One input, checked, and what is to be done with it."""

    given: RerankInput
    config: RunnableConfig
    scorer: Scorer
    arguments: dict[str, Any]  # of Scorer.rerank, beside query and documents


class NoOtherFields(BaseModel):
    """Refuse arguments that are no fields, with a hint at the one that was meant."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, given: Any) -> Any:
        # As pydantic with extra="forbid", but with the hint, and without the value: it may be a key.
        fields = cls.model_fields.items()
        known = {alias for name, field in fields for alias in (name, field.alias, field.validation_alias)}
        errors: list[InitErrorDetails] = []
        for name in sorted(map(str, given.keys() - known if isinstance(given, dict) else ())):
            hint = did_you_mean(name, cls.model_fields)
            message = f"Extra inputs are not permitted{hint and f': {hint}'}"
            errors.append({"type": PydanticCustomError("extra_forbidden", message), "loc": (name,), "input": None})
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors, hide_input=True)
        return given


class BaseReranker(NoOtherFields, BaseDocumentCompressor, RunnableSerializable[RerankInput, list[Document]], Closeable):
    """Rerank with a scorer, wherever that comes from; `ScorerReranker` describes the fields."""

    model_config = ConfigDict(
        extra="forbid",  # a mistyped setting must not be ignored
        validate_assignment=True,
        hide_input_in_errors=True,  # the input may be a key
        arbitrary_types_allowed=True,
        protected_namespaces=(),  # model_kwargs is what LangChain's users call it
    )

    top_n: int | None = Field(default=3, ge=1)
    score_threshold: float | None = Field(default=None, allow_inf_nan=False)
    min_precision: float | None = Field(default=None, gt=0, le=1)
    min_n: int = Field(default=0, ge=0)
    score_key: str | None = Field(default="relevance_score", min_length=1)
    document_formatter: SkipJsonSchema[Callable[[Document], Any] | None] = Field(default=None, exclude=True)
    on_error: Literal["raise", "passthrough"] = "raise"

    if TYPE_CHECKING:  # a field of one subclass: at run time pydantic would warn of it

        @property
        def scorer(self) -> Scorer:
            """The scorer that fits the fields as they are now."""

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Rerank documents (in retrieval order), as `ContextualCompressionRetriever` asks for it.

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
        """Rerank without blocking the event loop and without a thread per call; see `compress_documents`."""
        return await self.ainvoke({"query": query, "documents": documents}, {"callbacks": callbacks})

    def invoke(self, input: RerankInput, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """Rerank the documents of one query.

        Args:
            input: A mapping with ``query`` and ``documents``; other keys, which chains carry along, are ignored.
            config: Callbacks, tags, metadata and the like.
            **kwargs: `CallOptions`.

        Returns and raises what `compress_documents` does; ValueError for an option out of range.
        """
        return self._rank(self._prepare(input, config, kwargs), self._copies)

    async def ainvoke(self, input: RerankInput, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        """Rerank without blocking the event loop and without a thread per call; see `invoke`."""
        return await self._arank(self._prepare(input, config, kwargs), self._copies)

    def rerank(
        self, documents: Iterable[Document | Input], query: Input, **options: Unpack[CallOptions]
    ) -> list[RerankResult]:
        """Give positions and scores instead of documents, as other rerankers of LangChain do.

        Args:
            documents: Texts, documents, or mappings. Of a mapping, ``text`` or ``page_content`` is the text, which a
                `document_formatter` can do without, and the rest metadata. For models that see, also
                `rag_rerank.Image`, `rag_rerank.Content`, or mappings with a list of parts under ``content``, which no
                formatter sees.
            query: The query; for models that see, it may be an image or content as well.
            **options: `CallOptions`.

        Returns:
            ``{"index": ..., "relevance_score": ...}`` for each document that is kept, best first.

        Raises what `invoke` does.
        """
        given = {"query": query, "documents": as_documents(documents, needs_text=self.document_formatter is None)}
        return self._rank(self._prepare(given, None, options), places)

    async def arerank(
        self, documents: Iterable[Document | Input], query: Input, **options: Unpack[CallOptions]
    ) -> list[RerankResult]:
        """Rerank without blocking the event loop and without a thread per call; see `rerank`."""
        given = {"query": query, "documents": as_documents(documents, needs_text=self.document_formatter is None)}
        return await self._arank(self._prepare(given, None, options), places)

    def batch(
        self, inputs: list[RerankInput], config: Configs = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[list[Document]]:
        """Rerank for many queries, in as few calls to the back end as `rag_rerank.Scorer.rerank_batch` makes.

        Each input is one run in traces. A failure concerns only the input whose fault it is.

        Args:
            inputs: As `invoke` takes one.
            config: For all, or one each. ``max_concurrency`` is how many queries a call may have.
            return_exceptions: Return an input's error in the place of its documents, instead of raising the first.
            **kwargs: `CallOptions`.

        Returns and raises what `invoke` does. A note says which of the inputs an error is about, and so does the
        `query` of a `rag_rerank.BackendError`.
        """
        results, calls = self._prepare_all(inputs, config, kwargs, return_exceptions)

        given, configs = [call.given for call in calls], [call.config for call in calls]
        rank = functools.partial(self._rank_all, calls)
        return _merged(
            results, self._batch_with_config(rank, given, configs, return_exceptions=True), return_exceptions
        )

    async def abatch(
        self, inputs: list[RerankInput], config: Configs = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[list[Document]]:
        """Rerank for many queries without blocking the event loop and without a thread per call; see `batch`."""
        results, calls = self._prepare_all(inputs, config, kwargs, return_exceptions)

        given, configs = [call.given for call in calls], [call.config for call in calls]
        rank = functools.partial(self._arank_all, calls)
        ranked = await self._abatch_with_config(rank, given, configs, return_exceptions=True)
        return _merged(results, ranked, return_exceptions)

    def _prepare(self, given: Any, config: RunnableConfig | None, options: Mapping[str, Any]) -> _Call:
        """Check one input and its options; add to `config` what a trace should tell about the run."""
        given = check(given, self.get_name())
        known = CallOptions.__annotations__
        for name in sorted(options.keys() - known.keys()):
            hint = did_you_mean(name, known) or f"a call takes {', '.join(known)}"
            raise TypeError(f"unexpected keyword argument {name!r}: {hint}")
        names = ("top_n", "score_threshold", "min_precision", "min_n", "on_error")
        arguments = {**{name: getattr(self, name) for name in names}, **options}
        scorer, config = self.scorer, ensure_config(config)
        model = {"ls_provider": "rag_rerank", "ls_model_name": scorer.model_name}  # LangSmith's names
        numbers = {"rerank_top_n": arguments["top_n"], "rerank_num_documents": len(given["documents"])}
        config["metadata"] = {**config["metadata"], **model, **numbers}
        return _Call(given, config, scorer, arguments)

    def _prepare_all(
        self, inputs: Sequence[Any], config: Configs, options: Mapping[str, Any], return_exceptions: bool
    ) -> tuple[list[Any], list[_Call]]:
        """Give the results of a batch as far as they are known without scoring (None: not yet), and the other calls."""
        results: list[Any] = []
        calls: list[_Call] = []
        for position, (given, each) in enumerate(zip(inputs, get_config_list(config, len(inputs)), strict=True)):
            try:
                call = self._prepare(given, each, options)
            except Exception as error:
                if not return_exceptions:
                    error.add_note(_ABOUT.format(position))
                    raise
                results.append(error)
            else:
                results.append(None if call.given["documents"] else [])
                calls += [call] if call.given["documents"] else []
        return results, calls

    def _rank(self, call: _Call, result: Callable[[Sequence[Document], Sequence[Ranked]], T]) -> T:
        def rank(given: RerankInput) -> T:
            contents = contents_of(given["documents"], self.document_formatter)
            return result(given["documents"], call.scorer.rerank(given["query"], contents, **call.arguments))

        run: Any = self._call_with_config  # typed for documents only
        results: T = run(rank, call.given, call.config) if call.given["documents"] else result([], [])
        return results

    async def _arank(self, call: _Call, result: Callable[[Sequence[Document], Sequence[Ranked]], T]) -> T:
        async def rank(given: RerankInput) -> T:
            contents = contents_of(given["documents"], self.document_formatter)
            return result(given["documents"], await call.scorer.arerank(given["query"], contents, **call.arguments))

        run: Any = self._acall_with_config
        results: T = await run(rank, call.given, call.config) if call.given["documents"] else result([], [])
        return results

    def _rank_all(self, calls: Sequence[_Call], inputs: Sequence[RerankInput], size: int | None = None) -> list[Any]:
        """Rank several queries, `size` of them at a time; give each one's documents, or its error."""
        size = size or calls[0].config.get("max_concurrency") or len(inputs)
        if len(inputs) > size:
            return [each for part in _parts(inputs, size) for each in self._rank_all(calls, part, size)]
        try:
            return self._results(inputs, calls[0].scorer.rerank_batch(**self._arguments(calls[0], inputs)))
        except Exception as error:
            if _is_of_all(error):
                raise
            return [error] if len(inputs) == 1 else self._rank_all(calls, inputs, len(inputs) // 2)

    async def _arank_all(
        self, calls: Sequence[_Call], inputs: Sequence[RerankInput], size: int | None = None
    ) -> list[Any]:
        size = size or calls[0].config.get("max_concurrency") or len(inputs)
        if len(inputs) > size:
            return [each for part in _parts(inputs, size) for each in await self._arank_all(calls, part, size)]
        try:
            return self._results(inputs, await calls[0].scorer.arerank_batch(**self._arguments(calls[0], inputs)))
        except Exception as error:
            if _is_of_all(error):
                raise
            return [error] if len(inputs) == 1 else await self._arank_all(calls, inputs, len(inputs) // 2)

    def _arguments(self, call: _Call, inputs: Sequence[RerankInput]) -> dict[str, Any]:
        return {
            **call.arguments,
            "queries": [given["query"] for given in inputs],
            "documents": [contents_of(given["documents"], self.document_formatter) for given in inputs],
            "on_error": "return" if self.on_error == "raise" else self.on_error,
        }

    def _results(self, inputs: Sequence[RerankInput], ranked: Sequence[Any]) -> list[Any]:
        return [
            each if isinstance(each, Exception) else self._copies(given["documents"], each)
            for given, each in zip(inputs, ranked, strict=True)
        ]

    def _copies(self, documents: Sequence[Document], ranked: Sequence[Ranked]) -> list[Document]:
        return copies(documents, ranked, self.score_key)

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Name the package, where LangChain finds the class again: what was dumped outlives a move of modules."""
        return ["langchain_rag_rerank"]


def _parts(inputs: Sequence[RerankInput], size: int) -> list[Sequence[RerankInput]]:
    if size < 1:
        raise ValueError(f"max_concurrency must be at least 1, or None; got {size}")
    return [inputs[start : start + size] for start in range(0, len(inputs), size)]


def _is_of_all(error: Exception) -> bool:
    """Tell a wrong setting from what a formatter raised, and an image that can't be read, which are one query's own."""
    return isinstance(error, RerankError) and not isinstance(error, ContentError)


def _merged(results: Sequence[Any], ranked: Sequence[Any], return_exceptions: bool) -> list[list[Document]]:
    """Put what was ranked in the places of the batch that wait for it.

    Raises:
        BaseException: The first error, unless errors are to be returned; always what ended the whole batch (Ctrl-C, a
            cancelled task), which LangChain would return, too.
    """
    following = iter(ranked)
    results = [next(following) if result is None else result for result in results]
    for position, result in enumerate(results):
        if isinstance(result, ContentError):  # it names the position among those inputs that were ranked together
            result.args = (re.sub(r"^(queries|documents(?=\[\d+\]\[))\[\d+\]", rf"\1[{position}]", str(result)),)
        if isinstance(result, BaseException) and not (return_exceptions and isinstance(result, Exception)):
            if any(getattr(other, "args", None) != result.args for other in results):
                result.add_note(_ABOUT.format(position))
                if isinstance(result, BackendError):
                    result.query = position
            raise result
    return results
