"""Listwise rerankers: all documents of a query in one prompt (jina-reranker-v3).

The score of a document is the cosine of two vectors: of the state at a mark behind the document, and of the one at a
mark behind the query. A document's score depends on those before it, so their order and company change it.
Lists that are too long for the window become blocks. Each document is then compared with the mean of the query's
vectors in all blocks, weighted by the best score of each, as in the repository's own code.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from rag_rerank.inputs import NEUTRAL
from rag_rerank.local.models.encoding import truncate
from rag_rerank.local.models.model import Inputs
from rag_rerank.local.models.prompts import SLACK, no_space
from rag_rerank.local.transformer.batching import TokenSequence
from rag_rerank.local.transformer.transformer import Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = "<|embed_token|>", "<|rerank_token|>"  # behind a document, behind the query
# Where a list is too long for one prompt: most documents in each, and where texts are cut.
BLOCK, DOCUMENT_TOKENS, QUERY_TOKENS = 125, 2048, 512
_MARK = re.compile("|".join(map(re.escape, MARKS)))  # in an instruction; other texts spell no special tokens

_BEFORE = (
    "<|im_start|>system\nYou are a search relevance expert who can determine a ranking of the passages based on how "
    "relevant they are to the query. If the query is a question, how relevant a passage is depends on how well it "
    "answers the question. If not, try to analyze the intent of the query and assess how well each passage satisfies "
    "the intent. If an instruction is provided, you should follow the instruction when determining the ranking."
    "<|im_end|>\n<|im_start|>user\n"
)
_BEHIND = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def prompt(query: str, documents: Sequence[str], instruction: str | None) -> str:
    """Write the prompt for the documents of a query."""
    return (
        f"{_BEFORE}I will provide you with {len(documents)} passages, each indicated by a numerical identifier. "
        f"Rank the passages based on their relevance to query: {query}\n"
        + (f"<instruct>\n{_MARK.sub('', instruction)}\n</instruct>\n" if instruction else "")
        + "".join(_passage(number, document) for number, document in enumerate(documents))
        + f"<query>\n{query}{MARKS[1]}\n</query>{_BEHIND}"
    )


def _passage(number: int, document: str) -> str:
    return f'<passage id="{number}">\n{document}{MARKS[0]}\n</passage>\n'


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block(TokenSequence):
    """A prompt, and where the vectors of its documents and of its query, the last, are read."""

    marks: Sequence[int]
    vectors: list[Tensor] = field(default_factory=list)  # once it was run: one of [documents + 1, size]


@dataclass(frozen=True, slots=True)
class Listwise:
    """A model that compares the documents of a query with each other."""

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int  # of a prompt, in tokens
    instruction: str | None
    marks: tuple[int, int]  # tokens, see `MARKS`
    transformer: Transformer
    projector: Callable[[Tensor], Tensor]  # from states to vectors that are compared, float32

    def inputs(self, queries: list[str], documents: list[str], instruction: str | None = None) -> Inputs:
        """Make the blocks of one query's documents; or, with a query for each, of each document alone."""
        instruction = self.instruction if instruction is None else instruction
        one = len(queries) == 1
        groups = [documents] if one else [[document] for document in documents]
        lists = [self._blocks(*each, instruction) for each in zip(queries, groups, strict=True)]
        blocks = [block for each in lists for block in each]
        return Inputs(blocks, lambda _: [score for each in lists for score in _scores(each)])

    def document_space(self, queries: list[str], instruction: str | None = None) -> list[int]:
        """Count the tokens of a document that are read beside each of the queries, measured as on a server."""
        instruction = self.instruction if instruction is None else instruction
        return [self.max_length - len(self._ids(prompt(query, [NEUTRAL], instruction))) for query in queries]

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Keep the vectors with their blocks; what is given, ``[len(sequences), 1]``, is finite if they are."""
        blocks = cast("Sequence[_Block]", sequences)  # the engine hands back what `inputs` made
        states = self.transformer.states(blocks)
        counts = [len(block.marks) for block in blocks]
        marks = torch.tensor([mark for block in blocks for mark in block.marks], device=states.tokens.device)
        starts = states.firsts.repeat_interleave(torch.tensor(counts, device=marks.device))
        vectors = torch.split(self.projector(states.tokens[starts + marks].float()), counts)
        for block, own in zip(blocks, vectors, strict=True):
            block.vectors[:] = [own]
        return torch.stack([own.sum().unsqueeze(0) for own in vectors])

    def _blocks(self, query: str, documents: list[str], instruction: str | None) -> list[_Block]:
        """Make one block where the window holds it, as a vLLM server does; else those of the repository's code."""
        whole = self._block(query, documents, instruction)
        if len(whole.ids) <= self.max_length:
            return [whole]
        many = len(documents) > 1
        asked = truncate(self.tokenizer, query, QUERY_TOKENS) if many else query
        [space] = self.document_space([asked], instruction)
        if space < 1:
            raise no_space(self.max_length)
        longest = min(DOCUMENT_TOKENS, space) if many else space
        texts = [truncate(self.tokenizer, document, longest) for document in documents]
        frame = len(self._ids(_passage(BLOCK, "")))
        groups: list[list[int]] = []
        left = 0
        for position, text in enumerate(texts):
            size = len(self._ids(text)) + frame
            if size > left or len(groups[-1]) == BLOCK:
                groups.append([])
                left = space + frame - SLACK
            groups[-1].append(position)
            left -= size
        blocks = []
        for group in groups:
            cut = (asked != query) + sum(texts[position] != documents[position] for position in group)
            block = self._block(asked, [texts[position] for position in group], instruction)
            blocks.append(replace(block, truncated=cut))
        return blocks

    def _block(self, query: str, documents: list[str], instruction: str | None) -> _Block:
        ids = self._ids(prompt(query, documents, instruction))
        return _Block(ids=ids, marks=[place for place, token in enumerate(ids) if token in self.marks])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids


def _scores(blocks: Sequence[_Block]) -> list[float]:
    vectors = [block.vectors[0] for block in blocks]
    query = vectors[0][-1]
    if len(vectors) > 1:
        best = torch.stack([(1 + _cosines(each[:-1], each[-1])).max() for each in vectors])
        query = best @ torch.stack([each[-1] for each in vectors])  # a cosine minds no scale
    return _cosines(torch.cat([each[:-1] for each in vectors]), query).tolist()


def _cosines(vectors: Tensor, query: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(vectors, query.unsqueeze(0))
