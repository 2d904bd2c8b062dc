"""Real vLLM servers under load: how much they do, what happens beyond that, who waits for whom."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from rich.progress import Progress

from benchmarks.load.traffic import Ask, Traffic, closed, opened
from benchmarks.machine import Watch
from benchmarks.texts import Load, Texts
from rag_rerank import VLLMScorer
from tests import vllm_server

DOCUMENTS = 10  # of a call
CALLERS = (1, 2, 4, 8, 16, 32, 64)
MOST = 2000  # calls of one measurement
DEADLINE = 2.0  # seconds of a call where more come than can be done
BACKLOG = DEADLINE / 2  # seconds of work that are let in where there is a bound
SHORT = 20  # words
LARGE = 1000  # documents of a call that others wait beside


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement, for a table.

    Attributes:
        what: Which servers, or which client.
        asked: How many callers, or how many calls a second.
        calls: Answered in a second.
        pairs: Scored in a second.
        p50, p95, p99: Seconds of the answered calls.
        under_way: Most calls at a time.
        ended: How many calls ended how.
        others: How many processors were busy with something else.
    """

    what: str
    asked: float
    calls: float
    pairs: float
    p50: float
    p95: float
    p99: float
    under_way: int
    ended: dict[str, int]
    others: float

    @classmethod
    def of(cls, what: str, asked: float, traffic: Traffic, watch: Watch, documents: int = DOCUMENTS) -> "Point":
        """What `traffic` shows; `watch` was made before it."""
        ended = {"answered": sum(each.error is None for each in traffic.outcomes), **traffic.errors}
        p50, p95, p99 = (traffic.quantile(share) for share in (0.5, 0.95, 0.99))
        return cls(
            what, asked, traffic.rate, traffic.rate * documents, p50, p95, p99, traffic.under_way, ended, watch.others()
        )


def saturation(points: Sequence[Point]) -> Point:
    """The fewest callers that get 95 % of the most."""
    most = max(point.calls for point in points)
    return next(point for point in points if point.calls >= 0.95 * most)


