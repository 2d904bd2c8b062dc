"""Bi-encoders: each text embedded by itself, the score is the cosine of query and document.

Weaker than a cross-encoder of the same size but cheaper, and what an embedding model served by vLLM answers to
``/score``. No prompts are added, as vLLM adds none.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from rag_rerank.errors import ConfigError
from rag_rerank.local.models.encoding import encode, room
from rag_rerank.local.models.model import Inputs, Pace, TokenSequence
from rag_rerank.local.transformer.transformer import States, Transformer, most

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pooling = Callable[[States], Tensor]
"""From the states of a batch to float32 ``[sequences, size]``."""


@dataclass(frozen=True, slots=True)
class BiEncoder:
    """An encoder with the pooling of a sentence-transformers folder.

    Attributes:
        lower_case: Whether texts are lowered before the tokenizer sees them (``do_lower_case`` of old folders).
    """

    transformer: Transformer
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    pooling: Pooling
    lower_case: bool = False

    sees: ClassVar[bool] = False

    @property
    def pace(self) -> Pace:
        """The transformer's."""
        return self.transformer.pace

    def inputs(self, queries: list[str], documents: list[str]) -> Inputs:
        """One sequence per different text: a query that 100 documents share is embedded once."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(queries + documents))}
        texts = [text.lower() for text in rows] if self.lower_case else list(rows)
        query_rows, document_rows = [rows[text] for text in queries], [rows[text] for text in documents]

        def cosines(embeddings: Tensor) -> list[float]:
            scores: list[float] = (embeddings[query_rows] * embeddings[document_rows]).sum(dim=1).tolist()
            return scores

        return Inputs(encode(self.tokenizer, texts, None, self.max_length), cosines)

    def room(self, queries: Sequence[str]) -> list[int]:
        """How many tokens of a document are read beside each of the queries."""
        return [room(self.tokenizer, self.max_length)] * len(queries)

    def batches(self, sequences: Sequence[TokenSequence], token_budget: int) -> list[list[int]]:
        """The transformer's."""
        return self.transformer.batches(sequences, token_budget)

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Unit embeddings ``[len(sequences), size]``, pooled in float32 whatever the model computes in."""
        return torch.nn.functional.normalize(self.pooling(self.transformer.states(sequences)), dim=1)


def _mean(states: States) -> Tensor:
    tokens, owners = states.flat()
    sums = tokens.new_zeros(len(states.lengths), tokens.shape[1], dtype=torch.float32)
    counts = (states.lasts - states.firsts + 1).unsqueeze(1)
    return sums.index_add_(0, owners, tokens.float()) / counts


def _max(states: States) -> Tensor:
    tokens, owners = states.flat()
    return most(tokens.float(), owners, len(states.lengths))


def _first(states: States) -> Tensor:
    return states.first().float()


def _last(states: States) -> Tensor:
    return states.last().float()


_POOLINGS: dict[str, Pooling] = {"mean": _mean, "max": _max, "cls": _first, "lasttoken": _last}


def pooling_of(config: Mapping[str, Any]) -> Pooling:
    """The pooling that ``1_Pooling/config.json`` names, in its newer (``pooling_mode``) or older (one flag each) form.

    Raises:
        ConfigError: A mode other than mean, max, cls and lasttoken, or several at once.
    """
    modes = config.get("pooling_mode")
    if modes is None:
        flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        modes = [flag.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for flag in flags]
    names = [modes] if isinstance(modes, str) else list(modes)
    if len(names) != 1 or names[0] not in _POOLINGS:
        raise ConfigError(
            f"pooling {' + '.join(names) or '(none)'} is not supported; these are: {', '.join(sorted(_POOLINGS))}"
        )
    return _POOLINGS[names[0]]
