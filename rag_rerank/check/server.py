"""What a server is: whether it answers, its version, model and key, and whether it has a score API.

Each function looks at one thing and notes in the patient what it learns. A problem here makes all scores fail.
"""

import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rag_rerank.check.finding import Finding, Verdict, failure, sentence
from rag_rerank.check.patient import Patient
from rag_rerank.check.texts import known_pairs
from rag_rerank.errors import AuthError, BackendRejected, BadReply, ConfigError, RerankError
from rag_rerank.vllm.steps import Failure
from rag_rerank.vllm.wire import SINCE, Card, Reply, Request, Version, error_text, read_models, read_version

OLDEST: Version = (0, 8)
TEMPLATES_SINCE: Version = (0, 14)
"""The version from which ``--chat-template`` is used for scores."""
ROUNDED, ROUGHLY_ROUNDED = 1e-3, 1e-2
"""How far apart rounding brings scores of one pair at most (`largest_difference`): in single and in half precision."""

_NO_ANSWER = {
    "connect": "Start vLLM there (it listens once its model is loaded), or pass the address where it runs.",
    "timeout": "Restart it if it hangs (vLLM does so after SIGTERM while it works), or allow more time.",
    "certificate": "Use the name that its certificate is for; SSL_CERT_FILE names more authorities to trust.",
    "broken": "Look into the log of the server, or of the proxy before it.",
    "unread": "Pass the address of a vLLM server.",
}


def reach(patient: Patient) -> Finding:
    """Whether anybody answers, and how fast."""
    label = patient.label
    took, outcome = _timed(patient)
    if isinstance(outcome, Failure):
        return Finding("Reachable", "problem", f"{label} gave no answer: {outcome.text}.", _NO_ANSWER[outcome.kind])
    if outcome.status >= 500:
        said = sentence(f"{label} answered {outcome.status}: {error_text(outcome.body)}")
        return Finding("Reachable", "problem", said, "Look into the log of the server, or of the proxy before it.")
    if 300 <= outcome.status < 400:
        said = f"{label} redirects, and redirects are never followed: they could send documents anywhere."
        return Finding("Reachable", "problem", said, "Pass the address that it redirects to.")
    version = read_version(outcome.body) if outcome.status == 200 else None
    patient.server = replace(patient.server, version=version)
    again, _ = _timed(patient)  # what is set up for the first request, here and on the way, is not the server's time
    said = f"{label} answers in {1000 * again:.0f} ms ({1000 * took:.0f} ms the first time, with connecting)."
    return Finding("Reachable", "good", said)


def _timed(patient: Patient) -> tuple[float, Reply | Failure]:
    """Seconds until there was an answer to a request that is no work for the server, and the answer."""
    began = time.perf_counter()
    outcome = patient.send(Request("GET", "/version"))
    return time.perf_counter() - began, outcome


def version(patient: Patient) -> Iterator[Finding]:
    """What the server's version of vLLM can't do."""
    known = patient.server.version
    if known is None:
        said = (
            "It does not tell its version, so it is taken for a recent one: an older one ignores what it doesn't know."
        )
        yield Finding("Version", "note", said, "Have the gateway forward /version, too.")
        return
    name = f"vLLM {_dotted(known)}"
    newer = SINCE | {"score templates (--chat-template)": TEMPLATES_SINCE}
    missing = {option: since for option, since in newer.items() if known < since}
    upgrade = f"Upgrade vLLM to {_dotted(max(missing.values()))} or newer." if missing else None
    try:
        patient.options.fields(known)
    except ConfigError as error:
        yield Finding("Version", "problem", sentence(str(error)), upgrade)
        return
    if known < OLDEST:
        yield Finding("Version", "problem", f"{name} is older than {_dotted(OLDEST)}, the first that works.", upgrade)
    elif missing:
        yield Finding("Version", "note", f"{name} is too old for {', '.join(missing)}.", upgrade)
    else:
        yield Finding("Version", "good", f"{name} knows every option.")


def model(patient: Patient) -> Iterator[Finding]:
    """What is served; or that the server doesn't tell without another key."""
    reply = patient.get("/v1/models")
    if reply.status in (401, 403):
        yield _refused(patient, f"the server answered {reply.status}: {error_text(reply.body)}")
        return
    try:
        cards = read_models(reply.body) if reply.status == 200 else []
    except BadReply:
        cards = []
    if patient.model is not None:
        yield _named(patient, patient.model, cards)
        return
    names = ", ".join(card.name for card in cards)
    if not cards:
        said = f"It lists no models (GET /v1/models gave {reply.status})."
        yield Finding("Model", "problem", said, "Pass the model's name: --model NAME (model= in Python).")
    elif len({card.root for card in cards}) > 1:
        said = f"It serves {len(cards)} models: {names}."
        yield Finding("Model", "problem", said, "Pass the name of one: --model NAME (model= in Python).")
    else:
        yield _served(patient, cards[0], names)


def _named(patient: Patient, name: str, cards: Sequence[Card]) -> Finding:
    """The finding about a model that the scorer names."""
    for card in cards:
        if card.name == name:
            return _served(patient, card, name)
    if not cards:
        return Finding("Model", "note", f"It does not list its models, so {name} is taken on trust.")
    names = ", ".join(card.name for card in cards)
    return Finding("Model", "warning", f"{name} is not among the models that it lists.", f"Pass one of these: {names}.")


def _served(patient: Patient, card: Card, names: str) -> Finding:
    patient.server = replace(patient.server, model=card.name, checkpoint=card.root, window=card.window)
    checkpoint = "" if card.root == card.name else f", from {card.root}"
    return Finding("Model", "good", f"It serves {names}{checkpoint}.")


