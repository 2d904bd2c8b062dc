"""The public interface as type checkers see it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def check(code: str, folder: Path) -> str:
    """What mypy says, strictly, of a user's file."""
    file = folder / "users.py"
    file.write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", str(folder / "cache")]
    return subprocess.run([*command, str(file)], capture_output=True, text=True, check=False, cwd=folder).stdout


def test_what_users_write_is_understood(tmp_path: Path):
    """Names, types and results of everything that a page of the documentation shows."""
    assert "Success" in check((ROOT / "tests" / "typing_api.py").read_text(encoding="utf-8"), tmp_path)


def test_what_is_wrong_is_told(tmp_path: Path):
    """A wrong setting of a scorer, and one of an adapter."""
    code = """
import langchain_rag_rerank
from rag_rerank import VLLMScorer

VLLMScorer(top_k=3)
VLLMScorer().score("q", [None])
langchain_rag_rerank.LocalReranker(model=3)
"""
    said = check(code, tmp_path)
    for number in (5, 6, 7):
        assert f"users.py:{number}: error" in said, said
