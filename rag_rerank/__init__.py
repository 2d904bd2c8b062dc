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
    from rag_rerank.calibration import Calibrated as Calibrated
    from rag_rerank.calibration import Calibration as Calibration
    from rag_rerank.closeable import Closeable as Closeable
    from rag_rerank.errors import AuthError as AuthError
    from rag_rerank.errors import BackendError as BackendError
    from rag_rerank.errors import BackendRejected as BackendRejected
    from rag_rerank.errors import BackendUnavailable as BackendUnavailable
    from rag_rerank.errors import BadReply as BadReply
    from rag_rerank.errors import ConfigError as ConfigError
    from rag_rerank.errors import ContentError as ContentError
    from rag_rerank.errors import DeadlineExceeded as DeadlineExceeded
    from rag_rerank.errors import DocumentRejected as DocumentRejected
    from rag_rerank.errors import RerankError as RerankError
    from rag_rerank.fallback import FallbackScorer as FallbackScorer
    from rag_rerank.identity import Identity as Identity
    from rag_rerank.inputs.content import Content as Content
    from rag_rerank.inputs.content import Image as Image
    from rag_rerank.inputs.content import Input as Input
    from rag_rerank.inputs.content import Video as Video
    from rag_rerank.integration import LocalSettings as LocalSettings
    from rag_rerank.integration import VLLMSettings as VLLMSettings
    from rag_rerank.integration import did_you_mean as did_you_mean
    from rag_rerank.integration import path_as_text as path_as_text
    from rag_rerank.local import LocalScorer as LocalScorer
    from rag_rerank.ranking import Ranked as Ranked
    from rag_rerank.scorer import Scorer as Scorer
    from rag_rerank.telemetry import Load as Load
    from rag_rerank.template import Template as Template
    from rag_rerank.vllm import VLLMScorer as VLLMScorer

__version__ = "0.1.0"

_HOME = {
    "Content": "inputs.content",
    "Image": "inputs.content",
    "Input": "inputs.content",
    "Video": "inputs.content",
    "AuthError": "errors",
    "BackendError": "errors",
    "BackendRejected": "errors",
    "BackendUnavailable": "errors",
    "BadReply": "errors",
    "ConfigError": "errors",
    "ContentError": "errors",
    "DeadlineExceeded": "errors",
    "DocumentRejected": "errors",
    "RerankError": "errors",
    "Calibrated": "calibration",
    "Calibration": "calibration",
    "FallbackScorer": "fallback",
    "LocalSettings": "integration",
    "VLLMSettings": "integration",
    "did_you_mean": "integration",
    "path_as_text": "integration",
    "LocalScorer": "local",
    "Identity": "identity",
    "Closeable": "closeable",
    "Ranked": "ranking",
    "Scorer": "scorer",
    "Load": "telemetry",
    "Template": "template",
    "VLLMScorer": "vllm",
}
__all__ = [  # noqa: PLE0604 - one list of names, kept in _HOME
    "__version__",
    *_HOME,
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
