"""How time and memory grow with the work: 10 to 1,000,000 pairs, each row in a fresh process.

    .venv/bin/python -m benchmarks.growth                # make bench runs it; about ten minutes
    .venv/bin/python -m benchmarks.growth --most 10000   # only what is that large, in one or two
    .venv/bin/python -m benchmarks.growth --event-loop   # only how long `ascore` keeps an event loop from other work

LocalScorer with dtype="auto": the MiniLM shape with passages of about 200 tokens, in one call; and, for the largest
numbers, a tiny model with short documents, in calls of 1,000 as users would make them, and in one call of 100,000.
Passages repeat, with a number put before each so that none is like another. Linear means: every row costs the same per
pair as the row of 1,000 above it. Peak memory includes the documents and scores of one call, but not a second call's.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.models import ROOT, folder, tiny
from benchmarks.peers import CONTESTANTS
from benchmarks.process import Worker
from benchmarks.rerank import OUT, shown
from benchmarks.texts import Call, Texts
from rag_rerank import LocalScorer, Scorer

SHORT = 20  # words
REFERENCE = 1000  # pairs of the row that the others of a series are compared with
AT_LEAST = 5  # rounds of what is small


@dataclass(frozen=True, slots=True)
class Series:
    """Rows that are compared with each other.

    Attributes:
        title: The model and its documents.
        model: Its folder.
        words: Of a document; None leaves passages as they are.
        pairs: Of each row.
        of_call: Most documents in a call; None asks for all at once.
    """

    title: str
    model: Path
    words: int | None
    pairs: tuple[int, ...]
    of_call: int | None = None


@dataclass(frozen=True, slots=True)
class Grown:
    """A row.

    Attributes:
        pairs: How many were scored.
        calls: In how many calls.
        per_pair: Seconds; the median over rounds.
        drift: Seconds of the last tenth of the calls by those of the first; None of fewer than 20 calls.
        first_mb, peak_mb: Most memory after the first call, and at the end.
        others: How many processors were busy with something else.
    """

    pairs: int
    calls: int
    per_pair: float
    drift: float | None
    first_mb: float
    peak_mb: float
    others: float


def series() -> list[Series]:
    """What is measured."""
    passages, short = "MiniLM shape, about 200 tokens", f"2 layers x 64, {SHORT} words"
    return [
        Series(f"{passages}, one call", folder("minilm"), None, (10, 100, 1000, 10_000)),
        Series(f"{short}, calls of 1,000", tiny(), SHORT, (1000, 10_000, 100_000, 1_000_000), 1000),
        Series(f"{short}, one call", tiny(), SHORT, (100, 1000, 10_000, 100_000)),
        Series("DeBERTa-v2 shape, padded, calls of one", folder("deberta-v2"), None, (100, 1000), 1),
    ]


def grow(asked: Series, pairs: int, texts: Texts, progress: Progress) -> Grown:
    """One row, in a process of its own."""
    peer = next(peer for peer in CONTESTANTS if peer.name == "rag_rerank dtype=auto")
    options = peer.loaded_with(asked.model)
    worker = Worker(ROOT / peer.venv / "bin" / "python", peer.worker, options, OUT / "logs" / "growth.log", {})
    of_call = min(asked.of_call or pairs, pairs)
    documents = _documents(texts, asked.words)
    rounds = 1 if asked.of_call is not None and pairs > of_call else max(1, min(AT_LEAST, 5000 // pairs))
    count = rounds * pairs // of_call
    task = progress.add_task(f"{asked.title}: {pairs:,} pairs", total=count)
    try:
        worker.start()
        worker.ask(Call(texts.questions[:1], [[next(documents) for _ in range(min(of_call, 256))]]))  # to warm up
        answers = []
        for _ in range(count):
            answers.append(worker.ask(Call(texts.questions[:1], [[next(documents) for _ in range(of_call)]])))
            progress.advance(task)
    finally:
        worker.close()
        progress.remove_task(task)
    seconds = [float(answer["seconds"]) for answer in answers]
    tenth = count // 10
    return Grown(
        pairs=pairs,
        calls=pairs // of_call,
        per_pair=(statistics.median(seconds) if rounds > 1 else statistics.mean(seconds)) / of_call,
        drift=sum(seconds[-tenth:]) / sum(seconds[:tenth]) if tenth >= 2 else None,
        first_mb=answers[0]["peak_mb"],
        peak_mb=answers[-1]["peak_mb"],
        others=statistics.mean(answer["others"] for answer in answers),
    )


def _documents(texts: Texts, words: int | None) -> Iterator[str]:
    for number, text in enumerate(cycle(texts.documents.values())):
        yield f"{number} {text if words is None else ' '.join(text.split()[:words])}"


def table(asked: Series, rows: Sequence[Grown]) -> Table:
    """For the terminal."""
    shown_table = Table(title=f"LocalScorer dtype=auto, {asked.title}")
    columns = ("pairs", "calls", "seconds", "pairs/s", "cost per pair,\ntimes that of 1,000", "last tenth\nby first")
    for column in (*columns, "peak RSS MB:\nfirst call, end", "processors busy\nwith something else"):
        shown_table.add_column(column, justify="right")
    reference = next((row.per_pair for row in rows if row.pairs == REFERENCE), None)
    for row in rows:
        shown_table.add_row(
            f"{row.pairs:,}",
            f"{row.calls:,}",
            f"{row.per_pair * row.pairs:,.2f}",
            f"{1 / row.per_pair:,.0f}",
            "" if reference is None else f"{row.per_pair / reference:.2f}",
            "" if row.drift is None else f"{row.drift:.2f}",
            f"{row.first_mb:,.0f}, {row.peak_mb:,.0f}",
            f"{row.others:.2f}",
        )
    return shown_table


class Instant(Scorer):
    """Scores at once, so that only what is around it takes time."""

    model_name = "instant"

    def _score(self, queries: Sequence[Any], documents: Sequence[Any], *_: Any) -> list[float]:
        return [0.5] * len(documents)

    async def _ascore(self, *arguments: Any) -> list[float]:
        return self._score(*arguments)


async def standing(work: Coroutine[Any, Any, object]) -> tuple[float, float]:
    """Milliseconds for which the event loop stood at most, and the seconds that the work took."""
    began = last = time.perf_counter()
    longest, task = 0.0, asyncio.create_task(work)
    while not task.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last - 0.001), now
    await task
    return 1000 * longest, last - began


async def event_loop(texts: Texts, progress: Progress) -> Table:
    """How long an event loop stands during one call, beside one that only sleeps: other processes make it late, too."""
    shown_table = Table("scorer", "documents", "seconds", "stood at most, ms", "asleep as long, ms", title="ascore")
    documents = _documents(texts, SHORT)
    with Instant() as instant, LocalScorer(tiny()) as local:
        await asyncio.to_thread(local.warmup)
        for scorer, count in progress.track([(each, 10**power) for each in (instant, local) for power in (2, 3, 4, 5)]):
            asked = [next(documents) for _ in range(count)]
            stood, seconds = await standing(scorer.ascore(texts.questions[0], asked))
            asleep, _ = await standing(asyncio.sleep(seconds))
            shown_table.add_row(type(scorer).__name__, f"{count:,}", f"{seconds:.2f}", f"{stood:.1f}", f"{asleep:.1f}")
    return shown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=int, default=1_000_000, metavar="PAIRS", help="leave out what is larger")
    parser.add_argument("--event-loop", action="store_true", help="only how long `ascore` keeps an event loop")
    arguments = parser.parse_args()
    console, texts = Console(width=130), Texts("passages")
    with shown(console) as progress:
        console.print(asyncio.run(event_loop(texts, progress)))
        if arguments.event_loop:
            return
        for asked in series():
            sizes = [pairs for pairs in asked.pairs if pairs <= arguments.most]
            console.print(table(asked, [grow(asked, pairs, texts, progress) for pairs in sizes]))


if __name__ == "__main__":
    main()
