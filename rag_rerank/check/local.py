"""Examines a model that runs in this process: what its files declare, and the proof that it is run rightly."""

from collections.abc import Iterator

from rag_rerank import LocalScorer
from rag_rerank.check.finding import Finding, failure
from rag_rerank.errors import RerankError
from rag_rerank.local.checkpoint.declaration import Declaration, Layer, Route


def check_local(scorer: LocalScorer) -> Iterator[Finding]:
    """Load the model of a scorer, with its settings, and tell what it is.

    Yields:
        What was found. Nothing is raised for what is wrong with a model.
    """
    try:
        declared, facts, proof = scorer.declaration(), scorer.identity().facts, scorer.proof()
    except RerankError as error:
        yield failure("Model", error)
        return
    what = f"{scorer.model_name} is a {declared.kind}, run as {facts['score type']}"
    yield Finding("Model", "good", f"{what} in {facts['dtype']} on {facts['device']}.")
    yield _files(declared)
    yield _scores(declared, facts["activation"]) if declared.kind == "cross-encoder" else _similarity(declared)
    if declared.kind == "cross-encoder":
        yield Finding("Prompt", "good", _prompt(declared, facts["template"]))
    if "classifier tokens" in facts:
        ids = f", ids {', '.join(map(str, declared.answers))}" if declared.answers else ""
        yield Finding("Answers", "good", f"Its score is the logit of {facts['classifier tokens']}{ids} (false, true).")
    yield Finding("Window", "good", f"It reads {facts['max_length']} tokens.")
    seen = ", ".join(f"{path}: {difference:.1g}" for path, difference in proof.differences.items())
    shown = f"largest difference from plain transformers: {seen}" if seen else "not proven (verify=False)"
    yield Finding("Proof", "good" if seen else "note", f"It is run {proof.path}; {shown}.")


def _files(declared: Declaration) -> Finding:
    if not declared.modular:
        return Finding("Files", "good", "It has no modules.json: a model of transformers, or a ColBERT of its authors.")
    said = f"modules.json declares {' / '.join(dict.fromkeys(map(_route, (declared.query, declared.document))))}."
    if declared.kind == "cross-encoder" and declared.document.pooling is not None:
        said += " vLLM takes such a model for an embedding model."
        return Finding("Files", "note", said, "Serve what rag-rerank convert makes of it.")
    return Finding("Files", "good", said)


def _route(route: Route) -> str:
    """Name the modules that a text passes through."""

    def name(layer: Layer) -> str:
        return f"Dense ({layer.activation.rpartition('.')[2]})" if layer.kind == "Dense" else layer.kind

    pooling = [] if route.pooling is None else [f"Pooling ({' + '.join(route.pooling.modes)})"]
    return ", ".join(
        [f"Transformer ({route.task})", *map(name, route.token_layers), *pooling, *map(name, route.layers)]
    )


def _similarity(declared: Declaration) -> Finding:
    """Tell what makes a score of two embeddings, and what of that vLLM leaves out."""
    theirs = "cosine" if declared.kind == "bi-encoder" else "maxsim"
    said = declared.similarity + "".join(
        f", {what} {value!r}"
        for what, value, usual in (
            ("query prompt", declared.query.prompt, ""),
            ("document prompt", declared.document.prompt, ""),
            ("dimensions", declared.dimensions, None),
            ("queries filled up to", declared.expansion and declared.expansion.length, None),
            ("skipped words", len(declared.skipped_words), 0),
        )
        if value != usual
    )
    if said == theirs:
        return Finding("Scores", "good", f"It declares {said}, as vLLM has it.")
    remedy = "Put prompts in yourself there (query_prompt=, document_prompt=)."
    if declared.kind == "late-interaction":
        remedy = 'late_interaction="vllm" gives the same scores here.'
    return Finding("Scores", "note", f"It declares {said}; vLLM takes {theirs} alone.", remedy)


def _scores(declared: Declaration, activation: str) -> Finding:
    named = "" if declared.activation is None else declared.activation.rpartition(".")[2]
    if activation.startswith(named.lower()):
        return Finding("Scores", "good", f"A score is the {activation} of its logit.")
    said = f"A score is the {activation} of its logit, as on vLLM; sentence-transformers has the {named}."
    return Finding("Scores", "note", said, "use_activation=False gives the logit.")


def _prompt(declared: Declaration, template: str) -> str:
    if template == "none":
        return f"Query and document are read as a pair, the query behind {declared.document.prompt!r}."
    own = "its own chat template" if declared.document.chat else "a score template"
    by_default = "" if declared.instruction is None else f", by default with the instruction {declared.instruction!r}"
    return f"Query and document are put into {own}{by_default}."
