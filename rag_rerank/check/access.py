"""Whether a server gives scores at all; each function looks at one thing and notes it in `CheckedServer.facts`."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rag_rerank.check.checked_server import CheckedServer
from rag_rerank.check.finding import Finding, Verdict, failure, sentence
from rag_rerank.check.texts import known_pairs
from rag_rerank.errors import AuthError, BackendRejected, BadReply, ConfigError, RerankError
from rag_rerank.vllm import wire
from rag_rerank.vllm.wire import Card, Failure, Reply, Request, Version

OLDEST: Version = (0, 8)
TEMPLATES_SINCE: Version = (0, 14)  # the version from which --chat-template is used for scores
# How far apart rounding brings scores of one pair at most (`largest_difference`): in single and in half precision.
ROUNDED, ROUGHLY_ROUNDED = 1e-3, 1e-2

# By what other programs than vLLM are known: a header of their answers, or the owner that they name for a model.
_BY_HEADER = {"x-litellm-call-id": "LiteLLM", "x-new-api-version": "new-api", "x-oneapi-request-id": "new-api"}
_BY_OWNER = {
    "docker": "Docker Model Runner",
    "infinity": "infinity",
    "llamacpp": "llama.cpp",
    "sglang": "SGLang",
    "text-embeddings-inference": "text-embeddings-inference",
    "xinference": "Xinference",
}

_LOG = "Look into the log of the server, or of the proxy before it."
_NO_ANSWER = {
    "connect": "Start vLLM there (it listens once its model is loaded), or pass the address where it runs.",
    "timeout": "Restart it if it hangs (vLLM does so after SIGTERM while it works), or allow more time.",
    "certificate": "Use the name that its certificate is for; SSL_CERT_FILE names the authorities to trust.",
    "tls": "Pass an address that begins with http://, if it does not speak https.",
    "unread": "Pass the address of a vLLM server.",
}


def reach(server: CheckedServer) -> Finding:
    """See whether anybody answers, and how fast."""
    label = server.label
    took, outcome = _timed(server)
    if isinstance(outcome, Failure):
        said, remedy = f"{label} gave no answer: {outcome.text}.", _NO_ANSWER.get(outcome.kind, _LOG)
        return Finding("Reachable", "problem", said, remedy)
    if outcome.status >= 500:
        said = sentence(f"{label} answered {outcome.status}: {wire.error_text(outcome.body)}")
        return Finding("Reachable", "problem", said, _LOG)
    if 300 <= outcome.status < 400:
        said = f"{label} redirects, and redirects are never followed: they could send documents anywhere."
        return Finding("Reachable", "problem", said, "Pass the address that it redirects to.")
    version = wire.read_version(outcome.body) if outcome.status == 200 else None
    server.facts = replace(server.facts, version=version)
    again, _ = _timed(server)  # what is set up for the first request, here and on the way, is not the server's time
    said = f"{label} answers in {1000 * again:.0f} ms ({1000 * took:.0f} ms the first time, with connecting)."
    return Finding("Reachable", "good", said)


def _timed(server: CheckedServer) -> tuple[float, Reply | Failure]:
    """Get seconds until there was an answer to a request that is no work for the server, and the answer."""
    began = time.perf_counter()
    outcome = server.send(Request("GET", "/version"))
    return time.perf_counter() - began, outcome


def version(server: CheckedServer) -> Finding:
    """See what answers, and what its version of vLLM can't do."""
    reply, cards = _listed(server)
    server.program = _program(server, reply, cards)
    if server.program is not None or (cards and not any(card.window for card in cards)):
        # Some gateways have a version of their own: only vLLM's lists tell how long prompts may be.
        server.facts = replace(server.facts, version=None)
    if server.program is not None:
        said = f"{server.program} answers, not vLLM itself: what it drops is said below."
        return Finding("Version", "note", said)
    known = server.facts.version
    if known is None:
        said = "It does not tell its version, so it is taken for a recent one: older ones ignore what they don't know."
        return Finding("Version", "note", said, "Have the gateway forward /version, too.")
    newer = wire.SINCE | {"score templates (--chat-template)": TEMPLATES_SINCE}
    missing = {option: since for option, since in newer.items() if known < since}
    verdict: Verdict = "note" if missing else "good"
    said = f"vLLM {_dotted(known)} " + (f"is too old for {', '.join(missing)}." if missing else "knows every option.")
    if known < OLDEST:
        verdict, said = "problem", f"vLLM {_dotted(known)} is older than {_dotted(OLDEST)}, the first that works."
    try:
        server.client.options.fields(known)
    except ConfigError as error:
        verdict, said = "problem", sentence(str(error))
    upgrade = f"Upgrade vLLM to {_dotted(max(missing.values()))} or newer." if missing else None
    return Finding("Version", verdict, said, upgrade)


