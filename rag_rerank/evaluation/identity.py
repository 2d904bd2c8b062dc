"""What a scorer's scores depend on, and what its times depend on: the keys under which both are kept.

The only module of the evaluation that knows what `LocalScorer` and `VLLMScorer` look like inside.
"""

import dataclasses
import inspect
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rag_rerank import __version__
from rag_rerank.fallback import FallbackScorer
from rag_rerank.local import LocalScorer
from rag_rerank.scorer import Scorer
from rag_rerank.template import Template
from rag_rerank.vllm import VLLMScorer

# Neither changes a score.
_LOCAL_BESIDE_THE_POINT = {"max_waiting_calls", "cache_dir", "local_files_only", "trust_remote_code"}
_REMOTE_BESIDE_THE_POINT = {"priority"}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who scores.

    Attributes:
        model: The model's name.
        facts: All that a score depends on, beside query and document; JSON.
        place: Where the scorer runs: the same scores may take another time elsewhere.
    """

    model: str
    facts: Mapping[str, Any]
    place: str

    def text(self) -> str:
        """The facts, always written the same."""
        return json.dumps(self.facts, sort_keys=True, ensure_ascii=False)


def identify(scorer: Scorer) -> Identity | None:
    """Who `scorer` is, or None where that can't be told, so that its scores must not be kept.

    A local model is known by its settings and, if it is a folder, by the sizes and times of its files; a model on the
    hub by name and revision. A server's is known by the checkpoint that it names, so it must have been asked
    something before. Any other scorer is known by its class, the source code of that, its `model_name` and, if it has
    one, its attribute ``fingerprint``, a string: for settings that change its scores.
    """
    facts: dict[str, Any] = {"rag_rerank": __version__, "class": _name(type(scorer)), "model": scorer.model_name}
    place = platform.node()
    if type(scorer) not in (LocalScorer, VLLMScorer):
        source = _source(type(scorer))
        if source is None or isinstance(scorer, FallbackScorer):  # whoever answers may change from call to call
            return None
        facts |= {"source": source, "fingerprint": getattr(scorer, "fingerprint", None)}
    if isinstance(scorer, LocalScorer):
        facts |= _local(scorer)
    elif isinstance(scorer, VLLMScorer):
        known = _remote(scorer)
        if known is None:
            return None
        facts |= known
        place = ", ".join(sorted(endpoint.root for endpoint in scorer.client.servers.endpoints))
    try:
        json.dumps(facts)
    except TypeError:  # a setting that can't be written down, such as an object among the model_kwargs
        return None
    return Identity(scorer.model_name, facts, place)


def is_remote(scorer: Scorer) -> bool:
    """Whether the scorer must be asked before it is known, and may become another without notice."""
    return isinstance(scorer, VLLMScorer)


def _local(scorer: LocalScorer) -> dict[str, Any]:
    settings = scorer._settings
    facts = {
        field.name: _plain(getattr(settings, field.name))
        for field in dataclasses.fields(settings)
        if field.name not in _LOCAL_BESIDE_THE_POINT
    }
    facts |= {"torch": _version("torch"), "transformers": _version("transformers"), "files": _files(settings.model)}
    if settings.dtype == "auto" or settings.device is None:
        # What these turn into depends on the machine. Asking torch for it would take seconds, all scores known or not.
        facts |= {"machine": platform.node(), "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}
    return facts


def _remote(scorer: VLLMScorer) -> dict[str, Any] | None:
    client = scorer.client
    known = client.servers.facts
    if known is None:
        return None
    options = dataclasses.asdict(client.options)
    halves = client.halves()
    return {
        "options": {name: value for name, value in options.items() if name not in _REMOTE_BESIDE_THE_POINT},
        "template": None if halves is None else halves.of("{query}", "{document}"),
        "prompts": client.prompts,
        "truncates": client.fit,
        "api": client.api,
        "checkpoint": known.checkpoint or client.servers.endpoints[0].root,
        "window": known.window,
        "version": str(known.version),
    }


def _files(model: str) -> list[tuple[str, int, int]] | None:
    """Path, size and time of every file of a folder; None for a hub id."""
    folder = Path(model)
    if not folder.is_dir():
        return None
    found = ((path.relative_to(folder).as_posix(), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def _plain(value: Any) -> Any:
    """Templates as their text; all else as it is."""
    return value.source if isinstance(value, Template) else value


def _source(kind: type) -> str | None:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # made where no file is, in an interactive session
        return None


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
