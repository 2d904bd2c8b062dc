"""Bi-encoders: each text embedded by itself, the score is how alike the embeddings of query and document are.

An embedding model served by vLLM answers the cosine to ``/score``, and adds no prompts.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from rag_rerank.local.models.encoding import TextEncoder
from rag_rerank.local.models.model import Inputs
from rag_rerank.local.transformer.batching import TokenSequence
from rag_rerank.local.transformer.transformer import States, Transformer


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Embedder(TextEncoder):
    """An encoder, and what makes one vector of a text's states, float32 ``[sequences, size]``."""

    head: Callable[[States], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text(TokenSequence):
    """A text, and what embeds it."""

    embedder: Embedder


@dataclass(frozen=True, slots=True)
class BiEncoder:
    """Embeds queries and documents, each in its own way or both in one."""

    query: Embedder
    document: Embedder  # the query's where both are embedded in one way
    similarity: str = "cosine"  # of `SIMILARITIES`

    @property
    def transformer(self) -> Transformer:
        """The documents'."""
        return self.document.transformer

    def document_space(self, queries: list[str], _instruction: str | None = None) -> list[int]:
        """Count the tokens of a document that are read, whatever the query."""
        return [self.document.space()] * len(queries)

    def inputs(self, queries: list[str], documents: list[str], _instruction: str | None = None) -> Inputs:
        """Make one sequence per different text: a query that 100 documents share is embedded once."""
        wanted = [(self.query, text) for text in queries] + [(self.document, text) for text in documents]
        rows = {key: row for row, key in enumerate(dict.fromkeys(wanted))}
        query_rows = [rows[self.query, text] for text in queries]
        document_rows = [rows[self.document, text] for text in documents]
        sequences: list[TokenSequence] = []
        for embedder, keys in itertools.groupby(rows, key=lambda key: key[0]):
            sequences += (
                _Text(ids=text.ids, types=text.types, truncated=text.truncated, embedder=embedder)
                for text in embedder.encode([text for _, text in keys])
            )
        compare = SIMILARITIES[self.similarity]
        return Inputs(sequences, lambda vectors: compare(vectors[query_rows], vectors[document_rows]).tolist())

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Compute embeddings, float32 ``[len(sequences), size]``."""
        texts = cast("Sequence[_Text]", sequences)  # the engine hands back what `inputs` made
        rows_of: dict[Embedder, list[int]] = {}
        for row, text in enumerate(texts):
            rows_of.setdefault(text.embedder, []).append(row)
        parts = [each.head(each.transformer.states([texts[row] for row in rows])) for each, rows in rows_of.items()]
        order = torch.tensor([row for rows in rows_of.values() for row in rows]).argsort()
        return parts[0] if len(parts) == 1 else torch.cat(parts)[order]


SIMILARITIES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": functools.partial(torch.nn.functional.cosine_similarity, eps=1e-12),
    "dot": lambda queries, documents: (queries * documents).sum(dim=1),
    "euclidean": lambda queries, documents: -(queries - documents).norm(dim=1),
    "manhattan": lambda queries, documents: -(queries - documents).abs().sum(dim=1),
}
"""From the vectors of queries and documents, ``[pairs, size]`` each, to scores."""