def _program(server: CheckedServer, listed: Reply, cards: Sequence[Card]) -> str | None:
    """Find out which program answers; None for vLLM, and for one that is not known."""
    replies: list[Reply | Failure] = [listed]
    if not any(card.owner == "vllm" for card in cards):
        # LiteLLM's header is on answers to scoring requests only; one without a query costs nobody a score.
        path = server.client.servers.endpoints[0].forms("rerank")[0].path
        replies.append(server.send(Request("POST", path, b"{}")))
    headers = {header for reply in replies if isinstance(reply, Reply) for header in reply.headers}
    named = [name for header, name in _BY_HEADER.items() if header in headers]
    named += [_BY_OWNER[owner] for card in cards if (owner := str(card.owner)) in _BY_OWNER]
    return named[0] if named else None


def _listed(server: CheckedServer) -> tuple[Reply, list[Card]]:
    """Ask for the models; give the first answer where none is a list."""
    replies = []
    for path in server.client.servers.endpoints[0].lists("auto"):
        replies.append(reply := server.get(path))
        if reply.status == 200:
            with contextlib.suppress(BadReply):
                return reply, wire.read_models(reply.body)
    return replies[0], []


def model(server: CheckedServer) -> Finding:
    """See what is served; or that the server doesn't tell without another key."""
    reply, cards = _listed(server)
    wanted, names = server.client.rules.model, wire.printable(", ".join(card.name for card in cards))
    card = next((card for card in cards if wanted in (None, card.name)), None)
    if reply.status in (401, 403):
        return _refused(server, f"the server answered {reply.status}: {wire.error_text(reply.body)}")
    if wanted is not None and not cards:
        return Finding("Model", "note", f"It does not list its models, so {wanted} is taken on trust.")
    if not cards:
        said = f"It lists no models (GET /v1/models gave {reply.status})."
        return Finding("Model", "problem", said, "Pass the model's name: --model NAME (model= in Python).")
    if card is None:
        said = f"{wanted} is not among the models that it lists."
        return Finding("Model", "warning", said, f"Pass one of these: {names}.")
    if wanted is None and len({card.root for card in cards}) > 1:
        said = f"It serves {len(cards)} models: {names}."
        return Finding("Model", "problem", said, "Pass the name of one: --model NAME (model= in Python).")
    server.facts = replace(server.facts, model=card.name, checkpoint=card.root, window=card.window)
    checkpoint = "" if card.root == card.name else f", from {wire.printable(card.root)}"
    return Finding("Model", "good", f"It serves {wanted or names}{checkpoint}.")


def api(server: CheckedServer) -> Finding:
    """See whether it scores at all."""
    try:
        server.ask()
    except AuthError as error:
        return _refused(server, error.message)
    except BackendRejected as error:
        return _without_api(server, error)
    except RerankError as error:
        return failure("Score API", error)
    return Finding("Score API", "good", f"POST {server.told.form.path} gives scores.")


def _without_api(server: CheckedServer, error: BackendRejected) -> Finding:
    """Make the finding that it has no such API: where else scores may be had."""
    asked, endpoint = server.told.form, server.client.servers.endpoints[0]
    for form in endpoint.forms("auto"):
        request = wire.scoring_request(replace(server.told, form=form), ["a"], ["a"], wire.Options())
        if form != asked and _gives_scores(server.send(request)):
            said = f"It has no {asked.api} API at {asked.path}, but a {form.api} API at {form.path}."
            where = f", with the address {endpoint.root}{form.path}" if form not in endpoint.forms(form.api) else ""
            remedy = f'Pass --endpoint {form.api} (endpoint="{form.api}" in Python){where}.'
            remedy = "Leave out --endpoint (endpoint= in Python)." if form.api == "score" else remedy
            return Finding("Score API", "problem", said, remedy)
    found = failure("Score API", error)
    return found if error.status != 404 or server.family is None else replace(found, remedy=serve(server))


