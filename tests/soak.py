"""Two real vLLM servers, of which one after the other is killed and comes back, under steady calls from threads.

    make soak                                                    # five minutes
    .venv/bin/python -m tests.soak --seconds 60 --threads 8      # shorter

What must come out: no score is wrong, no call is lost, none outlives its deadline by more than 0.25 s, and at least
99.9 % are answered.
"""

import argparse
import contextlib
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from rag_rerank import LocalScorer, RerankError, VLLMScorer
from rag_rerank.embedded import collection_folder
from rag_rerank.evaluation import Collection
from tests import vllm_server
from tests.models import make_bert_cross_encoder

TOLERANCE = 1e-4
GRACE = 0.25  # seconds that a call may outlive its deadline


@dataclass
class Report:
    """What the threads saw.

    Attributes:
        seconds: Of every call that was answered.
        errors: How many calls ended in each kind of our errors.
        wrong: Calls with a score that is not the document's, or with too few.
        lost: Calls that ended in anything but scores or one of our errors.
        late: Calls that outlived their deadline by more than the grace.
        kills: How often a server was killed, and `returns` how often one came back.
    """

    seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    lost: int = 0
    late: int = 0
    kills: int = 0
    returns: int = 0

    @property
    def calls(self) -> int:
        return len(self.seconds) + self.errors.total() + self.wrong + self.lost

    @property
    def answered(self) -> float:
        """Share of the calls."""
        return len(self.seconds) / max(1, self.calls)

    def table(self) -> Table:
        table = Table("", "", show_header=False)
        for name in ("calls", "wrong", "lost", "late", "kills", "returns"):
            table.add_row(name, str(getattr(self, name)))
        table.add_row("answered", f"{self.answered:.3%}")
        table.add_row("errors", ", ".join(f"{count} {name}" for name, count in self.errors.items()) or "none")
        ordered = sorted(self.seconds)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("longest", 1.0)):
            table.add_row(name, f"{1000 * ordered[int(share * (len(ordered) - 1))]:.0f} ms" if ordered else "")
        return table


class Servers:
    """Servers of one model that can be killed and started again where they were."""

    def __init__(self, folder: Path, count: int = 2) -> None:
        self._folder = folder
        self._ports = [vllm_server.free_port() for _ in range(count)]
        self._running: list[contextlib.ExitStack | None] = [None] * count
        self.base_urls = [f"http://127.0.0.1:{port}" for port in self._ports]

    def __enter__(self) -> "Servers":
        threads = [threading.Thread(target=self.start, args=(number,)) for number in range(len(self._ports))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if None in self._running:
            self.__exit__()
            raise RuntimeError("a server did not start")
        return self

    def __exit__(self, *_: object) -> None:
        for number in range(len(self._ports)):
            self.kill(number)

    def start(self, number: int) -> None:
        """Start it and wait until it answers."""
        stack = contextlib.ExitStack()
        stack.enter_context(vllm_server.serving(self._folder, port=self._ports[number]))
        self._running[number] = stack

    def kill(self, number: int) -> None:
        """SIGKILL to all of its processes."""
        stack, self._running[number] = self._running[number], None
        if stack is not None:
            stack.close()


def run(
    servers: Servers,
    expected: dict[str, dict[str, float]],
    *,
    seconds: float,
    threads: int = 8,
    documents: int = 20,
    every: float = 20.0,
    deadline: float = 10.0,
    pause: float = 0.3,
) -> Report:
    """Score from several threads while servers die and come back.

    Args:
        servers: Two or more.
        expected: The score of each query with each document.
        seconds: How long.
        threads: How many callers.
        documents: Of a call.
        every: Seconds for which all servers answer before the next one is killed.
        deadline: Seconds for a call.
        pause: Seconds between the calls of a thread, on average: without any, a server takes minutes to come back on
            two cores, and few would be killed.
    """
    report, lock, over = Report(), threading.Lock(), threading.Event()

    def call(scorer: VLLMScorer, chance: random.Random) -> None:
        query = chance.choice(list(expected))
        texts = chance.sample(list(expected[query]), documents)
        began = time.monotonic()
        error: BaseException | None = None
        scores: Sequence[float] = ()
        try:
            scores = scorer.score(query, texts, deadline=deadline)
        except Exception as raised:  # noqa: BLE001 - whatever it is, it is counted
            error = raised
        took = time.monotonic() - began
        pairs = zip(scores, texts, strict=False)
        right = len(scores) == len(texts) and all(
            abs(score - expected[query][text]) < TOLERANCE for score, text in pairs
        )
        with lock:
            report.late += took > deadline + GRACE
            if isinstance(error, RerankError):
                report.errors[type(error).__name__] += 1
            elif error is not None:
                report.lost += 1
                sys.stderr.write(f"{error!r}\n")
            elif right:
                report.seconds.append(took)
            else:
                report.wrong += 1

    def caller(scorer: VLLMScorer, seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311
        while not over.wait(chance.uniform(0, 2 * pause)):
            call(scorer, chance)

    def killer() -> None:
        number = 0
        while not over.wait(every):
            servers.kill(number)
            report.kills += 1
            servers.start(number)
            report.returns += 1
            number = (number + 1) % len(servers.base_urls)

    with VLLMScorer(servers.base_urls, max_concurrency=2, chunk_size=16) as scorer:
        callers = [threading.Thread(target=caller, args=(scorer, seed)) for seed in range(threads)]
        ending = threading.Thread(target=killer)
        for thread in (*callers, ending):
            thread.start()
        over.wait(seconds)
        over.set()
        for thread in (*callers, ending):  # a server that is still loading must not be left behind
            thread.join()
    return report


def expectations(folder: Path, queries: int = 20, documents: int = 200) -> dict[str, dict[str, float]]:
    """The score of each query with each document, by the same model in this process."""
    collection = Collection.load(collection_folder())
    texts = list(dict.fromkeys(text[:400] for text in collection.documents.values()))[:documents]
    with LocalScorer(folder, dtype="float32") as scorer:
        return {
            query: dict(zip(texts, scorer.score(query, texts), strict=True))
            for query in list(collection.queries.values())[:queries]
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--every", type=float, default=20.0)
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_bert_cross_encoder(Path(temporary) / "model")
        expected = expectations(folder)
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("starting two servers", total=None)
            with Servers(folder) as servers:
                bar.update(task, description="scoring", total=arguments.seconds)
                ticking = threading.Event()

                def tick() -> None:
                    while not ticking.wait(1.0):
                        bar.advance(task)

                threading.Thread(target=tick, daemon=True).start()
                report = run(
                    servers, expected, seconds=arguments.seconds, threads=arguments.threads, every=arguments.every
                )
                ticking.set()
    console.print(report.table())
    ok = not (report.wrong or report.lost or report.late) and report.answered >= 0.999
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
