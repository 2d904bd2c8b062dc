"""VLLMScorer: settings, and what is remembered about the server between calls."""

import math
import os
from typing import Any

from rag_rerank.errors import ConfigError
from rag_rerank.scorer import Scorer
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.policy import Call, Steps
from rag_rerank.vllm.transport import Transport
from rag_rerank.vllm.wire import Server

DEFAULT_BASE_URL = "http://localhost:8000"


class VLLMScorer(Scorer):
    """Asks a vLLM server (0.8 or newer) for scores over HTTP.

    Nothing is sent at construction. The first call asks for the server's version and, where no `model` is named, for
    the model that it serves; both are remembered. Threads and event loops may share one scorer, forked processes too.

    Args:
        base_url: The server's address, with or without ``/v1`` or ``/score`` at its end. None reads ``VLLM_BASE_URL``
            from the environment, and is ``http://localhost:8000`` where that is not set.
        model: The name that the server serves the model under. None takes the only one.
        api_key: Sent as bearer token. None reads ``VLLM_API_KEY`` from the environment, never another service's
            variable. The key is in no repr, error or pickle: an unpickled copy reads the environment again.
        use_activation: None leaves the score to the model's own activation (vLLM's default: sigmoid for one label
            unless its config names another); False asks for logits; True is the same as None on today's vLLM.
        timeout: Seconds that a call may take in all, tries and waits included, unless it names a `deadline`.
        max_retries: How often a request is repeated after a failure that may pass: connection refused or broken, the
            statuses 408, 429, 500, 502, 503, 504, or an invalid reply; with full jitter over 0.5 s, doubling.
        truncate_prompt_tokens: Where the server cuts a pair that is longer than the model allows. -1, the default: at
            the model's maximum, from the longer of query and document. An int: at that many tokens. None: not at all,
            so that one over-long document fails the call. Pass None for a server with ``--chat-template``: there vLLM
            cuts the end of the rendered prompt, which the score is read from.

    Raises:
        ConfigError: An address that is no http(s) address or holds a password, or a number out of range.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        model: str | None = None,
        api_key: str | None = None,
        use_activation: bool | None = None,
        timeout: float = 30.0,
        max_retries: int = 2,
        truncate_prompt_tokens: int | None = -1,
    ) -> None:
        self._endpoint = Endpoint.parse(base_url or os.environ.get("VLLM_BASE_URL") or DEFAULT_BASE_URL)
        if not (isinstance(timeout, int | float) and 0 < timeout < math.inf):
            raise ConfigError(f"timeout must be a positive number of seconds, got {timeout!r}")
        if max_retries < 0:
            raise ConfigError(f"max_retries must be 0 or more, got {max_retries}")
        if truncate_prompt_tokens is not None and truncate_prompt_tokens != -1 and truncate_prompt_tokens < 1:
            raise ConfigError(f"truncate_prompt_tokens must be -1, 1 or more, or None; got {truncate_prompt_tokens}")
        self._default_deadline = float(timeout)
        self._model = model
        self._max_retries = max_retries
        self._use_activation = use_activation
        self._truncate_prompt_tokens = truncate_prompt_tokens
        self._server: Server | None = None
        self._transport = Transport(self._endpoint, _headers(api_key))

    @property
    def model_name(self) -> str:
        """The model's name on the server; ``"unknown"`` before the first call where it was not given."""
        if self._server is not None:
            return self._server.model
        return self._model or "unknown"

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        return self._transport.run(self._steps(queries, documents, until))

    async def _ascore(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        return await self._transport.arun(self._steps(queries, documents, until))

    def _steps(self, queries: list[str], documents: list[str], until: float | None) -> Steps[list[float]]:
        call = Call(self._endpoint.label, until=until, max_retries=self._max_retries)
        # Two first calls at once both ask; they learn the same.
        server = self._server = self._server or (yield from call.learn(self._model))
        return (
            yield from call.score(
                server,
                queries,
                documents,
                use_activation=self._use_activation,
                truncate_prompt_tokens=self._truncate_prompt_tokens,
            )
        )

    def _close(self) -> None:
        self._transport.close()

    async def _aclose(self) -> None:
        await self._transport.aclose()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_transport"]  # connections stay here, and the key goes nowhere
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._transport = Transport(self._endpoint, _headers(None))

    def __repr__(self) -> str:
        model = "" if self._model is None else f", model={self._model!r}"
        return f"VLLMScorer({self._endpoint.root!r}{model})"


def _headers(api_key: str | None) -> dict[str, str]:
    key = api_key or os.environ.get("VLLM_API_KEY")
    if not key:
        return {}
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ConfigError("api_key has characters that no HTTP header can carry; was a line break pasted with it?")
    return {"Authorization": f"Bearer {key}"}
