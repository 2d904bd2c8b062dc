"""Tiny encoders of other families than BERT that the tests make: cross-encoders, bi-encoders and ColBERTs.

As in `tests.models`, the architectures are real and the weights random but wide. Heads are of 32, which is the least
that vLLM's CPU attention knows.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rag_rerank.convert import convert
from rag_rerank.local.checkpoint.declaration import Layer
from rag_rerank.local.checkpoint.files import Files
from rag_rerank.local.models.late_interaction import LateInteraction, TokenEmbedder
from rag_rerank.local.models.layers import read_layers
from rag_rerank.local.transformer.batching import Batching
from rag_rerank.local.transformer.transformer import make_transformer
from tests.causal_models import byte_level_tokenizer, random_decoder
from tests.models import MAX_LENGTH, widen, word_piece_tokenizer

VECTOR_SIZE = 48


def _bert() -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    return word_piece_tokenizer(), {}


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Make an XLM-RoBERTa's tokenizer: the padding token is not the first."""
    return _roberta()[0]


def _roberta() -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """The padding token's id matters: RoBERTa counts positions from the one after it.

    The configs of real RoBERTa and BGE rerankers have ``position_embedding_type``; transformers 5 writes none. Without
    it vLLM 0.32 takes all 98 positions for usable and reads past the end of its table from token 97 on: over-long pairs
    score up to 0.12 off, unless it is started with ``--max-model-len 96``.
    """
    specials = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
    tokenizer = word_piece_tokenizer(
        specials={**specials, "mask_token": "<mask>"}, pair="{cls} $A {sep} {sep} $B {sep}", token_types=False
    )
    assert tokenizer.pad_token_id == 1
    own = {"max_position_embeddings": MAX_LENGTH + 2, "type_vocab_size": 1, "position_embedding_type": "absolute"}
    return tokenizer, own


def _modern_bert() -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """The first and the fourth layer see all tokens, those between them 8 to each side."""
    tokenizer = word_piece_tokenizer(token_types=False)
    own = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    own |= {"bos_token_id": None, "eos_token_id": None}  # the default ids lie beyond this vocabulary
    return tokenizer, {"num_hidden_layers": 4, "local_attention": 16, **own}


_FAMILIES = {"bert": _bert, "roberta": _roberta, "xlm-roberta": _roberta, "modernbert": _modern_bert}
KINDS = tuple(_FAMILIES)


def make_encoder_cross_encoder(folder: Path, kind: str) -> Path:
    """Save a ``*ForSequenceClassification`` of the family `kind` (one of `KINDS`), with one label, into `folder`."""
    return _save(folder, *_random(AutoModelForSequenceClassification, kind, num_labels=1))


def make_bi_encoder(folder: Path, pooling: str) -> Path:
    """Save a BERT as sentence-transformers does, cut at 64 tokens; `pooling` as in its config: ``cls_token``, ..."""
    _save(folder, *_random(AutoModel, "bert"))
    _write(folder / "modules.json", _modules(Transformer="", Pooling="1_Pooling", Normalize="2_Normalize"))
    _write(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 64, f"pooling_mode_{pooling}": True})
    return folder


