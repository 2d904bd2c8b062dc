"""How long the first score takes: importing the package, and a fresh process until it has scored one pair.

    .venv/bin/python -m benchmarks.cold
    .venv/bin/python -m benchmarks.cold --proof [FOLDER ...]     # what the proof adds to loading

Processes alternate. sentence-transformers imports torch when it is imported, LocalScorer with its first call: compare
the times from the start of the process.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.models import folder
from benchmarks.report import spread
from benchmarks.rerank import shown

IMPORTS = {"an empty interpreter": "pass", "import rag_rerank": "import rag_rerank"}
_TIMED = "import time; began = time.perf_counter()"
_SPENT = "print(time.perf_counter() - began)"
FIRST_SCORES = {
    "sentence-transformers CrossEncoder": (
        f"import sys; from sentence_transformers import CrossEncoder; {_TIMED}; "
        f"CrossEncoder(sys.argv[1], device='cpu').predict([('a', 'b')]); {_SPENT}"
    ),
    "rag_rerank LocalScorer, float32": (
        f"import sys; from rag_rerank import LocalScorer; {_TIMED}; "
        f"LocalScorer(sys.argv[1], device='cpu', dtype='float32').score('a', 'b'); {_SPENT}"
    ),
    "rag_rerank LocalScorer, dtype=auto": (
        f"import sys; from rag_rerank import LocalScorer; {_TIMED}; "
        f"LocalScorer(sys.argv[1], device='cpu').score('a', 'b'); {_SPENT}"
    ),
}

# What torch and transformers take to import is no part of it: 2 to 3 s.
LOADED = (
    "import sys, rag_rerank.local.loading; from rag_rerank import LocalScorer; scorer = LocalScorer(sys.argv[1], "
    f"device='cpu', dtype=sys.argv[2], verify=sys.argv[3] == 'True'); {_TIMED}; used = time.process_time(); "
    f"seen = scorer.proof().differences; {_SPENT}; print(time.process_time() - used, max(seen.values(), default=0))"
)


def fresh(code: str, *arguments: str) -> tuple[float, str]:
    """Seconds that a new interpreter takes for `code`, and what it printed."""
    began = time.perf_counter()
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
    return time.perf_counter() - began, done.stdout


def proof(folders: list[str], rounds: int, console: Console) -> None:
    """What the proof adds to loading, imports done: the ratios within each pair of processes.

    That of the processor's seconds is steadier on a busy machine.
    """
    table = Table(title="Loading, imports done, seconds")
    for column in ("", "dtype", "verify=False", "verify=True", "ratio", "CPU ratio", "difference"):
        table.add_column(column, justify="left" if not column else "right")
    with shown(console) as progress:
        for path, dtype in progress.track(
            list(itertools.product(folders, ("float32", "bfloat16"))), description="Loads"
        ):
            times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}  # the clock's, the processor's
            difference = ""
            for number in range(rounds + 1):
                for verify, seconds in times.items():
                    *spent, difference = fresh(LOADED, path, dtype, f"{verify}")[1].split()[-3:]
                    if number:
                        seconds.append((float(spent[0]), float(spent[1])))
            plain, proven = times.values()
            cells = [f"{statistics.median(clock for clock, _ in seconds):.2f}" for seconds in times.values()]
            for kind in (0, 1):
                ratios = [each[kind] / before[kind] for before, each in zip(plain, proven, strict=True)]
                cells.append(spread(ratios).replace("[", r"\["))
            table.add_row(Path(path).name, dtype, *cells, difference)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of first scores; imports are timed twice as often")
    parser.add_argument("--proof", nargs="*", metavar="FOLDER", help="of models; by default two shapes")
    arguments = parser.parse_args()
    console = Console(width=120)
    if arguments.proof is not None:
        folders = arguments.proof or [str(folder(name)) for name in ("released", "qwen3-0.6b")]
        proof(folders, arguments.rounds, console)
        return
    model = str(folder("minilm"))
    imports: dict[str, list[float]] = {name: [] for name in IMPORTS}
    whole: dict[str, list[float]] = {name: [] for name in FIRST_SCORES}
    inside: dict[str, list[float]] = {name: [] for name in FIRST_SCORES}
    with shown(console) as progress:
        for _ in progress.track(range(2 * arguments.rounds), description="Imports"):
            for name, code in IMPORTS.items():
                imports[name].append(fresh(code)[0])
        for number in progress.track(range(arguments.rounds + 1), description="First scores"):
            for name, code in FIRST_SCORES.items():
                seconds, printed = fresh(code, model)
                if number:  # the first reads files from the disk
                    whole[name].append(seconds)
                    inside[name].append(float(printed.split()[-1]))
    empty, full = (statistics.median(times) for times in imports.values())
    console.print(f"import rag_rerank: {(full - empty) * 1000:.0f} ms beyond an interpreter's {empty * 1000:.0f} ms")
    table = Table(title="Until one pair is scored, MiniLM shape, seconds")
    for column in ("", "from process start", "from the constructor, imports done", "reference / own, process start"):
        table.add_column(column, justify="left" if not column else "right")
    reference = next(iter(whole.values()))
    for name, times in whole.items():
        ratios = [theirs / own for theirs, own in zip(reference, times, strict=True)]
        row = (f"{statistics.median(times):.2f}", f"{statistics.median(inside[name]):.2f}", spread(ratios))
        table.add_row(name, *(cell.replace("[", r"\[") for cell in row))
    console.print(table)


if __name__ == "__main__":
    main()
