"""LlamaIndex node postprocessors that rerank with a local model or a vLLM server, with the same scores.

    from llama_index.postprocessor.rag_rerank import VLLMReranker

    index.as_query_engine(node_postprocessors=[VLLMReranker(top_n=5)])

Importing this package loads neither torch nor httpx; what a reranker needs comes when one is made or first used.
"""

from llama_index.postprocessor.rag_rerank.base import QueryWithInstruction
from llama_index.postprocessor.rag_rerank.rerank import LocalReranker, ScorerReranker, VLLMReranker

__all__ = ["VLLMReranker", "LocalReranker", "ScorerReranker", "QueryWithInstruction"]
