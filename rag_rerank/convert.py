"""From a causal reranker to a sequence-classification checkpoint that scores the same (extra `local`).

Some rerankers are causal language models that answer "yes" or "no", scored by the logit of one token or the difference
of two. A logit is the last hidden state times one row of the output matrix. So one row, or the difference of two, as
the weight of a one-label classifier gives the same score, without the output matrix and ``--hf-overrides``.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSIFIERS
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_layers import GenericForSequenceClassification

from rag_rerank.errors import ConfigError
from rag_rerank.local.checkpoint.checkpoint import check_exists
from rag_rerank.local.checkpoint.fingerprint import TOKENIZER_FILES
from rag_rerank.local.models.decoder import LOGIT_OPTIONS, token_ids

Method = Literal["two-token", "single-token"]
Dtype = Literal["float32", "bfloat16", "float16"]

_TOKENS = {"two-token": ("false", "true"), "single-token": ("true",)}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
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


def convert(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: Method,
    tokens: Sequence[str],
    template: str | None = None,
    dtype: Dtype | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `model`, a ``*ForCausalLM`` reranker, as a ``*ForSequenceClassification`` with one label into `out`.

    The classifier's weight is computed and stored in float32 whatever the rest is stored in, as vLLM computes it from
    ``classifier_from_token``: a difference of two rows rounded to bfloat16 is another model. Weights are copied shard
    by shard, so memory for one shard is enough for a model of any size. Nothing appears at `out` before all of it
    is written, and nothing of `model` is changed.

    Args:
        model: A hub id or a folder, with safetensors weights.
        out: The folder to make.
        method: ``"two-token"``: the score is the logit of the true token minus that of the false one (its sigmoid is
            the softmax over the two). ``"single-token"``: the logit of the true token.
        tokens: ``(false, true)`` or ``(true,)``: vocabulary entries, as in ``("no", "yes")`` or ``("Yes",)``.
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
    if method not in get_args(Method):
        raise ConfigError(f"method must be one of {', '.join(get_args(Method))}; got {method!r}")
    if isinstance(tokens, str) or len(tokens) != len(_TOKENS[method]):
        raise ConfigError(f"method {method!r} takes the tokens ({', '.join(_TOKENS[method])}); got {tokens!r}")
    if dtype is not None and dtype not in get_args(Dtype):
        raise ConfigError(f"dtype must be None or one of {', '.join(get_args(Dtype))}; got {dtype!r}")
    target = Path(out).absolute()
    _check_target(target, overwrite)
    folder = _folder(str(model), revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    if folder.resolve().is_relative_to(target.resolve()):
        raise ConfigError(f"{str(target)!r} holds the model itself; pass another folder to write to")
    source = _CausalModel(str(model), folder)
    score = source.score_weight(token_ids(source.tokenizer, tokens, source.name))
    staging = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        staging.mkdir(parents=True)
        source.write_weights(staging, score, dtype, progress or (lambda done, total: None))
        source.write_config(staging, dtype)
        source.write_tokenizer(staging, template)
        _put(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Path(out)


class _CausalModel:
    """A causal reranker on disk; ConfigError where a classifier can't score as it does."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        local = {"local_files_only": True, "trust_remote_code": False}  # no code of the model ever runs
        self.config: PreTrainedConfig = self._read(AutoConfig.from_pretrained, folder, **local)
        self.architecture = _classifier(name, self.config)
        self.tokenizer: PreTrainedTokenizerBase = self._read(AutoTokenizer.from_pretrained, folder, **local)
        if self.tokenizer.pad_token_id is None:
            raise ConfigError(
                f"the tokenizer of {name!r} has no pad_token, by which a classifier finds the last token in a batch. "
                "Set one in its tokenizer_config.json that no prompt ends with."
            )
        self.shards = self._shards()
        self._home: dict[str, str] = {}
        for shard in self.shards:
            with self._read(safe_open, folder / shard, framework="pt") as source:
                self._home |= dict.fromkeys(source.keys(), shard)
        self.head = _EMBEDDINGS if self.config.tie_word_embeddings else _HEAD
        if self.head not in self._home or "lm_head.bias" in self._home:
            raise ConfigError(f"{name!r} has no {self.head}, or an lm_head.bias: a classifier has a weight and no bias")

    def score_weight(self, ids: Sequence[int]) -> torch.Tensor:
        """Compute the classifier's one row, in float32: the true token's, less the false token's if there is one."""
        *false, true = [self._row(row).to(torch.float32) for row in ids]
        return true - false[0] if false else true

    def write_weights(
        self, out: Path, score: torch.Tensor, dtype: Dtype | None, progress: Callable[[int, int], None]
    ) -> None:
        """Copy the weights in the same shards, with the classifier in the place of the output matrix."""
        home = self._home.get(_HEAD, self.shards[-1])  # so that no shard is left empty
        index: dict[str, str] = {}
        size = 0
        for done, shard in enumerate(self.shards, 1):
            with safe_open(self.folder / shard, framework="pt") as source:
                tensors = {name: source.get_tensor(name) for name in source.keys() if name != _HEAD}  # noqa: SIM118
                metadata = source.metadata() or {"format": "pt"}
            for name in [name for name in tensors if dtype and tensors[name].is_floating_point()]:
                tensors[name] = tensors[name].to(getattr(torch, str(dtype)))
            if shard == home:
                tensors[_SCORE] = score
            save_file(tensors, out / shard, metadata=metadata)
            shutil.copymode(self.folder / shard, out / shard)  # safetensors makes files for the owner alone
            index |= dict.fromkeys(tensors, shard)
            size += sum(tensor.nbytes for tensor in tensors.values())
            del tensors  # before the next shard is read
            progress(done, len(self.shards))
        if self.shards != [_WEIGHTS]:
            _write_json(out / _INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))})

    def write_config(self, out: Path, dtype: Dtype | None) -> None:
        """Write the config as it was, but of a classifier with one label."""
        entries = self._json("config.json")
        stored = dtype or entries.get("dtype") or entries.get("torch_dtype") or str(self._row(0).dtype).split(".")[1]
        kept = {key: value for key, value in entries.items() if key not in _DROPPED_ENTRIES}
        # The dtype is always there: without it, readers may take the classifier's float32 for that of all weights.
        kept |= {"architectures": [self.architecture], "torch_dtype" if "torch_dtype" in entries else "dtype": stored}
        kept |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": self.tokenizer.pad_token_id}
        _write_json(out / "config.json", kept)

    def write_tokenizer(self, out: Path, template: str | None) -> None:
        """Copy the tokenizer, with the score template as its template if there is one."""
        for file in TOKENIZER_FILES:
            if (self.folder / file).is_file():
                shutil.copyfile(self.folder / file, out / file)
        if template is not None:
            (out / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
            settings = self._json("tokenizer_config.json")
            if settings.pop("chat_template", None) is not None:  # older readers look here first
                _write_json(out / "tokenizer_config.json", settings)

    def _shards(self) -> list[str]:
        """List the weight files, in order; as in transformers, one file goes before an index."""
        index = {} if (self.folder / _WEIGHTS).is_file() else self._json(_INDEX)
        shards = sorted(set(index.get("weight_map", {}).values())) or [_WEIGHTS]
        outside = [shard for shard in shards if Path(shard).name != shard]
        missing = [shard for shard in shards if not (self.folder / shard).is_file()]
        if outside or missing:
            raise ConfigError(
                f"{self.name!r} has no {(outside + missing)[0]}: only models with all their safetensors weights are "
                "converted (pickle weights can run code). Load it with transformers, call save_pretrained, pass that."
            )
        return shards

    def _row(self, row: int) -> torch.Tensor:
        with safe_open(self.folder / self._home[self.head], framework="pt") as shard:
            weight: torch.Tensor = shard.get_slice(self.head)[row : row + 1]
        return weight

    def _json(self, file: str) -> Any:
        path = self.folder / file
        return self._read(json.loads, path.read_bytes()) if path.is_file() else {}

    def _read(self, reader: Any, *args: Any, **options: Any) -> Any:
        try:
            return reader(*args, **options)
        except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
            raise ConfigError(f"{self.name!r} can't be loaded: {' '.join(str(error).split())}") from error


def _classifier(name: str, config: PreTrainedConfig) -> str:
    """Name the classifier of the same architecture, if its score can be the causal model's logit."""
    architecture = (config.architectures or ["(none)"])[0]
    if not architecture.endswith("ForCausalLM"):
        raise ConfigError(f"{name!r} is a {architecture}. Pass a *ForCausalLM; other rerankers need no conversion.")
    wanted = architecture.removesuffix("ForCausalLM") + "ForSequenceClassification"
    known: Any = CLASSIFIERS.get(type(config), None)
    if getattr(known, "__name__", None) != wanted or not issubclass(known, GenericForSequenceClassification):
        raise ConfigError(f"{name!r} is a {architecture}, for which transformers has no {wanted} that can score alike")
    for option in LOGIT_OPTIONS:
        if getattr(config, option, None) not in {None, 1}:
            raise ConfigError(f"{name!r} has {option} in its config: its logits are more than the output matrix gives")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{name!r} is quantized; convert the model that it was made from, then quantize the result")
    return wanted


def _folder(name: str, **source: Any) -> Path:
    """Where the model's files are, after fetching them from the hub if need be."""
    if Path(name).is_dir():
        return Path(name)
    check_exists(name)
    wanted = ["model*.safetensors", "*.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"], **source))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name!r} can't be fetched: {' '.join(str(error).split())}") from error


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
