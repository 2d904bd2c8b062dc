"""From text to tokens: what cross-encoders and bi-encoders have in common."""

from typing import TYPE_CHECKING, Literal

from rag_rerank.local.models.model import TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Truncation = Literal["longest_first", "only_second"]


def room(tokenizer: "PreTrainedTokenizerBase", max_length: int) -> int:
    """How many tokens of a text are read when it is encoded alone."""
    return max_length - tokenizer.num_special_tokens_to_add()


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
    cut = [bool(encoding.overflowing) for encoding in encoded.encodings or ()] or [False] * len(texts)
    return [
        TokenSequence(ids, kinds, cut=was_cut)
        for ids, kinds, was_cut in zip(encoded["input_ids"], types, cut, strict=True)
    ]
