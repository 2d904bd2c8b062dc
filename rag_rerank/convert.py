"""From a reranker to a sequence-classification checkpoint that scores the same and that vLLM serves (extra `local`).

A causal language model that answers "yes" or "no" is scored by the logit of one token or the difference of two. A logit
is the last hidden state times one row of the output matrix. So one row, or the difference of two, as the weight of a
one-label classifier gives the same score, without the output matrix and ``--hf-overrides``.

A modular cross-encoder of sentence-transformers (a transformer, a pooling, and a head of Dense and LayerNorm: Ettin)
is transformers' classifier of the same architecture, where that has the same parts. As it is, vLLM takes it for an
embedding model.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, cast, get_args

import torch
from safetensors.torch import save_file
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS
from transformers.modeling_layers import GenericForSequenceClassification

from rag_rerank.errors import ConfigError
from rag_rerank.local.checkpoint.checkpoint import Checkpoint
from rag_rerank.local.checkpoint.declaration import SCORE_TEMPLATE, Pooling
from rag_rerank.local.checkpoint.files import INDEX, ONLY_SAFETENSORS, WEIGHTS, Files, Weights, opened
from rag_rerank.local.checkpoint.fingerprint import TOKENIZER_FILES
from rag_rerank.local.models.decoder import LOGIT_OPTIONS, token_ids
from rag_rerank.local.models.layers import activation, config_activation, read_layers

Dtype = Literal["float32", "bfloat16", "float16"]

_HEAD, _EMBEDDINGS, _SCORE = "lm_head.weight", "model.embed_tokens.weight", "score.weight"
_DROPPED_ENTRIES = {
    # of generation
    *("do_sample", "temperature", "top_k", "top_p", "typical_p", "max_length", "min_length", "max_new_tokens"),
    *("num_beams", "num_beam_groups", "num_return_sequences", "repetition_penalty", "length_penalty", "early_stopping"),
    # with these vLLM looks for the output matrix, which the result no longer has
    *("classifier_from_token", "method", "is_original_qwen3_reranker"),
    # written anew; code that is not copied
    *("dtype", "torch_dtype", "num_labels", "auto_map"),
}


# What the heads of classifiers are made of, by model types: of which pooling they are, then the name and activation of
# each layer; one without is a LayerNorm. `_DECODER` is that of all that `GenericForSequenceClassification` covers.
_Layout = tuple[tuple[str, ...], Mapping[str, str | None]]
_DECODER: _Layout = ("lasttoken",), {"score": "Identity"}
_ROBERTA: _Layout = ("cls",), {"classifier.dense": "Tanh", "classifier.out_proj": "Identity"}
_HEADS: Mapping[str, _Layout] = {
    "bert": (("cls",), {"bert.pooler.dense": "Tanh", "classifier": "Identity"}),
    "modernbert": (("cls", "mean"), {"head.dense": "GELU", "head.norm": None, "classifier": "Identity"}),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokens: Sequence[str] = (),
    template: str | None = None,
    dtype: Dtype | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `model` as a ``*ForSequenceClassification`` with one label into `out`.

    It is a ``*ForCausalLM`` reranker, or a modular cross-encoder of sentence-transformers whose head is that of BERT's,
    RoBERTa's, ModernBERT's or a decoder's classifier.

    The classifier's weights are stored in float32 whatever the rest is stored in, as vLLM computes with them: a
    difference of two rows rounded to bfloat16 is another model. Weights are copied shard by shard, so memory for one
    shard is enough for a model of any size. Nothing appears at `out` before all of it is written, and nothing of
    `model` is changed.

    Args:
        model: A hub id or a folder, with safetensors weights.
        out: The folder to make.
        tokens: Of a causal model, vocabulary entries: ``("no", "yes")``, where the score is the logit of the true token
            minus that of the false one (its sigmoid is the softmax over the two); or ``("Yes",)``, the logit of the
            true token. Empty takes those that the checkpoint declares (``LogitScore``).
        template: Text of the score template. It becomes ``chat_template.jinja``, where transformers looks for the
            tokenizer's template. vLLM up to 0.33 does not take it from there for a text reranker: start the server
            with ``--chat-template OUT/chat_template.jinja``. None keeps what the model has.
        dtype: Store the other weights in this; None keeps theirs.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where hub files are kept; None for the usual place.
        local_files_only: Never ask the hub.
        overwrite: Whether a model at `out` may be replaced.
        progress: Called with the number of shards written and of all shards, after each.

    Raises:
        ConfigError: An argument is wrong, the model is not there, or it can't be converted so that it scores the same.
    """
    if isinstance(tokens, str):
        raise ConfigError(f"tokens must be (true,) or (false, true), got {tokens!r}")
    if dtype is not None and dtype not in get_args(Dtype):
        raise ConfigError(f"dtype must be None or one of {', '.join(get_args(Dtype))}; got {dtype!r}")
    target = Path(out).absolute()
    _check_target(target, overwrite)
    checkpoint = Checkpoint(Files(str(model), revision, cache_dir, local_files_only))
    weights = Weights(checkpoint.files, checkpoint.route.folder)
    if weights.missing:
        raise ConfigError(f"{checkpoint.name!r} has no {weights.missing[0]}: {ONLY_SAFETENSORS}")
    if next(iter(weights.shards.values())).parent.resolve().is_relative_to(target.resolve()):
        raise ConfigError(f"{str(target)!r} holds the model itself; pass another folder to write to")
    if checkpoint.tokenizer.pad_token_id is None:
        raise ConfigError(
            f"the tokenizer of {checkpoint.name!r} has no pad_token, by which a classifier finds the last token in a "
            "batch. Set one in its tokenizer_config.json that no prompt ends with."
        )
    modular = checkpoint.declaration.document.pooling is not None
    made = _modular(checkpoint, weights) if modular else _causal(checkpoint, weights, tokens)
    declared, route = checkpoint.declaration, checkpoint.declaration.document
    said: dict[str, Any] = {"instruction": declared.instruction, "prompt": route.prompt or None}
    said |= route.chat.variables if route.chat else {}
    said = {name: value for name, value in said.items() if value is not None}
    if said and template is None:
        _refuse(
            checkpoint, f"it declares {said}, which a classifier has no place for; pass template= with it written in"
        )
    if route.lower_case:
        _refuse(checkpoint, "it declares do_lower_case, which a classifier has no place for")
    staging = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
        _write_weights(staging, weights, made, dtype, progress or (lambda done, total: None))
        _write_config(staging, checkpoint, made, dtype or weights.rows(next(iter(made.names)), 0, 1).dtype)
        _write_tokenizer(staging, checkpoint, template)
        _put(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Path(out)


@dataclass(frozen=True, slots=True)
class _Classifier:
    """What is to be written; `names` are those of the transformer's tensors by what they were."""

    architecture: str
    names: Mapping[str, str]
    head: Mapping[str, torch.Tensor]
    replaced: str = ""  # a tensor in whose file the head goes
    entries: Mapping[str, Any] = field(default_factory=dict)  # of its config


def _refuse(checkpoint: Checkpoint, why: str) -> NoReturn:
    raise ConfigError(f"{checkpoint.name!r} can't be converted so that it scores the same: {why}")


def _causal(checkpoint: Checkpoint, weights: Weights, tokens: Sequence[str]) -> _Classifier:
    """Put the answer's row of the output matrix, less that of the other answer, in the place of the matrix."""
    name, config = checkpoint.name, checkpoint.config
    architecture = (*checkpoint.architectures, "(none)")[0]
    if not architecture.endswith("ForCausalLM"):
        raise ConfigError(
            f"{name!r} is a {architecture}. Pass a *ForCausalLM or a modular cross-encoder; others need no conversion."
        )
    wanted = architecture.removesuffix("ForCausalLM") + "ForSequenceClassification"
    known = _classifier(checkpoint)
    if getattr(known, "__name__", None) != wanted or not issubclass(known, GenericForSequenceClassification):
        raise ConfigError(f"{name!r} is a {architecture}, for which transformers has no {wanted} that can score alike")
    for option in LOGIT_OPTIONS:
        if getattr(config, option, None) not in {None, 1}:
            raise ConfigError(f"{name!r} has {option} in its config: its logits are more than the output matrix gives")
    # Tied to the embeddings, unless it has weights of its own: so does transformers.
    matrix = _EMBEDDINGS if config.tie_word_embeddings and _HEAD not in weights.home else _HEAD
    if matrix not in weights.home or "lm_head.bias" in weights.home:
        raise ConfigError(f"{name!r} has no {matrix}, or an lm_head.bias: a classifier has a weight and no bias")
    ids = token_ids(checkpoint.tokenizer, tokens, name) if tokens else checkpoint.declaration.answers
    if not ids:
        raise ConfigError(f"{name!r} declares no answers; pass them: tokens=('no', 'yes'), --token no --token yes")
    *false, true = [weights.rows(matrix, row, row + 1).float() for row in ids]
    names = {tensor: tensor for tensor in weights.home if tensor != _HEAD}
    return _Classifier(wanted, names, {_SCORE: true - false[0] if false else true}, _HEAD)


def _modular(checkpoint: Checkpoint, weights: Weights) -> _Classifier:
    """Take a transformer, its pooling and its modules for the architecture's classifier, if that has the same parts."""
    declared, config, known = checkpoint.declaration, checkpoint.config, _classifier(checkpoint)
    route, pooling = declared.document, cast("Pooling", declared.document.pooling)
    layout = _HEADS.get(config.model_type)
    if layout is None and known is not None and issubclass(known, GenericForSequenceClassification):
        layout = _DECODER
    if layout is None or declared.kind != "cross-encoder":
        _refuse(checkpoint, f"no classifier is known for a {declared.kind} of the type {config.model_type}")
    extras = {"a prompt": route.prompt, "a chat template": route.chat}
    for what, declares in {**extras, "layers before the pooling": route.token_layers}.items():
        if declares:
            _refuse(checkpoint, f"it declares {what}, which a classifier has no place for")
    poolings, parts = layout
    if len(pooling.modes) > 1 or pooling.modes[0] not in poolings:
        _refuse(checkpoint, f"it pools {' + '.join(pooling.modes)}, {known.__name__} {' or '.join(poolings)}")
    prefix = f"{known.base_model_prefix}."
    # A transformer that was saved with another head has the prefix, and that head besides.
    whole = any(name.startswith(prefix) for name in weights.home)
    names = {name: name if whole else prefix + name for name in weights.home if name.startswith(prefix) or not whole}
    names = {name: new for name, new in names.items() if not new.startswith(f"{prefix}pooler.")}
    head = _head(checkpoint, known.__name__, parts)
    # Of other decoders LocalScorer must know the prompt.
    entries: dict[str, Any] = {SCORE_TEMPLATE: "none"} if layout is _DECODER else {}
    if config.model_type == "modernbert":
        norms = [new for new in names.values() if new.endswith("norm.weight")]
        entries = {"classifier_pooling": pooling.modes[0], **_as_modernbert(checkpoint, head, norms)}
    if config_activation(config) is None and declared.activation is not None:
        activation(declared.activation, f"{checkpoint.name!r}")
        entries["sentence_transformers"] = {"activation_fn": declared.activation}
    return _Classifier(known.__name__, names, head, entries=entries)


def _head(checkpoint: Checkpoint, classifier: str, parts: Mapping[str, str | None]) -> dict[str, torch.Tensor]:
    """Read the modules behind the pooling under the names of the classifier's head."""
    layers = checkpoint.declaration.document.layers
    asked = [layer.activation.rpartition(".")[2] if layer.kind == "Dense" else None for layer in layers]
    if asked != [*parts.values()] or any(layer.residual for layer in layers):
        has, needs = (", ".join(act or "LayerNorm" for act in acts) for acts in (asked, parts.values()))
        _refuse(checkpoint, f"its head is {has}, that of a {classifier} {needs}")
    head: dict[str, torch.Tensor] = {}
    size = checkpoint.config.hidden_size
    for (place, act), module in zip(parts.items(), read_layers(checkpoint.files, layers), strict=True):
        layer = cast("torch.nn.Linear", module if act is None else module.get_submodule("0"))
        wanted = (size,) if act is None else (1 if act == "Identity" else size, size)
        if layer.weight.shape != wanted:
            _refuse(checkpoint, f"its {place} is {tuple(layer.weight.shape)}, that of a {classifier} {wanted}")
        head[f"{place}.weight"] = layer.weight
        head[f"{place}.bias"] = torch.zeros(wanted[0]) if layer.bias is None else layer.bias
    if "score.bias" in head and head.pop("score.bias").any():
        _refuse(checkpoint, f"its Dense has a bias, the head of a {classifier} none")
    return head


def _as_modernbert(checkpoint: Checkpoint, head: dict[str, torch.Tensor], norms: Sequence[str]) -> dict[str, Any]:
    """Give the entries of the config that say the same of the head; all norms of a ModernBERT have a bias, or none."""
    config, bias = checkpoint.config, head["head.norm.bias"]
    if config.norm_eps != torch.nn.LayerNorm(1).eps:
        _refuse(checkpoint, f"norm_eps is {config.norm_eps:g} in its config, but 1e-05 in its LayerNorm")
    has_bias = config.norm_bias or bool(bias.any())
    if not has_bias:
        del head["head.norm.bias"]
    elif not config.norm_bias:
        head |= {name.replace(".weight", ".bias"): torch.zeros_like(bias) for name in norms}
    return {"classifier_activation": "gelu", "classifier_bias": True, "norm_bias": has_bias}


def _classifier(checkpoint: Checkpoint) -> Any:
    """Find transformers' classifier of the same architecture; ConfigError for a model that can be none."""
    if checkpoint.adapter is not None:
        _refuse(checkpoint, "it has an adapter; merge that first (PEFT: merge_and_unload)")
    if getattr(checkpoint.config, "quantization_config", None) is not None:
        _refuse(checkpoint, "it is quantized; convert the model that it was made from, then quantize the result")
    return CLASSIFIERS.get(type(checkpoint.config), None)


def _write_weights(
    out: Path, weights: Weights, made: _Classifier, dtype: Dtype | None, progress: Callable[[int, int], None]
) -> None:
    """Copy the weights in the same shards, with the head in the place of what it replaces."""
    home = weights.home.get(made.replaced, list(weights.shards)[-1])  # so that no shard is left empty
    index: dict[str, str] = {}
    size = 0
    for done, (shard, path) in enumerate(weights.shards.items(), 1):
        with opened(path) as source:
            tensors = {made.names[name]: source.get_tensor(name) for name in source.keys() if name in made.names}  # noqa: SIM118
            metadata = source.metadata() or {"format": "pt"}
        for name in [name for name in tensors if dtype and tensors[name].is_floating_point()]:
            tensors[name] = tensors[name].to(getattr(torch, str(dtype)))
        if shard == home:
            tensors |= made.head
        save_file(tensors, out / shard, metadata=metadata)
        shutil.copymode(path, out / shard)  # safetensors makes files for the owner alone
        index |= dict.fromkeys(tensors, shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
        del tensors  # before the next shard is read
        progress(done, len(weights.shards))
    if list(weights.shards) != [WEIGHTS]:
        _write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))})


