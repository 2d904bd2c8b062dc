"""The READMEs are true: their examples run as they stand and print what stands below them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READMES = ["README.md", "integrations/langchain/README.md", "integrations/llama_index/README.md"]
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def examples(with_output: bool) -> list[object]:
    """(code, output) of every Python block, with its place in the file as its name."""
    return [
        pytest.param(match[1], match[2], id=f"{readme}-{number}")
        for readme in READMES
        for number, match in enumerate(EXAMPLE.finditer((ROOT / readme).read_text(encoding="utf-8")), 1)
        if bool(match[2]) == with_output
    ]


@pytest.mark.parametrize(("code", "printed"), examples(with_output=True))
def test_an_example_prints_what_stands_below_it(code: str, printed: str):
    """In an interpreter of its own, as a reader would try it."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == printed


@pytest.mark.parametrize(("code", "printed"), examples(with_output=False))
def test_an_example_without_output_compiles(code: str, printed: None):
    """It needs a server or a vector store of yours."""
    compile(code, "README.md", "exec")


def test_the_tree_of_the_readme_is_the_tree_of_the_package():
    """Every module stands in it, and nothing that is not there."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What is where")[2].partition("```\n\n")[0]
    named = set(re.findall(r"(\w+\.py)\b", tree.partition("integrations/")[0]))
    there = {path.name for path in (ROOT / "rag_rerank").rglob("*.py") if path.name != "__init__.py"}
    assert named == there
