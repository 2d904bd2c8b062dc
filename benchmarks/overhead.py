"""What VLLMScorer costs beside a bare ``httpx.post`` of the same body to the same server.

    .venv/bin/python -m benchmarks.overhead                      # make bench runs it
    .venv/bin/python -m benchmarks.overhead --rounds 400 --instant-only

Both take turns. An instant server, which answers without a model, shows the milliseconds of the client alone; a real
vLLM server with the embedded MiniLM shows their share of a call. The bare client checks nothing: no order, no number
of scores, no finite scores, no retry, no deadline.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import statistics
import time
from itertools import islice
from multiprocessing.queues import Queue

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.report import spread
from benchmarks.rerank import shown
from benchmarks.texts import Call, Load, Texts
from rag_rerank import VLLMScorer
from rag_rerank.embedded import minilm_folder
from tests import vllm_server

COUNTS = (1, 10, 100)


async def instant(port: "Queue[int]") -> None:
    """A server that gives every document the same score, at once."""
    known = {
        b"/version": b'{"version": "0.32.0"}',
        b"/v1/models": b'{"data": [{"id": "instant", "max_model_len": 1000000}]}',
    }

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError), contextlib.closing(writer):
            await answer_all(reader, writer)

    async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.split(b"\r\n")
            lengths = [int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")]
            body = await reader.readexactly(lengths[0] if lengths else 0)
            answer = known.get(lines[0].split()[1]) or scores(json.loads(body))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n" % len(answer) + answer)

    def scores(request: dict[str, object]) -> bytes:
        documents = request["text_2"]
        assert isinstance(documents, list)
        data = [{"index": index, "object": "score", "score": 0.49211326241493225} for index in range(len(documents))]
        answer = {"id": f"score-{request['request_id']}", "object": "list", "model": "instant", "data": data}
        return json.dumps(answer | {"usage": {"prompt_tokens": 16, "total_tokens": 16}}).encode()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port.put(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _instant(port: "Queue[int]") -> None:
    asyncio.run(instant(port))


def compare(base_url: str, call: Call, rounds: int, progress: Progress, title: str) -> tuple[list[float], list[float]]:
    """Seconds of the bare client and of ours, in turn."""
    bare: list[float] = []
    ours: list[float] = []
    query, documents = call.queries[0], call.documents[0]
    with VLLMScorer(base_url) as scorer, httpx.Client() as client:
        expected = scorer.score(query, documents)
        body = {
            "model": scorer.model_name,
            "text_1": query,
            "text_2": documents,
            "truncate_prompt_tokens": -1,
            "request_id": "bare",
        }

        def post() -> list[float]:
            answer = client.post(f"{base_url}/v1/score", json=body, timeout=60).json()
            return [entry["score"] for entry in answer["data"]]

        assert max(abs(a - b) for a, b in zip(post(), expected, strict=True)) < 1e-4
        for number in progress.track(range(rounds), description=title):
            turns = [(bare, post), (ours, lambda: scorer.score(query, documents))]
            for times, do in turns if number % 2 else turns[::-1]:
                began = time.perf_counter()
                do()
                times.append(time.perf_counter() - began)
    return bare, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="with the instant server; a tenth with vLLM")
    parser.add_argument("--instant-only", action="store_true")
    arguments = parser.parse_args()
    texts, console = Texts("passages"), Console(width=120)
    calls = {count: next(islice(texts.calls(Load(1, count)), 1)) for count in COUNTS}
    table = Table("server", "documents", "bare httpx", "VLLMScorer", "more, ms", "more, times", title="Medians, ms")
    for column in table.columns[1:]:
        column.justify = "right"

    def measure(server: str, base_url: str, rounds: int) -> None:
        for count, call in calls.items():
            bare, ours = compare(base_url, call, rounds, progress, f"{server}, {count} documents")
            more = [1000 * (own - other) for own, other in zip(ours, bare, strict=True)]
            ratios = [own / other for own, other in zip(ours, bare, strict=True)]
            medians = (f"{1000 * statistics.median(times):.2f}" for times in (bare, ours))
            share = spread(ratios).replace("[", r"\[")
            table.add_row(server, str(count), *medians, f"{statistics.median(more):.2f}", share)

    with shown(console) as progress:
        port: Queue[int] = multiprocessing.Queue()
        process = multiprocessing.Process(target=_instant, args=(port,), daemon=True)
        process.start()
        measure("instant", f"http://127.0.0.1:{port.get()}", arguments.rounds)
        process.terminate()
        if not arguments.instant_only and vllm_server.why_not() is None:
            with vllm_server.serving(minilm_folder(), name="minilm", alone=True) as server:
                measure("vLLM, MiniLM on the CPU", server.base_url, max(3, arguments.rounds // 10))
    console.print(table)


if __name__ == "__main__":
    main()