def _write_config(out: Path, checkpoint: Checkpoint, made: _Classifier, stored: Dtype | torch.dtype) -> None:
    """Write the config as it was, but of a classifier with one label."""
    entries = checkpoint.files.json(checkpoint.route.folder, "config.json")
    dtype = stored if isinstance(stored, str) else entries.get("dtype") or entries.get("torch_dtype") or stored
    kept = {key: value for key, value in entries.items() if key not in _DROPPED_ENTRIES}
    # The dtype is always there: without it, readers may take the classifier's float32 for that of all weights.
    kept["torch_dtype" if "torch_dtype" in entries else "dtype"] = str(dtype).removeprefix("torch.")
    kept |= {"architectures": [made.architecture], "pad_token_id": checkpoint.tokenizer.pad_token_id, **made.entries}
    _write_json(out / "config.json", kept | {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}})


def _write_tokenizer(out: Path, checkpoint: Checkpoint, template: str | None) -> None:
    """Copy the tokenizer, with the score template as its template if there is one, and the declared limit."""
    files, route = checkpoint.files, checkpoint.route
    for file in TOKENIZER_FILES:
        if (found := files.path(route.folder, file)) is not None:
            shutil.copyfile(found, out / file)
    settings = files.json(route.folder, "tokenizer_config.json") or {}
    changed = {**settings, **route.tokenizer_options}
    if template is not None:
        (out / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
        changed.pop("chat_template", None)  # older readers look here first
    if route.max_length is not None:
        changed["model_max_length"] = min(route.max_length, changed.get("model_max_length") or route.max_length)
    if changed != settings:
        _write_json(out / "tokenizer_config.json", changed)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_file():
        raise ConfigError(f"{str(target)!r} is a file; pass a folder")
    there = target.exists() and any(target.iterdir())
    if there and not overwrite:
        raise ConfigError(f"{str(target)!r} is not empty; pass another folder, or overwrite=True to replace it")
    if there and not (target / "config.json").is_file():
        raise ConfigError(f"{str(target)!r} holds something else than a model, which is never replaced; pass another")


def _put(staging: Path, target: Path) -> None:
    """Rename the finished folder to `target`, and only then remove what was there."""
    old = staging.with_name(f"{staging.name}-old")
    if target.exists():
        target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
