"""Examines a model that runs in this process: what its files declare, and the proof that it is run rightly."""

from collections.abc import Iterator

from rag_rerank import LocalScorer
from rag_rerank.check.finding import Finding, failure
from rag_rerank.errors import RerankError
from rag_rerank.local.checkpoint.declaration import Declaration, Layer, Route
from rag_rerank.local.transformer.proof import Proof


def check_local(scorer: LocalScorer) -> Iterator[Finding]:
    """Load the model of a scorer, with its settings, and tell what it is.

    Args:
        scorer: It must stay open until the end; it is not changed.

    Yields:
        What was found. Nothing is raised for what is wrong with a model.
    """
    try:
        model = scorer.loaded
    except RerankError as error:
        yield failure("Model", error)
        return
    declared, facts = model.declaration, model.facts
    what = f"{scorer.model_name} is a {declared.kind}, run as {facts['score type']}"
    yield Finding("Model", "good", f"{what} in {facts['dtype']} on {facts['device']}.")
    yield from _files(declared)
    if declared.kind == "cross-encoder":
        yield _scores(declared, facts["activation"])
        yield Finding("Prompt", "good", _prompt(declared, facts["template"]))
    if "classifier tokens" in facts:
        ids = f", ids {', '.join(map(str, declared.answers))}" if declared.answers else ""
        yield Finding("Answers", "good", f"Its score is the logit of {facts['classifier tokens']}{ids} (false, true).")
    yield Finding("Window", "good", f"It reads {facts['max_length']} tokens.")
    yield _proof(model.proof)


def _files(declared: Declaration) -> Iterator[Finding]:
    """Tell what texts pass through, and what a vLLM server makes of that."""
    if not declared.modular:
        yield Finding("Files", "good", "It has no modules.json: a model of transformers, or a ColBERT of its authors.")
    elif declared.kind == "cross-encoder" and declared.document.pooling is not None:
        said = f"modules.json declares {_route(declared.document)}. vLLM takes such a model for an embedding model."
        yield Finding("Files", "note", said, "Serve what rag-rerank convert makes of it.")
    else:
        same = _route(declared.query) == _route(declared.document)
        said = _route(declared.document) if same else f"{_route(declared.query)} / {_route(declared.document)}"
        yield Finding("Files", "good", f"modules.json declares {said}.")
    prompts = f"prompts {declared.query.prompt!r} and {declared.document.prompt!r}"
    if declared.kind == "bi-encoder":
        ours = [f"similarity {declared.similarity}", f"dimensions {declared.dimensions or 'all'}", prompts]
        asks = declared.similarity != "cosine" or declared.query.prompt or declared.document.prompt
        remedy = "Put the prompts in yourself there (query_prompt=, document_prompt=)." if asks else None
        yield _beside_vllm("Similarity", ours, "the cosine of texts without prompts", remedy)
    if declared.kind == "late-interaction":
        ours = [f"similarity {declared.similarity}", prompts]
        ours += [f"query filled up to {declared.expansion.length}"] if declared.expansion else []
        ours += [f"{len(declared.skipped_words)} words skipped"] if declared.skipped_words else []
        asks = declared.expansion or declared.skipped_words or declared.query.prompt or declared.document.prompt
        remedy = 'late_interaction="vllm" gives the same scores here.' if asks else None
        yield _beside_vllm("Similarity", ours, "MaxSim without any of it", remedy)


def _beside_vllm(title: str, ours: list[str], theirs: str, remedy: str | None) -> Finding:
    said = f"It declares {', '.join(ours)}"
    return (
        Finding(title, "note", f"{said}; vLLM takes {theirs}.", remedy)
        if remedy
        else Finding(title, "good", said + ".")
    )


def _route(route: Route) -> str:
    """Name the modules that a text passes through."""
    pooling = [] if route.pooling is None else [f"Pooling ({' + '.join(route.pooling.modes)})"]
    parts = ["Transformer", *map(_layer, route.token_layers), *pooling, *map(_layer, route.layers)]
    return ", ".join([f"{parts[0]} ({route.task})" if route.task else parts[0], *parts[1:]])


def _layer(layer: Layer) -> str:
    return f"Dense ({layer.activation.rpartition('.')[2]})" if layer.kind == "Dense" else layer.kind


def _scores(declared: Declaration, activation: str) -> Finding:
    named = None if declared.activation is None else declared.activation.rpartition(".")[2]
    if named is None or activation.startswith(named.lower()):
        return Finding("Scores", "good", f"A score is the {activation} of its logit.")
    said = f"A score is the {activation} of its logit, as on vLLM; sentence-transformers has the {named}."
    return Finding("Scores", "note", said, "use_activation=False gives the logit.")


def _prompt(declared: Declaration, template: str) -> str:
    instruction = "" if declared.instruction is None else f", by default with the instruction {declared.instruction!r}"
    if template != "none":
        own = "its own chat template" if declared.document.chat else "a score template"
        return f"Query and document are put into {own}{instruction}."
    return f"Query and document are read as a pair, the query behind {declared.document.prompt!r}."


def _proof(proof: Proof) -> Finding:
    if not proof.differences:
        return Finding("Proof", "note", f"Not looked for (verify=False); it is run {proof.path}.")
    seen = ", ".join(f"{path}: {difference:.1g}" for path, difference in proof.differences.items())
    said = f"It is run {proof.path}; largest difference from plain transformers: {seen}."
    return Finding("Proof", "good", said)
