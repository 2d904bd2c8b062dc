"""What is known of a server: asked of it, with an age; what it does not tell is unknown, and never read as "no"."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from rag_rerank.errors import AuthError, BackendError, BackendRejected, BackendUnavailable, BadReply, ConfigError
from rag_rerank.inputs import NEUTRAL
from rag_rerank.vllm import wire
from rag_rerank.vllm.sending import NOBODY, MayPass, Sending
from rag_rerank.vllm.servers import Server
from rag_rerank.vllm.wire import Card, Form, Options, Request, ServerFacts, Version, printable

T = TypeVar("T")

# Seconds for which what is known of a server holds; where it could not tell, it is asked again soon.
LONGEST_AGE, SHORTEST_AGE = 60.0, 5.0


async def described(sending: Sending, server: Server) -> ServerFacts:
    """Learn what a server tells about itself, asked if it is not known or was long ago."""
    before, now = server.facts, sending.clock()
    if before is None or now - server.asked_at > LONGEST_AGE:
        server.asked_at = now  # others go on with what is known meanwhile
        version = await _optional(sending, server, Request("GET", "/version"), wire.read_version)
        facts = _facts(sending, server, version, await _listed(sending, server))
        if facts == before:
            server.facts = replace(before, has_template=None)  # a restart may have changed no more than that
        else:
            server.facts = replace(facts, form=await _form(sending, server, facts))
    return server.facts or await described(sending, server)


async def missing(sending: Sending, server: Server, model: str, refusal: BackendRejected) -> Exception:
    """Make the error for a model that is not served, as it seems, with those that are."""
    said, remedy = f"the server does not serve the model {model!r}", "Pass the name that it serves as model=."
    cards = await _optional(sending, server, Request("GET", "/v1/models"), wire.read_models)
    is_listed = any(card.name == model for card in cards or ())
    if is_listed:
        said = refusal.message
        remedy = 'It has no such API there. endpoint="auto" finds out whether it has another.'
    elif cards is not None:
        remedy = f"It serves: {_names(cards)}. Pass one of them as model=."
    facts = {"status": 404, "body": refusal.body, "request_id": refusal.request_id}
    error = sending.error(BackendRejected, said, remedy, server, whole=True, **facts)
    return error if is_listed or sending.model is not None else MayPass(error, "soon")


async def _optional(sending: Sending, server: Server, request: Request, read: Callable[[bytes], T]) -> T | None:
    """Ask what a server need not tell; None where it answers anything else, or nothing, as gateways do."""
    for once_more in (True, False):
        try:
            return await sending.once(server, request, read, optional=True)
        except BackendRejected:
            break
        except MayPass as failure:
            if failure.kind in NOBODY:
                raise
            if failure.kind == "broken" and once_more:  # most often an old connection
                continue
            if failure.kind != "timeout":
                server.asked_at = sending.clock() - LONGEST_AGE + SHORTEST_AGE
            break
    return None


async def _listed(sending: Sending, server: Server) -> list[Card]:
    """Get the models that are served; none where one is named and the server doesn't tell."""
    refusals = []
    for path in server.endpoint.lists(sending.api):
        request = Request("GET", path)
        try:
            if sending.model is None:
                return await sending.once(server, request, wire.read_models)
            cards = await _optional(sending, server, request, wire.read_models)
            if cards is not None:
                return cards
        except BackendRejected as refusal:
            refusals.append(refusal)
    if refusals:
        raise refusals[0]
    return []


async def _form(sending: Sending, server: Server, facts: ServerFacts) -> Form:
    """Find how a server is asked for scores: the only way, or the first that it answers."""
    forms = server.endpoint.forms(sending.api)
    if len(forms) == 1:
        return forms[0]
    refusals: list[BackendError] = []
    for form in forms:
        request = wire.scoring_request(replace(facts, form=form), [NEUTRAL], [NEUTRAL], Options())
        try:
            await sending.once(server, request, functools.partial(wire.read_answer, form.api, positions=[0]))
        except (BackendRejected, MayPass) as error:
            refusal = error.error if isinstance(error, MayPass) else error
            if isinstance(refusal, AuthError) or not isinstance(refusal, BackendRejected | BadReply):
                raise
            refusals.append(refusal)
        else:
            return form
    raise min(refusals, key=lambda refusal: refusal.status == 404)  # a path that is not there tells less


def _facts(sending: Sending, server: Server, version: Version | None, cards: list[Card]) -> ServerFacts:
    if not any(card.window for card in cards):
        version = None  # some gateways have a version of their own: only vLLM's lists tell how long prompts may be
    if sending.model is not None:
        card = next((card for card in cards if card.name == sending.model), Card(sending.model, ""))
        return ServerFacts(version, card.name, card.root or None, card.window)
    label = server.endpoint.label
    if not cards:
        remedy = "Wait until one is loaded, or pass its name as model=."
        raise MayPass(sending.error(BackendUnavailable, "the server lists no model", remedy, server))
    if len({card.root for card in cards}) != 1:
        raise ConfigError(f"{label} serves {len(cards)} models; pass model=. It serves: {_names(cards)}.")
    known = sending.servers.facts_beside(server)
    if known is not None and known.model != cards[0].name:
        sending.servers.forget()  # unless they all have another one now
        raise ConfigError(f"{label} serves {cards[0].name!r}, another one {known.model!r}; pass model=.")
    return ServerFacts(version, cards[0].name, cards[0].root, cards[0].window)


def _names(cards: list[Card]) -> str:
    return printable(", ".join(card.name for card in cards))