def api(patient: Patient) -> Iterator[Finding]:
    """Whether it scores at all."""
    try:
        patient.ask("a", "a")
    except AuthError as error:
        yield _refused(patient, error.message)
    except BackendRejected as error:
        yield _without_api(patient, error) if error.status == 404 else failure("Score API", error)
    except RerankError as error:
        yield failure("Score API", error)
    else:
        yield Finding("Score API", "good", f"POST /v1/{patient.api} gives scores.")


def _without_api(patient: Patient, error: BackendRejected) -> Finding:
    """The finding that it has no such API: where else scores may be had."""
    if patient.api == "score" and patient.has_api("rerank"):
        said = "It has no score API, but a rerank API."
        return Finding("Score API", "problem", said, 'Pass endpoint="rerank" to VLLMScorer.')
    if patient.api == "rerank" and patient.has_api("score"):
        said = "It has no rerank API, but a score API."
        return Finding("Score API", "problem", said, 'Leave out endpoint="rerank".')
    family = patient.family
    if family is None:
        return failure("Score API", error)
    return Finding("Score API", "problem", sentence(error.message), serve(patient))


def serve(patient: Patient) -> str:
    """How the model that a patient serves is to be served; it must be of a known family."""
    family = patient.family
    assert family is not None  # noqa: S101 - said above
    checkpoint = shlex.quote(patient.server.checkpoint or patient.server.model)  # the server's words, to be pasted
    command = f"vllm serve {checkpoint} {family.vllm_flags}".strip()
    if family.template is None or "{template}" not in family.vllm_flags:
        return f"Serve it so: {command}"
    command = command.replace("{template}", family.template)
    remedy = f"rag-rerank template show {family.name} > {family.template}; {command}"
    if "classifier_from_token" in command:
        remedy += " (without --hf-overrides where `rag-rerank convert` wrote the model)"
    return f"Serve it so: {remedy}"


def _refused(patient: Patient, why: str) -> Finding:
    if patient.has_key:
        remedy = "Set VLLM_API_KEY to the key that the server was started with."
        return Finding("Key", "problem", sentence(f"It refuses the key: {why}"), remedy)
    said = sentence(f"It wants a key, and none is set: {why}")
    return Finding("Key", "problem", said, "Set VLLM_API_KEY (api_key= in Python).")


def key(patient: Patient) -> Iterator[Finding]:
    """Whether the key guards anything. It was accepted, if there is one."""
    if not patient.has_key:
        yield Finding("Key", "note", "It wants no key: whoever reaches the server may use it.")
        return
    request = patient.request("a", "a")
    inside = patient.send(request, keyless=True)
    outside = patient.send(replace(request, path=request.path.removeprefix("/v1")), keyless=True)
    guarded = isinstance(inside, Reply) and inside.status in {401, 403}
    if isinstance(inside, Reply) and inside.status == 200:
        said = "It takes the key, but gives scores without one, too: whoever reaches the server may use it."
        remedy = "Start it with --api-key if it is to be guarded, or unset VLLM_API_KEY."
        yield Finding("Key", "warning", said, remedy)
    elif guarded and isinstance(outside, Reply) and outside.status == 200:
        said = f"The key guards /v1/{patient.api}, but /{patient.api} gives scores without one: vLLM guards /v1 only."
        remedy = "Put a proxy before it that lets through /v1 and /version only, and let nobody else reach its port."
        yield Finding("Key", "warning", said, remedy)
    elif guarded:
        yield Finding("Key", "good", "It takes the key, and gives no scores without one.")
    else:
        yield Finding("Key", "note", "It takes the key; what it does without one could not be seen.")


def alike(first: Patient, others: Sequence[Patient]) -> Iterator[Finding]:
    """Whether several servers may stand in for each other."""
    queries, documents = known_pairs()
    expected, found = first.score(queries, documents), []
    for other in others:
        try:
            scores = other.score(queries, documents)
        except RerankError as error:
            found.append(replace(failure("Same", error), says=f"{other.label}: {error}"))
            continue
        found += _differences(first, other, largest_difference(expected, scores))
    yield from found
    if not found:
        labels = ", ".join(patient.label for patient in (first, *others))
        yield Finding("Same", "good", f"{labels} serve the same model by the same version and give the same scores.")


def _differences(first: Patient, other: Patient, apart: float) -> Iterator[Finding]:
    """How two servers that have scored differ; `apart` are their scores."""
    ours, theirs = first.told or first.server, other.told or other.server
    pair = f"{first.label} and {other.label}"
    if ours.model != theirs.model:
        remedy = "Serve the same model under one name (--served-model-name), or pass --model NAME."
        yield Finding("Same", "problem", f"{pair} serve {ours.model} and {theirs.model}.", remedy)
    if apart > ROUNDED:
        remedy = "Start them with the same checkpoint, template, --dtype and other options."
        verdict: Verdict = "problem" if apart > ROUGHLY_ROUNDED else "warning"
        yield Finding("Same", verdict, f"{pair} give scores that differ by up to {apart:.2g}.", remedy)
    if ours.version != theirs.version:
        names = " and ".join(
            "one that is not told" if v is None else _dotted(v) for v in (ours.version, theirs.version)
        )
        remedy = "Bring both to the same version: options are refused by the older one only."
        yield Finding("Same", "warning", f"{pair} run different versions: {names}.", remedy)
    if ours.window != theirs.window:
        remedy = "Start both with the same --max-model-len: over-long documents are cut at it."
        yield Finding("Same", "warning", f"{pair} read {ours.window} and {theirs.window} tokens.", remedy)


def largest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """The largest distance of two scores of one pair; as a part of them where they are beyond 1."""
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(first, second, strict=True))


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
