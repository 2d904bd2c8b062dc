"""From text to padded tensors: what cross-encoders and bi-encoders have in common."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from rag_rerank.local.model import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Truncation = Literal["longest_first", "only_second"]


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    texts: list[str],
    pairs: list[str] | None,
    max_length: int,
    truncation: Truncation = "longest_first",
) -> list[TokenSequence]:
    """Tokenise texts, or pairs of texts, in one call and without padding.

    Text that spells a special token (``[SEP]`` in a document) stays text. What is longer than `max_length` is cut:
    pairs from the longer side, as vLLM does for ``truncate_prompt_tokens=-1``, or from the second only, as vLLM does
    where ``max_tokens_per_doc`` is set too.
    """
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        pairs,
        truncation=truncation if pairs else True,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        split_special_tokens=True,
        verbose=False,
    )
    types = encoded.get("token_type_ids") or [None] * len(texts)
    return [TokenSequence(ids, kinds) for ids, kinds in zip(encoded["input_ids"], types, strict=True)]


def padded(sequences: Sequence[TokenSequence], pad_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Model inputs of one batch, padded on the right.

    Returns:
        ``input_ids``, ``attention_mask`` and, where the tokenizer makes them, ``token_type_ids``: int64
        ``[len(sequences), longest]`` on `device`.
    """
    longest = max(len(sequence.ids) for sequence in sequences)
    columns = {
        "input_ids": [sequence.ids + [pad_id] * (longest - len(sequence.ids)) for sequence in sequences],
        "attention_mask": [[1] * len(sequence.ids) + [0] * (longest - len(sequence.ids)) for sequence in sequences],
    }
    if sequences[0].types is not None:
        columns["token_type_ids"] = [
            (sequence.types or []) + [0] * (longest - len(sequence.ids)) for sequence in sequences
        ]
    return {name: torch.tensor(rows).to(device, non_blocking=True) for name, rows in columns.items()}
