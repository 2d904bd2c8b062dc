"""LangChain document compressors that rerank with rag_rerank: in this process or on a vLLM server.

Importing the package imports neither torch nor transformers nor an HTTP client nor langchain-classic; they come when
a reranker needs them.
"""

from langchain_rag_rerank.base import RerankInput
from langchain_rag_rerank.rerank import LocalReranker, ScorerReranker, VLLMReranker

__version__ = "0.1.0"
__all__ = ["VLLMReranker", "LocalReranker", "ScorerReranker", "RerankInput", "__version__"]
