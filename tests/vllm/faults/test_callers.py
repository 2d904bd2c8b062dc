"""What callers pass, how they stop, and what they share."""

import asyncio
import copy
import gc
import multiprocessing
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from rag_rerank import (
    RerankError,
    VLLMScorer,
)
from rag_rerank.vllm.call import MAX_BYTES
from tests.faulty_server import (
    on_scores,
    oracle,
)
from tests.vllm.faults.common import (
    CHUNKS,
    DOCUMENTS,
    EXACT,
    FEW,
    KEY,
    QUERY,
    Connect,
    Score,
    Serve,
    hang,
    soon,
)


class TestInput:
    """What callers pass."""

    def test_no_documents(self, serve: Serve, connect: Connect, score: Score):
        """Row 36: nothing is sent."""
        server = serve()
        assert score(connect(server), []) == []
        assert server.connections == 0

    @pytest.mark.parametrize(
        "documents",
        [
            ["one"],
            [f"{number}" for number in range(10_000)],
            ["same", "other", "same", "same"] * 10,
            ["", "a", "", " "],
            ["a\0b", "\0", "a"],
            ["x" * 10_000_000, "short"],
        ],
        ids=["one", "10,000", "duplicates", "empty", "NUL", "10 MB"],
    )
    def test_unusual_documents(self, serve: Serve, connect: Connect, score: Score, documents: list[str]):
        """Row 36: each has its own score; what is larger than a request should be goes in one of its own."""
        server = serve()
        assert score(connect(server), documents) == [oracle(QUERY, document) for document in documents]
        requests = [request for request in server.score_requests if request.documents != ["a"]]  # that one measures
        large = sum(len(document) > MAX_BYTES for document in documents)
        assert len(requests) == -(-(len(documents) - large) // 32) + large

    def test_a_query_for_each_document(self, serve: Serve, connect: Connect, score: Score):
        """Row 36: queries are cut into chunks with their documents."""
        queries = [f"query {number}" for number in range(100)]
        expected = [oracle(*pair) for pair in zip(queries, DOCUMENTS, strict=True)]
        assert score(connect(serve()), DOCUMENTS, queries) == expected

    def test_a_lone_surrogate(self, serve: Serve, connect: Connect, score: Score):
        """Row 37: U+FFFD in its place."""
        assert score(connect(serve()), ["a\ud800b"], "q\udc00") == [oracle("q\ufffd", "a\ufffdb")]

    @pytest.mark.parametrize(
        ("queries", "documents", "place"),
        [(QUERY, ["a", 1], "documents[1]"), (QUERY, ["a", b"b"], "documents[1]"), (None, ["a"], "queries")],
    )
    def test_what_is_no_text(self, serve: Serve, connect: Connect, score: Score, queries, documents, place: str):
        """Row 38: its place is named before anything is sent."""
        server = serve()
        with pytest.raises(TypeError) as caught:
            score(connect(server), documents, queries)
        assert place in str(caught.value)
        assert server.connections == 0

    def test_a_generator(self, serve: Serve, connect: Connect, score: Score):
        """Row 38: it is read once."""
        assert score(connect(serve()), (document for document in DOCUMENTS)) == EXACT


INTERRUPTED = """
import os, signal, sys, threading, time
from rag_rerank import VLLMScorer
from tests.faulty_server import HANG, FaultyServer, on_scores, oracle

server = FaultyServer(on_scores(lambda request: [HANG]))
scorer = VLLMScorer(server.base_url, chunk_size=1, timeout=300)

def interrupt():
    while len(server.score_requests) < 2:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    scorer.score("q", ["a", "b"])
except KeyboardInterrupt:
    print("before the timeout of 300 s")
until = time.monotonic() + 60
while server.open_connections and time.monotonic() < until:
    time.sleep(0.005)
print(len(server.abandoned), server.open_connections)
server.behave = lambda request: None
print(scorer.score("q", ["a", "b"]) == [oracle("q", "a"), oracle("q", "b")])
"""


class TestInterruption:
    """Calls that are given up."""

    def test_a_cancelled_task(self, serve: Serve, connect: Connect):
        """Row 39: at once; the server sees that nobody waits any more, and the scorer goes on."""
        server = serve(on_scores(hang))
        scorer = connect(server)

        async def cancel_then_call() -> list[float]:
            task = asyncio.create_task(scorer.ascore(QUERY, DOCUMENTS))
            await asyncio.to_thread(soon, lambda: len(server.score_requests) == CHUNKS)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(soon, lambda: len(server.abandoned) == CHUNKS)
            assert server.open_connections == 0
            server.behave = lambda request: None
            return await scorer.ascore(QUERY, DOCUMENTS)

        assert asyncio.run(cancel_then_call()) == EXACT

    def test_ctrl_c(self):
        """Row 40: at once, as with a task; in a process of its own, so that pytest does not end."""
        run = subprocess.run(
            [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=300, check=True
        )
        interrupted, left, exact = run.stdout.splitlines()
        assert interrupted == "before the timeout of 300 s"
        assert run.stderr == ""
        assert (left, exact) == ("2 0", "True")

    def test_a_closed_scorer(self, serve: Serve, connect: Connect, score: Score):
        """R7: it says that it is closed; closing it again is harmless."""
        server = serve()
        scorer = connect(server)
        score(scorer, FEW)
        scorer.close()
        scorer.close()
        asyncio.run(scorer.aclose())
        with pytest.raises(RerankError, match="closed"):
            score(scorer, FEW)
        assert len(server.score_requests) == 1

    def test_closing_closes_connections(self, serve: Serve, connect: Connect):
        """R7: of `close` and of `aclose`."""
        server = serve()
        scorer = connect(server)
        scorer.score(QUERY, FEW)
        scorer.close()
        assert soon(lambda: server.open_connections == 0)

        async def call() -> None:
            async with connect(server) as other:
                await other.ascore(QUERY, FEW)
                assert server.open_connections == 1
            assert await asyncio.to_thread(soon, lambda: server.open_connections == 0)

        asyncio.run(call())

    def test_closing_while_threads_wait(self, serve: Serve, connect: Connect):
        """R7: their calls end in an error of ours, and soon."""
        server = serve(on_scores(hang))
        scorer = connect(server)
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(scorer.score, QUERY, DOCUMENTS) for _ in range(2)]
            assert soon(lambda: len(server.score_requests) == 2 * CHUNKS)
            scorer.close()
            assert all(isinstance(call.exception(timeout=60), RerankError) for call in calls)
        assert soon(lambda: server.open_connections == 0)

    def test_closing_while_tasks_wait(self, serve: Serve, connect: Connect):
        """R7: as with threads."""
        server = serve(on_scores(hang))
        scorer = connect(server)

        async def close_during_calls() -> list[object]:
            calls = [asyncio.create_task(scorer.ascore(QUERY, DOCUMENTS)) for _ in range(2)]
            await asyncio.to_thread(soon, lambda: len(server.score_requests) == 2 * CHUNKS)
            await scorer.aclose()
            return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)

        assert [isinstance(error, RerankError) for error in asyncio.run(close_during_calls())] == [True, True]
        assert soon(lambda: server.open_connections == 0)


