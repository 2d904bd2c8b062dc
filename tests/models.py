"""Models that the tests make.

Real architectures with a few thousand weights, drawn at random but wide enough that scores differ, and a tokenizer
made of the bundled collection.
"""

import json
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

import rag_rerank

CORPUS = Path(rag_rerank.__file__).parent / "data" / "python_faq" / "corpus.jsonl"
MAX_LENGTH = 96  # short, so that ordinary documents are over-long


BERT_SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def word_piece_tokenizer(
    vocabulary: int = 2000,
    *,
    specials: Mapping[str, str] = MappingProxyType(BERT_SPECIALS),
    pair: str = "{cls} $A {sep} $B:1 {sep}:1",
    token_types: bool = True,
) -> PreTrainedTokenizerFast:
    """A BERT tokenizer with the characters and the most frequent words of the bundled collection.

    Not trained: tokenizers' trainer breaks ties by chance, and makes another vocabulary in each process.

    Args:
        vocabulary: How many tokens.
        specials: Special tokens by transformers' names, in the order of their ids.
        pair: How two texts are joined.
        token_types: Whether it makes ``token_type_ids``.
    """
    unknown, cls, sep = specials["unk_token"], specials["cls_token"], specials["sep_token"]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    pieces = dict.fromkeys([*specials.values(), *_pieces()])
    ids = {piece: number for number, piece in enumerate(list(pieces)[:vocabulary])}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=unknown))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens(list(specials.values()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=pair.format(cls=cls, sep=sep),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    inputs = ["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, model_input_names=inputs, **specials
    )


@cache
def _pieces() -> list[str]:
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    texts = [json.loads(line)["text"] for line in CORPUS.read_text(encoding="utf-8").splitlines()[:200]]
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    letters = sorted({letter for word in words for letter in word})
    frequent = sorted(words, key=lambda word: (-words[word], word))
    return [*letters, *(f"##{letter}" for letter in letters), *frequent]


def readable_by_transformers_4(folder: Path) -> Path:
    """The same folder, in which what version 5 has renamed also has the name that older servers know."""
    names = {
        "tokenizer_config.json": lambda content: {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "additional_special_tokens": content.pop("extra_special_tokens", []),
        },
        "config.json": lambda content: content.get("rope_parameters") or {},  # rope_theta, at the top
    }
    for name, more in names.items():
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        content |= more(content)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def make_bert_cross_encoder(
    folder: Path, *, num_labels: int = 1, safe: bool = True, seed: int = 0, **config: object
) -> Path:
    """Save a two-layer BERT cross-encoder into `folder`, whose logits span several units."""
    tokenizer = word_piece_tokenizer()
    torch.manual_seed(seed)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,  # heads of 32: vLLM's CPU attention knows no 16, and its engine dies of them
            intermediate_size=128,
            max_position_embeddings=MAX_LENGTH,
            num_labels=num_labels,
            pad_token_id=0,
            **config,
        )
    )
    widen(model, 8.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not safe:  # the same weights as a pickle, which nothing here may open
        weights = folder / "model.safetensors"
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        weights.unlink()
    return folder


def spoil(folder: Path, target: Path, text: str, others: list[str]) -> Path:
    """Copy a cross-encoder into `target`, which then has NaN for the tokens that a text has and others have not."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    kept = {token for other in others for token in tokenizer(other)["input_ids"]}
    with torch.no_grad():
        model.get_input_embeddings().weight[list(set(tokenizer(text)["input_ids"]) - kept)] = torch.nan
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def widen(model: torch.nn.Module, factor: float) -> None:
    """Enlarge all matrices but the embeddings: as they are drawn, scores hardly differ."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embeddings" not in name:
                weight.mul_(factor)
