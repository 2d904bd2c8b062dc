"""How time and memory grow with the work: 10 to 1,000,000 pairs, each row in a fresh process.

    .venv/bin/python -m benchmarks.growth                # make bench runs it; about ten minutes
    .venv/bin/python -m benchmarks.growth --most 10000   # only what is that large, in one or two
    .venv/bin/python -m benchmarks.growth --event-loop   # only how long `ascore` keeps an event loop from other work
    .venv/bin/python -m benchmarks.growth --fine         # every number from 1 to 1,024, and 5,000 calls on every path

LocalScorer with dtype="auto": the MiniLM shape with passages of about 200 tokens, in one call; and, for the largest
numbers, a tiny model with short documents, in calls of 1,000 as users would make them, and in one call of 100,000.
Passages repeat, with a number put before each so that none is like another. Linear means: every row costs the same per
pair as the row of 1,000 above it. Peak memory includes the documents and scores of one call, but not a second call's.

`--fine` looks for steps: MiniLM's shape in float32 with documents of 6 words, each number of documents in random order.
The smooth curve that times are compared with is a cost of the call and one of each document. And it looks for growth:
5,000 calls of 1 to 8 documents of any length to a tiny model of each path.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
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
FINE, SHORTEST = 1024, 6  # documents in a call at most; words
CALLS = 5000
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


def steps(texts: Texts, progress: Progress, rounds: int) -> Table:
    """How far the cost of each number of documents is from a smooth curve: the best of some rounds."""
    documents = _documents(texts, SHORTEST)
    numbers = np.random.default_rng(0).permuted(np.tile(np.arange(1, FINE + 1), (rounds, 1)), axis=1).ravel().tolist()
    best = np.full((2, FINE + 1), np.inf)
    with LocalScorer(folder("minilm"), dtype="float32") as scorer:
        scorer.score(texts.questions[0], [next(documents) for _ in range(256)])
        for number in progress.track(numbers, description="1 to 1,024 documents"):
            asked = [next(documents) for _ in range(number)]
            began = time.perf_counter(), time.process_time()
            scorer.score(texts.questions[0], asked)
            taken = time.perf_counter() - began[0], time.process_time() - began[1]
            best[:, number] = np.minimum(best[:, number], taken)
    shown_table = Table("time", "of a call, ms", "of a document, ms", "furthest above", "below", "outside 25 %")
    numbers_of = np.arange(1, FINE + 1)
    for name, seconds in zip(("wall", "processor"), best[:, 1:], strict=True):
        # Least squares of relative errors, so that few documents count as much as many.
        columns = np.stack([np.ones(FINE), numbers_of], axis=1) / seconds[:, None]
        (of_call, of_document), *_ = np.linalg.lstsq(columns, np.ones(FINE), rcond=None)
        off = seconds / (of_call + of_document * numbers_of) - 1
        outside = [int(number) for number in numbers_of[abs(off) > 0.25]]
        shown_table.add_row(
            name,
            f"{1000 * of_call:.2f}",
            f"{1000 * of_document:.3f}",
            f"{off.max():+.0%} at {numbers_of[off.argmax()]}",
            f"{off.min():+.0%} at {numbers_of[off.argmin()]}",
            f"{len(outside)}: {', '.join(map(str, outside[:8]))}".removesuffix(": "),
        )
    return shown_table


def resident_mb() -> float:
    """Memory resident now."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def memory(texts: Texts, progress: Progress) -> Table:
    """Whether calls of random lengths leave something behind, on each path."""
    from tests.encoder_models import make_bi_encoder, make_colbert, make_random_cross_encoder

    words, draw = " ".join(texts.documents.values()).split(), np.random.default_rng(0)
    shown_table = Table("model", "path", "MB after 500 calls", f"after {CALLS:,}")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        models = {kind: make_random_cross_encoder(root / kind, kind) for kind in ("bert", "deberta-v2")}
        models |= {"bi-encoder": make_bi_encoder(root / "bi", "mean"), "ColBERT": make_colbert(root / "colbert")}
        # What is not verified runs in equal lengths, unless tests cover it.
        for name, verify in [*((name, True) for name in models), ("deberta-v2", False)]:
            with LocalScorer(models[name], dtype="float32", verify=verify) as scorer:
                for number in progress.track(range(CALLS), description=name):
                    starts = draw.integers(len(words) - 200, size=draw.integers(1, 9))
                    found = [" ".join(words[at : at + draw.integers(1, 200)]) for at in starts]
                    scorer.score(texts.questions[number % len(texts.questions)], found)
                    if number == 499:
                        early = resident_mb()
                shown_table.add_row(name, scorer.proof().path, f"{early:,.0f}", f"{resident_mb():,.0f}")
    return shown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=int, default=1_000_000, metavar="PAIRS", help="leave out what is larger")
    parser.add_argument("--event-loop", action="store_true", help="only how long `ascore` keeps an event loop")
    parser.add_argument(
        "--fine", type=int, nargs="?", const=2, metavar="ROUNDS", help="only steps and growth; 2 rounds"
    )
    arguments = parser.parse_args()
    console, texts = Console(width=130), Texts("passages")
    with shown(console) as progress:
        if arguments.fine:
            console.print(steps(texts, progress, arguments.fine))
            console.print(memory(texts, progress))
            return
        console.print(asyncio.run(event_loop(texts, progress)))
        if arguments.event_loop:
            return
        for asked in series():
            sizes = [pairs for pairs in asked.pairs if pairs <= arguments.most]
            console.print(table(asked, [grow(asked, pairs, texts, progress) for pairs in sizes]))


if __name__ == "__main__":
    main()
