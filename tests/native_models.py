"""Tiny checkpoints in the layouts of repositories with code of their own, as their hub pages have them.

Names of files, weights and fields are the repositories'; the weights are random but wide. Each brings a module with its
config's class, which vLLM needs; elsewhere than in vLLM it fails as soon as it is run.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Tokens
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tests.causal_models import byte_level_tokenizer
from tests.encoder_models import roberta_tokenizer
from tests.models import MAX_LENGTH, widen

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
NEMOTRON_LENGTH = 1024  # room for a document beside the longest of the queries
ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}

_CODE = """import sys
from transformers import PretrainedConfig
assert "vllm" in sys.modules, "code of the repository is run"
class {name}(PretrainedConfig):
    model_type = "{model_type}"
"""


def make_gte(folder: Path, **fields: object) -> Path:
    """Save a gte-multilingual-reranker: a rope that is scaled, projections that are joined."""
    tokenizer = roberta_tokenizer()
    config = {
        **SIZES,
        **ONE_LABEL,
        "architectures": ["NewForSequenceClassification"],
        "model_type": "new",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "layer_norm_type": "layer_norm",
        "logn_attention_clip1": False,
        "logn_attention_scale": False,
        "max_position_embeddings": MAX_LENGTH,
        "pack_qkv": True,
        "pad_token_id": tokenizer.pad_token_id,
        "position_embedding_type": "rope",
        "rope_scaling": {"factor": 8.0, "type": "ntk"},
        "rope_theta": 20000,
        "type_vocab_size": 1,
        "vocab_size": len(tokenizer),
        **fields,
    }
    kept = SIZES.keys() | {"vocab_size", "pad_token_id", "type_vocab_size"}
    weights = _random("gte", {key: config[key] for key in kept})
    names = {
        r"gte\.layers": "new.encoder.layer",
        r"^gte": "new",
        r"self_attn\.o_proj": "attention.o_proj",
        "post_attention_layernorm": "attn_ln",
        "post_mlp_layernorm": "mlp_ln",
    }
    joined = _joined(weights, r"self_attn\.{}_proj", "qkv", "attention.qkv_proj")
    joined = _joined(joined, r"mlp\.{}_proj", ("up", "gate"), "mlp.up_gate_proj")
    return _save(folder, tokenizer, config, _renamed(joined, names), "configuration.NewConfig", "new")


def make_jina_reranker(folder: Path) -> Path:
    """Save a jina-reranker-v2: an XLM-RoBERTa under FlashAttention's names, without a model type."""
    tokenizer = roberta_tokenizer()
    config = {
        **SIZES,
        **ONE_LABEL,
        "architectures": ["XLMRobertaForSequenceClassification"],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": MAX_LENGTH + 2,
        "pad_token_id": tokenizer.pad_token_id,
        "position_embedding_type": "absolute",
        "type_vocab_size": 1,
        "use_flash_attn": True,
        "vocab_size": len(tokenizer),
    }
    weights = _random("xlm-roberta", {key: config[key] for key in config if key not in ("architectures", *ONE_LABEL)})
    joined = _joined(weights, r"attention\.self\.{}", ("query", "key", "value"), "mixer.Wqkv")
    named = _renamed(joined, FLASH_NAMES)
    return _save(folder, tokenizer, config, named, "configuration_xlm_roberta.XLMRobertaFlashConfig", "xlm-roberta")


FLASH_NAMES = {
    r"embeddings\.LayerNorm": "emb_ln",
    r"encoder\.layer\.": "encoder.layers.",
    r"attention\.output\.dense": "mixer.out_proj",
    r"attention\.output\.LayerNorm": "norm1",
    r"intermediate\.dense": "mlp.fc1",
    r"(\d)\.output\.dense": r"\1.mlp.fc2",
    r"(\d)\.output\.LayerNorm": r"\1.norm2",
}


