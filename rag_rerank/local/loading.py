"""From a hub id or a folder to a model that is ready to score, or a ConfigError that says what is missing."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from rag_rerank.errors import ConfigError
from rag_rerank.local.bi_encoder import BiEncoder, pooling_of
from rag_rerank.local.cross_encoder import CrossEncoder, own_activation
from rag_rerank.local.hardware import TOKEN_BUDGET, TOKEN_BUDGETS, choose_device, choose_dtype
from rag_rerank.local.model import Model


def load(
    *,
    model: str,
    device: str | None,
    dtype: str,
    score_type: str,
    use_activation: bool | None,
    max_length: int | None,
    revision: str | None,
    trust_remote_code: bool,
    local_files_only: bool,
    cache_dir: str | None,
    model_kwargs: dict[str, Any],
    tokenizer_kwargs: dict[str, Any],
) -> Model:
    """Load a model for scoring; the arguments are those of `LocalScorer`.

    Raises:
        ConfigError: It is not there, not a reranker, not safetensors, lacks weights, or does not fit the arguments.
    """
    checkpoint = _Checkpoint(
        model,
        revision=revision,
        trust_remote_code=trust_remote_code,
        local_files_only=local_files_only,
        cache_dir=cache_dir,
    )
    kind = _score_type(checkpoint, score_type)
    target = choose_device(device)
    weights = {"dtype": choose_dtype(dtype, target), **model_kwargs}
    budget = TOKEN_BUDGETS.get(target.type, TOKEN_BUDGET)
    if kind == "cross-encoder":
        classifier = checkpoint.model(AutoModelForSequenceClassification, weights, target)
        tokenizer = checkpoint.tokenizer(tokenizer_kwargs)
        activation = torch.nn.Identity() if use_activation is False else own_activation(checkpoint.config)
        limit = _max_length(checkpoint, classifier, tokenizer, max_length)
        return CrossEncoder(classifier, tokenizer, limit, budget, activation)
    modules = _Modules(checkpoint)
    encoder = checkpoint.model(AutoModel, weights, target, subfolder=modules.transformer)
    tokenizer = checkpoint.tokenizer(tokenizer_kwargs, subfolder=modules.transformer)
    pooling = pooling_of(checkpoint.json(f"{modules.pooling}/config.json") or {})
    limit = _max_length(checkpoint, encoder, tokenizer, max_length, subfolder=modules.transformer)
    lower_case = bool(checkpoint.sentence_config(modules.transformer).get("do_lower_case", False))
    return BiEncoder(encoder, tokenizer, limit, budget, pooling, lower_case)


class _Checkpoint:
    """A hub id or a folder, and how to read it; `config` is read at once, which shows whether it is there."""

    def __init__(self, name: str, *, trust_remote_code: bool, **source: Any) -> None:
        self.name = name
        self._source = source
        self._code = {"trust_remote_code": trust_remote_code}
        if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
            raise ConfigError(f"there is no folder {name!r}; pass an existing folder or a hub id such as org/name")
        if Path(name).is_dir() and not any(Path(name, file).is_file() for file in ("config.json", "modules.json")):
            raise ConfigError(f"the folder {name!r} holds no model: neither config.json nor modules.json is in it")
        self.modules: list[dict[str, Any]] | None = self.json("modules.json")
        subfolder = next((module["path"] for module in self.modules or [] if _kind(module) == "Transformer"), "")
        self.config: PreTrainedConfig = self._read(AutoConfig.from_pretrained, subfolder=subfolder, **self._code)

    def json(self, path: str) -> Any:
        """The content of a JSON file of the checkpoint, or None where it has no such file."""
        found = self._read(cached_file, path, _raise_exceptions_for_missing_entries=False)
        if found is None:
            return None
        try:
            return json.loads(Path(found).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} of {self.name!r} is not valid JSON: {error}") from error

    def sentence_config(self, subfolder: str = "") -> dict[str, Any]:
        """What sentence-transformers wrote about its tokenizer, if anything."""
        return self.json(str(PurePosixPath(subfolder, "sentence_bert_config.json"))) or {}

    def model(self, auto: Any, weights: dict[str, Any], device: torch.device, subfolder: str = "") -> PreTrainedModel:
        """The weights, complete, on the device, in evaluation mode."""
        loaded: PreTrainedModel
        loaded, report = self._read(
            auto.from_pretrained,
            subfolder=subfolder,
            use_safetensors=True,  # pickle weights can run code
            output_loading_info=True,
            **self._code,
            **weights,
        )
        # Weights that a checkpoint lacks are drawn at random with no more than a log line: scores from nowhere. Only
        # the pooler may be missing, and only where we pool ourselves.
        missing = [key for key in report["missing_keys"] if auto is not AutoModel or "pooler" not in key]
        if missing:
            raise ConfigError(
                f"{self.name!r} has no weights for {', '.join(sorted(missing)[:3])}: not a trained "
                f"{type(loaded).__name__}. Pass a reranker, or score_type= for what it is."
            )
        # Module's own methods: those that transformers puts before them have lost their types.
        torch.nn.Module.to(loaded, device)
        torch.nn.Module.eval(loaded)
        return loaded

    def tokenizer(self, options: dict[str, Any], subfolder: str = "") -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self._read(
            AutoTokenizer.from_pretrained, subfolder=subfolder, **self._code, **options
        )
        return tokenizer

    def _read(self, reader: Any, *args: Any, **options: Any) -> Any:
        try:
            return reader(self.name, *args, **self._source, **options)
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{self.name!r} can't be loaded: {reason}") from error


class _Modules:
    """Where a sentence-transformers folder keeps its parts; ConfigError where it has parts that we don't run."""

    def __init__(self, checkpoint: _Checkpoint) -> None:
        if checkpoint.modules is None:
            raise ConfigError(
                f"{checkpoint.name!r} has no modules.json, so how its token states become an embedding is unknown. "
                "Pass a sentence-transformers model, or a cross-encoder."
            )
        paths = {_kind(module): str(module["path"]) for module in checkpoint.modules}
        unknown = sorted(paths.keys() - {"Transformer", "Pooling", "Normalize"})
        if unknown or "Pooling" not in paths:
            raise ConfigError(
                f"{checkpoint.name!r} is made of {', '.join(paths)}; as a bi-encoder only Transformer, Pooling and "
                "Normalize are supported"
            )
        self.transformer = paths.get("Transformer", "")
        self.pooling = paths["Pooling"]


