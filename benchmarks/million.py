"""A million pairs through Ray Data, an actor killed in the middle, compared bit by bit with a single process.

    .venv/bin/python -m benchmarks.million [--pairs 1000000]

A tiny cross-encoder in float32 and generated texts in Parquet: what is tested is that nothing is lost, doubled or
scored otherwise, and what all that is not the model costs. The single process reads the same files and calls
`LocalScorer.score` itself, with as many pairs a call as the actors, on one core, as each of them; then a part of them
again on all cores.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from benchmarks.models import ROOT
from benchmarks.texts import Texts
from rag_rerank.files.rows import GROUP

FOLDER = ROOT / ".benchmarks" / "million"
SINGLE = """
import json, sys, time
import numpy, psutil, pyarrow.parquet as pq, torch
from rag_rerank import LocalScorer
model, out, threads, group, limit, *files = sys.argv[1:]
torch.set_num_threads(int(threads))
group, left, scores = int(group), int(limit), []
with LocalScorer(model, dtype="float32") as scorer:
    scorer.warmup()
    began = time.perf_counter()
    for name in files:
        table = pq.read_table(name, columns=["query", "document"])
        for first in range(0, min(left, len(table)), group):
            some = table.slice(first, group).to_pydict()
            scores += scorer.score(some["query"], some["document"])
        left -= len(table)
    seconds = time.perf_counter() - began
