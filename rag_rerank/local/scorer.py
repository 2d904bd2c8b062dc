"""LocalScorer: settings, checked early, in microseconds; what needs torch is imported with the first call."""

import asyncio
import atexit
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_rerank.errors import ContentError, DeadlineExceeded, short_name
from rag_rerank.families import is_listwise
from rag_rerank.inputs.multimodal import Link, Prepared
from rag_rerank.inputs.preparing import MANY, off_loop
from rag_rerank.local.engine.engine import Engine
from rag_rerank.local.models.model import Model, Side
from rag_rerank.local.settings import Dtype, LateInteractionRule, LongDocuments, ScoreType, Settings
from rag_rerank.scorer import Scorer

if TYPE_CHECKING:
    from rag_rerank.local.checkpoint.declaration import Declaration
    from rag_rerank.local.transformer.proof import Proof

DEFAULT_MODEL = "cross-encoder/ms-marco-MiniLM-L6-v2"

_engines: "weakref.WeakSet[Engine]" = weakref.WeakSet()
_threads: "weakref.WeakSet[threading.Thread]" = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    """Wait for all engines' threads to end: none must run on into the interpreter's shutdown."""
    for engine in list(_engines):
        engine.stop()
    for thread in list(_threads):
        thread.join()


class LocalScorer(Scorer):
    """Runs a reranker in this process.

    The model is loaded by the first call, in one thread of its own that also does all scoring: callers in any number of
    threads and event loops share it, and what waits at the same time is scored in common batches. Copies share it, too;
    a forked child and an unpickled copy load their own. Models are loaded one after the other, for transformers sets
    torch's default dtype meanwhile, in all threads of the process: if you make tensors of your own, `warmup()` first.

    Args:
        model: A hub id or a folder. A ``*ForSequenceClassification`` checkpoint with one label is a cross-encoder, and
            so is a ``*ForCausalLM`` that answers with a known word; a sentence-transformers folder (``modules.json``)
            is a bi-encoder, scored by cosine; ColBERT is late interaction, scored by MaxSim; jina-reranker-v3 reads all
            documents of a query together (`listwise`).
        device: ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"cpu"``, ... None takes the first there is, in this order.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: the fastest that the device runs natively
            (bfloat16 on recent GPUs and on CPUs with AMX or AMD's AVX512_BF16, float16 on older GPUs, else float32).
        score_type: ``"cross-encoder"``, ``"bi-encoder"``, ``"late-interaction"``; ``"auto"`` reads it from the
            checkpoint.
        template: The score template: a shipped name, a path or the text (see `Template.load`). ``"auto"`` takes the one
            that the model was trained with, if the model's name or the checkpoint tells; a decoder (Qwen, Gemma, Llama)
            with no known template is refused rather than scored wrongly. None: query and document as a plain pair.
        instruction: The task, for a template with a place for it; None leaves it to the template.
        chat_template_kwargs: More variables for the template.
        classifier_tokens: For a ``*ForCausalLM`` that is not known: ``(true,)``, whose logit is the score, or
            ``(false, true)``, scored by the difference, as with vLLM's ``classifier_from_token``.
        query_prompt, document_prompt: Text to put before each query or document: embedding models such as E5 and
            Qwen3-Embedding were trained with one. None: what the checkpoint declares; vLLM adds none by itself.
        use_activation: None or True applies the checkpoint's own activation, as vLLM does (sigmoid unless its config
            names another); False gives logits. Without effect on a bi-encoder; for late interaction, False leaves
            token vectors at their own length.
        max_length: Longest input in tokens, special tokens included. None: what the model was made for. Longer pairs
            are cut as vLLM cuts them under ``truncate_prompt_tokens=-1``: from the longer of query and document; but
            with a template only from the document's text, for vLLM's cut would take the end of the prompt. An image
            is never cut: one that leaves no room is a `ContentError` that says what `max_pixels` would.
        max_tokens_per_query, max_tokens_per_doc: Cut each query or document at so many tokens first, as vLLM does.
        long_documents: What becomes of a document longer than the model's window: ``"truncate"`` reads its beginning,
            as vLLM does; ``"max-passage"`` reads all of it, in passages that overlap by half, and gives it the score of
            the best (MaxP, Dai and Callan 2019, https://arxiv.org/abs/1905.09217). Twice the work for its length.
            A document with images is one passage.
        late_interaction: ``"declared"`` compares the tokens of queries and documents as a ColBERT's authors do: with
            the prefixes, the filling up with ``[MASK]``, the lengths and the punctuation left out that the checkpoint
            declares. ``"vllm"`` goes by none of that, as vLLM does. Without effect on other models.
        verify: Whether the way that the model is run is compared with plain transformers when it is loaded, on a short
            and a long text; see `proof`. A model that scores a pair beside others otherwise than alone is run in
            batches of equal length, or is a `ConfigError`. False takes the way that this package's tests cover for the
            architecture; others are run in batches of equal length, unproven.
        max_waiting_calls: How many calls may be unfinished at a time; one more is refused at once.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether code from the checkpoint may run. Only ever on by this argument.
        local_files_only: Never ask the hub.
        cache_dir: Where hub files are kept; None for the usual place.
        model_kwargs, tokenizer_kwargs: Passed on to ``from_pretrained``. An access token is refused here, for settings
            are shown, stored and pickled: set the environment variable ``HF_TOKEN``.

    Raises:
        ConfigError: At construction, an argument out of range or the extra `local` not installed; at the first call, a
            model that can't be loaded as asked. Only safetensors weights are read.

    A call without `deadline` waits as long as the model needs.

    Images (extra `images`; not torchvision) are scaled as the checkpoint says, with the numbers that a vLLM server
    gets, and stand before the text of their query or document, whatever their order. Nothing is fetched: `Image` with
    an address, `Video`, an image for a model that reads text only, and one together with a `query_prompt` or
    `document_prompt` are each a `ContentError` that names the position.
    """

    accepts_instruction = True
    _facts_suffice = True
    _queues = True
    _engine: Engine  # of this process; there from the first call on

    def __init__(
        self,
        model: str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        device: str | None = None,
        dtype: Dtype = "auto",
        score_type: ScoreType = "auto",
        template: str | os.PathLike[str] | None = "auto",
        instruction: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        classifier_tokens: Sequence[str] | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        use_activation: bool | None = None,
        max_length: int | None = None,
        max_tokens_per_query: int | None = None,
        max_tokens_per_doc: int | None = None,
        long_documents: LongDocuments = "truncate",
        late_interaction: LateInteractionRule = "declared",
        verify: bool = True,
        max_waiting_calls: int = 1024,
        revision: str | None = None,
        trust_remote_code: bool = False,
        local_files_only: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        given = dict(locals())
        del given["self"]
        self._settings = Settings(**given)
        self._max_waiting_calls = self._settings.max_waiting_calls

    def _start(self) -> None:
        settings = self._settings  # not self: the thread must not keep the scorer alive
        self._engine = Engine(lambda: _load(settings), name=settings.model)
        weakref.finalize(self, self._engine.stop)  # of a scorer that nobody closed
        _engines.add(self._engine)
        _threads.add(self._engine.thread)

    @property
    def model_name(self) -> str:
        """The hub id, or the whole path of the folder."""
        return self._settings.model

    @property
    def accepts_images(self) -> bool:  # type: ignore[override]  # of a class that is asked, not told
        """Whether the model reads images; True until it is loaded."""
        model = self._engine.model if self._process else None
        return model is None or model.text_only is None

    @property
    def listwise(self) -> bool:  # type: ignore[override]  # of a class that is asked, not told
        """Whether the documents of a query are scored together; until it is loaded, by its config.json or name."""
        model = self._engine.model if self._process else None
        return is_listwise(self.model_name) if model is None else model.listwise

    def warmup(self) -> None:
        """Load the model and score a pair now, so that the first call doesn't pay for it.

        Raises:
            ConfigError: It can't be loaded as asked.
        """
        self._begin(None, None)
        self._wait(self._engine.submit(["warm"], ["up"]), None)

    def declaration(self) -> "Declaration":
        """Tell what the checkpoint's files declare about how it scores; loads the model first.

        Raises:
            ConfigError: It can't be loaded as asked.
        """
        self._begin(None, None)
        return self._loaded(None).declaration

    def proof(self) -> "Proof":
        """Tell how the model is run, and how far that is from plain transformers; loads it first.

        Raises:
            ConfigError: It can't be loaded as asked.
        """
        self._begin(None, None)
        return self._loaded(None).proof

    def _score(
        self,
        queries: Sequence[Prepared],
        documents: Sequence[Prepared],
        until: float | None,
        instruction: str | None = None,
    ) -> list[float]:
        inputs = self._prompted(queries, documents)
        return self._wait(self._engine.submit(*inputs, instruction), until)

    async def _ascore(
        self,
        queries: Sequence[Prepared],
        documents: Sequence[Prepared],
        until: float | None,
        instruction: str | None = None,
    ) -> list[float]:
        began = time.monotonic()
        inputs = await off_loop(len(documents) > MANY, self._prompted, queries, documents)
        work = asyncio.wrap_future(self._engine.submit(*inputs, instruction))
        try:
            async with asyncio.timeout(None if until is None else until - time.monotonic()):
                return await work  # cancelling the task cancels the work
        except TimeoutError as error:
            raise self._too_late(error, began) from None

    def _prompted(
        self, queries: Sequence[Prepared], documents: Sequence[Prepared]
    ) -> tuple[Sequence[Prepared], Sequence[Prepared]]:
        return (
            _prompted(queries, "queries", "query_prompt", self._settings.query_prompt),
            _prompted(documents, "documents", "document_prompt", self._settings.document_prompt),
        )

    def _wait(self, work: "Future[list[float]]", until: float | None) -> list[float]:
        began = time.monotonic()
        try:
            return work.result(None if until is None else max(0.0, until - began))
        except TimeoutError as error:
            raise self._too_late(error, began) from None
        finally:
            work.cancel()  # no effect on finished work; what nobody waits for any more is not scored

    def _too_late(self, error: TimeoutError, began: float) -> TimeoutError:
        if isinstance(error, DeadlineExceeded):
            return error
        message = f"{short_name(self.model_name)} was still scoring when the deadline passed"
        remedy = "Allow more time, pass fewer documents, or call warmup() first: loading counts."
        return DeadlineExceeded(message, elapsed=time.monotonic() - began, remedy=remedy)

    def _loaded(self, until: float | None) -> Model:
        while (model := self._engine.model) is None:
            self._wait(self._engine.submit([], []), until)
        return model

    def _facts(self, until: float | None) -> dict[str, str]:
        model = self._loaded(until)
        name = "a folder" if Path(self.model_name).is_dir() else self.model_name  # wherever it lies
        return {"model": name, **model.facts}

    def _close(self) -> None:
        if self._process == os.getpid():
            self._engine.close()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_engine"}

    def __repr__(self) -> str:
        return f"LocalScorer({self.model_name!r})"


def _load(settings: Settings) -> Model:
    from rag_rerank.local.loading import load, one_at_a_time  # noqa: PLC0415 - imports torch, transformers (2-3 s)

    with one_at_a_time:
        return load(settings)


def _prompted(inputs: Sequence[Prepared], side: Side, name: str, prompt: str | None) -> Sequence[Prepared]:
    """Put the prompt before each; ContentError for what only a server can read."""
    for position, each in enumerate(inputs):
        if isinstance(each, str):
            continue
        kinds = {part.kind for part in each.parts if isinstance(part, Link)}
        if "video_url" in kinds:
            raise ContentError(f"{side}[{position}] holds a video, but LocalScorer reads none")
        if kinds:
            raise ContentError(f"{side}[{position}] holds an address, but LocalScorer fetches nothing; pass the file")
        if prompt:
            raise ContentError(f"{side}[{position}] holds an image, which can't follow a {name}: images come first")
    return [prompt + each if prompt and isinstance(each, str) else each for each in inputs]
