"""Rerankers that answer with a word in one step of a decoder, behind an encoder that reads the prompt (monoT5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rag_rerank.local.transformer.batching import TokenSequence
from rag_rerank.local.transformer.transformer import Padded, States


@dataclass(frozen=True, slots=True)
class FirstStep(Padded):
    """A ``*T5ForConditionalGeneration``, run until it knows its first word; gives that word's logits as states."""

    def states(self, sequences: Sequence[TokenSequence]) -> States:
        """Run one batch."""
        first = torch.full((len(sequences), 1), self.model.config.decoder_start_token_id, device=self.model.device)
        logits: Tensor = self.model(**self.inputs(sequences), decoder_input_ids=first).logits
        return States.of_rows(logits, [1] * len(sequences))
