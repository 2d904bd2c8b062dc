"""Scoring on a vLLM server over HTTP."""

from rag_rerank.vllm.scorer import VLLMScorer

__all__ = ["VLLMScorer"]
