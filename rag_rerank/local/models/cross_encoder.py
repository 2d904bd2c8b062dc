"""Cross-encoders: query and document read together, one logit a pair."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rag_rerank.errors import ConfigError
from rag_rerank.local.models.model import Inputs
from rag_rerank.local.models.prompts import Prompts
from rag_rerank.local.transformer.batching import TokenSequence
from rag_rerank.local.transformer.transformer import Padded, States, Transformer

if TYPE_CHECKING:
    from rag_rerank.local.models.vision.prompts import ImagePrompts

Activation = Callable[[Tensor], Tensor]
Head = Callable[[States], Tensor]  # from the states of a batch to logits [sequences, labels], of one label or two


@dataclass(frozen=True, slots=True)
class PairModel:
    """A model that reads query and document together: a sequence and a logit for each pair."""

    prompts: "Prompts | ImagePrompts"
    activation: Activation  # from logits to scores, elementwise
    transformer: Transformer  # without its head
    head: Head

    def inputs(self, queries: list[Any], documents: list[Any], instruction: str | None = None) -> Inputs:
        """Make one sequence per pair."""
        sequences = self.prompts.instructed(instruction).sequences(queries, documents)
        return Inputs(sequences, lambda logits: self.activation(logits[:, 0]).tolist())

    def document_space(self, queries: list[Any], instruction: str | None = None) -> list[int]:
        """Count the tokens of a document that are read beside each of the queries."""
        return self.prompts.instructed(instruction).document_space(queries)

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Compute logits ``[len(sequences), 1]``."""
        logits = self.head(self.transformer.states(sequences)).float()
        # Of two, the second says "relevant": its share in their softmax is the sigmoid of the difference.
        return logits if logits.shape[1] == 1 else logits[:, 1:] - logits[:, :1]


@dataclass(frozen=True, slots=True)
class Whole(Padded):
    """A ``*ForSequenceClassification`` of an architecture that we don't know: run as it is, its logits as states."""

    def states(self, sequences: Sequence[TokenSequence]) -> States:
        """Run one batch, head included."""
        logits: Tensor = self.model(**self.inputs(sequences)).logits
        rows = torch.arange(len(sequences), device=logits.device)
        return States(logits, rows, rows, [1] * len(sequences))


def classification_head(model: Any) -> Head:
    """Take the head off a ``*ForSequenceClassification`` of one of `ENCODERS`, as transformers wrote it."""
    kind = model.config.model_type
    if kind in ("bert", "gte"):
        return lambda states: model.classifier(model.base_model.pooler(states.first().unsqueeze(1)))
    if kind in ("camembert", "electra", "roberta", "xlm-roberta"):
        return lambda states: model.classifier(states.first().unsqueeze(1))  # takes the first token by itself
    if kind == "distilbert":
        return lambda states: model.classifier(torch.relu(model.pre_classifier(states.first())))
    dense = (model.head,) if kind == "modernbert" else (model.dense, model.activation)
    layers, pooling = torch.nn.Sequential(*dense, model.classifier), model.config.classifier_pooling
    if pooling in ("cls", "bos"):
        return lambda states: layers(states.first())
    if pooling == "mean":
        return lambda states: layers(states.mean().to(states.tokens.dtype))
    if pooling == "late":  # the logits of all tokens, averaged
        return lambda states: states.mean(layers)
    raise ConfigError(f"classifier_pooling={pooling!r} is not supported; these are: bos, cls, late, mean")