def make_nemotron(folder: Path, **fields: object) -> Path:
    """Save a llama-nemotron-rerank-1b-v2: a Llama that attends both ways, the mean of its states, a head."""
    tokenizer = byte_level_tokenizer("llama")
    tokenizer.model_max_length = NEMOTRON_LENGTH
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = {
        **SIZES,
        **ONE_LABEL,
        **special,
        "architectures": ["LlamaBidirectionalForSequenceClassification"],
        "model_type": "llama_bidirec",
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": NEMOTRON_LENGTH,
        "num_key_value_heads": 1,
        "pooling": "avg",
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "temperature": 1.0,
        "tie_word_embeddings": False,
        "vocab_size": len(tokenizer),
        **fields,
    }
    kept = SIZES.keys() | special.keys() | {"head_dim", "num_key_value_heads", "vocab_size"}
    weights = _random("llama", {key: config[key] for key in kept})
    return _save(
        folder, tokenizer, config, weights, "llama_bidirectional_model.LlamaBidirectionalConfig", "llama_bidirec"
    )


COLBERT = {
    "query_token_id": "[QueryMarker]",
    "doc_token_id": "[DocumentMarker]",
    "query_maxlen": 20,
    "doc_maxlen": 60,
    "attend_to_mask_tokens": False,
    "mask_punctuation": True,
}


def make_jina_colbert(folder: Path, plain: Path | None = None) -> Path:
    """Save a jina-colbert-v2: an XLM-RoBERTa with a rope, a projection, and ColBERT's settings.

    The same goes into `plain` as transformers and ColBERT's authors have it.
    """
    tokenizer = roberta_tokenizer()
    tokenizer.add_tokens([COLBERT["query_token_id"], COLBERT["doc_token_id"]])
    special = {"pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": MAX_LENGTH, "type_vocab_size": 1}
    sizes = {**SIZES, **special, "vocab_size": len(tokenizer)}
    rope = {"rope_type": "default", "rope_theta": 500.0}
    weights = _random("jina_embeddings_v3", {**sizes, "rope_parameters": rope}, AutoModel)
    weights = {name: weight for name, weight in weights.items() if not name.startswith("pooler")}
    projection = {"linear.weight": torch.randn(48, 64, generator=torch.Generator().manual_seed(1)) / 64}
    names = {
        "self_attn": "mixer",
        "mixer.o_proj": "mixer.out_proj",
        "^layers": "encoder.layers",
        r"embeddings\.LayerNorm": "emb_ln",
        "post_attention_layernorm": "norm1",
        "post_mlp_layernorm": "norm2",
        "^": "roberta.",
    }
    named = _renamed(_joined(weights, r"self_attn\.{}_proj", "qkv", "self_attn.Wqkv"), names)
    own = {"architectures": ["HF_ColBERT"], "hidden_act": "gelu", "layer_norm_eps": 1e-05}
    lora = {"lora_alpha": 1, "lora_rank": 4}  # of adapters that this model has not
    rotary = {"position_embedding_type": "rotary", "rotary_emb_base": 500.0, "use_flash_attn": True}
    config = {**sizes, **own, **lora, **rotary}
    code = "configuration_xlm_roberta.XLMRobertaFlashConfig"
    _save(folder, tokenizer, config, {**named, **projection}, code, "xlm-roberta")
    if plain is not None:
        tokenizer.save_pretrained(plain)
        fields = {**sizes, **own, "model_type": "jina_embeddings_v3", "rope_parameters": rope}
        (plain / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        native = {f"roberta.{name}": weight for name, weight in weights.items()}
        save_file({**native, **projection}, plain / "model.safetensors", metadata={"format": "pt"})
    for each in (folder, plain or folder):
        (each / "artifact.metadata").write_text(json.dumps(COLBERT), encoding="utf-8")
    return folder


def make_lfm2_colbert(folder: Path) -> Path:
    """Save an LFM2-ColBERT-350M: PyLate's layout around a decoder of convolutions and attention."""
    tokenizer = byte_level_tokenizer("llama")
    tokenizer.model_max_length = MAX_LENGTH
    tokenizer.add_tokens(["[Q] ", "[D] "])
    fields = {**SIZES, "num_key_value_heads": 1, "vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH}
    special = {f"{name}_token_id": tokenizer.pad_token_id for name in ("pad", "bos", "eos")}
    layers = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    layers |= {"block_dim": 64, "conv_dim": 64, "conv_dim_out": 64}  # which vLLM reads
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIG_MAPPING["lfm2"](**fields, **special, **layers))
    widen(model, 8.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    identity = "torch.nn.modules.linear.Identity"
    kinds = {"": "sentence_transformers.models.Transformer", "1_Dense": "pylate.models.Dense.Dense"}
    modules = [
        {"idx": place, "name": f"{place}", "path": path, "type": kind}
        for place, (path, kind) in enumerate(kinds.items())
    ]
    dense = {"in_features": 64, "out_features": 48, "bias": False, "activation_function": identity}
    recipe = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 20, "document_length": 60}
    recipe |= {"model_type": "ColBERT", "attend_to_expansion_tokens": False, "skiplist_words": [",", "."]}
    (folder / "1_Dense").mkdir()
    for path, content in {
        "modules.json": modules,
        "1_Dense/config.json": dense,
        "config_sentence_transformers.json": {**recipe, "similarity_fn_name": "MaxSim", "prompts": {}},
    }.items():
        (folder / path).write_text(json.dumps(content), encoding="utf-8")
    projection = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)) / 64
    save_file({"linear.weight": projection}, folder / "1_Dense" / "model.safetensors", metadata={"format": "pt"})
    return folder


