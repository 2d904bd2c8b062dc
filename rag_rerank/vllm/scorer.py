"""VLLMScorer: settings, checked, and the scorer's contract kept with a client."""

import asyncio
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, replace
from typing import Any, Literal

from rag_rerank.errors import ConfigError
from rag_rerank.identity import Identity
from rag_rerank.isolation import Outcome
from rag_rerank.scorer import Scorer
from rag_rerank.template import Template
from rag_rerank.vllm.call import Inputs
from rag_rerank.vllm.client import Client, check_sendable
from rag_rerank.vllm.endpoint import Endpoint
from rag_rerank.vllm.exchange import Rules, Usage
from rag_rerank.vllm.keys import SECRET, Key, Keys, guarded
from rag_rerank.vllm.servers import Servers
from rag_rerank.vllm.transport import Factory, Transport
from rag_rerank.vllm.wire import Options

DEFAULT_BASE_URL = "http://localhost:8000"

# What arguments must be that are given.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("model", "instruction", "query_prompt", "document_prompt"), str),
    **dict.fromkeys(("default_headers", "default_query", "chat_template_kwargs", "extra_body"), Mapping),
    **dict.fromkeys(("use_activation", "send_key_over_http"), bool),
    "priority": int,
    "template": str | os.PathLike,
}
# From a count to the least that it may be, and what else.
_COUNTS: dict[str, tuple[int, Any]] = {
    "max_retries": (0, 0),
    "chunk_size": (1, 1),
    "max_concurrency": (1, 1),
    "max_waiting_calls": (1, None),
    "max_tokens_per_query": (1, None),
    "max_tokens_per_doc": (1, None),
}

_usage: ContextVar[Usage | None] = ContextVar("usage", default=None)


