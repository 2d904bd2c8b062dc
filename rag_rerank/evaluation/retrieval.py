"""The first stage: BM25."""

import re
from collections.abc import Mapping
from typing import Any

import bm25s
import Stemmer

from rag_rerank.errors import ConfigError

LANGUAGES = (*Stemmer.algorithms(), "none", "characters")


class BM25:
    """A BM25 index of texts by id: Lucene's variant, k1 1.2, b 0.75.

    Args:
        documents: The texts.
        language: Whose Snowball stems are compared, ``"english"`` without stop words; ``"none"`` for words as they are,
            or ``"characters"`` for pairs of neighbouring characters, where no spaces part the words. A ConfigError for
            any other.
    """

    def __init__(self, documents: Mapping[str, str], language: str = "english") -> None:
        if language not in LANGUAGES:
            raise ConfigError(f"the language {language!r} is none of {', '.join(LANGUAGES)}")
        self._ids, self._language = list(documents), language
        self._stemmer = None if language in ("none", "characters") else Stemmer.Stemmer(language)
        self._index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
        tokens = self._tokens(list(documents.values()))
        self._has_words = bool(tokens.vocab)  # an index of none can't be made
        if self._has_words:
            self._index.index(tokens, show_progress=False)

    def retrieve(self, query: str, depth: int) -> dict[str, float]:
        """Find the `depth` best documents, best first, with their scores; fewer if fewer share a word with it."""
        if not self._has_words:
            return {}
        rows, scores = self._index.retrieve(self._tokens([query]), k=min(depth, len(self._ids)), show_progress=False)
        # Documents with score 0 share no word with the query: keeping them would inflate recall on small collections.
        return {self._ids[row]: float(score) for row, score in zip(rows[0], scores[0], strict=True) if score > 0}

    def _tokens(self, texts: list[str]) -> Any:
        texts = [text.encode(errors="replace").decode() for text in texts]  # stemmers take no halves of characters
        if self._language == "characters":
            words = [re.findall(r"\w+", text) for text in texts]
            texts = [" ".join(word[at : at + 2] for word in each for at in range(len(word) - 1)) for each in words]
        stopwords: Any = "en" if self._language == "english" else []
        return bm25s.tokenize(texts, stopwords=stopwords, stemmer=self._stemmer, show_progress=False)
