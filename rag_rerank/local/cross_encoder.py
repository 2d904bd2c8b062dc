"""Cross-encoders: query and document read together, one logit a pair."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rag_rerank.errors import ConfigError
from rag_rerank.local.encoding import padded
from rag_rerank.local.model import Inputs, TokenSequence
from rag_rerank.local.prompting import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class PairModel:
    """What models that read query and document together have in common: a sequence and a logit for each pair.

    Attributes:
        activation: From logits to scores, elementwise.
    """

    prompts: Prompts
    token_budget: int
    activation: Activation

    def inputs(self, queries: list[str], documents: list[str]) -> Inputs:
        """One sequence per pair."""
        return Inputs(self.prompts.sequences(queries, documents), self._scores)

    def _scores(self, logits: Tensor) -> list[float]:
        scores: list[float] = self.activation(logits[:, 0]).tolist()
        return scores


@dataclass(frozen=True, slots=True)
class CrossEncoder(PairModel):
    """A ``*ForSequenceClassification`` model with one label."""

    model: "PreTrainedModel"

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Logits ``[len(sequences), 1]``."""
        batch = padded(sequences, self.prompts.tokenizer.pad_token_id or 0, self.model.device)
        logits: Tensor = self.model(**batch).logits
        return logits.float().cpu()


def own_activation(config: "PreTrainedConfig") -> Activation:
    """The activation that a checkpoint asks for, found as vLLM finds it.

    In this order: ``problem_type``; the torch module that sentence-transformers wrote into the config (``Identity`` for
    ms-marco models of old: then scores are logits, not within 0 and 1); else sigmoid, as for one label everywhere.
    (vLLM 0.32, ``model_executor/layers/pooler/activations.py``.)

    Raises:
        ConfigError: The config names something outside ``torch.nn.modules``.
    """
    problem_type = getattr(config, "problem_type", None)
    if problem_type == "regression":
        return torch.nn.Identity()
    if problem_type in ("single_label_classification", "multi_label_classification"):
        return torch.sigmoid
    name = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    name = name or getattr(config, "sbert_ce_default_activation_function", None)
    if name is None:
        return torch.sigmoid
    module = getattr(torch.nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.modules.") else None
    if not (isinstance(module, type) and issubclass(module, torch.nn.Module)):
        raise ConfigError(f"the checkpoint asks for the activation {name!r}, which is not in torch.nn.modules")
    activation: Activation = module()
    return activation
