"""From pairs to token sequences for models that read a prompt: a rendered template, or query and document as a pair.

What is too long is cut from the document, never from the query or the template: the end of a prompt is where a causal
reranker's score is read, and vLLM's own ``truncate_prompt_tokens`` would cut just that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from rag_rerank.errors import BackendRejected
from rag_rerank.inputs.multimodal import Multimodal, Prepared
from rag_rerank.isolation import NEUTRAL
from rag_rerank.local.models.encoding import Truncation, encode
from rag_rerank.local.models.model import Inputs, Model, Pace, TokenSequence
from rag_rerank.template import Template

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


# Words may join over the edges of a document: a prompt has a few tokens more or less than its parts.
SLACK = 8

PLACEHOLDER_TOKENS = 3
"""What stands for a picture in a prompt, ``<|vision_start|><|image_pad|><|vision_end|>``, before the model's view of
it takes the place of the middle one."""
LEAST_PER_PICTURE = 16
"""A lower limit leaves query or document as it is; so does `VLLMScorer`, which can't know a model's placeholder."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """Makes the token sequences of pairs.

    Attributes:
        max_length: Longest sequence, in tokens.
        template: None encodes query and document as the tokenizer's pair.
        variables: For the template, such as the instruction.
        truncation: From which of a plain pair the tokens beyond `max_length` are cut.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    template: Template | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    truncation: Truncation = "longest_first"
    sees: ClassVar[bool] = False

    def sequences(self, queries: Sequence[str], documents: Sequence[str]) -> list[TokenSequence]:
        """One sequence per pair.

        Args:
            queries: One for all documents, or one each.
            documents: The documents.

        Raises:
            BackendRejected: A query leaves no room for any document.
        """
        rows = list(queries) * len(documents) if len(queries) == 1 else list(queries)
        if self.template is None:
            return self._pairs(rows, list(documents))
        prompts = [
            self.template.render(query, document, self.variables)
            for query, document in zip(rows, documents, strict=True)
        ]
        rooms: dict[str, int] = {}
        sequences = []
        for ids, query, document in zip(self._ids(prompts), rows, documents, strict=True):
            cut_ids = ids
            if len(ids) + SLACK > self.max_length:
                if query not in rooms:
                    [rooms[query]] = self.room([query])
                cut_ids = self._shortened(self.template, ids, query, document, rooms[query])
            sequences.append(TokenSequence(cut_ids, query=query, cut=cut_ids is not ids))
        return sequences

    def room(self, queries: Sequence[str]) -> list[int]:
        """How many tokens of a document fit beside each query."""
        if self.template is None:
            special = self.tokenizer.num_special_tokens_to_add(pair=True)
            taken = [len(ids) + special for ids in self._ids(list(queries), add_special_tokens=False)]
        else:
            # Measured with a document rather than without, because that is what can be measured on a server, too.
            prompts = [self.template.render(query, NEUTRAL, self.variables) for query in queries]
            taken = [len(ids) for ids in self._ids(prompts)]
        return [self.max_length - tokens for tokens in taken]

    def _pairs(self, queries: list[str], documents: list[str]) -> list[TokenSequence]:
        sequences = encode(self.tokenizer, queries, documents, self.max_length, self.truncation)
        # vLLM tokenises pair by pair, and tokenizer(query, "") takes the empty document for none: [CLS] q [SEP] instead
        # of [CLS] q [SEP] [SEP]. Another score (4e-3 in one logit), so we do as the server does.
        empty = [position for position, document in enumerate(documents) if not document]
        alone = encode(self.tokenizer, [queries[position] for position in empty], None, self.max_length)
        for position, sequence in zip(empty, alone, strict=True):
            sequences[position] = sequence
        return sequences

    def _shortened(self, template: Template, ids: list[int], query: str, document: str, room: int) -> list[int]:
        """The prompt's tokens with the document cut to `room` tokens; to fewer, should the prompt still be too long.

        The same cut as `VLLMScorer` has the server make, and so the same score.
        """
        while True:
            if room < 1:
                raise no_room(self.max_length)
            beginning = cut(self.tokenizer, document, room)
            if len(beginning) < len(document):
                ids = self._ids([template.render(query, beginning, self.variables)])[0]
            if len(ids) <= self.max_length:
                return ids
            room -= len(ids) - self.max_length

    def _ids(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=add_special_tokens, padding=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids


def no_room(max_length: int) -> BackendRejected:
    """The error for a query that leaves a document none of so many tokens."""
    return BackendRejected(
        f"a query and its template leave no room for a document in the {max_length} tokens that the model reads",
        remedy="Shorten the query or instruction, or set max_tokens_per_query.",
    )


def cut(tokenizer: "PreTrainedTokenizerBase", text: str, max_tokens: int) -> str:
    """The beginning of `text` that is at most `max_tokens` tokens long, special tokens not counted.

    Cut between characters of the original text, not between tokens, because decoded tokens may encode to more of them.
    The same cut as vLLM's ``max_tokens_per_doc`` makes, and so the same score (vLLM 0.32,
    ``entrypoints/pooling/scoring/utils.py``).
    """
    if max_tokens <= 0:
        return ""
    while text:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if len(encoded["input_ids"]) <= max_tokens:
            break
        offsets = encoded["offset_mapping"]
        # A character may take several tokens, all with its offsets: it goes as a whole.
        end = min(offsets[max_tokens - 1][1], offsets[max_tokens][0])
        text = text[: min(end, len(text) - 1)]
    return text


@dataclass(frozen=True, slots=True)
class Limited:
    """A model of any kind whose queries and documents are cut before it sees them.

    Attributes:
        max_tokens_per_query, max_tokens_per_doc: None doesn't cut.
    """

    model: Model
    tokenizer: "PreTrainedTokenizerBase"
    max_tokens_per_query: int | None
    max_tokens_per_doc: int | None

    @property
    def pace(self) -> Pace:
        """The model's."""
        return self.model.pace

    @property
    def sees(self) -> bool:
        """The model's."""
        return self.model.sees

    def inputs(self, queries: list[Any], documents: list[Any]) -> Inputs:
        """The model's, of what is left."""
        return self.model.inputs(
            list(self._cut(queries, self.max_tokens_per_query)), list(self._cut(documents, self.max_tokens_per_doc))
        )

    def room(self, queries: Sequence[Any]) -> list[int]:
        """The model's."""
        return self.model.room(queries)

    def batches(self, sequences: Sequence[TokenSequence], token_budget: int) -> list[list[int]]:
        """The model's."""
        return self.model.batches(sequences, token_budget)

    def run(self, sequences: Sequence[TokenSequence]) -> "Tensor":
        """The model's."""
        return self.model.run(sequences)

    def _cut(self, inputs: Sequence[Prepared], limit: int | None) -> Sequence[Prepared]:
        return inputs if limit is None else [self._shortened(each, limit) for each in inputs]

    def _shortened(self, each: Prepared, limit: int) -> Prepared:
        if isinstance(each, str):
            return cut(self.tokenizer, each, limit)
        # vLLM counts a picture's placeholder and would cut that, too, where there is nothing else to cut.
        if limit < LEAST_PER_PICTURE * len(each.images):
            return each
        text = cut(self.tokenizer, each.text, limit - PLACEHOLDER_TOKENS * len(each.images))
        return Multimodal((*each.images, text))
