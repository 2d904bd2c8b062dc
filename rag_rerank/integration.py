"""What the integrations in frameworks share: the scorers' settings as fields, and one scorer for equal settings.

Both LangChain and LlamaIndex describe their components as pydantic models. The core knows neither, but pydantic makes
fields of the annotations that it finds in plain base classes. So each setting is declared here once, and an adapter is
``class LocalReranker(LocalSettings, ...)``.
"""

import contextlib
import difflib
import functools
import inspect
import os
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, cast, dataclass_transform

from rag_rerank.calibration import Calibrated
from rag_rerank.closeable import Closeable
from rag_rerank.errors import RerankError
from rag_rerank.forking import held_over_forks
from rag_rerank.inputs import NEUTRAL
from rag_rerank.local import LocalScorer
from rag_rerank.local.scorer import DEFAULT_MODEL
from rag_rerank.scorer import Scorer

Build = Callable[..., Scorer]


@dataclass(eq=False)
class _Shared:
    """A scorer, what it was made of, what uses it, and what gives its scores as probabilities, by the file."""

    made_of: tuple[Build, dict[str, Any], Any]
    scorer: Scorer
    # By id, for pydantic's models have no hash.
    users: "weakref.WeakValueDictionary[int, ScorerSettings]" = field(default_factory=weakref.WeakValueDictionary)
    calibrated: dict[str, Calibrated] = field(default_factory=dict)
    ended: bool = False

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self


_all_shared: "weakref.WeakSet[_Shared]" = weakref.WeakSet()  # components hold them: the last one takes its scorer along
# Held for comparisons and while a calibration is read, never while a scorer is built or closed. Reentrant: meanwhile
# the garbage collector may run a user's __del__, which may close a component.
_sharing = held_over_forks(threading.RLock())


# So that type checkers, which know of fields in pydantic's own classes only, know these as arguments.
@dataclass_transform(kw_only_default=True)
class ScorerSettings(Closeable):
    """A component with the settings of a scorer as its attributes, which uses the scorer that fits them.

    Components with equal settings share one scorer, and so one loaded model or one pool of connections, in a process:
    whatever made them (constructors, copies, pickles) and whichever framework they belong to. They do not where the
    environment variables that it reads, or the files of its model or template, have changed in between.

    The framework's class declares the private attribute ``_built`` with the value None, and leaves it out of pickles.
    """

    calibration: str | None = None
    """The file that ``rag-rerank calibrate`` has written for the model: scores are then probabilities of relevance."""

    _built: tuple[_Shared, str | None, Scorer] | Literal["closed"] | None  # the second: the calibration

    @abstractmethod
    def _scorer_class(self) -> Build:
        """Give what builds the scorer; its parameters are the settings."""

    def _surroundings(self) -> Any:
        """Give what the scorer reads beside its settings, to be compared; nothing secret."""
        return None

    @property
    def scorer(self) -> Scorer:
        """The scorer in use; another one once settings have changed. Close the component rather than its scorer.

        Raises:
            ConfigError: Settings were changed to something that can't work.
            RerankError: The component is closed.
        """
        # Compared rather than reset by assignments, because pydantic's model_copy(update=...) changes fields without
        # telling. A scorer that is left is not closed: a call may be using it, and the last one to drop it closes it.
        build = self._scorer_class()
        names = _parameters(build)
        settings = {name: _comparable(getattr(self, name)) for name in names}
        used = self._built  # another thread may close it meanwhile
        if isinstance(used, tuple):
            shared, calibration, scorer = used
            if calibration == self.calibration and shared.made_of[1] == settings and id(self) in shared.users:
                return scorer
        made_of = build, settings, self._surroundings()
        if (found := self._share(made_of)) is None:
            found = self._share(made_of, build(**{name: _plain(getattr(self, name)) for name in names}))
        return cast("Scorer", found)

    def _share(self, made_of: tuple[Build, dict[str, Any], Any], made: Scorer | None = None) -> Scorer | None:
        """Use the scorer that equal components use; where there is none, the one that was made, if any."""
        with _sharing:
            if self._built == "closed":
                raise RerankError(f"This {type(self).__name__} is closed. Create a new one to go on scoring.")
            equal = (each for each in _all_shared if each.made_of == made_of)
            shared = next((each for each in equal if not (each.ended or each.scorer._closed)), None)
            if shared is None:
                if made is None:
                    return None
                _all_shared.add(shared := _Shared(made_of, made))
            scorer = shared.scorer
            if self.calibration is not None:
                file = f"{self.calibration} {_last_written(self.calibration)}"
                scorer = shared.calibrated.get(file) or Calibrated(shared.scorer, self.calibration)
                shared.calibrated[file] = scorer
            if self._built is not None:
                self._built[0].users.pop(id(self), None)
            shared.users[id(self)] = self
            self._built = shared, self.calibration, scorer
            return scorer

    def close(self) -> None:
        """Give back the model or the connections, if no other component is left that shares them and has used them.

        Closing twice is harmless; using the component afterwards raises `RerankError`. A copy that was never used is
        not counted: it still works, but has to load the model again.
        """
        if (scorer := self._leave()) is not None:
            scorer.close()

    async def aclose(self) -> None:
        """Close from an event loop; see `close`. The last one also closes the connections that the loop has."""
        if (scorer := self._leave()) is not None:
            await scorer.aclose()

    def _leave(self) -> Scorer | None:
        """Stop using the scorer; give it to be closed if nobody else uses it."""
        with _sharing:
            if not isinstance(self._built, tuple):  # closed, or never used
                return None
            shared, _, _ = self._built
            self._built = "closed"
            shared.users.pop(id(self), None)
            shared.ended = not shared.users
            return shared.scorer if shared.ended else None


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
    late_interaction: str = "declared"
    verify: bool = True
    max_waiting_calls: int = 1024
    revision: str | None = None
    trust_remote_code: bool = False
    local_files_only: bool = False
    cache_dir: str | None = None
    model_kwargs: dict[str, Any] | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def warmup(self) -> None:
        """Load the model now, so that the first call doesn't wait for it; ConfigError if it can't be."""
        self.scorer.score(NEUTRAL, NEUTRAL)

    def _scorer_class(self) -> Build:
        return LocalScorer

    def _surroundings(self) -> Any:
        return _last_written(self.model), _last_written(self.template)