def hundred_calls(scorer: VLLMScorer, name: str, results) -> None:
    """In a forked child: half of the calls from a thread, half from an event loop."""

    def exact(number: int) -> tuple[str, list[str], list[float]]:
        query, documents = f"{name} {number}", DOCUMENTS[number:][:3]
        return query, documents, [oracle(query, document) for document in documents]

    right_ones = 0
    for query, documents, expected in map(exact, range(50)):
        right_ones += scorer.score(query, documents) == expected

    async def calls() -> int:
        return sum(
            [await scorer.ascore(query, documents) == expected for query, documents, expected in map(exact, range(50))]
        )

    results.put(right_ones + asyncio.run(calls()))


FIRST_CALL = """
import sys
from rag_rerank import VLLMScorer
from tests.faulty_server import FaultyServer

with FaultyServer() as server, VLLMScorer(server.base_url) as scorer:
    before = set(sys.modules)
    scorer.score("q", ["a"])
    print(sorted(set(sys.modules) - before))
"""


class TestSharing:
    """Processes and event loops may share one scorer (threads: TestConcurrency)."""

    def test_forked_children(self, serve: Serve, connect: Connect):
        """Row 41: with the parent's connections, in use as it forks, they would get each other's answers."""
        scorer = connect(serve())
        scorer.score(QUERY, FEW)
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        children = [
            context.Process(target=hundred_calls, args=(scorer, str(name), results), daemon=True) for name in range(4)
        ]
        with ThreadPoolExecutor(2) as pool:
            calls = pool.map(lambda _: scorer.score(QUERY, DOCUMENTS), range(50))
            for child in children:
                child.start()
            assert list(calls) == [EXACT] * 50
        assert [results.get(timeout=30) for _ in children] == [100] * 4
        for child in children:
            child.join(30)
        assert [child.exitcode for child in children] == [0] * 4
        assert scorer.score(QUERY, DOCUMENTS) == EXACT

    def test_a_first_call_imports_nothing(self):
        """Row 41: a child that is forked while another thread imports waits for that import for ever."""
        run = subprocess.run(
            [sys.executable, "-c", FIRST_CALL], capture_output=True, text=True, timeout=300, check=True
        )
        assert run.stdout == "[]\n"

    def test_event_loops(self, serve: Serve, connect: Connect):
        """Row 43: one after another, side by side, and none of the caller's (Jupyter); nothing is left open."""
        server = serve()
        gc.collect()  # what other tests have left open warns now
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scorer = connect(server)
            assert [asyncio.run(scorer.ascore(QUERY, DOCUMENTS)) for _ in range(3)] == [EXACT] * 3
            with ThreadPoolExecutor(2) as pool:
                answers = pool.map(lambda _: asyncio.run(scorer.ascore(QUERY, DOCUMENTS)), range(2))
                assert list(answers) == [EXACT] * 2

            async def in_a_notebook() -> list[float]:
                return scorer.score(QUERY, DOCUMENTS)

            assert asyncio.run(in_a_notebook()) == EXACT
            scorer.close()
            assert soon(lambda: server.open_connections == 0)
            gc.collect()
        assert [str(warning.message) for warning in caught] == []

    @pytest.mark.parametrize("remake", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy, copy.copy])  # noqa: S301
    def test_copies(self, serve: Serve, connect: Connect, score: Score, remake, monkeypatch: pytest.MonkeyPatch):
        """Row 44: a copy works and has a key: the same scorer's, or the environment's."""
        server = serve()
        scorer = connect(server, api_key=KEY)
        score(scorer, FEW)
        monkeypatch.setenv("VLLM_API_KEY", "from-env")
        with remake(scorer) as copied:
            assert score(copied) == EXACT
        key = KEY if copied is scorer else "from-env"
        assert server.requests[-1].headers["authorization"] == f"Bearer {key}"

    def test_pickles_have_no_key(self, connect: Connect):
        """Row 44: they are read by whoever has the file."""
        scorer = connect("http://localhost", api_key=KEY)
        assert KEY.encode() not in pickle.dumps(scorer)
        assert KEY not in repr(scorer) + str(vars(scorer))

    def test_spawned_process(self, serve: Serve, connect: Connect):
        """Row 44: the scorer goes there as a pickle."""
        scorer = connect(serve())
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(scorer.score, QUERY, DOCUMENTS).result(timeout=30) == EXACT
