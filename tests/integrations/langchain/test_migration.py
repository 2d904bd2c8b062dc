"""What the guide says about other rerankers is true: its code runs, before and after, and its table is complete."""

import ast
import importlib
import math
import re
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import Document

from langchain_rag_rerank import LocalReranker, VLLMReranker
from tests.vllm_server import VLLMServer

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "pages" / "langchain.md"
SECTION = GUIDE.read_text(encoding="utf-8").partition("## Coming from another reranker")[2]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)

# The arguments of the versions that were current when this was written: langchain-classic 1.0.8, langchain-community
# 0.4.2, langchain-cohere 0.6.0, langchain-reranker 0.1.4.
THEIRS = {
    "CrossEncoderReranker": {"model", "top_n"},
    "HuggingFaceCrossEncoder": {"client", "model_name", "model_kwargs"},
    "FlashrankRerank": {"client", "top_n", "score_threshold", "model", "prefix_metadata"},
    "CohereRerank": {"client", "top_n", "model", "cohere_api_key", "base_url", "user_agent"},
    "JinaRerank": {"session", "top_n", "model", "jina_api_key", "user_agent"},
    "HttpReranker": {"model", "top_n", "base_url", "endpoint", "api_key", "timeout"},
}
NO_SETTINGS = {"client", "session", "user_agent"}  # of nobody who asks a server of their own

QUERY = "how do bears sleep in winter"
TEXTS = ["a recipe for bread", "bears sleep in winter", "how to sleep well", "bears eat fish", "winter is coming"]


class Move(NamedTuple):
    """How one class is replaced."""

    name: str
    before: str
    after: str


MOVES = [Move(part.partition("\n")[0].strip(), *BLOCK.findall(part)) for part in SECTION.split("\n### ")[1:]]
both = pytest.mark.parametrize("move", MOVES, ids=lambda move: move.name)


