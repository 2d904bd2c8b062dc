"""The adapters use the core by its public names only, and the versions go together."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import rag_rerank

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(ROOT.glob("integrations/langchain/langchain_*/*.py")) + sorted(
    ROOT.glob("integrations/llama_index/llama_index/**/*.py")
)


def core_names(tree: ast.AST) -> Iterator[str]:
    """Every name of rag_rerank that a module imports or touches."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] == "rag_rerank":
                yield from ((module.partition(".")[2] + "." + alias.name).lstrip(".") for alias in node.names)
            case ast.Import():
                yield from (alias.name for alias in node.names if alias.name.startswith("rag_rerank."))
            case ast.Attribute(value=ast.Name(id="rag_rerank")):
                yield node.attr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_public_names_of_the_core_are_used(source: Path):
    """What is not in rag_rerank.__all__ may change without notice."""
    assert set(core_names(ast.parse(source.read_text(encoding="utf-8")))) <= set(rag_rerank.__all__)


def test_there_is_something_to_check():
    """Both adapters are found."""
    assert len(SOURCES) >= 6


@pytest.mark.parametrize("adapter", ["langchain", "llama_index"])
def test_adapters_ask_for_this_version_of_the_core(adapter: str):
    """All three are released together."""
    project = tomllib.loads((ROOT / "integrations" / adapter / "pyproject.toml").read_text())["project"]
    assert project["version"] == rag_rerank.__version__
    assert any(need.startswith(f"rag-rerank>={rag_rerank.__version__}") for need in project["dependencies"])
