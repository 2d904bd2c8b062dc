"""The event loop for callers that have none: threads that can't be had, names that can't be looked up."""

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from rag_rerank import BackendUnavailable
from rag_rerank.vllm.background import Background

HANGING = """
import socket
import threading

from rag_rerank import DeadlineExceeded, VLLMScorer

socket.getaddrinfo = lambda *arguments, **options: threading.Event().wait()
try:
    VLLMScorer("http://reranker.test", timeout=0.2).score("q", ["d"])
except DeadlineExceeded:
    print("in time")
"""


async def answer() -> int:
    return 42


class TestThread:
    """One for the process."""

    def test_one_that_can_not_be_had_is_tried_for_again(self, monkeypatch: pytest.MonkeyPatch):
        """With the next call."""
        background, start, tries = Background(), threading.Thread.start, []

        def refuse_once(thread: threading.Thread) -> None:
            tries.append(thread)
            if len(tries) == 1:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse_once)
        with pytest.raises(BackendUnavailable, match="new thread"):
            background.run(answer(), 10)
        assert background.run(answer(), 10) == background.run(answer(), None) == 42
        assert len(tries) == 2

    @pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
    def test_what_ends_a_thread_ends_a_call_only(self, error: type[BaseException]):
        """A user's function for keys may call sys.exit; others go on."""
        background = Background()

        async def leave() -> None:
            raise error

        async def wait() -> int:
            await asyncio.sleep(0.1)
            return 42

        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(background.run, wait(), 10)
            with pytest.raises(error):
                background.run(leave(), 10)
            assert other.result() == background.run(answer(), 10) == 42

    def test_work_that_takes_too_long_is_cancelled(self):
        """And the loop goes on."""
        background, cancelled = Background(), threading.Event()

        async def wait() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()

        with pytest.raises(TimeoutError):
            background.run(wait(), 0.05)
        assert cancelled.wait(30)
        assert background.run(answer(), 10) == 42


class TestLookup:
    """Of names, in threads that nothing waits for."""

    @pytest.fixture
    def lookups(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
        """The names that are looked up; that of the host "hangs" for as long as the test takes."""
        over, lookups, look_up = threading.Event(), [], socket.getaddrinfo

        def hanging(host, *arguments, **options):
            lookups.append(host)
            if host == "hangs" and over.wait(60):
                raise socket.gaierror(socket.EAI_AGAIN, "over")
            return look_up(host, *arguments, **options)

        monkeypatch.setattr(socket, "getaddrinfo", hanging)
        yield lookups
        over.set()

    def test_one_that_hangs_holds_up_no_other(self, lookups: list[str]):
        """However many callers wait for it, it takes one thread."""
        background = Background()

        async def look_up(host: str) -> list:
            return await asyncio.get_running_loop().getaddrinfo(host, 80)

        for _ in range(40):
            with pytest.raises(TimeoutError):
                background.run(look_up("hangs"), 0.001)
        assert background.run(look_up("127.0.0.1"), 30)
        assert lookups.count("hangs") == 1

    def test_one_that_fails_is_tried_anew(self):
        """Its error is the caller's."""
        background = Background()

        async def look_up() -> None:
            await asyncio.get_running_loop().getaddrinfo("no such name", -1)

        for _ in range(2):
            with pytest.raises(socket.gaierror):
                background.run(look_up(), 30)

    def test_a_process_ends_while_one_hangs(self):
        """It would wait for ever for a thread of asyncio's own."""
        ended = subprocess.run(
            [sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=120, check=False
        )
        assert (ended.stdout, ended.returncode) == ("in time\n", 0), ended.stderr
