"""How far a local score may be from that of a real server, family by family: the guide says it, the tests hold it."""

import shlex

from rag_rerank.families import family
from rag_rerank.template import SHIPPED

_FAMILIES, _TEMPLATES, _IMAGES = (f"tests/vllm/test_{name}_parity.py" for name in ("family", "template", "image"))
_T5 = "tests/local/models/test_sequence_to_sequence.py"

PARITY: dict[str, tuple[float, str]] = {
    "qwen3-reranker": (3e-5, _TEMPLATES),
    "qwen3-reranker-seq-cls": (3e-5, _TEMPLATES),
    "qwen3-vl-reranker": (3e-5, _IMAGES),
    "jina-reranker-v3": (1e-5, _FAMILIES),
    "jina-reranker-m0": (6e-5, _IMAGES),
    "mxbai-rerank-v2": (7e-5, _TEMPLATES),
    "bge-reranker-v2-gemma": (4e-5, _TEMPLATES),
    "zerank-2": (1e-5, _TEMPLATES),
    "nemotron-rerank": (5e-6, _FAMILIES),
    "gte-multilingual-reranker": (1e-5, _FAMILIES),
    "jina-reranker-v2": (1e-5, _FAMILIES),
    "colbert-modernbert": (2e-5, _FAMILIES),
    "jina-colbert-v2": (3e-5, _FAMILIES),
    "lfm2-colbert": (3e-5, _FAMILIES),
    "mxbai-rerank-v1": (1e-4, "tests/local/test_architectures.py"),
    "monot5": (1e-5, _T5),
}
"""From a family to the largest difference of two logits, or sums of dot products, that was seen on a tiny model with
its architecture, rounded up; and the test that sees it."""

SAME = {"zerank-2-seq-cls": "qwen3-reranker-seq-cls", "ctxl-rerank-v2": "zerank-2", "mt5-mmarco": "monot5"}
"""Families that are run like another, and are not compared apart."""


def largest_known(name: str, otherwise: float) -> float:
    """The largest difference that was seen with a family; `otherwise` with what is none."""
    return PARITY.get(name, (otherwise, ""))[0]


def model_name(name: str) -> str:
    """What a folder must be called to be a model of a family; the name itself where there is no such family."""
    if name not in PARITY:
        return name
    return family(name).models[0].rpartition("/")[2].replace("*", "tiny")


def flags(name: str) -> list[str]:
    """The flags that the table has for a family; none where there is no such family."""
    if name not in PARITY:
        return []
    return shlex.split(family(name).vllm_flags.replace("{template}", str(SHIPPED / f"{family(name).template}")))