class VLLMSettings(ScorerSettings):
    """The settings of `VLLMScorer`, which describes them; checked by it, too.

    The framework's class declares ``api_key``, ``http_client``, ``default_headers`` and ``default_query``, and leaves
    them out of what it shows or writes: the key in its own way of hiding secrets, anything with ``get_secret_value``.
    Components share a scorer only if these are equal (functions: the same).
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
    timeout: Any = 30.0
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

    def _surroundings(self) -> Any:
        endings = "VLLM_BASE_URL", "VLLM_API_KEY", "_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"
        read = sorted(each for each in os.environ.items() if each[0].upper().endswith(endings))
        return hash(tuple(read)), _last_written(self.template)  # a hash: it holds secrets, and differs in each process


def path_as_text(value: Any) -> Any:
    """Turn a path into its text, which JSON can hold; leave anything else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


# What other rerankers of both frameworks call these settings.
_ALIASES = {
    "top_n": "top_k topn k n",
    "model": "model_name model_id",
    "base_url": "url api_base endpoint_url",
    "api_key": "token auth_token",
    "model_kwargs": "cross_encoder_kwargs",
    "truncate_prompt_tokens": "truncate_text",
    "timeout": "request_timeout",
    "score_threshold": "threshold similarity_cutoff",
    "use_activation": "normalize",
    "chunk_size": "batch_size",
    "cache_dir": "cache_folder",
    "dtype": "use_fp16",
    "max_length": "max_tokens",
    "instruction": "query_instruction",
}


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Hint at the setting that a wrong name meant, such as ``did you mean top_n?``; empty where none is alike."""
    names = list(known)
    meant = [name for name in names if wrong.lower() in _ALIASES.get(name, "").split()]
    meant += ["api_key"] if wrong.endswith("api_key") and "api_key" in names else []
    likely = meant or difflib.get_close_matches(wrong, names, n=1, cutoff=0.75)
    return f"did you mean {likely[0]}?" if likely else ""


@functools.cache
def _parameters(build: Build) -> tuple[str, ...]:
    return tuple(inspect.signature(build).parameters)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value.get_secret_value() if hasattr(value, "get_secret_value") else value


def _comparable(value: Any) -> Any:
    """Keep a setting as it is now, whatever becomes of a dict or list in it, with 1 and True told apart."""
    if isinstance(value, dict):
        return {key: _comparable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_comparable(each) for each in value]
    return type(value), value


def _last_written(path: str | None) -> Any:
    """Tell a file or a folder from what may take its place; None for a model's name or a template's text."""
    root = Path(path or "\0").absolute()
    with contextlib.suppress(OSError, ValueError):
        files = {file: file.stat() for file in [root, *root.glob("*"), *root.glob("*/*")]}
        # Some file systems give all files one time, and those of two models often have one size.
        return {str(file): (each.st_mtime_ns, each.st_size, each.st_dev, each.st_ino) for file, each in files.items()}
    return None
