"""What a local model is to be loaded with: checked when it is written down, used when it is loaded."""

import importlib.util
import operator
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
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
_QUANTIZED = "pass model_kwargs={'quantization_config': ...}, which is what transformers 5 reads"
_ALWAYS = "it is always set"
_ELSEWHERE = {
    "torch_dtype": "pass dtype= to LocalScorer itself",
    **dict.fromkeys(("load_in_8bit", "load_in_4bit"), _QUANTIZED),
    **dict.fromkeys(("output_loading_info", "subfolder", "use_safetensors"), _ALWAYS),
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
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ConfigError(f"{name} must be {kind.__name__}, got {type(value).__name__}")  # it may be a secret
            if isinstance(value, Mapping):
                self._set(name, dict(value))
        if not self.model:
            raise ConfigError("model is empty; pass a hub id or a folder")
        for name, choice in _CHOICES.items():
            value, allowed = str(getattr(self, name)).removeprefix("torch."), get_args(choice)  # torch.bfloat16, too
            if value not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
            self._set(name, value)
        for name in ("max_length", "max_tokens_per_query", "max_tokens_per_doc", "max_waiting_calls"):
            self._set(name, self._count(name))
        if (tokens := self.classifier_tokens) is not None:
            if (
                isinstance(tokens, str)
                or len(tokens) not in (1, 2)
                or not all(isinstance(each, str) for each in tokens)
            ):
                raise ConfigError(f"classifier_tokens must be (true,) or (false, true), got {tokens!r}")
            self._set("classifier_tokens", tuple(tokens))
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
            hint = "" if name == "max_waiting_calls" else "; None sets no limit of yours"
            raise ConfigError(f"{name} must be a whole number, at least 1, got {value!r}{hint}")
        return operator.index(value)  # tokenizers take none of numpy's numbers

    def _check_device(self) -> None:
        """Refuse what is no device in any torch; whether this machine has it shows when the model is loaded."""
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(self.device, torch.device):
            self._set("device", str(self.device))
        if self.device is None:
            return
        found = re.fullmatch(r"([a-z]+)(:\d+)?", self.device) if isinstance(self.device, str) else None
        # Devices that torch does not know by itself come with a package of their name.
        if found is None or not (found[1] in _DEVICES or importlib.util.find_spec(f"torch_{found[1]}")):
            hint = "; for several devices, make a scorer for each" if isinstance(self.device, list | tuple) else ""
            raise ConfigError(
                f'device must be None or one such as "cpu", "cuda" or "cuda:1", got {self.device!r}{hint}'
            )

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
