"""Documents longer than the model's window: scored as overlapping passages, by their best one.

MaxP of Dai and Callan, "Deeper Text Understanding for IR with Contextual Neural Language Modeling", SIGIR 2019
(https://arxiv.org/abs/1905.09217): each passage overlaps half of the one before it, and a document is as relevant as
its most relevant passage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rag_rerank.inputs.multimodal import Prepared
from rag_rerank.local.models.model import Inputs, Model, Pace, TokenSequence

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# Where a query leaves less than this for the document, its passages would be snippets: such a pair is cut instead.
LEAST_ROOM = 32


@dataclass(frozen=True, slots=True)
class MaxPassage:
    """A model of any kind that sees a long document as passages.

    Attributes:
        prompt: What stands before each document, and so before each passage.
    """

    model: Model
    tokenizer: "PreTrainedTokenizerBase"
    prompt: str = ""

    @property
    def pace(self) -> Pace:
        """The model's."""
        return self.model.pace

    @property
    def sees(self) -> bool:
        """The model's."""
        return self.model.sees

    def inputs(self, queries: list[Any], documents: list[Any]) -> Inputs:
        """The model's, of the passages; the best score of each document's. One with pictures is read as one."""
        rooms = self.model.room(queries)
        if len(queries) == 1:
            queries, rooms = queries * len(documents), rooms * len(documents)
        cut = [self._passages(document, room) for document, room in zip(documents, rooms, strict=True)]
        inputs = self.model.inputs(
            [query for query, passages_ in zip(queries, cut, strict=True) for _ in passages_],
            [passage for passages_ in cut for passage in passages_],
        )

        def best(outputs: "Tensor") -> list[float]:
            scores = iter(inputs.scores(outputs))
            return [max(next(scores) for _ in passages_) for passages_ in cut]

        return Inputs(inputs.sequences, best)

    def room(self, queries: Sequence[Any]) -> list[int]:
        """The model's, of a passage."""
        return self.model.room(queries)

    def batches(self, sequences: Sequence[TokenSequence], token_budget: int) -> list[list[int]]:
        """The model's."""
        return self.model.batches(sequences, token_budget)

    def run(self, sequences: Sequence[TokenSequence]) -> "Tensor":
        """The model's."""
        return self.model.run(sequences)

    def _passages(self, document: Prepared, room: int) -> Sequence[Prepared]:
        if not isinstance(document, str):
            return [document]
        text = document.removeprefix(self.prompt)
        if self.prompt and len(text) < len(document):
            room -= len(self.tokenizer(self.prompt, add_special_tokens=False)["input_ids"])
        if room < LEAST_ROOM:
            return [document]
        prompt = document[: len(document) - len(text)]
        return [prompt + passage for passage in passages(self.tokenizer, text, room)]


def passages(tokenizer: "PreTrainedTokenizerBase", text: str, size: int) -> list[str]:
    """Cut a text into passages of `size` tokens, each overlapping half of the one before; the last ends with the text.

    A text that fits is its own and only passage. Passages are pieces of the original text.
    """
    offsets = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False, split_special_tokens=True
    )["offset_mapping"]
    if len(offsets) <= size:
        return [text]
    step = size // 2
    starts = [*range(0, len(offsets) - size, step), len(offsets) - size]
    return [text[offsets[start][0] : offsets[start + size - 1][1]] for start in starts]