def calls(code: str) -> dict[str, set[str]]:
    """The arguments of each class that is called."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    names = [node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id for node in nodes]
    return {name: {keyword.arg for keyword in node.keywords} for name, node in zip(names, nodes, strict=True)}


def table() -> tuple[list[str], list[list[str]]]:
    """The columns' names, and for each row its cells."""
    lines = [line for line in SECTION.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [name.strip("`") for name in rows[0]], rows[2:]


def quoted(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


def run(code: str, folder: Path | None = None, base_url: str | None = None) -> Any:
    """The reranker that the code makes, with a model and a server that are there."""
    if folder is not None:
        code = re.sub(r'"(BAAI|cross-encoder)/[\w.-]+"', repr(str(folder)), code)
    if base_url is not None:
        code = code.replace("http://localhost:8000", base_url)
    space: dict[str, Any] = {}
    exec(compile(code, str(GUIDE), "exec"), space)  # noqa: S102 - ours
    return space["reranker"]


def order(reranker: Any) -> list[str]:
    documents = [Document(page_content=text) for text in TEXTS]
    return [document.page_content for document in reranker.compress_documents(documents, QUERY)]


def test_there_is_a_move_for_each():
    """And one column of the table."""
    assert [move.name for move in MOVES] == [name for name in THEIRS if name != "HuggingFaceCrossEncoder"]
    assert table()[0] == ["here", *(move.name for move in MOVES)]


@both
def test_the_code_uses_arguments_that_there_are(move: Move):
    """Of theirs, as far as they are installed, and of ours."""
    for name, arguments in calls(move.before).items():
        assert arguments <= THEIRS[name]
    [(name, arguments)] = calls(move.after).items()
    assert arguments <= {"LocalReranker": LocalReranker, "VLLMReranker": VLLMReranker}[name].model_fields.keys()


@both
def test_the_recorded_arguments_are_those_of_the_package(move: Move):
    """Where it is installed."""
    space: dict[str, Any] = {}
    for node in ast.walk(ast.parse(move.before)):
        if isinstance(node, ast.ImportFrom):
            pytest.importorskip(node.module)
            exec(ast.unparse(node), space)  # noqa: S102 - ours
    for thing in list(space.values()):
        space.update(vars(thing) if isinstance(thing, types.ModuleType) else {})
    assert {name: set(space[name].model_fields) for name in calls(move.before)} == {
        name: THEIRS[name] for name in calls(move.before)
    }


@both
def test_the_table_has_all_of_their_arguments(move: Move):
    """And names only those that there are, in its first column of ours."""
    columns, rows = table()
    ours = LocalReranker.model_fields.keys() | VLLMReranker.model_fields.keys()
    assert {name for row in rows for name in quoted(row[0])} <= ours
    theirs = set().union(*(quoted(row[columns.index(move.name)]) for row in rows))
    known = THEIRS[move.name]
    if move.name == "CrossEncoderReranker":
        known = known | THEIRS["HuggingFaceCrossEncoder"]
    assert theirs == known - NO_SETTINGS


@pytest.mark.parametrize("move", [move for move in MOVES if "LocalReranker" in move.after], ids=lambda move: move.name)
def test_what_comes_after_runs_in_process(move: Move, cross_encoder: Path):
    """With the tiny model in the place of the named one."""
    with run(move.after, folder=cross_encoder) as reranker:
        assert len(order(reranker)) == 3


def test_before_and_after_give_the_same_order(cross_encoder: Path, monkeypatch: pytest.MonkeyPatch):
    """From LangChain's own class over a cross-encoder of sentence-transformers."""
    transformers = pytest.importorskip("sentence_transformers")

    class HuggingFaceCrossEncoder(BaseCrossEncoder):
        """What langchain-community has, which is no longer maintained."""

        def __init__(self, model_name: str, model_kwargs: dict[str, Any]):
            self.client = transformers.CrossEncoder(model_name, **model_kwargs)

        def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
            return self.client.predict(text_pairs, show_progress_bar=False)

    package = types.ModuleType("langchain_community")
    module = types.ModuleType("langchain_community.cross_encoders")
    module.HuggingFaceCrossEncoder = HuggingFaceCrossEncoder
    monkeypatch.setitem(sys.modules, "langchain_community", package)
    monkeypatch.setitem(sys.modules, "langchain_community.cross_encoders", module)
    move = next(move for move in MOVES if move.name == "CrossEncoderReranker")
    before = run(move.before, folder=cross_encoder)
    with run(move.after, folder=cross_encoder) as after:
        assert order(before) == order(after)


def test_the_threshold_in_logits_is_the_one_in_probabilities():
    """-2.2 and 0.1."""
    move = next(move for move in MOVES if move.name == "FlashrankRerank")
    before, after = (float(re.search(r"score_threshold=(-?[\d.]+)", code)[1]) for code in (move.before, move.after))
    assert 1 / (1 + math.exp(-after)) == pytest.approx(before, abs=0.001)


@pytest.mark.parametrize("move", [move for move in MOVES if "VLLMReranker" in move.after], ids=lambda move: move.name)
def test_what_comes_after_runs_on_a_server(move: Move, vllm_minilm: VLLMServer, monkeypatch: pytest.MonkeyPatch):
    """In the same order as what came before, where that is installed."""
    code = [part.replace("BAAI/bge-reranker-v2-m3", vllm_minilm.name) for part in (move.before, move.after)]
    with run(code[1], base_url=vllm_minilm.base_url) as after:
        expected = order(after)
    assert len(expected) == 3
    module = next(node.module for node in ast.walk(ast.parse(move.before)) if isinstance(node, ast.ImportFrom))
    try:
        importlib.import_module(module)
    except ImportError:
        return
    before = run(code[0], base_url=vllm_minilm.base_url)
    if move.name == "CohereRerank":  # 0.6.0 sends null for what vLLM 0.32 wants as a number
        with pytest.raises(Exception, match="max_tokens_per_doc"):
            order(before)
    else:
        assert order(before) == expected
