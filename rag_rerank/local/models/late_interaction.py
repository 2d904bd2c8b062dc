"""Late interaction (ColBERT): a vector per token, scored by how well each query token is met by some document token.

The score is the sum, over the tokens of the query, of the largest dot product with any token of the document. What a
checkpoint declares decides which tokens are compared; vLLM compares all, special ones too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from rag_rerank.local.models.encoding import TextEncoder
from rag_rerank.local.models.model import Inputs
from rag_rerank.local.transformer.batching import TokenSequence
from rag_rerank.local.transformer.transformer import States, Transformer, largest_of_each

# What sentence-transformers gives to a document of which no token is compared.
_NOTHING_COMPARED = -1e9


@dataclass(slots=True, eq=False)
class _Query:
    """A query that many documents share; its vectors come with the first batch that needs them."""

    sequence: TokenSequence
    vectors: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Document(TokenSequence):
    """A document, and the query that it is scored against."""

    against: _Query


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenEmbedder(TextEncoder):
    """An encoder with a projection of its token states."""

    layers: torch.nn.Module  # from states to token vectors; float32 whatever the encoder computes in
    skipped: frozenset[int] = frozenset()  # tokens that are not compared
    kept: frozenset[int] = frozenset()  # if any, the only tokens that are compared
    expand_to: int = 0  # how many tokens a query is filled up to
    expand_with: int = 0
    attend: bool = True  # whether what it is filled up with is attended to

    def encode(self, texts: list[str]) -> list[TokenSequence]:
        """Tokenise texts, and fill them up."""
        return [self._expanded(sequence) for sequence in super(TokenEmbedder, self).encode(texts)]

    def embed(self, states: States, sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
        """Give the vectors that are compared, float32 ``[tokens, size]``, and which sequence each is of."""
        tokens, owners, _ = states.flat()
        vectors: Tensor = self.layers(tokens.float())
        if not self.skipped and not self.kept:
            return vectors, owners
        ids = [token for sequence in sequences for token in sequence.ids]
        compared = [token not in self.skipped and (not self.kept or token in self.kept) for token in ids]
        rows = torch.tensor(compared, device=vectors.device)
        return vectors[rows], owners[rows]

    def _expanded(self, sequence: TokenSequence) -> TokenSequence:
        missing = self.expand_to - len(sequence.ids)
        if missing <= 0:
            return sequence
        ids, types = sequence.ids + [self.expand_with] * missing, sequence.types and sequence.types + [0] * missing
        return replace(sequence, ids=ids, types=types, unattended=0 if self.attend else missing)


@dataclass(frozen=True, slots=True)
class LateInteraction:
    """Compares the token vectors of queries and documents.

    A document is reduced to its score in the batch that encodes it, on the device. Kept until the call ends, the
    vectors of 1,000 documents of 512 tokens would be 262 MB (128 numbers each, float32), all copied from the GPU.
    """

    query: TokenEmbedder
    document: TokenEmbedder
    mean: bool = False  # whether scores are divided by the number of the query's tokens

    @property
    def transformer(self) -> Transformer:
        """The documents'."""
        return self.document.transformer

    def document_space(self, queries: list[str], _instruction: str | None = None) -> list[int]:
        """Count the tokens of a document that are read, whatever the query."""
        return [self.document.space()] * len(queries)

    def inputs(self, queries: list[str], documents: list[str], _instruction: str | None = None) -> Inputs:
        """Make one sequence per pair, its document; a query is encoded once, however many documents it has."""
        if len(queries) == 1:
            queries = queries * len(documents)
        different = list(dict.fromkeys(queries))
        shared = dict(zip(different, map(_Query, self.query.encode(different)), strict=True))
        cut = {query: shared[query].sequence.truncated for query in different}  # each counts once
        sequences = [
            _Document(text.ids, text.types, truncated=text.truncated + cut.pop(query, 0), against=shared[query])
            for query, text in zip(queries, self.document.encode(documents), strict=True)
        ]
        return Inputs(sequences, lambda outputs: outputs[:, 0].tolist())

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Compute scores ``[len(sequences), 1]``."""
        documents = cast("Sequence[_Document]", sequences)  # the engine hands back what `inputs` made
        rows_of: dict[_Query, list[int]] = {}
        for row, document in enumerate(documents):
            rows_of.setdefault(document.against, []).append(row)
        query_vectors = self._query_vectors(rows_of)
        states = self.transformer.states(documents)
        scores = torch.empty(len(documents), dtype=torch.float32, device=states.tokens.device)
        for query, rows in zip(query_vectors, rows_of.values(), strict=True):
            vectors, owners = self.document.embed(states.select(rows), [documents[row] for row in rows])
            sums = largest_of_each(vectors @ query.T, owners, len(rows)).sum(dim=1).clamp(min=_NOTHING_COMPARED)
            scores[rows] = sums / len(query) if self.mean else sums
        return scores.unsqueeze(1)

    def _query_vectors(self, queries: Iterable[_Query]) -> list[Tensor]:
        missing = [query for query in queries if query.vectors is None]
        transformer = self.query.transformer
        for batch in transformer.batches([query.sequence for query in missing], transformer.batching.token_budget):
            group = [missing[position] for position in batch]
            sequences = [query.sequence for query in group]
            vectors, owners = self.query.embed(transformer.states(sequences), sequences)
            counts = torch.bincount(owners, minlength=len(group)).tolist()
            for query, rows in zip(group, torch.split(vectors, counts), strict=True):
                query.vectors = rows.clone()  # a view would keep those of all queries alive
        return [cast("Tensor", query.vectors) for query in queries]
