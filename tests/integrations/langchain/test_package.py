"""What an import brings."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import langchain_rag_rerank
import rag_rerank

ROOT = Path(__file__).resolve().parents[3]


def test_importing_brings_only_what_langchain_core_brings():
    """Neither torch nor an HTTP client nor langchain-classic nor pytest, until they are needed; nor by construction."""
    program = """if True:
        import sys
        import langchain_core.callbacks, langchain_core.cross_encoders, langchain_core.documents
        import langchain_core.retrievers, langchain_core.runnables
        before = set(sys.modules)
        import langchain_rag_rerank
        heavy = {"torch", "transformers", "sentence_transformers", "httpx", "langchain_classic", "langchain_community"}
        heavy |= {"pytest", "_pytest", "langchain_rag_rerank.testing"}
        print(heavy & (set(sys.modules) - before))
        langchain_rag_rerank.LocalReranker()
        print(heavy & (set(sys.modules) - before))
    """
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], env=path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "set()"]


def test_only_public_names_of_the_core_are_used():
    """The adapter stands on rag_rerank.__all__, which versions may not change at will."""
    named = set(re.findall(r"\brag_rerank\.(\w+)", inspect.getsource(langchain_rag_rerank.rerank)))
    assert {"LocalScorer", "VLLMScorer"} <= named <= set(rag_rerank.__all__)


def test_the_public_names_are_there():
    """And each of them says what it is for."""
    for name in langchain_rag_rerank.__all__:
        assert getattr(langchain_rag_rerank, name)
        assert name.startswith("__") or inspect.getdoc(getattr(langchain_rag_rerank, name))
