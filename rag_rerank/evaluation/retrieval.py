"""The first stage: BM25."""

from collections.abc import Mapping
from typing import Any

import bm25s
import Stemmer


class BM25:
    """A BM25 index of texts by id: Lucene's variant, k1 1.2, b 0.75, English stop words and Snowball stems."""

    def __init__(self, documents: Mapping[str, str]) -> None:
        self._ids = list(documents)
        self._stemmer = Stemmer.Stemmer("english")
        self._index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
        self._index.index(self._tokens(list(documents.values())), show_progress=False)

    def retrieve(self, query: str, depth: int) -> dict[str, float]:
        """Find the `depth` best documents, best first, with their scores; fewer if fewer share a word with it."""
        rows, scores = self._index.retrieve(self._tokens([query]), k=min(depth, len(self._ids)), show_progress=False)
        # Documents with score 0 share no word with the query: keeping them would inflate recall on small collections.
        return {self._ids[row]: float(score) for row, score in zip(rows[0], scores[0], strict=True) if score > 0}

    def _tokens(self, texts: list[str]) -> Any:
        return bm25s.tokenize(texts, stopwords="en", stemmer=self._stemmer, show_progress=False)
