"""Repositories with code of their own whose architecture transformers has under another name.

Their ``config.json`` is read as data and becomes a config of transformers'; their weights get the names that
transformers has for them. What such a config asks for and transformers' architecture can't do is refused.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

from rag_rerank.errors import ConfigError
from rag_rerank.local.checkpoint.declaration import Declaration, Layer, Pooling
from rag_rerank.local.checkpoint.files import Weights

# Names of weights in Jina's XLM-RoBERTa, which follow FlashAttention's, and transformers'.
_FLASH_NAMES = {
    "emb_ln": "embeddings.LayerNorm",
    "encoder.layers": "encoder.layer",
    "mixer.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm2": "output.LayerNorm",
}
_FLASH_CLASSES: Mapping[Any, Any] = {
    AutoModel: XLMRobertaModel,
    AutoModelForSequenceClassification: XLMRobertaForSequenceClassification,
}
_POOLINGS = {"avg": "mean", "cls": "cls", "last": "lasttoken"}


def translated_config(name: str, content: Mapping[str, Any] | None) -> PreTrainedConfig | None:
    """Make a config of transformers' of a ``config.json`` for other code; None where it needs no translation."""
    content = content or {}
    try:
        code = str((content.get("auto_map") or {}).get("AutoConfig")).rpartition(".")[2]
        kinds = content.get("model_type"), code, *(content.get("architectures") or ())
        translate = next((_CONFIGS[kind] for kind in kinds if kind in _CONFIGS), None)
        if translate is None:
            return None
        model_type, changed = translate(content)
        fields = {key: value for key, value in content.items() if key not in ("auto_map", "model_type")}
        return CONFIG_MAPPING[model_type].from_dict({**fields, **changed})
    except (AttributeError, ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{name!r} can't be loaded: config.json: {error}") from error


def _only(content: Mapping[str, Any], **supported: object) -> None:
    for key, value in supported.items():
        if content.get(key, value) not in (value, None):
            raise ValueError(f"{key} is {content[key]!r}; supported is {value!r}")


def _gte(content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Translate the second generation of GTE: transformers knows its weights' names, but not its rope."""
    _only(content, position_embedding_type="rope", layer_norm_type="layer_norm", logn_attention_scale=False)
    scaling, theta = content.get("rope_scaling"), content.get("rope_theta", 10_000.0)
    rope = {"rope_type": "default", "rope_theta": theta}
    if scaling:
        _only(scaling, type="ntk", mixed_b=None)
        # Frequencies are (theta * factor) ** (-2i / size), divided by factor ** (2 / size): that is a linear scaling.
        factor, size = scaling["factor"], content["hidden_size"] // content["num_attention_heads"]
        rope = {"rope_type": "linear", "factor": factor ** (2 / size), "rope_theta": theta * factor}
    return "gte", {"rope_scaling": None, "rope_parameters": rope}


def _jina_roberta(content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Translate Jina's XLM-RoBERTa, whose positions are learned or rotary."""
    if content.get("position_embedding_type", "rotary") == "absolute":
        return "xlm-roberta", {}
    rope = {"rope_type": "default", "rope_theta": content.get("rotary_emb_base", 10_000.0)}
    return "jina_embeddings_v3", {"rope_parameters": rope}


def _bidirectional_llama(content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Translate a Llama whose tokens attend to all others; its own code divides logits by the temperature."""
    _only(content, temperature=1.0)
    if content.get("pooling", "avg") not in _POOLINGS:
        raise ValueError(f"pooling is {content['pooling']!r}; supported are {', '.join(_POOLINGS)}")
    return "llama", {"is_causal": False}


def _listwise(content: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    # v3.5 mixes local and global attention. Its repository's code has that, and how its config says so isn't known.
    _only(content, model_type="qwen3", use_sliding_window=False)
    for key, value in content.items():
        if key == "layer_types" and set(value or ()) <= {"full_attention"}:
            continue
        if value and re.search("layer_types|local|global|hybrid|pattern", key):
            raise ValueError(f"{key} is {value!r}; supported is full attention in every layer")
    return "qwen3", {}


_CONFIGS: Mapping[str, Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]]]] = {
    "new": _gte,
    "XLMRobertaFlashConfig": _jina_roberta,
    "llama_bidirec": _bidirectional_llama,
    "JinaForRanking": _listwise,
    "JinaVLForRanking": lambda _: ("qwen2_vl", {}),
}
ENDS = {"JinaVLForRanking": (100,)}
"""By architecture, tokens that follow a prompt and that no text spells."""


def translated_declaration(config: PreTrainedConfig, declared: Declaration) -> Declaration:
    """Add what code of its own makes of a Llama's states: a pooled vector, and of that the logit."""
    if tuple(config.architectures or ()) != ("LlamaBidirectionalForSequenceClassification",):
        return declared
    pooling = Pooling((_POOLINGS[getattr(config, "pooling", "avg")],))
    return replace(declared, document=replace(declared.document, pooling=pooling, layers=(Layer("Dense"),)))


def load_translated(
    auto: Any, weights: Callable[[], Weights], where: str, *, config: PreTrainedConfig, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model of a translated config as ``from_pretrained`` does, with ``output_loading_info``."""
    if isinstance(config, XLMRobertaConfig):
        named = _flash_named(weights())
        loaded, report = _FLASH_CLASSES[auto].from_pretrained(None, config=config, state_dict=named, **options)
    else:
        loaded, report = auto.from_pretrained(where, config=config, **options)
    if getattr(config, "is_causal", None) is False:
        for module in loaded.modules():
            if hasattr(module, "is_causal"):  # which goes before the config's where there is no padding
                module.is_causal = False
    return loaded, report


def _flash_named(weights: Weights) -> dict[str, Tensor]:
    names = re.compile("|".join(map(re.escape, _FLASH_NAMES)))
    found: dict[str, Tensor] = {}
    for name in weights.home:
        own = names.sub(lambda match: _FLASH_NAMES[match[0]], name)
        if "mixer.Wqkv" in own:
            parts = zip(("query", "key", "value"), weights.rows(name).chunk(3), strict=True)
            found |= {own.replace("mixer.Wqkv", f"attention.self.{part}"): rows for part, rows in parts}
        else:
            found[own] = weights.rows(name)
    return found
