"""Reading a checkpoint, from the hub or a folder: config, weights, tokenizer; or an error that says what is missing."""

import copy
import functools
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, cast

import torch
from tokenizers import normalizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rag_rerank.errors import ConfigError
from rag_rerank.local.checkpoint.adapter import Adapter, read_adapter
from rag_rerank.local.checkpoint.declaration import Kind, Route, read_declaration
from rag_rerank.local.checkpoint.files import Files, Weights, check_weights
from rag_rerank.local.checkpoint.fingerprint import fingerprint
from rag_rerank.local.models.native.translation import load_translated, translated_config, translated_declaration

_SMALL = 500_000_000  # bytes of a folder's weights, which are there before a progress bar can be read
_SCALES = "weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", ".scales", ".SCB", ".absmax"
_NO_ADAPTER = "(none)"  # a folder that no checkpoint has


class Checkpoint:
    """A model's files, and how to read it; `config` is read at once, which shows whether it is there."""

    def __init__(
        self,
        files: Files,
        kind: Kind | None = None,
        *,
        trust_remote_code: bool = False,
        tokenizer_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.name, self.files = files.name, files
        self.json = functools.cache(files.json)  # a hub is asked once for each
        self._code = {"trust_remote_code": trust_remote_code}
        self._tokenizer_kwargs = tokenizer_kwargs
        self.declaration = read_declaration(files.name, self._declared, kind)
        self._follow(self.declaration.document)
        self.declaration = translated_declaration(self.config, self.declaration)
        answers, words = self.declaration.answers, self.config.get_text_config()
        if answers and len({each for each in answers if 0 <= each < words.vocab_size}) < len(answers):
            ids = f"true_token_id and false_token_id are {answers[::-1]}"
            raise ConfigError(f"{self.name!r}: LogitScore: {ids}, which are no different entries of its vocabulary")

    def _declared(self, path: str) -> Any:
        """Read a JSON file for the declaration; an adapter's config is that of its model."""
        content, parent = self.json(path), PurePosixPath(path).parent
        if content is not None or path != str(parent / "config.json"):
            return content
        adapter = read_adapter(self.files, str(parent))
        return adapter and {"architectures": self._config(adapter, None).architectures}

    def _config(self, adapter: Adapter, task: str | None) -> PreTrainedConfig:
        config: PreTrainedConfig = adapter.base.read(AutoConfig.from_pretrained, subfolder=adapter.folder, **self._code)
        architecture = adapter.architecture(config, task)
        if architecture is not None:
            config.architectures = [architecture]
        if adapter.labels is not None:
            config.num_labels = adapter.labels
        return config

    def _follow(self, route: Route) -> None:
        """Read what there is of a route's transformer."""
        self.route = route
        self.adapter = read_adapter(self.files, route.folder)
        translated = translated_config(self.name, self.json(str(PurePosixPath(route.folder, "config.json"))))
        self._translated = translated is not None
        self.config: PreTrainedConfig = translated or (
            self.files.read(AutoConfig.from_pretrained, subfolder=route.folder, **self._code)
            if self.adapter is None
            else self._config(self.adapter, route.task)
        )
        self.architectures: tuple[str, ...] = tuple(self.config.architectures or ())

    def at(self, route: Route) -> "Checkpoint":
        """Give the same with the transformer of another route."""
        if route.folder == self.route.folder:
            return self
        other = copy.copy(self)
        other.__dict__.pop("tokenizer", None)
        other._follow(route)  # noqa: SLF001 - a copy of its own
        return other

    def model(self, auto: Any, device: torch.device, **options: Any) -> PreTrainedModel:
        """Load the weights, complete, on the device, in evaluation mode; `options` are those of ``from_pretrained``."""
        loaded: PreTrainedModel
        adapter = self.adapter
        files, folder = (self.files, self.route.folder) if adapter is None else (adapter.base, adapter.folder)
        local = Path(files.name, folder)
        if local.is_dir():
            check_weights(local)
        # A folder with few weights: nothing is downloaded and little is read.
        small = local.is_dir() and sum(file.stat().st_size for file in local.glob("*.safetensors")) < _SMALL
        read = auto.from_pretrained
        if self._translated:
            read = functools.partial(load_translated, auto, lambda: Weights(files, folder))
        with _without_bars() if small else nullcontext():
            loaded, report = files.read(
                read,
                subfolder=folder,
                use_safetensors=True,  # pickle weights can run code
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to name them below
                **({"config": self.config} if self._translated or adapter is not None else {}),
                **self._code,
                # transformers would apply an adapter without merging it, and ask the hub whether there is one
                **{"adapter_kwargs": {**files.source, "subfolder": _NO_ADAPTER}, **options},
            )
        there = () if adapter is None else adapter.shapes
        for name, stored, wanted in [each for each in report["mismatched_keys"] if each[0] not in there]:
            sizes = f"{name} is {tuple(stored)} in the weights, {tuple(wanted)} by config.json"
            raise ConfigError(f"{self.name!r}: {sizes}, which is another model's. Copy the right one")
        # Weights that a checkpoint lacks are drawn at random with no more than a log line: scores from nowhere. Only
        # the pooler may be missing, and only where we pool ourselves.
        missing = [key for key in report["missing_keys"] if auto is not AutoModel or "pooler" not in key]
        if missing := [key for key in missing if key not in there]:
            raise ConfigError(
                f"{self.name!r} has no weights for {', '.join(sorted(missing)[:3])}: not a trained "
                f"{type(loaded).__name__}. Pass a reranker, or score_type= for what it is."
            )
        ignored = getattr(loaded.config, "quantization_config", None) and getattr(loaded, "hf_quantizer", None) is None
        if ignored or any(key.endswith(_SCALES) for key in report["unexpected_keys"]):
            what = "config.json: its weights are quantized, but it has no quantization_config that transformers knows"
            raise ConfigError(f"{self.name!r}: {what}. Pass the model that it was made of")
        if adapter is not None:
            loaded = adapter.merge(loaded)
        self._check_tokenizer(loaded)
        # Module's own methods: those that transformers puts before them have lost their types.
        torch.nn.Module.to(loaded, device)
        torch.nn.Module.eval(loaded)
        return loaded

    def stored(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Read weights as the files have them, in float32; without those that are not there by these names."""
        weights = Weights(self.files, self.route.folder)
        return {name: weights.rows(name).float() for name in names if name in weights.home}

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's chat template, the default where it has several."""
        saved: Any = self.tokenizer.chat_template
        return saved.get("default") if isinstance(saved, dict) else saved

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer; an adapter without one has its model's."""
        files, folder, adapter = self.files, self.route.folder, self.adapter
        # From a folder with code of its own it would ask for that, and from an adapter's for a config.
        options = {"config": self.config} if self._translated or adapter is not None else {}
        if adapter is not None and not any(files.path(folder, f"tokenizer{end}.json") for end in ("", "_config")):
            files, folder = adapter.base, adapter.folder
        tokenizer: PreTrainedTokenizerBase = files.read(
            AutoTokenizer.from_pretrained,
            subfolder=folder,
            **self._code,
            **{**options, **self.route.tokenizer_options, **self._tokenizer_kwargs},
        )
        if self.route.lower_case:  # prompts, too; Python's lower() makes other letters of some
            backend: Any = tokenizer.backend_tokenizer
            before = [] if backend.normalizer is None else [backend.normalizer]
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *before])
        return tokenizer

    def fingerprint(self) -> dict[str, str]:
        """Hash what was loaded; see `fingerprint`."""
        base = None
        if self.adapter is not None and self.adapter.base != self.files:
            base = cast("Path", self.adapter.base.path("config.json")).parent
        found = next(filter(None, map(self.files.path, ("modules.json", "config.json", "adapter_config.json"))))
        return fingerprint(found.parent, base)

    def _check_tokenizer(self, model: PreTrainedModel) -> None:
        """Raise ConfigError for a tokenizer of another model, or one that transformers made up for missing files."""
        try:
            rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
        except NotImplementedError:  # a model of characters
            rows = None
        if rows is not None and len(self.tokenizer) > rows:
            raise ConfigError(
                f"the tokenizer of {self.name!r} has {len(self.tokenizer)} tokens, but the model only {rows}: "
                "its tokenizer files are another model's"
            )
        ids = self.tokenizer("the city of 1 . 的 и", add_special_tokens=False)["input_ids"]
        if not set(ids) - {self.tokenizer.unk_token_id}:
            raise ConfigError(
                f"the tokenizer of {self.name!r} knows no word at all: copy the model's tokenizer.json, or vocab.txt "
                "and the like, beside its config.json"
            )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' progress bars in this thread; those of others stay as they are, and so do all settings."""
    thread = threading.get_ident()

    def hook(make: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() == thread:
            kwargs = {**kwargs, "disable": True}
        return make(*args, **kwargs) if previous is None else previous(make, args, kwargs)

    previous = transformers_logging.set_tqdm_hook(hook)  # the process's: `one_at_a_time` is held
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def max_length(checkpoint: Checkpoint, model: PreTrainedModel, declared: int | None, asked: int | None) -> int:
    """Find the longest input in tokens; ConfigError if the caller asked for more than the model was made for.

    What sentence-transformers' files declare goes before what the tokenizer says, and before the window of a rope or of
    DeBERTa, which has no table of positions.
    """
    config = checkpoint.config.get_text_config()  # itself, where there is no tower beside it
    limits = [count for _, count in position_tables(model)]
    endless = getattr(config, "position_biased_input", None) is False
    if declared is None or not (endless or any("inv_freq" in name for name, _ in model.named_buffers())):
        limits.append(int(getattr(config, "max_position_embeddings", 0) or 0))
    limits.append(declared or int(min(checkpoint.tokenizer.model_max_length, 10**9)))  # "no limit" is written as 10**30
    limit = min(value for value in limits if value > 0)
    if asked is not None and asked > limit:
        raise ConfigError(f"max_length={asked} is more than {checkpoint.name!r} was made for: {limit} tokens")
    return asked or limit


def position_tables(model: PreTrainedModel) -> Iterator[tuple[int, int]]:
    """Yield the tables of positions that a model has learned: the number of the first, and how many there are.

    RoBERTa and its kin count from one behind the padding token's: their 514 rows are 512 positions, from 2.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            yield first, module.num_embeddings - first
