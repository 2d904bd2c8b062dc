"""From pairs to token sequences for models that read a prompt: a rendered template, or query and document as a pair.

What is too long is cut from the document: the end of a prompt is where a causal reranker's score is read, and vLLM's
own ``truncate_prompt_tokens`` would cut just that.
"""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from rag_rerank.errors import BackendRejected
from rag_rerank.inputs import NEUTRAL
from rag_rerank.local.models.encoding import Truncation, encode, truncate
from rag_rerank.local.transformer.batching import TokenSequence
from rag_rerank.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words may join over the edges of a document: a prompt has a few tokens more or less than its parts.
SLACK = 8


@dataclass(frozen=True, slots=True)
class Prompts:
    """Makes the token sequences of pairs."""

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int  # of a sequence, in tokens
    template: Template | None = None  # None encodes query and document as the tokenizer's pair
    variables: Mapping[str, Any] = field(default_factory=dict)  # for the template, such as the instruction
    truncation: Truncation = "longest_first"  # from which of a plain pair the tokens beyond `max_length` are cut
    prompt: str = ""  # before the query of a plain pair
    end: tuple[int, ...] = ()  # tokens behind a rendered template
    special: bool = False  # whether a prompt spells special tokens

    def instructed(self, instruction: str | None) -> Self:
        """Give the same with a call's own instruction; None keeps the scorer's."""
        return self if instruction is None else replace(self, variables={**self.variables, "instruction": instruction})

    def sequences(self, queries: Sequence[str], documents: Sequence[str]) -> list[TokenSequence]:
        """Make one sequence per pair, of one query for all documents or one each; see `no_space`."""
        rows = list(queries) * len(documents) if len(queries) == 1 else list(queries)
        if self.template is None:
            return self._pairs(rows, list(documents))
        pairs = zip(rows, documents, strict=True)
        prompts = [self.template.render(query, document, self.variables) for query, document in pairs]
        spaces: dict[str, int] = {}
        sequences = []
        for ids, query, document in zip(self._prompt_ids(prompts), rows, documents, strict=True):
            fitting = ids
            if len(ids) + SLACK > self.max_length:
                if query not in spaces:
                    [spaces[query]] = self.document_space([query])
                fitting = self._shortened(self.template, ids, query, document, spaces[query])
            sequences.append(TokenSequence(fitting, group=self.group(query), truncated=fitting is not ids))
        return sequences

    def group(self, query: Hashable) -> Hashable:
        """Name the group of a query's prompts: those with another instruction would have less in common with them."""
        return query, str(self.variables.get("instruction"))

    def document_space(self, queries: Sequence[str]) -> list[int]:
        """Count the tokens of a document that fit beside each query."""
        if self.template is None:
            special = self.tokenizer.num_special_tokens_to_add(pair=True)
            texts = [self.prompt + query for query in queries]
            taken = [len(ids) + special for ids in self._ids(texts, add_special_tokens=False)]
        else:
            # Measured with a document rather than without, because that is what can be measured on a server, too.
            prompts = [self.template.render(query, NEUTRAL, self.variables) for query in queries]
            taken = [len(ids) for ids in self._prompt_ids(prompts)]
        return [self.max_length - tokens for tokens in taken]

    def _pairs(self, queries: list[str], documents: list[str]) -> list[TokenSequence]:
        if self.truncation == "only_second" and min(self.document_space(list(dict.fromkeys(queries))), default=1) < 1:
            raise no_space(self.max_length)
        queries = [self.prompt + query for query in queries]
        sequences = encode(self.tokenizer, queries, documents, self.max_length, self.truncation, special=self.special)
        # vLLM tokenises pair by pair, and tokenizer(query, "") takes the empty document for none: [CLS] q [SEP] instead
        # of [CLS] q [SEP] [SEP]. Another score (4e-3 in one logit), so we do as the server does.
        empty = [position for position, document in enumerate(documents) if not document]
        without = [queries[position] for position in empty]
        alone = encode(self.tokenizer, without, None, self.max_length, special=self.special)
        for position, sequence in zip(empty, alone, strict=True):
            sequences[position] = sequence
        return sequences

    def _shortened(self, template: Template, ids: list[int], query: str, document: str, space: int) -> list[int]:
        """Cut the document of a prompt to `space` tokens or fewer, as `VLLMScorer` has the server do."""
        while True:
            if space < 1:
                raise no_space(self.max_length)
            beginning = truncate(self.tokenizer, document, space)
            if len(beginning) < len(document):
                ids = self._prompt_ids([template.render(query, beginning, self.variables)])[0]
            if len(ids) <= self.max_length:
                return ids
            space -= len(ids) - self.max_length

    def _prompt_ids(self, prompts: list[str]) -> list[list[int]]:
        return [[*ids, *self.end] for ids in self._ids(prompts)]

    def _ids(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=add_special_tokens, padding=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids


@dataclass(frozen=True, slots=True)
class ChatPrompts(Prompts):
    """Makes the token sequences that sentence-transformers makes with a checkpoint's own chat template.

    What is too long is cut from the end of all that stands before the template's last tokens.
    """

    def _shortened(self, template: Template, ids: list[int], query: str, document: str, space: int) -> list[int]:
        if len(ids) <= self.max_length:
            return ids
        if space < 1:
            raise no_space(self.max_length)
        if self.tokenizer.truncation_side == "left":
            return ids[-self.max_length :]
        # Two prompts that have nothing in common but the template.
        first, second = self._ids([template.render(text, text, self.variables) for text in ("0", "1 2 3 4")])
        backwards = zip(reversed(first), reversed(second), strict=False)
        end = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], backwards))
        return ids[: self.max_length - end] + first[len(first) - end :]

    def _ids(self, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        return super(ChatPrompts, self)._ids(texts, add_special_tokens=add_special_tokens)


def no_space(max_length: int) -> BackendRejected:
    """Make the error for a query that leaves a document none of so many tokens."""
    return BackendRejected(
        f"a query, with its template, leaves no room for a document in the {max_length} tokens that the model reads",
        remedy="Shorten the query or instruction, or set max_tokens_per_query.",
    )