def _kind(module: dict[str, Any]) -> str:
    """``Pooling`` of ``sentence_transformers.models.Pooling``: the path before it changed over the versions."""
    return str(module.get("type", "")).rpartition(".")[2]


def _score_type(checkpoint: _Checkpoint, asked: str) -> str:
    """What the checkpoint is, checked against what the caller says."""
    architecture = (checkpoint.config.architectures or ["(none)"])[0]
    classifier = architecture.endswith("ForSequenceClassification")
    if asked == "bi-encoder" or (asked == "auto" and not classifier and checkpoint.modules is not None):
        return "bi-encoder"
    if not classifier:
        raise ConfigError(
            f"{checkpoint.name!r} is a {architecture}: neither a *ForSequenceClassification nor a "
            "sentence-transformers model. Pass a cross-encoder such as cross-encoder/ms-marco-MiniLM-L6-v2."
        )
    if checkpoint.config.num_labels != 1:
        raise ConfigError(
            f"{checkpoint.name!r} has {checkpoint.config.num_labels} labels; a reranker has one. "
            "It classifies, it does not score relevance."
        )
    return "cross-encoder"


def _max_length(
    checkpoint: _Checkpoint,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: int | None,
    subfolder: str = "",
) -> int:
    """Longest input in tokens: the least of what positions, tokenizer, sentence-transformers and the caller allow."""
    limits = [int(getattr(checkpoint.config, "max_position_embeddings", 0) or 0)]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa counts positions from padding_idx + 1: 514 rows are 512 positions.
            limits.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    limits.append(int(checkpoint.sentence_config(subfolder).get("max_seq_length") or 0))
    limits.append(int(min(tokenizer.model_max_length, 10**9)))  # "no limit" is written as 10**30
    limit = min(value for value in limits if value > 0)
    if asked is not None and asked > limit:
        raise ConfigError(f"max_length={asked} is more than {checkpoint.name!r} was made for: {limit} tokens")
    return asked or limit
