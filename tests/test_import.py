"""`import rag_rerank` is cheap and its public names are complete."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import rag_rerank
from tests.examples import ROOT

HEAVY = {"torch", "transformers", "httpx", "jinja2", "numpy", "langchain_core", "llama_index", "typer", "rich", "ray"}


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded in a fresh interpreter that has run `code`."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )


def test_importing_the_package_loads_nothing_heavy():
    """Neither torch, transformers, httpx nor a framework comes with the import."""
    assert modules_after("import rag_rerank") & HEAVY == set()


def test_building_a_local_scorer_loads_neither_torch_nor_transformers():
    """Construction is free: the first call pays."""
    loaded = modules_after("import rag_rerank; s = rag_rerank.LocalScorer('x'); assert s.score('q', []) == []")
    assert loaded & {"torch", "transformers", "httpx"} == set()


def test_building_a_remote_scorer_loads_no_torch():
    """A client of a server needs no torch."""
    assert modules_after("import rag_rerank; rag_rerank.VLLMScorer()") & {"torch", "transformers", "numpy"} == set()


def test_the_command_line_loads_what_a_command_needs():
    """All commands are put together without what only some of them use: --help is there at once."""
    heavy = {"torch", "transformers", "httpx", "jinja2", "numpy", "pyarrow", "ray", "bm25s"}
    assert modules_after("import rag_rerank.cli.app") & heavy == set()


@pytest.mark.parametrize("name", rag_rerank.__all__)
def test_every_public_name_is_there(name: str):
    """Each name of __all__ can be had and is listed by dir()."""
    assert getattr(rag_rerank, name) is not None
    assert name in dir(rag_rerank)


def test_an_unknown_name_is_an_attribute_error():
    """Lazy names do not turn typing errors into something else."""
    with pytest.raises(AttributeError, match="LocalScorerr"):
        rag_rerank.LocalScorerr  # noqa: B018


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.name)
def test_benchmarks_find_what_they_import(path: Path):
    """No other test runs them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in {"rag_rerank", "benchmarks"}:
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}"), name.name
