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
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, PreTrainedTokenizerFast

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


def _random(kind: str, fields: Mapping[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIG_MAPPING[kind](**fields, num_labels=1))
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
