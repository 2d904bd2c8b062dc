"""Cross-encoders: query and document read together, one logit a pair."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from rag_rerank.local.models.model import Inputs
from rag_rerank.local.models.prompts import Prompts
from rag_rerank.local.transformer.batching import TokenSequence
from rag_rerank.local.transformer.proof import Parts
from rag_rerank.local.transformer.transformer import Head, Padded, States, Transformer, from_transformers, looks_ahead

if TYPE_CHECKING:
    from rag_rerank.local.models.vision.prompts import ImagePrompts

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class PairModel:
    """A model that reads query and document together: a sequence and a logit for each pair."""

    prompts: "Prompts | ImagePrompts"
    activation: Activation  # from logits to scores, elementwise
    transformer: Transformer  # without its head
    head: Head  # gives one logit
    unread: int | None = None  # a token that no logit is read from at the end of a sequence

    def inputs(self, queries: list[Any], documents: list[Any], instruction: str | None = None) -> Inputs:
        """Make one sequence per pair."""
        sequences = self.prompts.instructed(instruction).sequences(queries, documents)
        return Inputs(list(map(self._read, sequences)), lambda logits: self.activation(logits[:, 0]).tolist())

    def _read(self, sequence: TokenSequence) -> TokenSequence:
        end = len(sequence.ids)
        while end > 1 and sequence.ids[end - 1] == self.unread:
            end -= 1
        if end == len(sequence.ids):
            return sequence
        return replace(sequence, ids=sequence.ids[:end], types=sequence.types and sequence.types[:end])

    def document_space(self, queries: list[Any], instruction: str | None = None) -> list[int]:
        """Count the tokens of a document that are read beside each of the queries."""
        return self.prompts.instructed(instruction).document_space(queries)

    @torch.inference_mode()
    def run(self, sequences: Sequence[TokenSequence]) -> Tensor:
        """Compute logits ``[len(sequences), 1]``."""
        return self.head(self.transformer.states(sequences))


def relevance(logits: Tensor) -> Tensor:
    """Make one logit of one or two: the second says "relevant", its share in their softmax is a sigmoid."""
    return logits if logits.shape[1] == 1 else logits[:, 1:] - logits[:, :1]


@dataclass(frozen=True, slots=True)
class Whole(Padded):
    """A ``*ForSequenceClassification`` of an architecture that we don't know: run as it is, its logits as states."""

    @classmethod
    def of(cls, model: Any, plain: Padded) -> Self:
        """Pad with the config's token, which the model may look for; as `plain` if it names none."""
        config = model.config.get_text_config()
        named = getattr(config, "pad_token_id", None)
        if named is None or named < 0:
            config.pad_token_id, named = -1, plain.pad_id  # no token: decoders refuse batches without one
        return cls(model, named, plain.device_batching)

    def states(self, sequences: Sequence[TokenSequence]) -> States:
        """Run one batch, head included."""
        return States.of_rows(self.model(**self.inputs(sequences)).logits.unsqueeze(1), [1] * len(sequences))


def make_head_precise(model: Any, stored: Callable[[Collection[str]], dict[str, Tensor]]) -> None:
    """Have what is behind the transformer compute in float32, as vLLM does, with its weights as they were `stored`.

    A head in bfloat16 gives many documents the same score: 41 of 100, where in float32 all differ.
    """
    body = model.base_model
    if model.dtype == torch.float32 or body is model:
        return
    parts = {name: part for name, part in model.named_children() if part is not body}
    if isinstance(pooler := getattr(body, "pooler", None), torch.nn.Module):
        parts[f"{model.base_model_prefix}.pooler"] = pooler
    weights = {f"{name}.{own}": weight for name, part in parts.items() for own, weight in part.named_parameters()}
    kept = stored(weights)
    for name, weight in weights.items():
        precise = kept.get(name, weight)
        # An adapter's weights, and those that transformers renames or reshapes, are not in the file as they are here.
        same = precise.shape == weight.shape and torch.equal(precise.to(weight), weight)
        weight.data = (precise if same else weight).detach().to(weight.device, torch.float32)
    for part in parts.values():
        part.float().register_forward_pre_hook(_in_float32, with_kwargs=True)


def _in_float32(_: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, arguments)), {name: cast(value) for name, value in options.items()}


def classifier_parts(model: Any, plain: Padded) -> Parts:
    """Take a ``*ForSequenceClassification`` apart, whose body `plain` runs; with an unknown head it is its body."""
    score, whole = getattr(model, "score", None), whole_parts(model.base_model, Whole.of(model, plain))
    # A checkpoint's own code may read its score from elsewhere (nemotron: the mean): that runs as it is. So does what
    # looks ahead: its score is read before padding that a text ends with, which can't be left out: it is attended to.
    if isinstance(score, torch.nn.Linear) and from_transformers(model) and not looks_ahead(model):
        # Padded, too, its last token is where we know it to be; transformers looks for a token that is no padding.
        precise = score.weight.detach().to(torch.float32, copy=True)  # it computes in float32, as vLLM has it

        def head(states: States) -> Tensor:
            return relevance(states.last().float() @ precise.to(states.tokens.device).T)

        return Parts(whole.body, head, plain, head, whole.outputs)
    known = classification_head(model)
    return whole if known is None else replace(whole, head=lambda states: relevance(known(states).float()))


def whole_parts(body: Any, plain: Padded) -> Parts:
    """Take a model for what gives its logits as states."""
    return Parts(body, None, plain, lambda states: relevance(states.tokens.float()))


def classification_head(model: Any) -> Head | None:
    """Take the head off a ``*ForSequenceClassification`` of an encoder, by its parts; None for another kind."""
    body, classifier = model.base_model, getattr(model, "classifier", None)
    pooler = getattr(body, "pooler", None)
    if classifier is None or body is model or isinstance(pooler, torch.nn.Linear):
        return None
    if isinstance(pooler, torch.nn.Module):  # BERT
        return lambda states: classifier(pooler(states.first().unsqueeze(1)))
    if not isinstance(classifier, torch.nn.Linear):  # RoBERTa's takes the first token by itself
        return lambda states: classifier(states.first().unsqueeze(1))
    if hasattr(model, "pre_classifier"):  # DistilBERT
        return lambda states: classifier(torch.relu(model.pre_classifier(states.first())))
    # ModernBERT, EuroBERT
    parts = [getattr(model, name) for name in ("head", "dense", "activation") if hasattr(model, name)]
    layers = torch.nn.Sequential(*parts, classifier)
    heads: dict[str, Head] = {
        **dict.fromkeys(("cls", "bos"), lambda states: layers(states.first())),
        "mean": lambda states: layers(states.mean()),
        "late": lambda states: states.mean(layers),  # the logits of all tokens, averaged
    }
    return heads.get(getattr(model.config, "classifier_pooling", "cls"))