def make_colbert(folder: Path) -> Path:
    """Save a ColBERT as its authors do: one file with a BERT under ``bert.``, and ``linear.weight``.

    The config has no ``dim``, of which vLLM 0.32 dies: it makes a layer before ``Module.__init__``.
    """
    model, tokenizer = _random(AutoModel, "bert")
    _save(folder, model, tokenizer)
    model.config.architectures = ["HF_ColBERT"]  # saving a model writes its class
    model.config.save_pretrained(folder)
    weights = {f"bert.{name}": weight for name, weight in model.state_dict().items()}
    save_file(weights | {"linear.weight": _projection()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_pylate_colbert(folder: Path, **dense: object) -> Path:
    """Save a ModernBERT ColBERT as PyLate does: the bare encoder, and the projection as a Dense module of its own."""
    _save(folder, *_random(AutoModel, "modernbert"))
    _write(folder / "modules.json", _modules(Transformer="", Dense="1_Dense"))
    identity = "torch.nn.modules.linear.Identity"
    config = {"in_features": 64, "out_features": VECTOR_SIZE, "bias": False, "activation_function": identity, **dense}
    _write(folder / "1_Dense" / "config.json", config)
    save_file({"linear.weight": _projection()}, folder / "1_Dense" / "model.safetensors", metadata={"format": "pt"})
    return folder


def scoring(size: int, *, bias: bool = False) -> Dense:
    """The last module of a cross-encoder."""
    identity = torch.nn.Identity()
    return Dense(size, 1, bias=bias, activation_function=identity, module_output_name="scores")


def modular_modules(folder: Path, kind: str) -> list[Any]:
    """sentence-transformers' modules for a cross-encoder on a random `kind`, which is saved into `folder`.

    Its head is that of the classifier of the architecture: Ettin's for ModernBERT.
    """
    decoder, roberta = kind == "qwen3", kind == "xlm-roberta"
    if decoder:
        tokenizer = byte_level_tokenizer(kind)
        _save(folder, random_decoder(kind, vocab_size=len(tokenizer)), tokenizer)
    elif kind == "electra":
        make_random_cross_encoder(folder, kind)
    else:
        _save(folder, *_random(AutoModel, kind))
    dense = Dense(
        64, 64, bias=roberta, activation_function=torch.nn.GELU() if kind == "modernbert" else torch.nn.Tanh()
    )
    hidden = [] if decoder else [dense, LayerNorm(64)] if kind == "modernbert" else [dense]
    pooling = Pooling(64, "lasttoken" if decoder else "cls")
    modules = [Transformer(str(folder)), pooling, *hidden, scoring(64, bias=roberta)]
    for layer in (part for module in modules[2:] for part in module.modules() if isinstance(part, torch.nn.Linear)):
        torch.nn.init.normal_(layer.weight, std=0.4)  # for scores that differ
    return modules


def make_converted(folder: Path) -> Path:
    """Save the classifier that a modular cross-encoder of ModernBERT's is converted to, as Ettin's would be."""
    torch.manual_seed(2)
    parts = folder.with_name(f"{folder.name}-parts")
    modules = modular_modules(parts / "transformer", "modernbert")
    CrossEncoder(modules=modules, device="cpu").save_pretrained(str(parts / "modular"))
    return convert(parts / "modular", folder)


def load_late_interaction(
    folder: Path, *, normalize: bool = True, token_budget: int = 2048, dtype: torch.dtype = torch.float32
) -> LateInteraction:
    """A ColBERT of this module, ready to score; `dtype` is the encoder's."""
    model, tokenizer = AutoModel.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)
    layers = [Layer("Dense", "1_Dense" if (folder / "1_Dense").exists() else ""), Layer("Normalize")]
    embedder = TokenEmbedder(
        make_transformer(model, tokenizer.pad_token_id, Batching(token_budget)),
        tokenizer,
        MAX_LENGTH,
        layers=read_layers(Files(str(folder)), layers if normalize else layers[:1]),
    )
    return LateInteraction(embedder, embedder)


def _random(auto: Any, kind: str, **options: object) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer, own = _FAMILIES[kind]()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    sizes |= {"max_position_embeddings": MAX_LENGTH, "vocab_size": len(tokenizer)}
    config = CONFIG_MAPPING[kind](**{"pad_token_id": tokenizer.pad_token_id, **sizes, **own, **options})
    torch.manual_seed(0)
    model = auto.from_config(config)
    widen(model, 4.0 if kind == "modernbert" else 8.0)
    return model, tokenizer


def _projection() -> torch.Tensor:
    """Small enough that plain dot products, too, add up to less than 100: float32 has 7 digits."""
    return torch.randn(VECTOR_SIZE, 64, generator=torch.Generator().manual_seed(1)) / 64


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _modules(**folders: str) -> list[dict[str, object]]:
    names = {"Dense": "pylate.models.Dense.Dense"}
    return [
        {
            "idx": index,
            "name": str(index),
            "path": path,
            "type": names.get(kind, f"sentence_transformers.models.{kind}"),
        }
        for index, (kind, path) in enumerate(folders.items())
    ]


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


# By model type, what a random model of three layers needs beyond `random_encoder`'s own sizes. None is saved.
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 64},
    "bert": {},
    "camembert": {"pad_token_id": 1},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    "distilbert": {},
    "electra": {"embedding_size": 64},
    "eurobert": {"mask_token_id": 3, "num_key_value_heads": 2},
    "gte": {},
    # The second and third layer see 8 tokens to each side, the others all.
    "modernbert": {"num_hidden_layers": 4, "local_attention": 16, "global_attn_every_n_layers": 3},
    "mpnet": {"pad_token_id": 1},
    "roberta": {"pad_token_id": 1},
    "t5": {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 3, "num_heads": 2},
    "xlm-roberta": {"pad_token_id": 1},
}


def random_encoder(kind: str, auto: Any = AutoModel, **options: object) -> PreTrainedModel:
    """A model of the type `kind` with 200 tokens, never the same state twice: all its matrices are wide.

    Raises:
        KeyError: Its config is not written down here.
    """
    special = {f"{name}_token_id": 2 for name in ("bos", "eos", "cls", "sep")}
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
    sizes |= {"max_position_embeddings": 512, "vocab_size": 200, "pad_token_id": 0}
    config = CONFIG_MAPPING[kind](**{**sizes, **special, **_ARCHITECTURES[kind], **options})
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(6)
    return model


def make_random_cross_encoder(folder: Path, kind: str) -> Path:
    """Save a `random_encoder` with one label, and a tokenizer of as many tokens as it has, into `folder`."""
    tokenizer = word_piece_tokenizer(token_types=kind != "distilbert")
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH}
    return _save(folder, random_encoder(kind, AutoModelForSequenceClassification, num_labels=1, **sizes), tokenizer)
