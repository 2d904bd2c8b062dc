"""What the integrations in frameworks share: the scorers' settings as fields, and the scorer that fits them now.

Both LangChain and LlamaIndex describe their components as pydantic models. The core knows neither, but pydantic makes
fields of the annotations that it finds in plain base classes. So each setting is declared here once, and an adapter is
``class LocalReranker(LocalSettings, ...)``.
"""

import copy
import difflib
import functools
import inspect
import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal, dataclass_transform

from rag_rerank.closeable import Closeable
from rag_rerank.local import LocalScorer
from rag_rerank.local.scorer import DEFAULT_MODEL
from rag_rerank.scorer import Scorer

# One lock for all: a scorer is built in microseconds, and a lock in each would have to be kept out of copies.
_building = threading.Lock()

Build = Callable[..., Scorer]


# So that type checkers, which know of fields in pydantic's own classes only, know these as arguments.
@dataclass_transform(kw_only_default=True)
class ScorerSettings(Closeable):
    """A component with the settings of a scorer as its attributes, which keeps the scorer that fits them.

    The framework's class declares the private attribute ``_built`` with the value None, and leaves it out of pickles:
    another process builds its own.
    """

    _built: tuple[dict[str, Any], Scorer] | None

    @abstractmethod
    def _scorer_class(self) -> Build:
        """What is built; its parameters are the settings."""

    @property
    def scorer(self) -> Scorer:
        """The scorer in use, built again where settings have changed since the last call. It belongs to this component.

        Raises:
            ConfigError: They were changed to something that can't work.
        """
        # Compared rather than reset by assignments, because pydantic's model_copy(update=...) changes fields without
        # telling. What was built before is not closed: a copy or a call may be using it, and the last one to drop it
        # closes it.
        build = self._scorer_class()
        settings = {name: copy.copy(getattr(self, name)) for name in _parameters(build)}
        with _building:
            if self._built is None or self._built[0] != settings:
                self._built = settings, build(**{name: _plain(value) for name, value in settings.items()})
            return self._built[1]

    def close(self) -> None:
        """Give back the model or the connections, for copies of this component too: they share them.

        Closing twice is harmless; using it afterwards raises `RerankError`.
        """
        if self._built is not None:
            self._built[1].close()

    async def aclose(self) -> None:
        """As `close`, from an event loop; this also closes the connections that the running loop has."""
        if self._built is not None:
            await self._built[1].aclose()


class LocalSettings(ScorerSettings):
    """The settings of `LocalScorer`, which describes them; checked by it, too."""

    model: str = DEFAULT_MODEL
    device: str | None = None
    dtype: str = "auto"
    score_type: str = "auto"
    template: str | None = "auto"
    instruction: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    classifier_tokens: tuple[str, ...] | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    use_activation: bool | None = None
    max_length: int | None = None
    max_tokens_per_query: int | None = None
    max_tokens_per_doc: int | None = None
    long_documents: str = "truncate"
    max_waiting_calls: int = 1024
    revision: str | None = None
    trust_remote_code: bool = False
    local_files_only: bool = False
    cache_dir: str | None = None
    model_kwargs: dict[str, Any] | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def _scorer_class(self) -> Build:
        return LocalScorer


class VLLMSettings(ScorerSettings):
    """The settings of `VLLMScorer`, which describes them; checked by it, too.

    The framework's class declares ``api_key`` in its own way of hiding secrets: anything with ``get_secret_value``.
    """

    base_url: str | list[str] | None = None
    model: str | None = None
    template: str | None = None
    instruction: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | Literal["auto"] | None = "auto"
    max_tokens_per_query: int | None = None
    max_tokens_per_doc: int | None = None
    priority: int | None = None
    extra_body: dict[str, Any] | None = None
    endpoint: str = "score"
    timeout: float = 30.0
    max_retries: int = 2
    chunk_size: int = 128
    max_concurrency: int = 4
    max_waiting_calls: int | None = None
    connect_timeout: float = 2.0
    attempt_timeout: float | None = None
    send_key_over_http: bool = False

    def _scorer_class(self) -> Build:
        from rag_rerank.vllm import VLLMScorer  # noqa: PLC0415 - httpx takes 0.2 s to import

        return VLLMScorer


def path_as_text(value: Any) -> Any:
    """A path as its text, anything else as it is: settings are dumped to JSON."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


# What other rerankers of both frameworks call these settings.
_ALIASES = {
    "top_k": "top_n",
    "topn": "top_n",
    "k": "top_n",
    "n": "top_n",
    "model_name": "model",
    "model_id": "model",
    "url": "base_url",
    "api_base": "base_url",
    "endpoint_url": "base_url",
    "token": "api_key",
    "auth_token": "api_key",
    "cross_encoder_kwargs": "model_kwargs",
    "truncate_text": "truncate_prompt_tokens",
    "request_timeout": "timeout",
    "threshold": "score_threshold",
    "similarity_cutoff": "score_threshold",
    "normalize": "use_activation",
    "batch_size": "chunk_size",
    "cache_folder": "cache_dir",
    "use_fp16": "dtype",
    "max_tokens": "max_length",
    "query_instruction": "instruction",
}


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """A hint at the setting that was meant, such as ``did you mean top_n?``; empty where none is alike.

    Args:
        wrong: The name that was given. Never its value: it may be a key.
        known: The names that there are.
    """
    names = list(known)
    alias = "api_key" if wrong.endswith("api_key") else _ALIASES.get(wrong.lower())
    likely = [alias] if alias in names else difflib.get_close_matches(wrong, names, n=1, cutoff=0.75)
    return f"did you mean {likely[0]}?" if likely else ""


@functools.cache
def _parameters(build: Build) -> tuple[str, ...]:
    return tuple(inspect.signature(build).parameters)


def _plain(value: Any) -> Any:
    return value.get_secret_value() if hasattr(value, "get_secret_value") else value
