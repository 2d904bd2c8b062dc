"""This package beside what users would pick instead: on the same weights, the same texts, in the same minutes.

    make bench                                          # everything
    .venv/bin/python -m benchmarks.rerank --model minilm --load 1x100 --rounds 10 --contestants 'rag_rerank|OpenVINO'

Every contestant lives in a process of its own and is loaded once. Every round asks all of them the same, in rotating
order; what counts is the ratio to the reference within a round, for machines are noisy. The reference is what users
have today: sentence-transformers' CrossEncoder in float32, for Qwen3 the loop of its model card. Scores must be
the same; only those of `released` mean something, for the weights of the others are random (see `models`). What could
not be installed, loaded or asked is in the table, with the reason.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import report
from benchmarks.models import ROOT, SHAPES, folder
from benchmarks.peers import CONTESTANTS, REFERENCES, NotThere, Peer
from benchmarks.process import Worker, WorkerError
from benchmarks.report import Result, Row
from benchmarks.roofline import Counter
from benchmarks.texts import LOADS, LONGEST, Call, Load, Texts

GAP = 0.8  # seconds between contestants: vLLM's OpenMP threads spin on for 0.2 s and would slow whoever comes next
OUT = ROOT / ".benchmarks"


class Field:
    """The contestants of one shape, alive from first to last load.

    Args:
        shape: Its name.
        wanted: Which contestants, by name; the reference always takes part.
        progress: Where it shows what it does.
    """

    def __init__(self, shape: str, wanted: re.Pattern[str], progress: Progress) -> None:
        kind = SHAPES[shape].kind
        self.shape, self.reference = shape, REFERENCES[kind]
        self.model = folder(shape)
        self._progress = progress
        self._peers = [
            peer
            for peer in CONTESTANTS
            if peer.kind == kind and (peer.name == self.reference or wanted.search(peer.name))
        ]
        self._workers: dict[str, Worker] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._errors: dict[str, str] = {}

    def __enter__(self) -> "Field":
        try:
            task = self._progress.add_task("", total=len(self._peers))
            for peer in self._peers:
                self._progress.update(task, description=f"{self.shape}: loading {peer.name}")
                self._load(peer)
                self._progress.advance(task)
            self._progress.remove_task(task)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def _load(self, peer: Peer) -> None:
        if (reason := peer.why_not()) is not None:
            self._errors[peer.name] = reason
            return
        try:
            options = peer.loaded_with(self.model)
            log = OUT / "logs" / f"{self.shape}, {peer.name}.log"
            worker = Worker(peer.python, peer.worker, options, log, dict(peer.environment))
            self._workers[peer.name] = worker
            time.sleep(GAP)
            self._facts[peer.name] = worker.start()
        except (NotThere, WorkerError) as error:
            self._errors[peer.name] = str(error)

    def run(self, load: Load, texts: Texts, rounds: int) -> Result:
        """All rounds of a load."""
        peers = [peer for peer in self._peers if peer.heavy or load.queries == 1]
        calls = list(islice(texts.calls(load), rounds + 1))
        rows = {peer.name: Row(peer.name, error=self._errors.get(peer.name)) for peer in peers}
        scores: dict[str, list[list[list[float]]]] = {name: [] for name in rows}
        names = list(rows)
        task = self._progress.add_task("", total=len(calls) * len(names))
        for number, call in enumerate(calls):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                what = f"round {number}" if number else "warming up"
                self._progress.update(task, description=f"{self.shape}, {load.title}: {what}, {name}")
                # To warm up, one query is enough.
                asked = call if number else Call(call.queries[:1], call.documents[:1])
                self._ask(rows[name], asked, scores[name], counts=number > 0)
                self._progress.advance(task)
        self._progress.remove_task(task)
        counter = Counter(self.model)
        counted = [counter.operations(call) for call in calls[1:]]
        gflop = [operations / 1e9 for operations, _ in counted]
        report.compare(list(rows.values()), rows[self.reference], scores, gflop)
        return Result(
            shape=self.shape,
            title=SHAPES[self.shape].title,
            load=load.title,
            documents=texts.kind,
            pairs=calls[0].pairs,
            tokens=statistics.mean(tokens for _, tokens in counted),
            gflop=statistics.mean(gflop),
            rows=list(rows.values()),
        )

    def _ask(self, row: Row, call: Call, scores: list[list[list[float]]], *, counts: bool) -> None:
        if row.error:
            return
        time.sleep(GAP)
        try:
            answer = self._workers[row.name].ask(call)
        except WorkerError as error:
            self._errors[row.name] = row.error = str(error)
            row.seconds.clear()
            return
        facts = self._facts[row.name]
        row.version, row.dtype, row.cold_seconds = facts["version"], facts["dtype"], facts["cold_seconds"]
        row.peak_mb = answer["peak_mb"]
        if counts:
            row.seconds.append(answer["seconds"])
            row.others.append(answer["others"])
            scores.append(answer["scores"])


def roofline(model: Path) -> dict[str, float]:
    """The machine's best rates, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.roofline", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)  # noqa: S603
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


@contextmanager
def shown(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


def run(
    shape: str, loads: Sequence[str], arguments: argparse.Namespace, texts: Texts, console: Console
) -> list[Result]:
    """All loads of a shape."""
    with shown(console) as progress:
        task = progress.add_task(f"{shape}: the model, and how fast this machine multiplies", total=None)
        gflops = roofline(folder(shape))
        progress.remove_task(task)
        with Field(shape, arguments.contestants, progress) as contestants:
            results = [contestants.run(LOADS[load], texts, arguments.rounds) for load in loads]
        task = progress.add_task(f"{shape}: how fast this machine multiplies, once more", total=None)
        again = roofline(folder(shape))
        progress.remove_task(task)
    for result in results:
        report.relate(result, {dtype: max(rate, again[dtype]) for dtype, rate in gflops.items()})
        console.print(report.table(result))
        console.print()
    return results


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", choices=SHAPES, help="may be repeated; all if not given")
    parser.add_argument(
        "--load", action="append", choices=LOADS, help="may be repeated; all for minilm, 1x100 elsewhere, if not given"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestants", type=lambda text: re.compile(text, re.IGNORECASE), default="", metavar="REGEX")
    parser.add_argument("--documents", choices=LONGEST, default="passages")
    parser.add_argument("--json", type=Path, default=OUT / "rerank.json")
    parser.add_argument("--plot", type=Path, default=OUT / "rerank.png")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    console = Console(width=170)
    texts = Texts(arguments.documents)
    about = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": cpu(),
        "cores": os.cpu_count(),
        "rounds": arguments.rounds,
    }
    console.print(f"{about['processor']}, {about['cores']} cores; {arguments.rounds} rounds")
    results: list[Result] = []
    try:
        for shape in arguments.model or SHAPES:
            asked = arguments.load or (list(LOADS) if shape == "minilm" else ["1x100"])
            loads = [load for load in LOADS if load in asked]  # small first: peak memory only grows
            results += run(shape, loads, arguments, texts, console)
            report.save(results, about, arguments.json)
            report.draw(results, arguments.plot)
    except KeyboardInterrupt:
        sys.exit(130)
    console.print(f"written: {arguments.json} and {arguments.plot}")


if __name__ == "__main__":
    main()