V3_LENGTH = 32768
V3_MARKS = {"<|embed_token|>": 151670, "<|rerank_token|>": 151671}  # vLLM knows them by these ids


def make_jina_v3(folder: Path) -> Path:
    """Save a jina-reranker-v3: a Qwen3 with the output matrix of its base and a projector of two layers."""
    plain = json.loads(byte_level_tokenizer("qwen3").backend_tokenizer.to_str())
    for mark, number in V3_MARKS.items():
        plain["model"]["vocab"][mark] = number
        plain["added_tokens"].append({**plain["added_tokens"][0], "id": number, "content": mark})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokens.from_str(json.dumps(plain)),
        model_max_length=V3_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *V3_MARKS],
    )
    config = {
        **SIZES,
        "architectures": ["JinaForRanking"],
        "auto_map": {"AutoModel": "modeling.JinaForRanking"},
        "model_type": "qwen3",
        "hidden_size": 32,
        "head_dim": 32,
        "num_key_value_heads": 1,
        "max_position_embeddings": V3_LENGTH,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": 151672,
    }
    own = {"architectures", "auto_map", "model_type", "torch_dtype"}
    weights = _random("qwen3", {key: config[key] for key in config.keys() - own}, AutoModel)
    shapes = {"0": (16, 32), "2": (512, 16)}
    projector = {f"projector.{layer}.weight": torch.randn(shape) for layer, shape in shapes.items()}
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "modeling.py").write_text("raise AssertionError('code of the repository is run')", encoding="utf-8")
    named = {f"model.{name}": weight for name, weight in weights.items()}
    save_file({**named, **projector}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _random(kind: str, fields: Mapping[str, Any], auto: Any = AutoModelForSequenceClassification) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = auto.from_config(CONFIG_MAPPING[kind](**fields, num_labels=1))
    widen(model, 8.0)
    return dict(model.state_dict())


def _joined(weights: Mapping[str, Tensor], pattern: str, parts: Sequence[str], target: str) -> dict[str, Tensor]:
    """Stack the weights of a layer that are called `parts`, in this order, as `target`."""
    joined = dict(weights)
    for name in weights:
        match = re.search(pattern.format(parts[0]), name)
        if match is not None:
            before, after = name[: match.start()], name[match.end() :]
            rows = [joined.pop(name.replace(match[0], match[0].replace(parts[0], part, 1))) for part in parts]
            joined[f"{before}{target}{after}"] = torch.cat(rows)
    return joined


def _renamed(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    def rename(name: str) -> str:
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        return name

    return {rename(name): weight for name, weight in weights.items()}


def _save(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    config: Mapping[str, object],
    weights: Mapping[str, Tensor],
    code: str,
    model_type: str,
) -> Path:
    tokenizer.save_pretrained(folder)
    module, _, name = code.rpartition(".")
    own = {"auto_map": {"AutoConfig": code}, "transformers_version": "4.40.0", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**config, **own}), encoding="utf-8")
    source = _CODE.format(name=name, model_type=model_type)
    (folder / f"{module}.py").write_text(source, encoding="utf-8")
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
