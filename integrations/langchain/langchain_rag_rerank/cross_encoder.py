"""A reranker as LangChain's `BaseCrossEncoder`."""

from typing import TYPE_CHECKING

from langchain_core.cross_encoders import BaseCrossEncoder

if TYPE_CHECKING:
    from langchain_rag_rerank.ways import Reranker


class RerankerCrossEncoder(BaseCrossEncoder):
    """Scores pairs of texts with a reranker's scorer, such as for ``CrossEncoderReranker``.

    Args:
        reranker: Whose scorer is used, as it is at each call.
    """

    def __init__(self, reranker: "Reranker") -> None:
        self._reranker = reranker

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """Score each pair of query and document.

        Raises:
            TypeError: Something is no pair of texts.
            rag_rerank.ConfigError, rag_rerank.BackendError: No scores; there is nothing to be passed through.
        """
        for position, pair in enumerate(text_pairs):
            if isinstance(pair, str) or len(pair) != 2:
                raise TypeError(f"text_pairs[{position}] must be a pair: (query, document)")
        queries, documents = [query for query, _ in text_pairs], [document for _, document in text_pairs]
        alike = len(queries) > 1 and all(query == queries[0] for query in queries)  # one query's documents, as a rule
        return self._reranker.scorer.score(queries[:1] if alike else queries, documents)
