"""Rerankers built on decoders (Qwen, Gemma, Llama, ...): the score is read from the last token's state.

A ``*ForSequenceClassification`` has a row of weights for it. A ``*ForCausalLM`` answers with a word, and the score is
the logit of that word, or its difference from the opposite's: of an output layer of 150,000 rows at most two are ever
computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rag_rerank.errors import ConfigError
from rag_rerank.local.models.cross_encoder import relevance
from rag_rerank.local.models.layers import linear
from rag_rerank.local.transformer.batching import TokenSequence
from rag_rerank.local.transformer.proof import Parts
from rag_rerank.local.transformer.transformer import Head, Padded, States

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rag_rerank.local.checkpoint.checkpoint import Checkpoint

LOGIT_OPTIONS = (  # what a causal model's config may do to its logits behind the output matrix
    *("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"),
    *("logit_scale", "logits_scaling", "lm_head_multiplier"),
)


def token_ids(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str], name: str) -> list[int]:
    """Find the vocabulary entries of ``(true,)`` or ``(false, true)``, each as it is written there (``Ġyes``, too).

    ConfigError for what is not one entry (vLLM takes the unknown token for it), half a character, or the same twice.
    """
    if len(tokens) not in (1, 2) or len(set(tokens)) < len(tokens):
        raise ConfigError(f"the classifier tokens of {name!r} must be (true,) or (false, true); got {tuple(tokens)}")
    ids: list[int] = []
    for token in tokens:
        row: Any = tokenizer.convert_tokens_to_ids(token)
        if row is None or tokenizer.convert_ids_to_tokens(row) != token or "\ufffd" in tokenizer.decode([row]):
            parts = tokenizer.convert_ids_to_tokens(tokenizer.encode(token, add_special_tokens=False))
            raise ConfigError(
                f"{token!r} is not one entry of the vocabulary of {name!r}: it is tokenized to {parts}. "
                "Pass the model's own answers, in its case."
            )
        ids.append(row)
    return ids


def keep_answers(model: "PreTrainedModel", ids: Sequence[int]) -> None:
    """Leave of a model's output layer the rows of the tokens `ids`, computed in float32; ConfigError where it has more.

    What is left is also what `Parts.alone` runs: no proof would see what a layer of its own kind does to its rows.
    """
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(output) is not torch.nn.Linear:  # Dory's multiplies each logit, Baichuan's divides its rows by their norms
        raise ConfigError(
            f"the output layer of a {type(model).__name__} is a {type(output).__name__}, which does more than multiply "
            "by rows of a matrix: its answers can't be taken out of it. Use another model"
        )
    kept = torch.nn.Linear(1, 1, bias=False, device="meta")  # draws no random numbers
    for name in ("weight", "bias"):
        if (rows := getattr(output, name, None)) is not None:
            setattr(kept, name, torch.nn.Parameter(rows[list(ids)].detach().float(), requires_grad=False))
    kept.register_forward_pre_hook(lambda _, states: (states[0].float(),))
    model.set_output_embeddings(kept)  # type: ignore[no-untyped-call]


def causal_parts(model: Any, plain: Padded) -> Parts:
    """Take a causal model apart whose answers are all that is left; `plain` runs its transformer."""
    head, one = answer_head(model), replace(plain, equal=True)  # nothing at its end

    def alone(sequence: TokenSequence) -> Tensor:
        return relevance(model(**one.inputs([sequence])).logits[:, -1].float())

    return Parts(plain.model, head, plain, head, alone)


def answer_head(model: "PreTrainedModel") -> Head:
    """Make of a causal model's last state its logit, or the difference of two; see `keep_answers`."""
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    options = {name: getattr(model.config.get_text_config(), name, None) for name in LOGIT_OPTIONS}
    scale = (options["logit_scale"] or 1) * (options["lm_head_multiplier"] or 1) / (options["logits_scaling"] or 1)
    cap = options["final_logit_softcapping"] or options["logits_soft_cap"] or options["output_logit_soft_cap"]

    def head(states: States) -> Tensor:
        device = states.tokens.device
        bias = None if output.bias is None else output.bias.to(device)
        logits = torch.nn.functional.linear(states.last().float(), output.weight.to(device), bias) * scale
        return relevance(logits if cap is None else cap * torch.tanh(logits / cap))

    return head


def stored_head(checkpoint: "Checkpoint") -> Head:
    """Read a classifier's head with one label from the checkpoint's files: a matrix, or two with a ReLU between."""
    layers = ("score.0", "score.2") if checkpoint.stored(["score.0.weight"]) else ("score",)
    name = f"{layers[-1]}.weight"
    if [len(rows) for rows in checkpoint.stored([name]).values()] != [1]:
        raise ConfigError(f"{checkpoint.name!r} has no {name} for one label: not a reranker with a head")
    run = stored_layers(checkpoint, *layers)
    return lambda states: run(states.last().float())


def stored_layers(checkpoint: "Checkpoint", *layers: str) -> Callable[[Tensor], Tensor]:
    """Read linear layers from the checkpoint's files; between them is a ReLU, and all compute in float32."""
    weights = checkpoint.stored([f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")])
    parts = [part for layer in layers for part in (linear(checkpoint.name, weights, [f"{layer}."]), torch.nn.ReLU())]
    run = torch.nn.Sequential(*parts[:-1]).requires_grad_(False)
    return lambda vectors: run.to(vectors.device)(vectors)
