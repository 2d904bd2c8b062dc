"""VLLMScorer: settings, and what is remembered about the server between calls."""

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from rag_rerank.errors import ConfigError
from rag_rerank.families import find_family
from rag_rerank.scorer import Scorer
from rag_rerank.template import Halves, Template, prefixed
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.policy import Call, Steps
from rag_rerank.vllm.transport import Transport
from rag_rerank.vllm.wire import Options, Server

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
        template: A score template (see `Template.load`) to render here, for a server without ``--chat-template``: the
            server gets each prompt in two halves and joins them. For tokenizers that put nothing before a text (Qwen);
            where they do (Gemma, Llama), the second half would get it too: give those servers ``--chat-template``.
        instruction: The task, for a reranker whose template has a place for it; None leaves it to the template.
        chat_template_kwargs: More variables for the template.
        query_prompt, document_prompt: Text to put before each query or document: embedding models such as E5 and
            Qwen3-Embedding were trained with one, and vLLM adds none.
        use_activation: None leaves the score to the model's own activation (vLLM's default: sigmoid for one label
            unless its config names another); False asks for logits; True is the same as None on today's vLLM.
        truncate_prompt_tokens: Where the server cuts a pair that is longer than the model allows. -1: at the model's
            maximum, from the longer of query and document. An int: at that many tokens. None: not at all, so that one
            over-long document fails the call. ``"auto"`` is -1, but None where there is a score template (one of the
            above is given, or the served model is known to need one): there vLLM cuts the end of the rendered prompt,
            which the score is read from. Set `max_tokens_per_doc` then.
        max_tokens_per_query, max_tokens_per_doc: Cut each query or document at so many tokens (vLLM 0.20).
        priority: Of the requests, where the server schedules by it; lower goes first.
        extra_body: More fields for the request, as they are.
        endpoint: ``"score"``; or ``"rerank"`` for other servers, which have only a rerank API of Jina's and Cohere's
            shape. It echoes every document back, and takes one query at a time.
        timeout: Seconds that a call may take in all, tries and waits included, unless it names a `deadline`.
        max_retries: How often a request is repeated after a failure that may pass: connection refused or broken, the
            statuses 408, 429, 500, 502, 503, 504, or an invalid reply; with full jitter over 0.5 s, doubling.

    Raises:
        ConfigError: At construction, an address that is no http(s) address or holds a password, a number out of range,
            a template that can't be used; at the first call, a server that is too old for an option.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        model: str | None = None,
        api_key: str | None = None,
        template: str | os.PathLike[str] | None = None,
        instruction: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        use_activation: bool | None = None,
        truncate_prompt_tokens: int | Literal["auto"] | None = "auto",
        max_tokens_per_query: int | None = None,
        max_tokens_per_doc: int | None = None,
        priority: int | None = None,
        extra_body: Mapping[str, Any] | None = None,
        endpoint: Literal["score", "rerank"] = "score",
        timeout: float = 30.0,
        max_retries: int = 2,
    ) -> None:
        self._endpoint = Endpoint.parse(base_url or os.environ.get("VLLM_BASE_URL") or DEFAULT_BASE_URL)
        self._options = Options(
            use_activation=use_activation,
            truncate_prompt_tokens=None if truncate_prompt_tokens == "auto" else truncate_prompt_tokens,
            max_tokens_per_query=max_tokens_per_query,
            max_tokens_per_doc=max_tokens_per_doc,
            instruction=instruction,
            chat_template_kwargs=None if chat_template_kwargs is None else dict(chat_template_kwargs),
            priority=priority,
            extra_body=None if extra_body is None else dict(extra_body),
        )
        _check(self._options, timeout, max_retries, endpoint)
        self._truncate_automatically = truncate_prompt_tokens == "auto"
        self._halves = None if template is None else self._split(template)
        self._query_prompt, self._document_prompt = query_prompt, document_prompt
        self._api: Literal["score", "rerank"] = endpoint
        self._default_deadline = float(timeout)
        self._model = model
        self._max_retries = max_retries
        self._server: Server | None = None
        self._transport = Transport(self._endpoint, _headers(api_key))

    def _split(self, template: str | os.PathLike[str]) -> Halves:
        """The template's halves, with the variables in them; the server then gets no more of either."""
        options = self._options
        if (options.truncate_prompt_tokens, options.max_tokens_per_doc, options.max_tokens_per_query) != (None,) * 3:
            raise ConfigError("a template that is rendered here can't be cut by the server: it would lose its end")
        variables = {"instruction": options.instruction, **(options.chat_template_kwargs or {})}
        self._options = replace(options, instruction=None, chat_template_kwargs=None)
        return Template.load(template).split(variables)

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
        options = self._options
        if self._truncate_automatically and not self._templated(server):
            options = replace(options, truncate_prompt_tokens=-1)
        queries, documents = prefixed(self._query_prompt, queries), prefixed(self._document_prompt, documents)
        if self._halves is not None:
            queries = [self._halves.of(query, "")[0] for query in queries]
            documents = [self._halves.of("", document)[1] for document in documents]
        return (yield from call.score(server, queries, documents, options=options, endpoint=self._api))

    def _templated(self, server: Server) -> bool:
        """Whether the server's prompts come from a template, as far as can be told from here."""
        if self._halves is not None or self._options.instruction is not None or self._options.chat_template_kwargs:
            return True
        family = find_family(server.checkpoint or server.model, ())
        return family is not None and family.template is not None

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


def _check(options: Options, timeout: float, max_retries: int, endpoint: str) -> None:
    """ConfigError for what is out of range."""
    if not (isinstance(timeout, int | float) and 0 < timeout < math.inf):
        raise ConfigError(f"timeout must be a positive number of seconds, got {timeout!r}")
    if max_retries < 0:
        raise ConfigError(f"max_retries must be 0 or more, got {max_retries}")
    if endpoint not in ("score", "rerank"):
        raise ConfigError(f'endpoint must be "score" or "rerank", got {endpoint!r}')
    truncate = options.truncate_prompt_tokens
    if truncate is not None and (not isinstance(truncate, int) or (truncate != -1 and truncate < 1)):
        raise ConfigError(f'truncate_prompt_tokens must be "auto", -1, 1 or more, or None; got {truncate!r}')
    for name in ("max_tokens_per_query", "max_tokens_per_doc"):
        limit = getattr(options, name)
        if limit is not None and limit < 1:
            raise ConfigError(f"{name} must be 1 or more, or None; got {limit}")
    if taken := {"model", "text_1", "text_2", "query", "documents"} & dict(options.extra_body or {}).keys():
        raise ConfigError(f"extra_body must not hold {', '.join(sorted(taken))}")


def _headers(api_key: str | None) -> dict[str, str]:
    key = api_key or os.environ.get("VLLM_API_KEY")
    if not key:
        return {}
    if not (key.isascii() and key.isprintable() and key == key.strip()):
        raise ConfigError("api_key has characters that no HTTP header can carry; was a line break pasted with it?")
    return {"Authorization": f"Bearer {key}"}
