"""How speed and memory grow with the number of documents in one call: 10 to 10,000, each in a fresh process.

    .venv/bin/python -m benchmarks.growth

LocalScorer with dtype="auto" on the MiniLM shape. Passages repeat, with a number appended so that none is like another.
"""

import argparse
from itertools import cycle, islice

from rich.console import Console
from rich.table import Table

from benchmarks.models import ROOT, folder
from benchmarks.peers import CONTESTANTS
from benchmarks.process import Worker
from benchmarks.rerank import OUT, shown
from benchmarks.texts import Call, Texts

COUNTS = (10, 100, 1000, 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--documents", type=int, nargs="+", default=COUNTS, metavar="COUNT")
    arguments = parser.parse_args()
    console = Console(width=110)
    texts = Texts("passages")
    peer = next(peer for peer in CONTESTANTS if peer.name == "rag_rerank dtype=auto")
    table = Table(title="1 query, LocalScorer dtype=auto, MiniLM shape", caption_justify="left")
    for column in ("documents", "seconds", "pairs/s", "peak RSS MB", "processors busy with something else"):
        table.add_column(column, justify="right")
    with shown(console) as progress:
        for count in progress.track(arguments.documents, description="Documents in a call"):
            documents = [
                f"{text} {number}" for number, text in enumerate(islice(cycle(texts.documents.values()), count))
            ]
            options = peer.loaded_with(folder("minilm"))
            worker = Worker(ROOT / peer.venv / "bin" / "python", peer.worker, options, OUT / "logs" / "growth.log", {})
            try:
                worker.start()
                worker.ask(Call(texts.questions[:1], [documents[:32]]))  # to warm up
                answer = worker.ask(Call(texts.questions[:1], [documents]))
            finally:
                worker.close()
            seconds = answer["seconds"]
            table.add_row(
                f"{count:,}",
                f"{seconds:.2f}",
                f"{count / seconds:,.0f}",
                f"{answer['peak_mb']:,.0f}",
                f"{answer['others']:.2f}",
            )
    console.print(table)


if __name__ == "__main__":
    main()
