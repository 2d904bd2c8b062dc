"""Tiny decoders that the tests make: causal language models, and classifiers of the same architectures.

As in `tests.models`, the architectures are real, the weights random but wide, and the tokenizers are trained on the
bundled collection. Each family has its own special tokens, in the places where its real tokenizer puts them.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.models import CORPUS

MAX_POSITIONS = 512
VOCABULARY = 1500
ANSWERS = ("yes", "no", "Yes", "No", "0", "1")  # rerankers answer with one of these: one vocabulary entry each


@dataclass(frozen=True, slots=True)
class _Family:
    """What differs between the families.

    Attributes:
        specials: The special tokens, in vocabulary order.
        names: Which of them is which, by transformers' names.
        ordinary: Tokens that are added, but not special.
        config: Options of the architecture.
    """

    specials: tuple[str, ...]
    names: dict[str, str]
    ordinary: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)


_QWEN = _Family(
    specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    names={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},  # and nothing at the front
    ordinary=("<think>", "</think>"),
)
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FAMILIES = {
    "qwen3": _Family(_QWEN.specials, _QWEN.names, _QWEN.ordinary, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen2": _Family(_QWEN.specials, _QWEN.names, _QWEN.ordinary, {"tie_word_embeddings": False}),
    "gemma": _Family(
        specials=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        names={"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        config={"head_dim": 32, "tie_word_embeddings": True},
    ),
    "llama": _Family(
        specials=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        names={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|eot_id|>"},
        config={"head_dim": 32, "tie_word_embeddings": False},
    ),
}
KINDS = tuple(_FAMILIES)


def make_causal_lm(
    folder: Path, kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB"
) -> Path:
    """Save a two-layer ``*ForCausalLM`` of the family `kind` (one of `KINDS`) and its tokenizer into `folder`."""
    return _save(AutoModelForCausalLM, folder, kind, seed, dtype, max_shard_size)


def make_decoder_classifier(
    folder: Path,
    kind: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    num_labels: int = 1,
) -> Path:
    """Save a two-layer ``*ForSequenceClassification``, as `make_causal_lm` does."""
    auto = AutoModelForSequenceClassification
    return _save(auto, folder, kind, seed, dtype, max_shard_size, num_labels=num_labels)


def byte_level_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the special tokens of the family `kind`."""
    family = _FAMILIES[kind]
    tokenizer = Tokenizer.from_str(_trained(family.specials))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.ordinary])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_POSITIONS,
        # No token_type_ids: decoders take none, and vLLM's engine dies of them.
        model_input_names=["input_ids", "attention_mask"],
        additional_special_tokens=[token for token in family.specials if token not in family.names.values()],
        **family.names,
    )


@cache
def _trained(specials: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if "<unk>" in specials else None))
    if specials == _QWEN.specials:  # as in Qwen's tokenizer: transformers puts these in where the model is a qwen2
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()[:200]]
    # The answers stand alone often enough to be merged into one entry each.
    tokenizer.train_from_iterator([*texts, *ANSWERS * 500], trainer)
    first = next((token for token in specials if token in {"<bos>", "<|begin_of_text|>"}), None)
    if first is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A",
            pair=f"{first} $A {first}:1 $B:1",
            special_tokens=[(first, tokenizer.token_to_id(first))],
        )
    return tokenizer.to_str()


def _save(
    auto: Any, folder: Path, kind: str, seed: int, dtype: torch.dtype, max_shard_size: str, **options: Any
) -> Path:
    family = _FAMILIES[kind]
    tokenizer = byte_level_tokenizer(kind)
    config = CONFIG_MAPPING[kind](
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,  # heads of 32: vLLM's CPU attention knows no 16, and its engine dies of them
        num_key_value_heads=1,
        intermediate_size=128,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **family.config,
        **options,
    )
    torch.manual_seed(seed)
    model = auto.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                # Inputs and outputs wide enough for logits of about +-10, layers for a last token that heard the rest.
                wide = "embed" in name or "lm_head" in name or name == "score.weight"
                weight.normal_(std=0.6 if wide else 0.25)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


# By model type, what a random decoder needs beyond `random_decoder`'s own sizes. None is saved. Windows are short
# enough to matter for 40 tokens.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 24, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 24, "sliding_window_pattern": 2},
    "llama": {},
    "mistral": {"sliding_window": 24},
    "phi3": {"sliding_window": None},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    # Of the pairs in a head, those that turn with time, height and width; for text the three are the same.
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "qwen3_vl_text": {
        "head_dim": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [6, 5, 5]},
    },
}


def random_decoder(kind: str, auto: Any = AutoModel, **options: object) -> PreTrainedModel:
    """A model of the type `kind`, without a head: 200 tokens, three layers, 4 heads on 2 for keys, wide matrices.

    Raises:
        KeyError: Its config is not written down here.
    """
    special = {f"{name}_token_id": 2 for name in ("bos", "eos")}
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 128, "max_position_embeddings": 512, "vocab_size": 200, "pad_token_id": 0}
    config = CONFIG_MAPPING[kind](**{**sizes, **special, **_ARCHITECTURES[kind], **options})
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(6)
    return model
