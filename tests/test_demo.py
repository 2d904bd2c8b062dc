"""`rag-rerank demo`, on a few queries: it runs, it helps, and the frameworks agree."""

import io

import pytest
from rich.console import Console

from rag_rerank import LocalScorer, Scorer, VLLMScorer
from rag_rerank.demo import run_demo
from tests.vllm_server import VLLMServer


def demonstrate(scorer: Scorer, limit: int) -> tuple[dict[str, float], str]:
    console = Console(file=io.StringIO(), width=160)
    figures = run_demo(scorer, console, model=scorer.model_name, limit=limit)
    return figures, console.file.getvalue()


def test_reranking_helps_and_the_terminal_shows_it(local: LocalScorer):
    """Higher nDCG@10 on the first 12 questions; three queries with what moved; one table of all."""
    figures, shown = demonstrate(local, 12)
    assert figures["nDCG@10 after"] > figures["nDCG@10 before"] + 0.1
    assert figures["RR@10 after"] > figures["RR@10 before"] + 0.1
    for words in ("Gained most", "Lost most", "Median", "All 12 queries", "MRR@10", "time per query", "▲"):
        assert words in shown


def test_both_frameworks_return_the_same_order(local: LocalScorer):
    """LangChain's compressor and LlamaIndex's postprocessor, on every query that is shown."""
    shown = demonstrate(local, 3)[1]
    assert shown.count("same order") == 2 * 3
    assert "differs" not in shown
    assert "not installed" not in shown


def test_a_server_gives_the_same_figures(vllm_minilm: VLLMServer, local: LocalScorer):
    """`rag-rerank demo --base-url`: the measures of both back ends agree."""
    with VLLMScorer(vllm_minilm.base_url, timeout=120) as remote:
        figures, shown = demonstrate(remote, 3)
    assert figures == pytest.approx(demonstrate(local, 3)[0], abs=1e-3)
    assert shown.count("same order") == 2 * 3
