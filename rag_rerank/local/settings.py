"""What a local model is to be loaded with: checked when it is written down, used when it is loaded."""

import importlib.util
import operator
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from rag_rerank.errors import ConfigError
from rag_rerank.template import Template

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ScoreType = Literal["auto", "cross-encoder", "bi-encoder", "late-interaction"]
LongDocuments = Literal["truncate", "max-passage"]
LateInteractionRule = Literal["declared", "vllm"]

_KINDS: dict[str, type] = {
    **dict.fromkeys(("model", "instruction", "query_prompt", "document_prompt", "revision", "cache_dir"), str),
    **dict.fromkeys(("use_activation", "verify", "trust_remote_code", "local_files_only"), bool),
    **dict.fromkeys(("chat_template_kwargs", "model_kwargs", "tokenizer_kwargs"), Mapping),
}
_CHOICES = {
    "dtype": Dtype,
    "score_type": ScoreType,
    "long_documents": LongDocuments,
    "late_interaction": LateInteractionRule,
}
_DEVICES = frozenset({"cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu"})
_ELSEWHERE = {
    "torch_dtype": "pass dtype= to LocalScorer itself",
    **dict.fromkeys(("load_in_8bit", "load_in_4bit"), "pass a quantization_config, which transformers 5 reads"),
    **dict.fromkeys(
        ("ignore_mismatched_sizes", "output_loading_info", "subfolder", "use_safetensors"), "it is always set"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The arguments of `LocalScorer`, which describes them; ConfigError if one is wrong or a package is missing."""

    model: str
    device: str | None
    dtype: Dtype
    score_type: ScoreType
    template: Template | Literal["auto"] | None
    instruction: str | None
    chat_template_kwargs: Mapping[str, Any] = field(repr=False)
    classifier_tokens: Sequence[str] | None
    query_prompt: str | None
    document_prompt: str | None
    use_activation: bool | None
    max_length: int | None
    max_tokens_per_query: int | None
    max_tokens_per_doc: int | None
    long_documents: LongDocuments
    late_interaction: LateInteractionRule
    verify: bool
    max_waiting_calls: int
    revision: str | None
    trust_remote_code: bool
    local_files_only: bool
    cache_dir: str | None
    model_kwargs: Mapping[str, Any] = field(repr=False)
    tokenizer_kwargs: Mapping[str, Any] = field(repr=False)

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value: Any = getattr(self, name)
            if name in ("model", "cache_dir") and isinstance(value, os.PathLike):
                value = os.fspath(value)
            if value is not None and not isinstance(value, kind):
                raise ConfigError(f"{name} must be {kind.__name__}, got {type(value).__name__}")  # it may be a secret
            self._set(name, dict(getattr(self, name) or {}) if kind is Mapping else value)
        if self.template is not None and self.template != "auto":
            self._set("template", Template.load(self.template))
        if not self.model:
            raise ConfigError("model is empty; pass a hub id or a folder")
        # It is loaded later, wherever the process works by then.
        self._set("model", str(Path(self.model).absolute()) if Path(self.model).is_dir() else self.model)
        for name, choice in _CHOICES.items():
            chosen, allowed = str(getattr(self, name)).removeprefix("torch."), get_args(choice)  # torch.bfloat16, too
            if chosen not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {chosen!r}")
            self._set(name, chosen)
        for name in ("max_length", "max_tokens_per_query", "max_tokens_per_doc", "max_waiting_calls"):
            self._set(name, self._count(name))
        tokens = self.classifier_tokens
        if isinstance(tokens, str) or (tokens is not None and [*map(type, tokens)] not in ([str], [str, str])):
            raise ConfigError(f"classifier_tokens must be (true,) or (false, true), got {tokens!r}")
        self._set("classifier_tokens", tokens and tuple(tokens))
        self._check_device()
        self._check_kwargs()
        if sys.flags.optimize > 1:
            raise ConfigError("transformers needs docstrings: run Python without -OO, and PYTHONOPTIMIZE below 2")
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"LocalScorer needs {package}: pip install 'rag-rerank[local]'")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # past frozen

    def _count(self, name: str) -> int | None:
        value = getattr(self, name)
        if value is None and name != "max_waiting_calls":
            return None
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
            raise ConfigError(f"{name} must be a whole number, at least 1, got {value!r}")
        return operator.index(value)  # tokenizers take none of numpy's numbers

    def _check_device(self) -> None:
        """Refuse what is no device in any torch; whether this machine has it shows when the model is loaded."""
        device = str(self.device) if type(self.device).__module__ == "torch" else self.device
        self._set("device", device)
        found = re.fullmatch(r"([a-z]+)(:\d+)?", device) if isinstance(device, str) else None
        known = found and (found[1] in _DEVICES or importlib.util.find_spec(f"torch_{found[1]}"))  # npu: torch_npu
        if device is not None and not known:
            raise ConfigError(f'device must be None or one device, such as "cpu" or "cuda:1", got {device!r}')

    def _check_kwargs(self) -> None:
        """Refuse in the arguments of from_pretrained what belongs elsewhere."""
        own = {each.name for each in fields(self)}
        for kwargs in ("model_kwargs", "tokenizer_kwargs"):
            for name in getattr(self, kwargs):
                # Settings are shown, stored and pickled.
                if name in ("token", "use_auth_token"):
                    raise ConfigError("no access token belongs in the settings; set the environment variable HF_TOKEN")
                remedy = f"pass {name}= to LocalScorer itself" if name in own else _ELSEWHERE.get(name)
                if remedy is not None:
                    raise ConfigError(f"{kwargs} can't hold {name}: {remedy}")

    @property
    def variables(self) -> dict[str, Any]:
        """What the template may read; an instruction among the kwargs wins, as in vLLM."""
        return {"instruction": self.instruction, **self.chat_template_kwargs}
