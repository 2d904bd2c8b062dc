"""Scoring inside this process with torch and transformers (extra `local`)."""

from rag_rerank.local.scorer import LocalScorer

__all__ = ["LocalScorer"]
