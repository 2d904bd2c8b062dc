"""Rerank documents for retrieval-augmented generation, locally or on a vLLM server, with the same scores.

    from rag_rerank import LocalScorer, VLLMScorer

    scorer = LocalScorer()                                   # or VLLMScorer("http://localhost:8000")
    scorer.rerank("what is a panda?", ["hi", "a bear"])      # [Ranked(index=1, score=...), Ranked(index=0, score=...)]

Names are loaded when first used (PEP 562), so ``import rag_rerank`` costs milliseconds: neither torch nor httpx nor any
framework comes with it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rag_rerank.calibration import Calibrated, Calibration
    from rag_rerank.closeable import Closeable
    from rag_rerank.errors import (
        AuthError,
        BackendError,
        BackendRejected,
        BackendUnavailable,
        BadReply,
        ConfigError,
        ContentError,
        DeadlineExceeded,
        DocumentRejected,
        RerankError,
    )
    from rag_rerank.fallback import FallbackScorer
    from rag_rerank.identity import Identity
    from rag_rerank.inputs.content import Content, Image, Input, Video
    from rag_rerank.integration import LocalSettings, VLLMSettings, did_you_mean, path_as_text
    from rag_rerank.local import LocalScorer
    from rag_rerank.ranking import Ranked
    from rag_rerank.scorer import Scorer
    from rag_rerank.telemetry import Load
    from rag_rerank.template import Template
    from rag_rerank.vllm import VLLMScorer

__version__ = "0.1.0"
__all__ = ["__version__", "AuthError", "BackendError", "BackendRejected", "BackendUnavailable", "BadReply"]
__all__ += ["ConfigError", "ContentError", "DeadlineExceeded", "DocumentRejected", "RerankError"]
__all__ += ["Content", "Image", "Input", "Video", "Ranked", "Scorer", "LocalScorer", "VLLMScorer", "FallbackScorer"]
__all__ += ["Calibrated", "Calibration", "Identity", "Load", "Template"]
__all__ += ["LocalSettings", "VLLMSettings", "did_you_mean", "path_as_text", "Closeable"]

_MODULES = {
    "inputs.content": {"Content", "Image", "Input", "Video"},
    "integration": {"LocalSettings", "VLLMSettings", "did_you_mean", "path_as_text"},
    "calibration": {"Calibrated", "Calibration"},
    "fallback": {"FallbackScorer"},
    "local": {"LocalScorer"},
    "vllm": {"VLLMScorer"},
    "scorer": {"Scorer"},
    "ranking": {"Ranked"},
    "identity": {"Identity"},
    "telemetry": {"Load"},
    "template": {"Template"},
    "closeable": {"Closeable"},
}  # the others are errors


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = next((module for module, names in _MODULES.items() if name in names), "errors")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
