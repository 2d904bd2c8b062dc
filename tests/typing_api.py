"""Type-checked by tests/test_typing.py, never run: what users write must be understood by their type checkers."""

from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore

import langchain_rag_rerank as langchain
import llama_index.postprocessor.rag_rerank as llama_index
from rag_rerank import FallbackScorer, Identity, LocalScorer, Ranked, RerankError, Scorer, VLLMScorer


def scorers() -> Scorer:
    servers = VLLMScorer(["http://a:8000", "http://b:8000"], model="m", timeout=5, use_activation=False)
    return FallbackScorer(servers, LocalScorer("m", dtype="bfloat16", device="cuda:1"))


def scores(scorer: Scorer) -> list[float]:
    return scorer.score("q", ["a"]) + scorer.score(["q", "r"], ("a", "b"), deadline=1.5) + scorer.score("q", "a")


async def ranked(scorer: Scorer) -> list[list[Ranked]]:
    async with scorer:
        one = await scorer.arerank("q", ["a"], top_n=1, score_threshold=0.5, on_error="passthrough")
        return [one, *scorer.rerank_batch(["q"], [["a", "b"]])]


async def outcomes(scorer: Scorer) -> list[list[Ranked] | RerankError]:
    again = await scorer.arerank_batch(["q"], [["a"]], instruction="Find it.", on_error="return")
    return scorer.rerank_batch(["q"], [["a", "b"]], on_error="return") + again


def same(scorer: Scorer, before: Identity) -> bool:
    return not scorer.identity(deadline=5).differences(before)


def settings() -> tuple[str, list[str] | str | None]:
    local = langchain.LocalReranker(model="m", device="cpu", top_n=None, document_formatter=lambda d: d.page_content)
    remote = langchain.VLLMReranker(base_url=["http://a:8000"], instruction="Find it.", on_error="passthrough")
    langchain.ScorerReranker(scorer=scorers(), score_threshold=0.5)
    return local.model, remote.base_url


def documents(local: langchain.LocalReranker) -> tuple[list[Document], list[langchain.RerankResult]]:
    local.warmup()
    return local.invoke({"query": "q", "documents": []}, top_n=3), local.rerank(["a"], "q", top_n=3)


def nodes(found: list[NodeWithScore]) -> list[NodeWithScore]:
    reranker = llama_index.VLLMReranker(base_url="http://a:8000", top_n=3)
    other = llama_index.ScorerReranker(scorer=scorers(), top_n=3)
    return reranker.postprocess_nodes(found, query_str="q") + other.postprocess_nodes(found, query_str="q")