class VLLMScorer(Scorer):
    """Asks a vLLM server (0.8 or newer), or several that serve the same model, for scores over HTTP.

    Nothing is sent at construction. The first call asks for the server's version and, where no `model` is named, for
    the model that it serves; both are remembered. Threads and event loops may share one scorer, forked processes too.
    Many documents are sent in several requests. A document that the server refuses costs only itself: the call raises
    `DocumentRejected`, which has the scores of the others.

    Queries and documents may be images (`Image`, `Content`, see `Scorer.score`) where the server's model sees. Their
    prompts are never truncated: vLLM answers 500 where an image's place is cut off. `max_tokens_per_query` and
    `max_tokens_per_doc` cut the text beside images, where they leave 16 tokens for each image's place. `template`, and
    a prompt for the side that an image is on, don't go with images. A request has at most 8 MiB, or one document. A
    server fetches addresses of images for itself; each goes in a request of its own. Where it says 500, as it does for
    one that it can't reach, that is tried again, then that document is rejected.

    Args:
        base_url: The server's address, with or without ``/v1`` or ``/score`` at its end; or several, which are asked
            in turn. One that does not answer is left alone for 1, 2, 4 ... 30 s, and its requests go to another. None
            reads ``VLLM_BASE_URL`` from the environment (several are separated by commas), and is
            ``http://localhost:8000`` where that is not set.
        model: The name that the servers serve the model under. None takes the only one.
        api_key: Sent as bearer token. A function is asked for it before each request (keys that change); a mapping has
            one for each address. None reads ``VLLM_API_KEY`` from the environment, never another service's variable.
            The key is in no repr, error or pickle: an unpickled copy reads the environment again, unless the key is a
            function that a module defines.
        http_client: A function that makes an `httpx.AsyncClient`, called once for each event loop. Its transport, TLS
            settings, proxy, HTTP/2 and hooks are used as they are, and its ``auth`` or ``Authorization`` where no
            `api_key` is given; redirects are never followed. A copy for another process needs a function that a module
            defines. None: a client of our own, with the proxies and authorities that the environment names; this
            machine is never asked through a proxy.
        default_headers, default_query: Go with each request. What is secret by its name is treated as the key is; a
            scorer that has such can't be pickled. ``Authorization`` takes the key's place.
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
            maximum, from the longer of query and document. An int: at that many tokens. None: not at all, so that
            over-long documents are rejected. ``"auto"`` is -1, but where the server puts pairs into a score template
            the document is cut at the tokens that query and template leave for it: vLLM would cut the end of the
            prompt, from which the score is read. Templates are told by the number of tokens that the server counts;
            where a gateway hides it, over-long documents are rejected. A template that is rendered here (`template`)
            leaves nothing to cut.
        max_tokens_per_query, max_tokens_per_doc: Cut each query or document at so many tokens (vLLM 0.20).
        priority: Of the requests, where the server schedules by it; lower goes first.
        extra_body: More fields for the request, as they are.
        endpoint: How the server is asked (see docs/pages/gateways.md). ``"score"``: vLLM's score API. ``"rerank"``: a
            rerank API as Jina's and Cohere's, at ``/v1/rerank`` or where `base_url` says (``/v2``, ``/rerank``); it may
            echo every document, and takes one query at a time. ``"tei"``: text-embeddings-inference. ``"auto"`` tries
            them with a request of two letters, and takes the first that is answered.
        timeout: Seconds that a call may take in all, tries and waits included, unless it names a `deadline`. None: no
            bound. An `httpx.Timeout` bounds each try instead, as httpx does, and takes the place of `connect_timeout`.
        max_retries: How often a request is repeated after a failure that may pass: connection refused or broken, the
            statuses 408, 409, 424, 425, 429 and 5xx (but 501 and 505), or an invalid reply. At once after a connection
            broke; else after 0.25 to 0.5 s, doubling, or when the server says (Retry-After). Asking another server
            is no repetition. After a request that failed in all its tries, requests get one each, until one is
            answered.
        chunk_size: How many documents a request may have. A listwise model (jina-reranker-v3) gets all documents of a
            query in one request, for each score depends on the others.
        max_concurrency: How many requests of one call may be under way at once. Neither changes a score.
        max_waiting_calls: How many calls may be unfinished at a time in this process; one more is refused at once with
            `BackendUnavailable`. None: any number, of which a server that is asked for more than it can do answers
            none in time, for each waits behind all others (see docs/pages/scaling.md).
        connect_timeout: Seconds in which there must be a connection.
        attempt_timeout: Seconds in which a request must be answered before it is given up and repeated. None: all of
            the call's time; of several servers, another is asked as well where one is silent for a third of it (with
            two retries), unless it works off what came before.
        send_key_over_http: Allow the key to be sent unencrypted to another machine.

    Raises:
        ContentError: From scoring, an image for a model that reads text only, or beside a `template` or prompt.
        ConfigError: At construction, an address that is no http(s) address or holds a password, a number out of range,
            a template that can't be used, a key for a plain http address that is not this machine's; at the first
            call, a server that is too old for an option, or servers that give one pair different scores.
    """

    accepts_images = accepts_instruction = remote = True

    @guarded
    def __init__(
        self,
        base_url: str | Sequence[str] | None = None,
        *,
        model: str | None = None,
        api_key: Key | Mapping[str, Key] | None = None,
        http_client: Factory | None = None,
        default_headers: Mapping[str, str] | None = None,
        default_query: Mapping[str, str] | None = None,
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
        endpoint: Literal["score", "rerank", "tei", "auto"] = "score",
        timeout: Any = 30.0,
        max_retries: int = 2,
        chunk_size: int = 128,
        max_concurrency: int = 4,
        max_waiting_calls: int | None = None,
        connect_timeout: float = 2.0,
        attempt_timeout: float | None = None,
        send_key_over_http: bool = False,
    ) -> None:
        _check(locals())
        variables = dict(chat_template_kwargs or {})
        if "instruction" in variables:  # as vLLM has it: one variable with two names, of which it reads this one
            if instruction is not None:
                raise ConfigError("instruction is given twice: as instruction= and in chat_template_kwargs")
            instruction = variables.pop("instruction")
        renders = template is not None  # then the server gets no variable, and cuts nothing
        options = Options(
            use_activation=use_activation,
            truncate_prompt_tokens=None if truncate_prompt_tokens == "auto" else truncate_prompt_tokens,
            max_tokens_per_query=max_tokens_per_query,
            max_tokens_per_doc=max_tokens_per_doc,
            instruction=None if renders else instruction,
            chat_template_kwargs=None if renders else variables or None,
            priority=priority,
            extra_body=None if extra_body is None else dict(extra_body),
        )
        limits = chunk_size, max_concurrency, max_retries, connect_timeout, attempt_timeout
        rules = Rules(*limits, model=model, api=endpoint, logits=use_activation is False)
        endpoints = _endpoints(base_url)
        keys = Keys(endpoints, api_key, default_headers, default_query, over_http=send_key_over_http)
        transport = Transport(endpoints, keys, http_client, timeout)
        seconds = math.inf if timeout is None or transport.limits is not None else timeout
        _check_seconds(timeout=seconds, connect_timeout=connect_timeout, attempt_timeout=attempt_timeout)
        if renders and (options.truncate_prompt_tokens, max_tokens_per_doc, max_tokens_per_query) != (None,) * 3:
            raise ConfigError("a template that is rendered here can't be cut by the server: it would lose its end")
        self.client = Client(
            servers=Servers(endpoints),
            transport=transport,
            rules=rules,
            options=options,
            fit=truncate_prompt_tokens == "auto" and not renders,
            template=None if template is None else Template.load(template),
            variables={"instruction": instruction, **variables},
            prompts=(query_prompt, document_prompt),
            timeout=float(seconds),
        )
        self._default_deadline = self.client.timeout
        self._max_waiting_calls = max_waiting_calls

    @property
    def model_name(self) -> str:
        """The model's name on the server; ``"unknown"`` before the first call where it was not given."""
        facts = self.client.servers.facts
        return (self.client.rules.model or "unknown") if facts is None else facts.model

    @property
    def usage(self) -> Usage | None:
        """What the last call in this thread or task took, also where it failed; None before any."""
        return _usage.get()

    @property
    def listwise(self) -> bool:  # type: ignore[override]  # of a server that is asked, not told
        """Whether the model scores a query's documents together (jina-reranker-v3); True before that is known."""
        facts = self.client.servers.facts
        return facts is None or facts.listwise

    def _score(
        self, queries: Inputs, documents: Inputs, until: float | None, instruction: str | None = None
    ) -> list[Outcome]:
        _usage.set(usage := Usage())
        return self.client.transport.run(self.client.call(queries, documents, until, instruction, usage), until)

    async def _ascore(
        self, queries: Inputs, documents: Inputs, until: float | None, instruction: str | None = None
    ) -> list[Outcome]:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            said = "ascore needs an event loop of asyncio; from another one (trio), call score in a thread"
            raise ConfigError(said) from None
        _usage.set(usage := Usage())
        return await self.client.call(queries, documents, until, instruction, usage)

    def identity(self, *, deadline: float | None = None) -> Identity:
        """Ask the servers anew who they are, see `Scorer.identity`; `Identity.place` has their addresses.

        The version of vLLM is not in it: what it changes in a score, the probes show.
        """
        self.client.servers.forget()
        return replace(super().identity(deadline=deadline), place=", ".join(self._roots))

    def _facts(self, until: float | None) -> dict[str, str]:
        client, options = self.client, self.client.options
        served = client.transport.run(client.exchange(until).describe(), until)
        facts: dict[str, object] = asdict(options) | {
            "checkpoint": served.checkpoint,
            "window": served.window,
            "endpoint": served.form.api,
            "template": None if client.template is None else client.template.source,
            "instruction": client.variables["instruction"],
            "chat_template_kwargs": client.variables if len(client.variables) > 1 else None,
            "query_prompt": client.prompts[0],
            "document_prompt": client.prompts[1],
            "truncate_prompt_tokens": "auto" if client.fit else options.truncate_prompt_tokens,
            "extra_body": None if options.extra_body is None else _without_secrets(options.extra_body),
            "priority": None,  # changes when, not what
        }
        return {name: _told(value) for name, value in facts.items() if value is not None}

    def _start(self) -> None:
        self.client.transport.start()

    def _close(self) -> None:
        self.client.transport.close()

    async def _aclose(self) -> None:
        await self.client.transport.aclose()

    def __repr__(self) -> str:
        roots = self._roots
        model = "" if self.client.rules.model is None else f", model={self.client.rules.model!r}"
        return f"VLLMScorer({(roots[0] if len(roots) == 1 else roots)!r}{model})"

    @property
    def _roots(self) -> list[str]:
        return [endpoint.root for endpoint in self.client.servers.endpoints]


