"""One LocalScorer asked by many threads: shared as it is, and behind a lock.

A lock is what users put round a model that threads share; behind it every call has the model, and both cores, to
itself. Without it, what waits at the same time is run in common batches. Both answer the same calls, in turn.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from rich.progress import Progress

from benchmarks.load.traffic import quantile
from benchmarks.machine import Watch
from benchmarks.models import folder, tiny
from benchmarks.texts import Load, Texts
from rag_rerank import LocalScorer

Work = tuple[str, list[str]]
Score = Callable[[str, list[str]], list[float]]


@dataclass(frozen=True, slots=True)
class Shape:
    """Calls of one kind.

    Attributes:
        model: ``minilm`` or ``tiny``.
        documents: Of a call.
        words: That each document has at most; None leaves passages of about 200 tokens as they are.
        calls: In a round.
        dtype: What LocalScorer computes in.
    """

    model: str
    documents: int
    words: int | None
    calls: int = 64
    dtype: Literal["auto", "float32"] = "auto"

    @property
    def title(self) -> str:
        """For tables."""
        texts = f"{self.words} words" if self.words else "about 200 tokens"
        return f"{self.model}, {self.documents} x {texts}, {self.dtype}"


SHAPES = (
    Shape("tiny", 10, 20),
    Shape("minilm", 10, 20),
    Shape("minilm", 1, 20, calls=128),
    Shape("minilm", 1, None),
    Shape("minilm", 10, None),
    Shape("minilm", 10, 20, dtype="float32"),
)


@dataclass
class Versus:
    """Shared as it is, against behind a lock.

    Attributes:
        shape: What was asked.
        callers: Threads.
        pairs: Of a round.
        seconds: Of each round: shared, and locked.
        p50, p95: Seconds of a call, in each round.
        ratios: The lock's seconds by the shared scorer's in the same round: how many times the throughput.
        ratios_p95: The shared scorer's p95 by the lock's in the same round.
        others: How many processors were busy with something else in each round.
    """

    shape: Shape
    callers: int
    pairs: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"shared": [], "locked": []})
    p50: dict[str, list[float]] = field(default_factory=lambda: {"shared": [], "locked": []})
    p95: dict[str, list[float]] = field(default_factory=lambda: {"shared": [], "locked": []})
    others: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [lock / own for own, lock in zip(self.seconds["shared"], self.seconds["locked"], strict=True)]

    @property
    def ratios_p95(self) -> list[float]:
        return [own / lock for own, lock in zip(self.p95["shared"], self.p95["locked"], strict=True)]

    def rate(self, which: str) -> float:
        """Pairs a second, the median round's."""
        return self.pairs / statistics.median(self.seconds[which])


def work(shape: Shape) -> list[Work]:
    """The calls of a round: questions, and passages that BM25 finds for them."""
    found = islice(Texts("passages").calls(Load(1, shape.documents)), shape.calls)
    return [(call.queries[0], [" ".join(text.split()[: shape.words]) for text in call.documents[0]]) for call in found]


@contextmanager
def scorers(shape: Shape) -> Iterator[dict[str, Score]]:
    """The two ways to share one."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one already
    path = tiny() if shape.model == "tiny" else folder(shape.model)
    lock = threading.Lock()
    with LocalScorer(path, dtype=shape.dtype) as scorer:

        def locked(query: str, documents: list[str]) -> list[float]:
            with lock:
                return scorer.score(query, documents)

        yield {"shared": scorer.score, "locked": locked}


def run(score: Score, work: Sequence[Work], callers: int) -> tuple[float, list[float]]:
    """Seconds for all calls, and those of each, sorted: made by so many threads, each one after the other."""
    left, times, gate = iter(work), [], threading.Barrier(callers + 1)
    taking = threading.Lock()
    errors: list[Exception] = []

    def caller() -> None:
        gate.wait()
        while True:
            with taking:
                call = next(left, None)
            if call is None:
                return
            began = time.perf_counter()
            try:
                score(*call)
            except Exception as error:  # noqa: BLE001 - raised below, in the thread that asked
                errors.append(error)
                return
            times.append(time.perf_counter() - began)

    threads = [threading.Thread(target=caller) for _ in range(callers)]
    for thread in threads:
        thread.start()
    gate.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - began, sorted(times)


def versus(shape: Shape, callers: Sequence[int], rounds: int, progress: Progress) -> list[Versus]:
    """All numbers of callers, rounds interleaved."""
    asked = work(shape)
    results = [Versus(shape, count, sum(len(documents) for _, documents in asked)) for count in callers]
    task = progress.add_task(f"LocalScorer, {shape.title}: warming up", total=rounds * len(results) * 2)
    with scorers(shape) as ways:
        run(ways["shared"], asked, max(callers))
        run(ways["locked"], asked[:8], 1)
        for number in range(rounds):
            for result in results:
                watch = Watch()
                for which in ("shared", "locked") if number % 2 else ("locked", "shared"):
                    what = f"LocalScorer, {shape.title}: {which}, {result.callers} callers, round {number + 1}"
                    progress.update(task, description=what)
                    seconds, times = run(ways[which], asked, result.callers)
                    result.seconds[which].append(seconds)
                    result.p50[which].append(quantile(times, 0.5))
                    result.p95[which].append(quantile(times, 0.95))
                    progress.advance(task)
                result.others.append(watch.others())
    progress.remove_task(task)
    return results


@dataclass
class Beside:
    """Calls of 10 documents while one of 1,000 is under way.

    Attributes:
        which: ``alone``, ``shared`` or ``locked``.
        small: Seconds of the calls of 10, sorted.
        large: Seconds of the one of 1,000; NaN where there was none.
    """

    which: str
    small: list[float]
    large: float


def fairness(progress: Progress, callers: int = 4) -> list[Beside]:
    """Who waits for whom: four callers of 10 documents each, and a call of 1,000."""
    shape = Shape("minilm", 10, 20)
    asked, results = work(shape), []
    query, documents = asked[0][0], [text for _, texts in work(Shape("minilm", 100, 20, 10)) for text in texts]
    many = [f"{number} {text}" for number, text in enumerate(documents)]  # no two alike
    task = progress.add_task("LocalScorer, 10 documents beside 1,000", total=3)
    with scorers(shape) as ways:
        run(ways["shared"], asked, callers)
        _, times = run(ways["shared"], asked, callers)
        results.append(Beside("alone", times, float("nan")))
        progress.advance(task)
        for which in ("shared", "locked"):
            results.append(_beside(ways[which], which, asked, (query, many), callers))
            progress.advance(task)
    progress.remove_task(task)
    return results


def _beside(score: Score, which: str, asked: Sequence[Work], large: Work, callers: int) -> Beside:
    """Small calls one after the other for as long as the large one takes."""
    done, seconds, times = threading.Event(), [], []

    def caller_of_many() -> None:
        began = time.perf_counter()
        score(*large)
        seconds.append(time.perf_counter() - began)
        done.set()

    def caller(start: int) -> None:
        number = start
        while not done.is_set():
            began = time.perf_counter()
            score(*asked[number % len(asked)])
            times.append(time.perf_counter() - began)
            number += callers

    first = threading.Thread(target=caller_of_many)
    first.start()
    time.sleep(0.05)
    others = [threading.Thread(target=caller, args=(number,)) for number in range(callers)]
    for thread in others:
        thread.start()
    for thread in (first, *others):
        thread.join()
    return Beside(which, sorted(times), seconds[0])
