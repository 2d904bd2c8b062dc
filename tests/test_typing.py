"""The public interface as type checkers see it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
WRONG = """
import langchain_rag_rerank
from rag_rerank import VLLMScorer

VLLMScorer(top_k=3)
VLLMScorer().score("q", [None])
langchain_rag_rerank.LocalReranker(model=3)
langchain_rag_rerank.LocalReranker(top_k=3)
langchain_rag_rerank.LocalReranker().rerank(["a"], "q", top_k=3)
"""
# With these, which no public signature names, it takes three times as long.
CONFIG = """
[mypy]
strict = true
[mypy-torch.*,transformers.*,ray.*]
follow_imports = skip
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What mypy says, strictly, of two users' files. One run: most of its time goes into the frameworks."""
    folder = tmp_path_factory.mktemp("users")
    shutil.copy(ROOT / "tests" / "typing_api.py", folder / "right.py")
    (folder / "wrong.py").write_text(WRONG, encoding="utf-8")
    (folder / "mypy.ini").write_text(CONFIG, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--cache-dir", ROOT / ".mypy_cache" / "users", "right.py", "wrong.py"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=600)
    assert asked.returncode == 1, asked.stderr
    return asked.stdout.splitlines()


def test_what_users_write_is_understood(said: list[str]):
    """Names, types and results of everything that a page of the documentation shows."""
    assert not [line for line in said if line.startswith("right.py")]


@pytest.mark.parametrize("line", range(5, 10))
def test_what_is_wrong_is_told(said: list[str], line: int):
    """An unknown setting and a wrong document of a scorer; an adapter's wrong and unknown settings."""
    assert any(text.startswith(f"wrong.py:{line}: error") for text in said)