def _gives_scores(outcome: Reply | Failure) -> bool:
    return isinstance(outcome, Reply) and outcome.status == 200


def serve(server: CheckedServer) -> str:
    """Say how the model that a server serves is to be served; it must be of a known family."""
    family = server.family
    assert family is not None  # noqa: S101 - said above
    commands = "; ".join(family.serve(server.facts.checkpoint or server.facts.model))
    converted = " (without --hf-overrides where `rag-rerank convert` wrote the model)"
    return f"Serve it so: {commands}{converted if 'classifier_from_token' in commands else ''}"


def _refused(server: CheckedServer, why: str) -> Finding:
    said, remedy = "It wants a key, and none is set", "Set VLLM_API_KEY (api_key= in Python)."
    if server.client.transport.keys:
        said, remedy = "It refuses the key", "Set VLLM_API_KEY to the key that the server was started with."
    return Finding("Key", "problem", sentence(f"{said}: {why}"), remedy)


def key(server: CheckedServer) -> Finding:
    """See whether the key guards anything. It was accepted, if there is one."""
    if not server.client.transport.keys:
        return Finding("Key", "note", "It wants no key: whoever reaches the server may use it.")
    request = server.request("rag-rerank-check")
    path, open_path = request.path, request.path.removeprefix("/v1")
    inside = server.send(request, without_key=True)
    outside = server.send(replace(request, path=open_path), without_key=True)
    if _gives_scores(inside):
        said = "It takes the key, but gives scores without one, too: whoever reaches the server may use it."
        remedy = "Start it with --api-key if it is to be guarded, or unset VLLM_API_KEY."
        return Finding("Key", "warning", said, remedy)
    if not isinstance(inside, Reply) or inside.status not in {401, 403}:
        return Finding("Key", "note", "It takes the key; what it does without one could not be seen.")
    if _gives_scores(outside):
        said = f"The key guards {path}, but {open_path} gives scores without one: vLLM guards /v1 only."
        remedy = "Put a proxy before it that lets through /v1 and /version only, and let nobody else reach its port."
        return Finding("Key", "warning", said, remedy)
    return Finding("Key", "good", "It takes the key, and gives no scores without one.")


def alike(first: CheckedServer, others: Sequence[CheckedServer]) -> Iterator[Finding]:
    """See whether several servers may stand in for each other."""
    queries, documents = known_pairs()
    expected = first.score(queries, documents)
    found: list[Finding] = []
    for other in others:
        try:
            found += _differences(first, other, largest_difference(expected, other.score(queries, documents)))
        except RerankError as error:
            found.append(replace(failure("Same", error), says=f"{other.label}: {error}"))
    labels = ", ".join(server.label for server in (first, *others))
    said = f"{labels} serve the same model by the same version and give the same scores."
    yield from found or [Finding("Same", "good", said)]


def _differences(first: CheckedServer, other: CheckedServer, apart: float) -> Iterator[Finding]:
    """Tell how two servers that have scored differ; `apart` are their scores."""
    ours, theirs, pair = first.told, other.told, f"{first.label} and {other.label}"
    if ours.model != theirs.model:
        remedy = "Serve the same model under one name (--served-model-name), or pass --model NAME."
        yield Finding("Same", "problem", f"{pair} serve {ours.model} and {theirs.model}.", remedy)
    if apart > ROUNDED:
        remedy = "Start them with the same checkpoint, template, --dtype and other options."
        verdict: Verdict = "problem" if apart > ROUGHLY_ROUNDED else "warning"
        yield Finding("Same", verdict, f"{pair} give scores that differ by up to {apart:.2g}.", remedy)
    if ours.version != theirs.version:
        names = [_dotted(each) if each else "one that is not told" for each in (ours.version, theirs.version)]
        remedy = "Bring both to the same version: options are refused by the older one only."
        yield Finding("Same", "warning", f"{pair} run different versions: {' and '.join(names)}.", remedy)
    if ours.window != theirs.window:
        remedy = "Start both with the same --max-model-len: over-long documents are cut at it."
        yield Finding("Same", "warning", f"{pair} read {ours.window} and {theirs.window} tokens.", remedy)


def largest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Find the largest distance of two scores of one pair; as a part of them where they are beyond 1."""
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(first, second, strict=True))


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
