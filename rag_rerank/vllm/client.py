"""What `VLLMScorer` and `rag_rerank.check` both hold: servers, connections, rules and options, and the way to ask."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from rag_rerank.errors import ConfigError, ContentError
from rag_rerank.inputs.multimodal import Prepared
from rag_rerank.isolation import Outcome
from rag_rerank.template import Halves, Template
from rag_rerank.vllm.call import Call, Inputs
from rag_rerank.vllm.exchange import Exchange, Rules, Usage
from rag_rerank.vllm.servers import Servers
from rag_rerank.vllm.transport import Transport
from rag_rerank.vllm.wire import Options


@dataclass(frozen=True, slots=True)
class Client:
    """How requests are made, where they go and how: a value, of which `dataclasses.replace` makes variants."""

    servers: Servers
    transport: Transport  # variants share it
    rules: Rules
    options: Options
    fit: bool  # whether to cut what is too long for the model
    template: Template | None  # to be rendered here; None leaves it and its variables to the server
    variables: dict[str, Any]  # of the template; one is its instruction
    prompts: tuple[str | None, str | None]  # to put before each query and each document
    timeout: float  # seconds that a call may take
    _halves: dict[str | None, Halves] = field(default_factory=dict)  # by instruction; to split takes 0.2 ms

    def __post_init__(self) -> None:
        self.halves()  # a template that can't be used is told at once

    def halves(self, instruction: str | None = None) -> Halves | None:
        """Split the template with its variables, if it is rendered here; ConfigError if that can't be done."""
        halves = self._halves.get(instruction)
        if halves is None and self.template is not None:
            variables = self.variables if instruction is None else self.variables | {"instruction": instruction}
            if variables["instruction"] is not None and not self.template.takes("instruction"):
                raise ConfigError(f"the template {self.template.name!r} has no place for an instruction")
            if len(self._halves) >= 64:
                self._halves.clear()
            self._halves[instruction] = halves = self.template.split(variables)
        return halves

    async def call(
        self,
        queries: Inputs,
        documents: Inputs,
        until: float | None,
        instruction: str | None = None,
        usage: Usage | None = None,
    ) -> list[Outcome]:
        """Score, see `Scorer._score`; a score that is not finite stays in its place."""
        options = self.options
        check_sendable("instruction", instruction)
        queries = _prefixed("query", self.prompts[0], queries)
        documents = _prefixed("document", self.prompts[1], documents)
        halves = self.halves(instruction)
        if halves is not None:
            queries = [halves.of(_text(query), "")[0] for query in queries]
            documents = [halves.of("", _text(document))[1] for document in documents]
        elif instruction is not None:
            options = replace(options, instruction=instruction)
        return await Call(self.exchange(until, usage), queries, documents, options, self.fit).score()

    def exchange(self, until: float | None, usage: Usage | None = None) -> Exchange:
        """Begin the requests of one call."""
        return Exchange(self.transport.send, self.servers, self.rules, until=until, usage=usage or Usage())


def check_sendable(name: str, value: object) -> None:
    """Raise ConfigError where a request can't hold it."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} can't be sent as JSON: {type(error).__name__}: {error}") from None


def _text(value: Prepared) -> str:
    if isinstance(value, str):
        return value
    raise ContentError(
        "an image has no place in a template that is rendered here (template=): give it to the server, --chat-template"
    )


def _prefixed(name: str, prompt: str | None, inputs: Inputs) -> Inputs:
    """Put the prompt before each text."""
    if not prompt:
        return inputs
    if not all(isinstance(each, str) for each in inputs):
        raise ContentError(f"an image can't follow a {name}_prompt: vLLM puts it before all text")
    return [f"{prompt}{each}" for each in inputs]
