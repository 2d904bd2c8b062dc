"""Rerankers built on decoders (Qwen, Gemma, Llama, ...): the score is read from the last token's state.

A ``*ForSequenceClassification`` has a row of weights for it. A ``*ForCausalLM`` answers a question with a word, and the
score is the logit of that word (``Yes``), or how much more likely it is than its opposite (``yes`` against ``no``):
again one row, taken from the output layer, or the difference of two. So both are one thing here, and of an output layer
of 150,000 rows at most two are ever computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rag_rerank.errors import ConfigError
from rag_rerank.local.cross_encoder import PairModel
from rag_rerank.local.encoding import padded
from rag_rerank.local.model import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Decoder(PairModel):
    """A decoder and the row that makes a logit of its last state.

    Attributes:
        model: Without its output layer or head.
        row: float32 ``[hidden]``, on the model's device.
    """

    model: torch.nn.Module
    row: Tensor

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Logits ``[len(sequences), 1]``."""
        # Padding on the right is never seen: a token attends only to those before it.
        batch = padded(sequences, self.prompts.tokenizer.pad_token_id or 0, self.row.device)
        states: Tensor = self.model(**batch, use_cache=False).last_hidden_state
        last = batch["attention_mask"].sum(dim=1) - 1
        # The head in float32 whatever the model computes in, as vLLM has it.
        logits = states[torch.arange(len(states), device=states.device), last].float() @ self.row
        return logits.unsqueeze(1).cpu()


def token_row(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> Tensor:
    """The row of a causal model that scores with one token, or with the second of two against the first.

    Args:
        model: With its output layer.
        tokenizer: The model's.
        tokens: ``(true,)`` or ``(false, true)``, each one entry of the vocabulary.

    Raises:
        ConfigError: A token is not one entry of the vocabulary, or there are not one or two.
    """
    if len(tokens) not in (1, 2):
        raise ConfigError(f"classifier_tokens must be (true,) or (false, true), got {len(tokens)} tokens")
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    for token, number in zip(tokens, ids, strict=True):
        if number is None or tokenizer.convert_ids_to_tokens(number) != token:
            raise ConfigError(f"the classifier token {token!r} is not an entry of the model's vocabulary")
    weight: Tensor = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    rows = weight[ids].detach().float()
    return rows[0] if len(tokens) == 1 else rows[1] - rows[0]