def _told(value: object) -> str:
    """Write a setting as text; a long one as its beginning and what tells it from others."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr)
    return text if len(text) <= 200 else f"{text[:40]}... (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"


def _without_secrets(value: Any) -> Any:
    """Leave out what may give access to something, by its name."""
    if not isinstance(value, Mapping):
        return value
    return {name: "..." if SECRET.search(str(name)) else _without_secrets(each) for name, each in value.items()}


def _endpoints(base_url: str | Sequence[str] | None) -> list[Endpoint]:
    """Read the servers' addresses, each once."""
    if base_url is None:
        named = os.environ.get("VLLM_BASE_URL", "").split(",")
        base_url = [url for url in named if url.strip()] or DEFAULT_BASE_URL
    several = base_url if isinstance(base_url, list | tuple) else [base_url]
    if not several:
        raise ConfigError("base_url is an empty list; pass at least one address")
    return list(dict.fromkeys(map(Endpoint.parse, several)))


def _check(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for an argument of the wrong type or out of range."""
    for name, kind in _KINDS.items():
        value = given[name]
        if value is not None and not isinstance(value, kind):
            kinds = getattr(kind, "__name__", kind)
            raise ConfigError(f"{name} must be {kinds}, got {type(value).__name__}")  # it may be a secret
        if isinstance(value, str | Mapping):
            check_sendable(name, value if isinstance(value, str) else dict(value))
    for name, (least, default) in _COUNTS.items():
        count = given[name]
        if isinstance(count, bool) or not ((isinstance(count, int) and count >= least) or count is default):
            or_none = ", or None" if default is None else ""
            raise ConfigError(f"{name} must be {least} or more{or_none}; got {count!r}")
    truncate = given["truncate_prompt_tokens"]
    if truncate not in (None, "auto", -1) and (type(truncate) is not int or truncate < 1):
        raise ConfigError(f'truncate_prompt_tokens must be "auto", -1, 1 or more, or None; got {truncate!r}')
    if given["endpoint"] not in ("score", "rerank", "tei", "auto"):
        raise ConfigError(f'endpoint must be "score", "rerank", "tei" or "auto", got {given["endpoint"]!r}')
    ours = {"model", "text_1", "text_2", "query", "documents", "texts", "request_id"}
    if taken := ours & dict(given["extra_body"] or {}).keys():
        raise ConfigError(f"extra_body must not hold {', '.join(sorted(taken))}")


def _check_seconds(**given: Any) -> None:
    """Raise ConfigError for what is no time; None and infinity are no bound."""
    for name, value in given.items():
        unbounded = value is None if name == "attempt_timeout" else name == "timeout" and value == math.inf
        if not unbounded and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise ConfigError(f"{name} must be a positive number of seconds, got {value!r}")