@contextlib.contextmanager
def on_core(number: int) -> Iterator[None]:
    """What this thread starts meanwhile runs on one core; vLLM binds its threads to those that it may use."""
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def started(folder: Path, options: Sequence[Sequence[str]], progress: Progress) -> Iterator[list[str]]:
    """Servers of a model side by side, each on a core of its own: their addresses.

    Args:
        folder: The model.
        options: More options of vLLM, for each of the servers.
        progress: Where it shows that it starts them.
    """
    task = progress.add_task(f"{len(options)} vLLM servers start, a core each", total=None)
    stacks = [contextlib.ExitStack() for _ in options]
    addresses: dict[int, str] = {}

    def start(number: int) -> None:
        with on_core(number):
            serving = vllm_server.serving(folder, *options[number], name="load", alone=True)
            addresses[number] = stacks[number].enter_context(serving).base_url

    threads = [threading.Thread(target=start, args=(number,)) for number in range(len(options))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
        if len(addresses) < len(options):
            raise RuntimeError("a server did not start: see above")
        progress.remove_task(task)
        yield [addresses[number] for number in range(len(options))]
    finally:
        for stack in stacks:
            stack.close()


def calls(count: int, documents: int = DOCUMENTS, words: int = SHORT) -> list[tuple[str, list[str]]]:
    """Questions, each with the beginnings of passages that BM25 finds, or with any where so many are not found."""
    texts = Texts("passages")
    others = cycle(texts.documents.values())
    found = islice(texts.calls(Load(1, min(documents, 100))), count)
    return [
        (
            call.queries[0],
            [
                f"{number} {' '.join(text.split()[:words])}"
                for number, text in enumerate(islice(_chained(call.documents[0], others), documents))
            ],
        )
        for call in found
    ]


def _chained(first: Sequence[str], then: Iterator[str]) -> Iterator[str]:
    yield from first
    yield from then


def asking(scorer: VLLMScorer, work: Sequence[tuple[str, list[str]]], deadline: float | None = None) -> Ask:
    """Scores the work of a number, one after the other and again from the beginning."""

    async def ask(number: int) -> None:
        query, documents = work[number % len(work)]
        await scorer.ascore(query, documents, deadline=deadline)

    return ask


def sweep(addresses: Sequence[str], seconds: float, progress: Progress) -> list[Point]:
    """One server, and all of them, by the number of callers; they take turns."""
    work, points = calls(64), []
    task = progress.add_task("", total=len(CALLERS) * 2)
    for callers in CALLERS:
        for what, urls in (("one server", addresses[:1]), ("two servers", addresses)):
            progress.update(task, description=f"{what}, {callers} callers")
            watch, traffic = Watch(), asyncio.run(_closed(urls, work, callers, seconds))
            points.append(Point.of(what, callers, traffic, watch))
            progress.advance(task)
    progress.remove_task(task)
    return points


async def _closed(urls: Sequence[str], work: Sequence[tuple[str, list[str]]], callers: int, seconds: float) -> Traffic:
    async with VLLMScorer(list(urls), timeout=120) as scorer:
        ask = asking(scorer, work)
        await asyncio.gather(*(ask(number) for number in range(min(callers, 8))))  # to warm up
        return await closed(ask, callers, seconds, MOST)


def overload(
    unbounded: str, bounded: str, capacity: float, seconds: float, factors: Sequence[float], progress: Progress
) -> list[Point]:
    """More calls than a server can answer: with a queue that has no end, and bounded by the server or by the client.

    Args:
        unbounded: A server's address.
        bounded: That of one that refuses what it can't answer soon.
        capacity: Calls that such a server answers in a second.
        seconds: Of each measurement.
        factors: How many times the capacity comes.
        progress: Where it shows what it does.
    """
    work, points = calls(64), []
    variants = (
        ("no bound", unbounded, None),
        ("server's --max-num-queued-reqs", bounded, None),
        ("client's max_waiting_calls", unbounded, max(1, round(capacity * BACKLOG))),
    )
    task = progress.add_task("", total=len(variants) * len(factors))
    for factor in factors:
        for what, url, most in variants:
            progress.update(task, description=f"{factor:g} times what a server can do, {what}")
            watch, traffic = Watch(), asyncio.run(_opened(url, work, factor * capacity, seconds, most))
            points.append(Point.of(what, factor, traffic, watch))
            progress.advance(task)
    progress.remove_task(task)
    return points


async def _opened(
    url: str, work: Sequence[tuple[str, list[str]]], rate: float, seconds: float, most: int | None
) -> Traffic:
    async with VLLMScorer(url, max_waiting_calls=most) as scorer:
        ask = asking(scorer, work, DEADLINE)
        await ask(0)
        traffic = await opened(ask, rate, seconds, warming_up=min(DEADLINE, seconds / 3))
    async with VLLMScorer(url, timeout=60) as scorer:  # what was given up must not be the next one's burden
        await asking(scorer, work)(0)
    return traffic


def fairness(url: str, seconds: float, progress: Progress) -> list[Point]:
    """Calls of 10 documents alone, and beside a call of 1,000, by how many documents its requests have."""
    small, large = calls(64), calls(1, LARGE)[0]
    variants = (
        ("alone", None),
        ("beside, chunk_size=128", 128),
        ("beside, chunk_size=32", 32),
        ("beside, one request", LARGE),
    )
    points = []
    task = progress.add_task("", total=len(variants))
    for what, chunk in variants:
        progress.update(task, description=f"calls of {DOCUMENTS} documents, {what}")
        points += asyncio.run(_fair(url, small, large, what, chunk, seconds))
        progress.advance(task)
    progress.remove_task(task)
    return points


async def _fair(
    url: str,
    small: Sequence[tuple[str, list[str]]],
    large: tuple[str, list[str]],
    what: str,
    chunk: int | None,
    seconds: float,
) -> list[Point]:
    """Four callers of few documents, for as long as one call of many takes, or `seconds` where there is none."""
    async with VLLMScorer(url, timeout=120, chunk_size=chunk or 128) as scorer:
        ask = asking(scorer, small)
        await ask(0)
        watch = Watch()
        if chunk is None:
            return [Point.of(f"{DOCUMENTS} documents, {what}", 4, await closed(ask, 4, seconds, MOST), watch)]
        beside = asyncio.create_task(closed(asking(scorer, [large]), 1, seconds, 1))
        await asyncio.sleep(0.1)
        traffic = await closed(ask, 4, 120, MOST, until=beside)
        other = await beside
    return [
        Point.of(f"{DOCUMENTS} documents, {what}", 4, traffic, watch),
        Point.of(f"1,000 documents, {what}", 1, other, watch, LARGE),
    ]
