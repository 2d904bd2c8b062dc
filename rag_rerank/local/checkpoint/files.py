"""The files of a model, in a folder or from the hub, and its weights in them; an error names the file."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from rag_rerank.errors import ConfigError

_FIRST_FILES = ("config.json", "modules.json", "adapter_config.json")  # every model has one of them
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

ONLY_SAFETENSORS = (
    "only safetensors are read, for pickle weights can run code. Where that does no harm, load the model with "
    "transformers, call save_pretrained, and pass the result"
)


@dataclass(frozen=True, slots=True)
class Files:
    """A folder or a hub id, and how to ask the hub."""

    name: str
    revision: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError for what can hold no model: no hub need be asked for what is written like a path."""
        name, folder = self.name, Path(self.name)
        if not folder.is_dir():
            if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
                raise ConfigError(f"there is no folder {name!r}; pass an existing folder or a hub id such as org/name")
            if not (self.local_files_only or constants.HF_HUB_OFFLINE or self._cached):
                self._reach_hub()
        elif Path(name, "snapshots").is_dir():
            raise ConfigError(f"{name!r} is a folder of the hub's cache; pass the one in its snapshots, or the hub id")
        elif not any((folder / file).is_file() for file in _FIRST_FILES):
            raise ConfigError(f"the folder {name!r} holds no model: none of {', '.join(_FIRST_FILES)} is in it")

    @property
    def source(self) -> Mapping[str, Any]:
        """How transformers is told the same."""
        return {name: getattr(self, name) for name in ("revision", "cache_dir", "local_files_only")}

    @property
    def _where(self) -> str:
        """The name; with `local_files_only` the folder in the cache, for the hub's client asks for things even then."""
        if not self.local_files_only or Path(self.name).is_dir():
            return self.name
        if (cached := self._cached) is not None:
            return cached
        raise ConfigError(f"{self.name!r} can't be loaded: it is not in the hub's cache, and local_files_only is True")

    @property
    def _cached(self) -> str | None:
        """The folder in the hub's cache, if the model is there."""
        for file in _FIRST_FILES:
            found = try_to_load_from_cache(self.name, file, self.cache_dir, self.revision)
            if isinstance(found, str):
                return str(Path(found).parent)
        return None

    def _reach_hub(self) -> None:
        """Raise ConfigError where the hub doesn't answer. Its client tries six times for each file: that is minutes."""
        url = hf_hub_url(self.name, _FIRST_FILES[0], revision=self.revision)
        try:
            get_hf_file_metadata(url)
        except HfHubHTTPError:  # an answer: what it means is told by whoever reads the files
            pass
        except Exception as error:
            raise ConfigError(
                f"{self.name!r} is not on this machine, and {constants.ENDPOINT} can't be reached: {error}. Pass a "
                "model's folder, set HF_ENDPOINT to a mirror, or fetch it where there is a network (hf download)."
            ) from error

    def read(self, reader: Any, *args: Any, **options: Any) -> Any:
        """Call a reader of transformers; ConfigError where it fails."""
        try:
            return reader(self._where, *args, **self.source, **options)
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{self.name!r} can't be loaded: {reason}") from error

    def path(self, *parts: str) -> Path | None:
        """Find a file on this machine, after fetching it if need be; None where there is no such file."""
        path = PurePosixPath(*parts)
        found: str | None = self.read(cached_file, str(path), _raise_exceptions_for_missing_entries=False)
        return None if found is None else Path(found)

    def json(self, *parts: str) -> Any:
        """Read a JSON file; None where there is no such file."""
        found = self.path(*parts)
        if found is None:
            return None
        try:
            return json.loads(found.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{PurePosixPath(*parts)} of {self.name!r} can't be loaded, no JSON: {error}") from error


class Weights:
    """The tensors of a model, each in one of its files.

    Attributes:
        shards: The files by their names, in order.
        home: The name of the file that each tensor is in.
        missing: The names of files that the index lists and that are not beside it.
    """

    def __init__(self, files: Files, folder: str = "") -> None:
        # As in transformers, one file goes before an index.
        index = None if files.path(folder, WEIGHTS) else files.json(folder, INDEX)
        self.shards: dict[str, Path] = {}
        self.home: dict[str, str] = {}
        self.missing: list[str] = []
        for shard in sorted(set((index or {}).get("weight_map", {}).values())) or [WEIGHTS]:
            path = files.path(folder, shard) if PurePosixPath(shard).name == shard else None
            if path is None:
                self.missing.append(shard)
                continue
            self.shards[shard] = path
            with opened(path) as tensors:
                self.home |= dict.fromkeys(tensors.keys(), shard)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read rows of a tensor."""
        with opened(self.shards[self.home[name]]) as tensors:
            rows: torch.Tensor = tensors.get_slice(name)[start:stop]
        return rows


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; ConfigError for one that is damaged or none."""
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise ConfigError(f"{str(path)!r} is a pointer of Git LFS, not the weights: git lfs pull")
    try:
        tensors = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ConfigError(f"{str(path)!r} is damaged and can't be loaded ({error}): copy it anew") from error
    with tensors as readable:
        yield readable


def check_weights(folder: Path) -> None:
    """Raise ConfigError for a folder whose weights would be read wrongly, or not at all."""
    weights, pickles = list(folder.glob("*.safetensors")), list(folder.glob("*.bin"))
    if pickles and not weights:
        raise ConfigError(f"{str(pickles[0])!r} holds pickled weights: {ONLY_SAFETENSORS}")
    for path in weights:
        with opened(path):
            pass
