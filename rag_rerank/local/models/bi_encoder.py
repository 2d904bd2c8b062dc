"""Bi-encoders: each text embedded by itself, the score is the cosine of query and document.

Weaker than a cross-encoder of the same size but cheaper, and what an embedding model served by vLLM answers to
``/score``. No prompts are added, as vLLM adds none.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rag_rerank.errors import ConfigError
from rag_rerank.local.models.encoding import TextEncoder
from rag_rerank.local.models.model import Inputs
from rag_rerank.local.transformer.batching import TokenSequence
from rag_rerank.local.transformer.transformer import States, largest_of_each

Pooling = Callable[[States], Tensor]
"""From the states of a batch to float32 ``[sequences, size]``."""


@dataclass(frozen=True, slots=True)
class BiEncoder(TextEncoder):
    """An encoder with the pooling of a sentence-transformers folder.

    Attributes:
        pooling: Makes one vector of a sequence's states.
        lower_case: Whether texts are lowered before the tokenizer sees them (``do_lower_case`` of old folders).
    """

    pooling: Pooling
    lower_case: bool = False

    def inputs(self, queries: list[str], documents: list[str], _instruction: str | None = None) -> Inputs:
        """Make one sequence per different text: a query that 100 documents share is embedded once."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(queries + documents))}
        texts = [text.lower() for text in rows] if self.lower_case else list(rows)
        query_rows, document_rows = [rows[text] for text in queries], [rows[text] for text in documents]

        def cosines(embeddings: Tensor) -> list[float]:
            scores: list[float] = (embeddings[query_rows] * embeddings[document_rows]).sum(dim=1).tolist()
            return scores

        return Inputs(self.encode(texts), cosines)

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Compute unit embeddings ``[len(sequences), size]``, pooled in float32 whatever the model computes in."""
        return torch.nn.functional.normalize(self.pooling(self.transformer.states(sequences)), dim=1)


def _max(states: States) -> Tensor:
    tokens, owners = states.flat()
    return largest_of_each(tokens.float(), owners, len(states.lengths))


_POOLINGS: dict[str, Pooling] = {
    "mean": States.mean,
    "max": _max,
    "cls": lambda states: states.first().float(),
    "lasttoken": lambda states: states.last().float(),
}


def pooling_of(config: Mapping[str, Any]) -> Pooling:
    """Find the pooling that ``1_Pooling/config.json`` names: in ``pooling_mode``, or in older files by one flag each.

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
