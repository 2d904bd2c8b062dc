"""Cross-encoders: query and document read together, one logit a pair."""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from rag_rerank.errors import ConfigError
from rag_rerank.local.models.model import Inputs, Pace, TokenSequence
from rag_rerank.local.models.prompts import Prompts
from rag_rerank.local.transformer.batching import by_length
from rag_rerank.local.transformer.transformer import Padded, States, Transformer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from rag_rerank.local.models.vision.prompts import PicturePrompts

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class PairModel:
    """What models that read query and document together have in common: a sequence and a logit for each pair.

    Attributes:
        activation: From logits to scores, elementwise.
        transformer: The model without its head.
    """

    prompts: "Prompts | PicturePrompts"
    activation: Activation
    transformer: Transformer

    @property
    def pace(self) -> Pace:
        """The transformer's."""
        return self.transformer.pace

    @property
    def sees(self) -> bool:
        """Whether it was made for pictures, too."""
        return self.prompts.sees

    def inputs(self, queries: list[Any], documents: list[Any]) -> Inputs:
        """One sequence per pair."""
        return Inputs(self.prompts.sequences(queries, documents), self._scores)

    def room(self, queries: Sequence[Any]) -> list[int]:
        """How many tokens of a document are read beside each of the queries."""
        return self.prompts.room(queries)

    def batches(self, sequences: Sequence[TokenSequence], token_budget: int) -> list[list[int]]:
        """The transformer's."""
        return self.transformer.batches(sequences, token_budget)

    def _scores(self, logits: Tensor) -> list[float]:
        scores: list[float] = self.activation(logits[:, 0]).tolist()
        return scores


@dataclass(frozen=True, slots=True)
class CrossEncoder(PairModel):
    """A transformer and the head of its ``*ForSequenceClassification``, with one label."""

    head: "Head"

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Logits ``[len(sequences), 1]``."""
        return self.head.logits(self.transformer.states(sequences)).float()


@dataclass(frozen=True, slots=True)
class WholeCrossEncoder(PairModel):
    """A ``*ForSequenceClassification`` of an architecture that we don't know: run as it is, in padded batches."""

    transformer: Padded  # of the whole model, head included

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Logits ``[len(sequences), 1]``."""
        logits: Tensor = self.transformer.model(**self.transformer.inputs(sequences)).logits
        return logits.float()


class Head:
    """What a ``*ForSequenceClassification`` does with the states of its transformer, as transformers wrote it.

    It is the model itself, with something in the transformer's place that answers with states that we have already. So
    no family's head (pooler, dense layers, activation, mean or first token) is written twice.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self._given = _Given(getattr(model.base_model, "pooler", None))
        self._model = copy.copy(model)
        self._model._modules = {**model._modules, model.base_model_prefix: self._given}
        pooling = getattr(model.config, "classifier_pooling", "cls")  # ModernBERT, EuroBERT
        self._first_only = pooling in ("cls", "bos")

    def logits(self, states: States) -> Tensor:
        """Logits ``[sequences, 1]``."""
        if self._first_only:
            firsts = states.first().unsqueeze(1)
            return self._logits(firsts, torch.ones(firsts.shape[:2], dtype=torch.int64, device=firsts.device))
        # Like lengths together: one long sequence must not make all others as long.
        groups = by_length(states.lengths, 2 * sum(states.lengths))
        logits = torch.cat([self._logits(*states.some(group).padded()) for group in groups])
        return logits[torch.tensor([row for group in groups for row in group]).argsort()]

    def _logits(self, states: Tensor, mask: Tensor) -> Tensor:
        with self._given.answering(states):
            # Some heads ask the ids for the size of the batch.
            logits: Tensor = self._model(input_ids=mask, attention_mask=mask).logits
        return logits


class _Given(torch.nn.Module):
    """Answers as a transformer would, with states that are given, to each thread its own."""

    def __init__(self, pooler: torch.nn.Module | None) -> None:
        super().__init__()
        self.pooler = pooler
        self._thread = threading.local()

    @contextlib.contextmanager
    def answering(self, states: Tensor) -> Iterator[None]:
        """Give these states to this thread, for a while."""
        self._thread.states = states
        try:
            yield
        finally:
            del self._thread.states

    def forward(self, *_: object, **__: object) -> BaseModelOutputWithPooling:
        """The states, and what the transformer's pooler makes of them."""
        states = self._thread.states
        pooled = None if self.pooler is None else self.pooler(states)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=pooled)


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
