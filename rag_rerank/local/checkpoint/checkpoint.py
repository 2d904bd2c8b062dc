"""Reading a checkpoint, from the hub or a folder: config, weights, tokenizer; or an error that says what is missing."""

import copy
import functools
import importlib.util
import json
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from rag_rerank.errors import ConfigError
from rag_rerank.local.checkpoint.declaration import Route, read_declaration
from rag_rerank.local.checkpoint.fingerprint import fingerprint
from rag_rerank.local.hardware import choose_dtype
from rag_rerank.local.settings import Settings

_SMALL = 500_000_000  # bytes of a folder's weights, which are there before a progress bar can be read
_HOOK = threading.Lock()


def check_exists(name: str) -> None:
    """Raise ConfigError for what is written like a path and leads nowhere: no hub need be asked for it."""
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise ConfigError(f"there is no folder {name!r}; pass an existing folder or a hub id such as org/name")


class Checkpoint:
    """A hub id or a folder, and how to read it; `config` is read at once, which shows whether it is there."""

    def __init__(self, settings: Settings) -> None:
        self.name = name = settings.model
        self._settings = settings
        self._source = {key: getattr(settings, key) for key in ("revision", "local_files_only", "cache_dir")}
        self._code = {"trust_remote_code": settings.trust_remote_code}
        check_exists(name)
        if Path(name, "snapshots").is_dir():
            raise ConfigError(f"{name!r} is a folder of the hub's cache; pass the one in its snapshots, or the hub id")
        if Path(name).is_dir() and not any(Path(name, file).is_file() for file in ("config.json", "modules.json")):
            raise ConfigError(f"the folder {name!r} holds no model: neither config.json nor modules.json is in it")
        kind = None if settings.score_type == "auto" else settings.score_type
        self.declaration = read_declaration(name, self.json, kind)
        self.transformer = self.declaration.document.folder  # within the checkpoint
        self.tokenizer_options = self.declaration.document.tokenizer_options
        self.config: PreTrainedConfig = self._read(AutoConfig.from_pretrained, subfolder=self.transformer, **self._code)
        self.architectures: tuple[str, ...] = tuple(self.config.architectures or ())

    def at(self, route: Route) -> "Checkpoint":
        """Give the same with the transformer of another route."""
        if route.folder == self.transformer:
            return self
        other = copy.copy(self)
        other.__dict__.pop("tokenizer", None)
        other.transformer, other.tokenizer_options = route.folder, route.tokenizer_options
        other.config = self._read(AutoConfig.from_pretrained, subfolder=route.folder, **self._code)
        return other

    def file(self, path: str) -> Path | None:
        """Find a file of the checkpoint on this machine; None where it has no such file."""
        found: str | None = self._read(cached_file, path, _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    def json(self, path: str) -> Any:
        """Read a JSON file of the checkpoint; None where it has no such file."""
        found = self.file(path)
        if found is None:
            return None
        try:
            return json.loads(found.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} of {self.name!r} is not valid JSON: {error}") from error

    def model(self, auto: Any, device: torch.device) -> PreTrainedModel:
        """Load the weights, complete, on the device, in evaluation mode."""
        loaded: PreTrainedModel
        self._check_files()
        # A folder with few weights: nothing is downloaded and little is read.
        files = Path(self.name, self.transformer).glob("*.safetensors")
        small = Path(self.name).is_dir() and sum(file.stat().st_size for file in files) < _SMALL
        with _without_bars() if small else nullcontext():
            loaded, report = self._read(
                auto.from_pretrained,
                subfolder=self.transformer,
                use_safetensors=True,  # pickle weights can run code
                output_loading_info=True,
                **self._code,
                **{"dtype": choose_dtype(self._settings.dtype, device), **self._settings.model_kwargs},
            )
        # Weights that a checkpoint lacks are drawn at random with no more than a log line: scores from nowhere. Only
        # the pooler may be missing, and only where we pool ourselves.
        missing = [key for key in report["missing_keys"] if auto is not AutoModel or "pooler" not in key]
        if missing:
            raise ConfigError(
                f"{self.name!r} has no weights for {', '.join(sorted(missing)[:3])}: not a trained "
                f"{type(loaded).__name__}. Pass a reranker, or score_type= for what it is."
            )
        self._check_tokenizer(loaded)
        # Module's own methods: those that transformers puts before them have lost their types.
        torch.nn.Module.to(loaded, device)
        torch.nn.Module.eval(loaded)
        return loaded

    def stored(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Read weights as the files have them, in float32; without those that are not there by these names."""
        folder = f"{self.transformer}/".removeprefix("/")
        index = self.json(f"{folder}model.safetensors.index.json")
        files = dict.fromkeys(names, "model.safetensors") if index is None else index["weight_map"]
        found: dict[str, torch.Tensor] = {}
        for file in {files[name] for name in names if name in files}:
            if (path := self.file(folder + file)) is not None:
                with safe_open(path, framework="pt") as weights:
                    found |= {name: weights.get_tensor(name).float() for name in {*names} & {*weights.keys()}}
        return found

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self._read(
            AutoTokenizer.from_pretrained,
            subfolder=self.transformer,
            **self._code,
            **{**self.tokenizer_options, **self._settings.tokenizer_kwargs},
        )
        return tokenizer

    def fingerprint(self) -> dict[str, str]:
        """Hash what was loaded; see `fingerprint`."""
        folder = cast("Path", self.file("modules.json") or self.file("config.json")).parent
        adapter = folder / "adapter_config.json"
        base = json.loads(adapter.read_bytes()).get("base_model_name_or_path") if adapter.is_file() else None
        if base is not None and not Path(base).is_dir():
            # None where it is not in the cache: then nothing has loaded it.
            config = try_to_load_from_cache(base, "config.json", cache_dir=self._settings.cache_dir)
            base = Path(config).parent if isinstance(config, str) else None
        return fingerprint(folder, base and Path(base))

    def _check_files(self) -> None:
        """Raise ConfigError for weights that would be read wrongly, or not at all."""
        if self.declaration.adapter and importlib.util.find_spec("peft") is None:
            raise ConfigError(
                f"{self.name!r} has an adapter (adapter_config.json), without which its scores are others: "
                "pip install peft, or merge the adapter into its model and pass that"
            )
        folder = Path(self.name, self.transformer)
        weights, pickles = list(folder.glob("*.safetensors")), list(folder.glob("*.bin"))
        if pickles and not weights and not self.declaration.adapter:
            raise ConfigError(
                f"{str(pickles[0])!r} holds pickled weights, which can run code, and there are no safetensors beside "
                "it: load it with transformers where that does no harm, call save_pretrained, and pass the result"
            )
        for path in weights:
            with path.open("rb") as file:
                if file.read(24).startswith(b"version https://git-lfs"):
                    raise ConfigError(f"{str(path)!r} is a pointer of Git LFS, not the weights: git lfs pull")
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError as error:
                raise ConfigError(f"{str(path)!r} is damaged ({error}): copy it anew") from error

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

    def _read(self, reader: Any, *args: Any, **options: Any) -> Any:
        try:
            return reader(self.name, *args, **self._source, **options)
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{self.name!r} can't be loaded: {reason}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' progress bars in this thread; those of others stay as they are, and so do all settings."""
    set_hook = getattr(transformers_logging, "set_tqdm_hook", None)
    if set_hook is None:  # before it had one, bars could be hidden for the whole process only
        yield
        return
    thread = threading.get_ident()

    def hook(make: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() == thread:
            kwargs = {**kwargs, "disable": True}
        return make(*args, **kwargs) if previous is None else previous(make, args, kwargs)

    with _HOOK:  # the hook is the process's: who sets it puts back what was there before the next one does
        previous = set_hook(hook)
        try:
            yield
        finally:
            set_hook(previous)


def max_length(checkpoint: Checkpoint, model: PreTrainedModel, declared: int | None, asked: int | None) -> int:
    """Find the longest input in tokens; ConfigError if the caller asked for more than the model was made for.

    What sentence-transformers' files declare goes before what the tokenizer says.
    """
    config = checkpoint.config.get_text_config()  # itself, where there is no tower beside it
    limits = [int(getattr(config, "max_position_embeddings", 0) or 0)]
    limits += [count for _, count in position_tables(model)]
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
