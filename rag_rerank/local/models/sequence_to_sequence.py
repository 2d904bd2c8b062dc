"""Rerankers that answer with a word in one step of a decoder, behind an encoder that reads the prompt (monoT5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from rag_rerank.local.transformer.batching import Batching, TokenSequence
from rag_rerank.local.transformer.transformer import Padded, States


@dataclass(frozen=True, slots=True)
class FirstStep(Padded):
    """A ``*T5ForConditionalGeneration``, run until it knows its first word; gives that word's logits as states."""

    @classmethod
    def of(cls, model: Any, pad_id: int | None, batching: Batching, ids: Sequence[int] | None = None) -> Self:
        """Have the model compute the logits of the tokens `ids` only, and in float32."""
        if ids is not None:
            rows = model.get_output_embeddings().weight[list(ids)].detach().float()
            head = torch.nn.Linear(rows.shape[1], len(ids), bias=False, device=rows.device, dtype=torch.float32)
            head.load_state_dict({"weight": rows})
            head.register_forward_pre_hook(lambda _, states: (states[0].float(),))
            model.set_output_embeddings(head)
        return cls(model, pad_id or 0, batching)

    def states(self, sequences: Sequence[TokenSequence]) -> States:
        """Run one batch."""
        rows = torch.arange(len(sequences), device=self.model.device)
        first = torch.full_like(rows, self.model.config.decoder_start_token_id).unsqueeze(1)
        logits: Tensor = self.model(**self.inputs(sequences), decoder_input_ids=first).logits
        return States(logits[:, 0], rows, rows, [1] * len(sequences))
