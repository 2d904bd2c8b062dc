"""Model folders: a released reranker, and the shapes that others have, with random weights.

Of random weights times are real and scores mean nothing.

A shape is an architecture with its real widths. Where a model has many equal layers, some are left out, which changes
neither the order of contestants nor, by much, their ratios. Vocabularies are small, since only BERT's is at hand: what
a large one costs (memory, and for the model card's loop an output layer of 150,000 rows) is not in the figures. Heads
are scaled until logits of real pairs spread by 1 around 0, so that agreement between contestants can be told.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.texts import Texts
from rag_rerank.embedded import minilm_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".benchmarks" / "models"


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of reranker.

    Attributes:
        title: For tables: what it is, and what it lacks of the original.
        kind: ``pairs`` for encoders with a head, ``causal`` for a decoder that answers yes or no.
        make: Saves model and tokenizer into a folder.
    """

    title: str
    kind: str
    make: Callable[[Path], None]


def folder(name: str) -> Path:
    """The folder of the shape `name`, made if there is none."""
    path = CACHE / name
    if not path.exists():
        unfinished = path.with_name(f"{name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        SHAPES[name].make(unfinished)
        unfinished.rename(path)
    return path


def tiny() -> Path:
    """A cross-encoder of two layers x 64, for what is about the amount of work and not about the model."""
    from tests.models import make_bert_cross_encoder

    path = CACHE / "tiny"
    if not path.exists():
        unfinished = path.with_name("tiny.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make_bert_cross_encoder(unfinished).rename(path)
    return path


def older(path: Path) -> Path:
    """The same model as transformers 4 reads it: newer names in configs are written in the older way, too."""
    made = path.with_name(f"{path.name}.transformers4")
    if made.exists():
        return made
    unfinished = path.with_name(f"{made.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    (unfinished / "model.safetensors").symlink_to(path / "model.safetensors")
    shutil.copy(path / "tokenizer.json", unfinished)
    config = _json(path / "config.json")
    rope = config.get("rope_parameters") or {}
    for layers, old in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta")):
        if layers in rope:
            config[old] = rope[layers]["rope_theta"]
    tokens = _json(path / "tokenizer_config.json")
    specials = {key: tokens[key] for key in tokens if key.endswith("_token") and isinstance(tokens[key], str)}
    tokens |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in (("config", config), ("tokenizer_config", tokens), ("special_tokens_map", specials)):
        (unfinished / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    unfinished.rename(made)
    return made


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _released(path: Path) -> None:
    from tokenizers import Tokenizer

    from tests.released import folder as released_folder

    source = released_folder()
    for name in ("model.safetensors", "tokenizer_config.json", "LICENSE", "NOTICE"):
        shutil.copy(source / name, path)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.no_padding()  # as saved, it fills every pair up to 512 tokens, also for those who use it as it is
    tokenizer.no_truncation()
    tokenizer.save(str(path / "tokenizer.json"))
    config = _json(source / "config.json")
    del config["sentence_transformers"]  # asks for logits; without it all contestants end in a sigmoid
    (path / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _minilm(path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(minilm_folder(), num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    tokenizer.model_max_length = 512  # as ms-marco-MiniLM-L6-v2; the bi-encoder's own limit is 256
    _save_classifier(path, model, model.classifier, tokenizer)


def _xlm_roberta(path: Path) -> None:
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    tokenizer = _plain_bert_tokenizer(512)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        num_hidden_layers=4,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=514,
        type_vocab_size=1,
        num_labels=1,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = XLMRobertaForSequenceClassification(config)
    _save_classifier(path, model, model.classifier.out_proj, tokenizer)


def _deberta(path: Path) -> None:
    import torch
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    tokenizer = _plain_bert_tokenizer(512)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=1536,
        max_position_embeddings=512,
        type_vocab_size=0,
        num_labels=1,
        relative_attention=True,
        position_buckets=256,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = DebertaV2ForSequenceClassification(config)
    _save_classifier(path, model, model.classifier, tokenizer)


def _modernbert(path: Path) -> None:
    import torch
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    tokenizer = _plain_bert_tokenizer(8192)
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1152,
        local_attention=128,
        global_attn_every_n_layers=3,
        classifier_pooling="mean",
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    torch.manual_seed(0)
    model = ModernBertForSequenceClassification(config)
    _save_classifier(path, model, model.classifier, tokenizer)


def _qwen3(path: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).eval()
    query, documents = _sample()
    states = []
    with torch.inference_mode():
        for text in documents:
            ids = tokenizer(f"{query}\n{text}<|im_end|>\n", return_tensors="pt", truncation=True, max_length=512)
            states.append(model.model(**ids).last_hidden_state[0, -1])
    stacked = torch.stack(states)
    no, yes = (tokenizer.convert_tokens_to_ids(answer) for answer in ("no", "yes"))
    with torch.no_grad():
        row, mean = model.lm_head.weight[yes] - model.lm_head.weight[no], stacked.mean(dim=0)
        row -= mean * (row @ mean) / (mean @ mean)  # logits around 0
        row /= (stacked @ row).std()
        model.lm_head.weight[yes], model.lm_head.weight[no] = row / 2, -row / 2
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _save_classifier(path: Path, model: Any, head: Any, tokenizer: Any) -> None:
    """Scale the last layer, `head`, until logits have mean 0 and deviation 1 on real pairs; then save."""
    import torch

    query, documents = _sample()
    model.eval()
    logits = []
    with torch.inference_mode():
        for text in documents:
            pair = tokenizer(query, text, truncation=True, max_length=512, return_tensors="pt")
            logits.append(model(**pair).logits[0, 0])
    spread, mean = torch.stack(logits).std(), torch.stack(logits).mean()
    with torch.no_grad():
        head.bias.sub_(mean).div_(spread)
        head.weight.div_(spread)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _sample() -> tuple[str, list[str]]:
    texts = Texts("passages")
    return texts.questions[0], list(texts.documents.values())[::20]


def _plain_bert_tokenizer(longest: int) -> "PreTrainedTokenizerFast":
    """MiniLM's tokenizer for models that know no token types."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:0 [SEP]:0",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = {f"{name.lower()}_token": f"[{name}]" for name in ("CLS", "SEP", "PAD", "UNK", "MASK")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )


def _qwen_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE with Qwen's special tokens and the answers as one entry each, trained on the collection."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*Texts("whole").documents.values(), *["yes", "no"] * 500], trainer)
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=40960,
        model_input_names=["input_ids", "attention_mask"],
        additional_special_tokens=["<|im_start|>"],
        eos_token="<|im_end|>",  # noqa: S106 - no password
        pad_token="<|endoftext|>",  # noqa: S106
    )


SHAPES = {
    "released": Shape("ms-marco-MiniLM-L-12-v2 (12 layers x 384), dequantised from int8", "pairs", _released),
    "minilm": Shape("MiniLM-L6 (6 layers x 384), as ms-marco-MiniLM-L6-v2", "pairs", _minilm),
    "xlm-roberta-base": Shape(
        "XLM-RoBERTa base (768 wide, 4 of 12 layers, 31k of 250k words), as bge-reranker-base", "pairs", _xlm_roberta
    ),
    "modernbert-base": Shape(
        "ModernBERT base (768 wide, 6 of 22 layers, 31k of 50k words), as gte-reranker-modernbert-base",
        "pairs",
        _modernbert,
    ),
    "deberta-v2": Shape("DeBERTa-v2 (384 wide, 4 of 12 layers), as mxbai-rerank-xsmall-v1", "pairs", _deberta),
    "qwen3-0.6b": Shape(
        "Qwen3 0.6B (1,024 wide, 4 of 28 layers, 16k of 152k words), as Qwen3-Reranker-0.6B", "causal", _qwen3
    ),
}
