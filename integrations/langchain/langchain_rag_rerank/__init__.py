"""LangChain document compressors that rerank with rag_rerank: in this process or on a vLLM server.

Importing the package imports neither torch nor transformers nor an HTTP client nor langchain-classic; they come when
a reranker needs them.
"""

from langchain_rag_rerank.documents import RerankInput, RerankResult
from langchain_rag_rerank.rerank import LocalReranker, ScorerReranker, VLLMReranker
from langchain_rag_rerank.retriever import RerankingRetriever

__version__ = "0.1.0"
__all__ = [
    "VLLMReranker",
    "LocalReranker",
    "ScorerReranker",
    "RerankingRetriever",
    "RerankInput",
    "RerankResult",
    "__version__",
]
