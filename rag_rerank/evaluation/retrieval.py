"""The first stage: BM25."""

import re
from collections.abc import Mapping
from typing import Any

import bm25s
import numpy as np
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
        [words] = self._tokens([query], return_ids=False)
        known = self._index.get_tokens_ids(words) if self._has_words else []
        if not known:
            return {}
        scores = self._index.get_scores_from_ids(known)
        # Documents with score 0 share no word with the query: keeping them would inflate recall on small collections.
        rows = np.flatnonzero(scores > 0)
        # Not the index's own search: which of several equal documents it leaves out depends on the processor.
        best = rows[np.argsort(-scores[rows], kind="stable")][:depth]
        return {self._ids[row]: float(scores[row]) for row in best}

    def _tokens(self, texts: list[str], *, return_ids: bool = True) -> Any:
        texts = [text.encode(errors="replace").decode() for text in texts]  # stemmers take no halves of characters
        if self._language == "characters":
            words = [re.findall(r"\w+", text) for text in texts]
            texts = [" ".join(word[at : at + 2] for word in each for at in range(len(word) - 1)) for each in words]
        stopwords: Any = "en" if self._language == "english" else []
        options = {"stopwords": stopwords, "stemmer": self._stemmer, "return_ids": return_ids}
        return bm25s.tokenize(texts, **options, show_progress=False)