numpy.save(out, numpy.array(scores))
print(json.dumps({"seconds": seconds, "pairs": len(scores), "mb": psutil.Process().memory_info().rss >> 20}))
"""


def make_pairs(folder: Path, pairs: int, files: int = 4) -> list[Path]:
    """Pairs of words of the embedded collection; the same for the same number."""
    paths = [folder / f"pairs-{number}.parquet" for number in range(files)]
    if all(path.exists() for path in paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    words = " ".join(Texts("passages").documents.values()).split()
    chance = random.Random(0)  # noqa: S311 - the same texts each time

    def text(least: int, most: int) -> str:
        return " ".join(chance.choices(words, k=chance.randint(least, most)))

    for number, path in enumerate(paths):
        rows = range(number * pairs // files, (number + 1) * pairs // files)
        made = {"id": list(rows), "query": [text(3, 8) for _ in rows], "document": [text(5, 30) for _ in rows]}
        pq.write_table(pa.table(made), unfinished := path.with_suffix(".unfinished"), row_group_size=50_000)
        unfinished.replace(path)
    return paths


def single(model: Path, files: list[Path], threads: int, limit: int, out: Path) -> tuple[np.ndarray, dict[str, float]]:
    """Scores of the first so many pairs of a process with so many threads, and what it took."""
    command = [sys.executable, "-c", SINGLE, *map(str, (model, out, threads, GROUP, limit, *files))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - our own
    return np.load(out), json.loads(done.stdout.splitlines()[-1])


@dataclass
class Watch:
    """Looks at a run from outside, and kills one of its actors in the middle.

    Attributes:
        shards: How many output files there will be.
        killed: At how many finished shards an actor was killed.
        peak_mb: The most memory of each kind of process.
        actors: The pids of all actors that there were.
    """

    process: psutil.Process
    target: Path
    shards: int
    killed: int | None = None
    peak_mb: dict[str, int] = field(default_factory=dict)
    actors: set[int] = field(default_factory=set)
    done: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        while not self.done.wait(0.5):
            try:
                self._look()
            except psutil.Error:  # a process ended meanwhile
                continue

    def _look(self) -> None:
        sums = {"driver": self.process.memory_info().rss >> 20, "actor": 0, "the rest of Ray": 0}
        actors = []
        for child in self.process.children(recursive=True):
            # Shared memory, of which all show the same, is not counted for each.
            memory = child.memory_info()
            mb = (memory.rss - memory.shared) >> 20
            if "ShardScorer" in " ".join(child.cmdline()):
                actors.append(child)
                sums["actor"] = max(sums["actor"], mb)
            else:
                sums["the rest of Ray"] += mb
        self.peak_mb = {name: max(mb, self.peak_mb.get(name, 0)) for name, mb in sums.items()}
        self.actors |= {actor.pid for actor in actors}
        finished = len(list(self.target.glob("*.parquet")))
        if self.killed is None and finished >= self.shards // 2 and actors:
            os.kill(actors[0].pid, signal.SIGKILL)
            self.killed = finished


def with_ray(
    model: Path, folder: Path, target: Path, actors: int, shard_lines: int, shards: int
) -> tuple[float, Watch]:
    """The command line's seconds, and what was seen of it."""
    command = [sys.executable, "-m", "rag_rerank", "rerank", "--engine", "ray", "--num-actors", str(actors)]
    command += ["--model", str(model), "--dtype", "float32", "--shard-lines", str(shard_lines)]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--in", str(folder), "--out", str(target)])  # noqa: S603 - our own
    watch = Watch(psutil.Process(process.pid), target, shards)
    thread = threading.Thread(target=watch.run)
    thread.start()
    code = process.wait()
    watch.done.set()
    thread.join()
    if code:
        raise SystemExit(f"the run ended with {code}")
    return time.perf_counter() - began, watch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--shard-lines", type=int, default=16_384)
    arguments = parser.parse_args()
    pairs, shard_lines = arguments.pairs, arguments.shard_lines
    assert shard_lines % GROUP == 0, f"shards must be whole groups of {GROUP}"
    console = Console(width=110, highlight=False)
    folder = FOLDER / f"{pairs}"
    files = make_pairs(folder / "in", pairs)
    if not (model := FOLDER / "model").exists():
        from tests.models import make_bert_cross_encoder

        make_bert_cross_encoder(model)
    shards = sum(-(-pq.read_metadata(path).num_rows // shard_lines) for path in files)
    console.print(f"{pairs:,} pairs in {len(files)} files, {shards} shards; load average {os.getloadavg()[0]:.1f}")

    shutil.rmtree(target := folder / "out", ignore_errors=True)
    seconds, watch = with_ray(model, folder / "in", target, arguments.actors, shard_lines, shards)
    console.print(
        f"Ray, {arguments.actors} actors, one killed after {watch.killed} shards ({len(watch.actors)} processes in "
        f"all): {seconds:,.0f} s, {pairs / seconds:,.0f} pairs/s with starting and stopping Ray; load average "
        f"{os.getloadavg()[0]:.1f}; peak memory {', '.join(f'{name} {mb:,} MB' for name, mb in watch.peak_mb.items())}"
    )
    expected, one = single(model, files, 1, pairs, folder / "one.npy")
    console.print(
        f"single process, 1 core: {one['seconds']:,.0f} s, {one['pairs'] / one['seconds']:,.0f} pairs/s, "
        f"{one['mb']:,} MB; load average {os.getloadavg()[0]:.1f}"
    )
    table = pa.concat_tables(pq.read_table(path) for path in sorted(target.glob("*.parquet")))
    given = pa.concat_tables(pq.read_table(path) for path in files)
    assert table.drop_columns(["score"]).equals(given), "lines were lost, doubled, moved or changed"
    found = table["score"].to_numpy()
    different = int((found.view(np.int64) != expected.view(np.int64)).sum())
    console.print(f"{len(found):,} scores, all pairs there, once, in order; {different:,} scores differ in any bit")

    some, two = single(model, files, os.cpu_count() or 1, min(pairs, 100_000), folder / "all.npy")
    differences = np.abs(some - expected[: len(some)])
    console.print(
        f"single process, {os.cpu_count()} cores: {two['pairs'] / two['seconds']:,.0f} pairs/s; of {len(some):,} "
        f"scores {int((differences > 0).sum()):,} differ from those of 1 core, by at most {differences.max():.1e}"
    )
    if different or watch.killed is None:
        raise SystemExit("not as it should be")


if __name__ == "__main__":
    main()
