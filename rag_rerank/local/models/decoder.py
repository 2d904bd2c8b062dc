"""Rerankers built on decoders (Qwen, Gemma, Llama, ...): the score is read from the last token's state.

A ``*ForSequenceClassification`` has a row of weights for it. A ``*ForCausalLM`` answers a question with a word, and the
score is the logit of that word (``Yes``), or how much more likely it is than its opposite (``yes`` against ``no``):
again one row, taken from the output layer, or the difference of two. So both are one thing here, and of an output layer
of 150,000 rows at most two are ever computed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

from rag_rerank.errors import ConfigError
from rag_rerank.local.models.cross_encoder import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rag_rerank.local.checkpoint.checkpoint import Checkpoint

_SCORE = "score.weight"


def last_token_head(row: Tensor) -> Head:
    """Make a head of the row that scores: float32 ``[hidden]``, on the decoder's device.

    It computes in float32 whatever the decoder computes in, as vLLM has it.
    """
    return lambda states: (states.last().float() @ row).unsqueeze(1)


def token_ids(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str], name: str) -> list[int]:
    """Find the vocabulary entries of ``(true,)`` or ``(false, true)``, each as it is written there (``Ġyes``, too).

    Raises:
        ConfigError: A token is not one entry (vLLM would take the unknown token for it without a word), or half a
            character; or there are not one or two, or they are the same.
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


def token_row(model: "PreTrainedModel", ids: Sequence[int]) -> Tensor:
    """Take the row that scores with one token, or with the second of two against the first; float32."""
    weight: Tensor = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    rows = weight[list(ids)].detach().float()
    return rows[0] if len(ids) == 1 else rows[1] - rows[0]


def score_row(checkpoint: "Checkpoint") -> Tensor:
    """Read the weight of a classifier's head with one label from the checkpoint's files; float32.

    Raises:
        ConfigError: There is none, or one for several labels.
    """
    index = checkpoint.json("model.safetensors.index.json")
    name = "model.safetensors" if index is None else index["weight_map"].get(_SCORE)
    path = None if name is None else checkpoint.file(name)
    if path is not None:
        with safe_open(path, framework="pt") as weights:
            row: Tensor | None = weights.get_tensor(_SCORE) if _SCORE in weights.keys() else None  # noqa: SIM118
        if row is not None and row.shape[0] == 1:
            return row[0].float()
    raise ConfigError(f"{checkpoint.name!r} has no {_SCORE} for one label: not a reranker with a head")
