"""What a scorer promises, and the only place where those promises are kept.

A back end writes one private hook, `Scorer._score`. Everything around it stands here, once, for all back ends: which
inputs pair up how (1:1, 1:N, N:N), what is refused before any model loads or any request leaves, how many calls may
wait, one finite score for every pair, and what becomes of a query or document that has none.
"""

import contextlib
import math
import numbers
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self, Unpack, overload

from rag_rerank import telemetry
from rag_rerank.batch import Batch
from rag_rerank.closeable import Closeable
from rag_rerank.errors import BackendUnavailable, ConfigError, DeadlineExceeded, RerankError, short_name
from rag_rerank.forking import held_over_forks
from rag_rerank.identity import PROBES, SCORING_VERSION, Identity
from rag_rerank.inputs.content import Input
from rag_rerank.inputs.multimodal import Contents, Multimodal
from rag_rerank.inputs.preparing import MANY, is_slow, off_loop, pair_up, starting_threads, text_only
from rag_rerank.isolation import Asking, Outcome, Pairs, failure
from rag_rerank.ranking import OnBatchError, OnError, Ranked, Ranking, RankOptions

Inputs = Sequence[Input]
_starting = held_over_forks(threading.Lock())


class Scorer(Closeable, ABC):
    """Scores how relevant documents are to queries.

    To add a back end, subclass, set `model_name`, and write `_score`. Override `_ascore` where waiting can be done
    without a thread, `_facts` where settings change scores, and `_close` where something must be given back.

    Attributes:
        accepts_images: Whether queries and documents may be more than text; also True where that is not known before
            the model is loaded or the server asked. The back end then gets `Multimodal` for these.
        accepts_instruction: Whether a call may bring an `instruction`; `_score` then takes one.
        listwise: Whether the documents of a query are scored together, so that they are never split over calls; also
            True where that is not known before the first call.
        remote: Whether another machine does the work, so that waiting for it needs no processor here.
        calibrated: Whether scores are probabilities of relevance, as `Calibrated` gives them.
    """

    accepts_images: bool = False
    accepts_instruction: bool = False
    listwise: bool = False
    remote: bool = False
    calibrated: bool = False

    _closed = False
    _queues = False  # whether calls wait here for others' work, and note when their own begins
    _default_deadline: float | None = None  # seconds for a call that names no deadline
    _max_waiting_calls: int | None = None  # how many may be unfinished at a time; None for any number
    _facts_suffice = False  # to tell two scorers apart, so that `identity` scores no probes
    _locates_failures = False  # whether errors say for themselves which documents they concern
    _process = 0  # the process that `_start` was called in
    _unfinished: set[telemetry.Call]  # a set, for adding and discarding need no lock, which a fork might leave locked
    _call_time: float | None = None  # seconds that calls take at present

    @property
    @abstractmethod
    def model_name(self) -> str:
        """What answers, for traces and errors; ``"unknown"`` while a server has not been asked yet."""

    @property
    def load(self) -> telemetry.Load:
        """How many calls wait and how many run in this process at the moment."""
        calls = list(self._unfinished) if self._process == os.getpid() else []
        running = sum(call.started is not None for call in calls)
        return telemetry.Load(len(calls) - running, running, self._max_waiting_calls)

    @abstractmethod
    def _score(
        self, queries: Contents, documents: Contents, until: float | None, instruction: str | None = None
    ) -> Sequence[Outcome]:
        """Score the pairs; called with checked input only.

        Args:
            queries: One query for all documents, or one per document; texts, and `Multimodal` if `accepts_images`.
            documents: At least one document.
            until: When the call must be over, on the clock of `time.monotonic`; None for no limit.
            instruction: The call's own; passed only where there is one, and only if `accepts_instruction`.

        Returns:
            One score per document, in order; or the error of one that the back end knows to be to blame. The base class
            checks number and finiteness.
        """

    async def _ascore(
        self, queries: Contents, documents: Contents, until: float | None, instruction: str | None = None
    ) -> Sequence[Outcome]:
        """Score the pairs for a caller in an event loop. By default it runs `_score` in a worker thread."""
        own = {} if instruction is None else {"instruction": instruction}
        return await off_loop(True, self._score, queries, documents, until, **own)

    def _start(self) -> None:
        """Begin in this process, before its first call: in a forked child, threads and connections are gone."""

    def _close(self) -> None:
        """Give back what the scorer holds; called once."""

    async def _aclose(self) -> None:
        """Give back what the scorer holds, from an event loop. By default it runs `_close` in a worker thread."""
        await off_loop(True, self._close)

    def _facts(self, until: float | None) -> dict[str, str]:
        """Say what, beside the class and the model's name, can change a score; nothing secret.

        Args:
            until: When a server must have answered.
        """
        return {}

    def identity(self, *, deadline: float | None = None) -> Identity:
        """Say who this scorer is: all that can change a score. May load the model or ask the server.

        Args:
            deadline: As in `score`.

        Returns:
            Facts as text, and the scores of a few pairs where facts alone do not tell two scorers apart. What resumes
            a run or caches scores compares it. An instruction that a call brings is not in it.

        Raises:
            ConfigError, BackendError: As `score`.
        """
        until = self._begin(deadline, None)
        probes: list[float] = []
        if not self._facts_suffice:
            queries, documents = zip(*PROBES, strict=True)
            probes = self.score(queries, documents, deadline=math.inf if until is None else until - time.monotonic())
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        common = {"scorer": name, "model": self.model_name, "scoring": SCORING_VERSION}
        return Identity(common | self._facts(until), probes, name=short_name(self.model_name))

    def score(
        self,
        queries: Input | Inputs,
        documents: Input | Inputs,
        *,
        instruction: str | None = None,
        deadline: float | None = None,
    ) -> list[float]:
        """Score documents against queries, paired as in vLLM's score API.

        Args:
            queries: One query, or as many as there are documents.
            documents: One document or many: 1:1, 1:N (one query for all) or N:N (like `zip`). Lone surrogates,
                which no tokenizer or JSON reader accepts, are read as U+FFFD; text that spells a special token, such
                as ``<|im_end|>``, is read with a space in it, so that it is not one. For models that see, each may be
                an `Image`, `Video` or `Content` instead of text; images are read and checked before anything is sent.
            instruction: The task, in place of the scorer's own, for a model whose template has a place for it.
            deadline: Seconds from now that the whole call may take. None: the back end's own default.

        Returns:
            One finite float per pair, in the order of the documents; ``[]`` for no documents, with no model loaded
            and no request sent.

        Raises:
            TypeError: Something is not text nor an image; the message names the position.
            ValueError: The numbers of queries and documents do not go together.
            ContentError: An image can't be read, or is more than the model reads.
            ConfigError: The scorer can't work as configured, or has no place for an instruction.
            BackendError: No scores; the subclass says why. Where only some documents have none, its `indices` names
                them and its `scores` has the others'.
        """
        until = self._begin(deadline, instruction)
        pairs = pair_up(queries, documents, until)
        return _scores(self._outcomes(pairs, until, Ranking(instruction=instruction)))

    async def ascore(
        self,
        queries: Input | Inputs,
        documents: Input | Inputs,
        *,
        instruction: str | None = None,
        deadline: float | None = None,
    ) -> list[float]:
        """Score without blocking the event loop, see `score`; cancelling the task abandons the call."""
        until = self._begin(deadline, instruction)
        pairs = await off_loop(is_slow(queries) or is_slow(documents), pair_up, queries, documents, until)
        outcomes = await self._aoutcomes(pairs, until, Ranking(instruction=instruction))
        return await off_loop(len(outcomes) > MANY, _scores, outcomes)

    def rerank(
        self,
        query: Input,
        documents: Inputs,
        *,
        top_n: int | None = None,
        score_threshold: float | None = None,
        min_precision: float | None = None,
        min_n: int = 0,
        instruction: str | None = None,
        on_error: OnError = "raise",
        deadline: float | None = None,
    ) -> list[Ranked]:
        """Order documents by relevance to a query, best first.

        Args:
            query: The query.
            documents: The documents, in retrieval order.
            top_n: How many to keep, at least 1. None keeps all.
            score_threshold: Keep only scores at or above it; applied before `top_n`, so the result may be empty.
            min_precision: Keep as many as together have a mean score of at least this. Where scores are probabilities
                (`Calibrated`), that is the share of relevant documents to be expected among what is kept.
            min_n: Keep at least so many, whatever `score_threshold` and `min_precision` say.
            instruction: As in `score`.
            on_error: ``"raise"``; or ``"passthrough"``, which turns a `BackendError` into one logged warning and the
                first `top_n` documents in retrieval order with score None. Where only some documents have no score,
                the others are ranked and those follow with score None.
            deadline: As in `score`.

        Returns:
            Positions with scores. Equal scores stay in retrieval order.

        Raises:
            TypeError, ValueError, ConfigError, BackendError: As `score`; a wrong argument is never passed through.
        """
        ranking = Ranking(top_n, score_threshold, min_precision, min_n, instruction, deadline, on_error)
        ranked: list[Ranked] = self._run(Batch([query], [documents], ranking, alone=True))[0]
        return ranked

    async def arerank(
        self, query: Input, documents: Inputs, *, on_error: OnError = "raise", **options: Unpack[RankOptions]
    ) -> list[Ranked]:
        """Rerank without blocking the event loop; see `rerank`."""
        batch = Batch([query], [documents], Ranking(on_error=on_error, **options), alone=True)
        ranked: list[Ranked] = (await self._arun(batch))[0]
        return ranked

    @overload
    def rerank_batch(
        self, queries: Inputs, documents: Sequence[Inputs], **options: Unpack[RankOptions]
    ) -> list[list[Ranked]]: ...

    @overload
    def rerank_batch(
        self, queries: Inputs, documents: Sequence[Inputs], *, on_error: OnBatchError, **options: Unpack[RankOptions]
    ) -> list[list[Ranked] | RerankError]: ...

    def rerank_batch(self, queries: Any, documents: Any, *, on_error: OnBatchError = "raise", **options: Any) -> Any:
        """Order the documents of several queries, in as few calls to the back end as are good for it.

        A failure concerns the query whose fault it is: the others are ranked as if that one were not there.

        Args:
            queries: The queries.
            documents: For each query its own documents, in retrieval order.
            on_error: ``"raise"`` raises the first failure, and names its query. ``"passthrough"``, as in `rerank`,
                ranks what has scores and logs one warning. ``"return"`` puts the error of a query, a `BackendError` or
                `ContentError`, in the place of its ranking.
            **options: As in `rerank`, for each query: `top_n`, `score_threshold`, `min_precision`, `min_n`,
                `instruction`. The `deadline` is for all of them; without one, each call to the back end, of about
                1,024 documents, has the back end's own default.

        Returns:
            For each query what `rerank` returns, or under ``"return"`` its error.

        Raises:
            TypeError, ValueError, ConfigError, BackendError: As `rerank`. A wrong argument is never passed through nor
                returned.
        """
        return self._run(Batch(queries, documents, Ranking(on_error=on_error, may_return=True, **options)))

    @overload
    async def arerank_batch(
        self, queries: Inputs, documents: Sequence[Inputs], **options: Unpack[RankOptions]
    ) -> list[list[Ranked]]: ...

    @overload
    async def arerank_batch(
        self, queries: Inputs, documents: Sequence[Inputs], *, on_error: OnBatchError, **options: Unpack[RankOptions]
    ) -> list[list[Ranked] | RerankError]: ...

    async def arerank_batch(
        self, queries: Any, documents: Any, *, on_error: OnBatchError = "raise", **options: Any
    ) -> Any:
        """Rerank several queries without blocking the event loop; see `rerank_batch`."""
        ranking = Ranking(on_error=on_error, may_return=True, **options)
        return await self._arun(await off_loop(is_slow(queries), Batch, queries, documents, ranking))

    def _run(self, batch: Batch) -> list[Any]:
        until = self._begin_batch(batch.ranking)
        batch.prepare(until)
        for pairs in batch.calls(lambda: self.listwise):
            until = self._begin_batch(batch.ranking) if batch.ranking.deadline is None else until
            batch.take(self._outcomes(pairs, until, batch.ranking))
        return batch.results()

    async def _arun(self, batch: Batch) -> list[Any]:
        until = self._begin_batch(batch.ranking)
        await off_loop(batch.is_slow, batch.prepare, until)
        for pairs in batch.calls(lambda: self.listwise):
            until = self._begin_batch(batch.ranking) if batch.ranking.deadline is None else until
            outcomes = await self._aoutcomes(pairs, until, batch.ranking)
            await off_loop(len(outcomes) > MANY, batch.take, outcomes)
        return await off_loop(batch.is_slow, batch.results)

    def _begin_batch(self, ranking: Ranking) -> float | None:
        until = self._begin(ranking.deadline, ranking.instruction)
        if ranking.min_precision is not None and not self.calibrated:
            raise ConfigError(
                f"min_precision needs probabilities, and the scores of {type(self).__name__} are none: run rag-rerank "
                "calibrate, and use Calibrated(scorer, file)"
            )
        return until

    def _outcomes(self, pairs: Pairs, until: float | None, ranking: Ranking) -> list[Outcome]:
        options = {} if ranking.instruction is None else {"instruction": ranking.instruction}
        with self._call(pairs, until, ranking.top_n) as asking:
            while asking.pairs is not None:
                try:
                    self._check_images(asking.pairs)
                    asking.take(self._score(*asking.pairs, until, **options))
                except Exception as error:  # noqa: BLE001 - raised there, unless it is of a query or of a probe
                    asking.fail(error)
        return asking.outcomes

    async def _aoutcomes(self, pairs: Pairs, until: float | None, ranking: Ranking) -> list[Outcome]:
        options = {} if ranking.instruction is None else {"instruction": ranking.instruction}
        many = len(pairs[1]) > MANY
        with self._call(pairs, until, ranking.top_n) as asking:
            while asking.pairs is not None:
                try:
                    await off_loop(many, self._check_images, asking.pairs)
                    scores = await self._ascore(*asking.pairs, until, **options)
                    await off_loop(many, asking.take, scores)
                except Exception as error:  # noqa: BLE001 - raised there, unless it is of a query or of a probe
                    asking.fail(error)
        return asking.outcomes

    @contextlib.contextmanager
    def _call(self, pairs: Pairs, until: float | None, top_n: int | None) -> Iterator[Asking]:
        """Begin a call, unless its time is up or too many wait; it counts as unfinished meanwhile."""
        asking = Asking(*pairs, scorer=self, located=self._locates_failures)
        call, most = telemetry.Call(), self._max_waiting_calls
        if not self._queues:
            call.start()
        refusal: RerankError | None = None
        if until is not None and time.monotonic() >= until:
            # Callers pass on what is left of their own budget: nothing left is a time-out, not a wrong argument.
            refusal = DeadlineExceeded("the deadline had passed before the call began", elapsed=0.0)
        elif most is not None and len(self._unfinished) >= most:
            refusal = self._overloaded(most)
        if refusal is not None and pairs[1]:
            asking.take(refusal)
        self._unfinished.add(call)
        telemetry.current.set(call)
        facts = {"queries": len(pairs[0]), "documents": len(pairs[1]), "top_n": top_n}
        try:
            with telemetry.observed(self, call, lambda: failure(asking.outcomes), **facts):
                yield asking
        finally:
            self._unfinished.discard(call)
        if refusal is None and pairs[1]:
            took = sum(call.times())
            self._call_time = took if self._call_time is None else 0.8 * self._call_time + 0.2 * took

    def _overloaded(self, most: int) -> BackendUnavailable:
        message = f"{short_name(self.model_name)} has {most} calls waiting already"
        remedy = "Try again later, make fewer calls at a time, or set max_waiting_calls."
        error = BackendUnavailable(message, attempts=0, remedy=remedy)
        oldest = min(call.began for call in list(self._unfinished))
        error.retry_after = max(0.1, self._call_time or time.monotonic() - oldest)
        return error

    def _check_images(self, pairs: Pairs) -> None:
        if not self.accepts_images and any(isinstance(each, Multimodal) for side in pairs for each in side):
            raise text_only(short_name(self.model_name), *pairs)

    def _begin(self, deadline: float | None, instruction: str | None) -> float | None:
        """Refuse what no call can do, start, and turn seconds from now into a moment on the monotonic clock."""
        if self._closed:
            raise RerankError(f"This {type(self).__name__} is closed. Create a new one to go on scoring.")
        if self._process != os.getpid():
            with _starting:
                if self._process != os.getpid():
                    self._unfinished = set()
                    with starting_threads():
                        self._start()
                    self._process = os.getpid()
        if instruction is not None and not isinstance(instruction, str):
            raise TypeError(f"instruction must be str or None, got {type(instruction).__name__}")
        if instruction is not None and not self.accepts_instruction:
            name = short_name(self.model_name)
            why = "has no place for an instruction: its scores don't depend on one"
            if self.calibrated:
                why = "was calibrated with its own instruction, not with one of a call: calibrate it with this one"
            raise ConfigError(f"{name} {why}")
        if deadline is None:
            deadline = self._default_deadline
        if deadline is None:
            return None
        if isinstance(deadline, bool) or not isinstance(deadline, numbers.Real):
            raise TypeError(f"deadline must be a number of seconds or None, got {type(deadline).__name__}")
        if math.isnan(deadline):
            raise ValueError("deadline must be a number of seconds, got nan")
        return None if deadline == math.inf else time.monotonic() + max(float(deadline), 0.0)

    def close(self) -> None:
        """Give back the model or the connections. Closing twice is harmless; scoring afterwards is an error."""
        if not self._closed:
            self._closed = True
            self._close()

    async def aclose(self) -> None:
        """Close from an event loop; see `close`."""
        if not self._closed:
            self._closed = True
            await self._aclose()

    # A scorer is a service, not a value: a copy that loaded the model again would be a surprise, deep or not. Pickles
    # are for other processes and do make a new one.
    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        of_process = ("_process", "_unfinished", "_call_time")
        return {name: value for name, value in vars(self).items() if name not in of_process}


def _scores(outcomes: list[Outcome]) -> list[float]:
    error = failure(outcomes)
    if error is not None:
        raise error
    return [outcome for outcome in outcomes if isinstance(outcome, float)]
