"""What is in a checkpoint's folder, in a few letters: other weights or another tokenizer make another fingerprint.

Hashing weights whole takes a second a gigabyte. So of each tensor only some bytes are read, at places that its size
alone decides: training or quantising changes some of them. One row of a large embedding may change unnoticed.
"""

import hashlib
import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag_rerank.errors import ConfigError

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    "chat_template.jinja",
)
_SETTINGS = frozenset((".json", ".txt", ".model", ".jinja", ".py", ".metadata", ".tiktoken"))
_NO_SETTINGS = ("generation_config.json", "trainer_state.json", "README", "LICENSE", "requirements.txt", "results.json")
# Of a large tensor, this many samples of so many bytes: a gigabyte in 1,190 tensors takes 15 ms; with 1,024 bytes, 25.
_SAMPLES, _SAMPLE_BYTES = 8, 256


def fingerprint(folder: Path, base: Path | None = None) -> dict[str, str]:
    """Hash what a checkpoint's folder holds, and that of the `base` model if it is an adapter.

    ``weights`` is of the safetensors files, of which samples of every tensor are read, and which raise ConfigError if
    damaged; ``checkpoint files`` of configurations, tokenizer and code, read whole.
    """
    weights, settings = hashlib.sha256(), hashlib.sha256()
    for origin, root in (("", folder), ("base", base)):
        for path in _files(root) if root is not None else ():
            own = hashlib.sha256()
            is_weights = path.suffix == ".safetensors"
            for part in _samples(path) if is_weights else (path.read_bytes(),):
                own.update(part)
            entry = json.dumps([origin, path.relative_to(root or folder).as_posix(), own.hexdigest()])
            (weights if is_weights else settings).update(entry.encode())
    return {"weights": weights.hexdigest()[:32], "checkpoint files": settings.hexdigest()[:32]}


def _files(folder: Path) -> list[Path]:
    """List what may change a score: files in `folder`, and all in the folders that ``modules.json`` names."""
    found = set(folder.iterdir())
    try:
        modules: Any = json.loads((folder / "modules.json").read_bytes())
        router = folder / "router_config.json"  # where it comes first, its modules' folders are beside it
        parted = json.loads(router.read_bytes())["types"] if router.is_file() else ()
        for path in (*(module.get("path") for module in modules), *parted):
            if path:
                found.update((folder / str(path)).rglob("*"))
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        pass  # no sentence-transformers folder; what is wrong with its file, loading says
    return sorted(
        path
        for path in found
        if path.suffix in _SETTINGS | {".safetensors"}
        and not path.name.startswith((".", *_NO_SETTINGS))
        and not path.name.endswith(_NO_SETTINGS)
        and path.is_file()
    )


def _samples(path: Path) -> Iterator[bytes]:
    """Yield the header of a safetensors file, small tensors whole, and samples of large ones."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            begin = 8 + int.from_bytes(data[:8], "little")
            if begin > len(data):
                raise ValueError("the file ends before its header does")  # noqa: TRY301
            tensors = json.loads(data[8:begin])
            yield data[:begin]
            for name in sorted(tensors.keys() - {"__metadata__"}):
                start, stop = (begin + offset for offset in tensors[name]["data_offsets"])
                if stop > len(data):
                    raise ValueError(f"the file ends before {name} does")  # noqa: TRY301 - joins the others
                if stop - start <= 2 * _SAMPLES * _SAMPLE_BYTES:
                    yield data[start:stop]
                    continue
                step = (stop - start - _SAMPLE_BYTES) // (_SAMPLES - 1)
                starts = range(start, start + step * _SAMPLES, step)
                yield b"".join([data[place : place + _SAMPLE_BYTES] for place in starts])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{str(path)!r} can't be read as safetensors: {error}") from error
