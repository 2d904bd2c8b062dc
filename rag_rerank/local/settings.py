"""What a local model is to be loaded with: checked when it is written down, used when it is loaded."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from rag_rerank.errors import ConfigError
from rag_rerank.template import Template

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ScoreType = Literal["auto", "cross-encoder", "bi-encoder", "late-interaction"]
LongDocuments = Literal["truncate", "max-passage"]
LateInteractionRule = Literal["declared", "vllm"]


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
    classifier_tokens: tuple[str, ...] | None
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
        if not self.model:
            raise ConfigError("model is empty; pass a hub id or a folder")
        for name, allowed in (
            *(("dtype", Dtype), ("score_type", ScoreType)),
            *(("long_documents", LongDocuments), ("late_interaction", LateInteractionRule)),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(allowed))}; got {getattr(self, name)!r}")
        for name in ("max_length", "max_tokens_per_query", "max_tokens_per_doc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1 token, got {value}; None sets no limit of yours")
        if self.max_waiting_calls < 1:
            raise ConfigError(f"max_waiting_calls must be at least 1, got {self.max_waiting_calls}")
        if self.classifier_tokens is not None and len(self.classifier_tokens) not in (1, 2):
            raise ConfigError("classifier_tokens must be (true,) or (false, true)")
        # Settings are shown, stored and pickled.
        if {"token", "use_auth_token"} & (dict(self.model_kwargs) | dict(self.tokenizer_kwargs)).keys():
            raise ConfigError("no access token belongs in the settings; set the environment variable HF_TOKEN")
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(f"LocalScorer needs {package}: pip install 'rag-rerank[local]'")

    @property
    def variables(self) -> dict[str, Any]:
        """What the template may read; an instruction among the kwargs wins, as in vLLM."""
        return {"instruction": self.instruction, **self.chat_template_kwargs}
