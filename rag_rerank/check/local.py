"""Examines a model that runs in this process: what its files declare, and the proof that it is run rightly."""

from collections.abc import Iterator

from rag_rerank import LocalScorer
from rag_rerank.check.finding import Finding, failure, listwise
from rag_rerank.errors import RerankError
from rag_rerank.local.checkpoint.declaration import Declaration, Layer, Route


def check_local(scorer: LocalScorer) -> Iterator[Finding]:
    """Load the model of a scorer, with its settings, and yield what was found; nothing is raised for what is wrong."""
    try:
        declared, facts, proof = scorer.declaration(), scorer.identity().facts, scorer.proof()
    except RerankError as error:
        yield failure("Model", error)
        return
    what = f"{scorer.model_name} is a {declared.kind}, run as {facts['score type']}"
    yield Finding("Model", "good", f"{what} in {facts['dtype']} on {facts['device']}.")
    yield _files(declared)
    if scorer.listwise:
        try:
            yield listwise(scorer.score)
        except RerankError as error:
            yield failure("Batches", error)
    elif declared.kind == "cross-encoder":
        yield _scores(declared, facts["activation"])
        made = "read as a pair" if facts["template"] == "none" else "put into a score template"
        own = {"prompt": declared.document.prompt or None, "instruction": declared.instruction}
        said = "".join(f", by default with the {name} {text!r}" for name, text in own.items() if text is not None)
        yield Finding("Prompt", "good", f"Query and document are {made}{said}.")
    else:
        yield _similarity(declared)
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
    said = f"modules.json declares {' / '.join(dict.fromkeys(map(_modules, (declared.query, declared.document))))}."
    if declared.kind == "cross-encoder" and declared.document.pooling is not None:
        said += " vLLM takes such a model for an embedding model."
        return Finding("Files", "note", said, "Serve what rag-rerank convert makes of it.")
    return Finding("Files", "good", said)


def _modules(route: Route) -> str:
    def name(layer: Layer) -> str:
        return f"Dense ({layer.activation.rpartition('.')[2]})" if layer.kind == "Dense" else layer.kind

    pooling = [] if route.pooling is None else [f"Pooling ({' + '.join(route.pooling.modes)})"]
    return ", ".join(
        [f"Transformer ({route.task})", *map(name, route.token_layers), *pooling, *map(name, route.layers)]
    )


def _scores(declared: Declaration, activation: str) -> Finding:
    named = (declared.activation or "").rpartition(".")[2]
    said = f"A score is the {activation} of its logit"
    if activation.startswith(named.lower()):
        return Finding("Scores", "good", said + ".")
    said += f", as on vLLM; sentence-transformers has the {named}."
    return Finding("Scores", "note", said, "use_activation=False gives the logit.")


def _similarity(declared: Declaration) -> Finding:
    """Tell what makes a score of two embeddings, and what of that vLLM leaves out."""
    late = declared.kind == "late-interaction"
    more = {
        "texts as": declared.query.chat and "messages",
        "query prompt": declared.query.prompt,
        "document prompt": declared.document.prompt,
        "dimensions": declared.dimensions,
        "queries filled up to": declared.expansion and declared.expansion.length,
        "skipped words": len(declared.skipped_words),
    }
    said = ", ".join([declared.similarity, *(f"{name} {value!r}" for name, value in more.items() if value)])
    theirs = "maxsim" if late else "cosine"
    if said == theirs:
        return Finding("Scores", "good", f"It declares {said}, as vLLM has it.")
    remedy = "Put prompts in yourself there: query_prompt=, document_prompt=."
    remedy = 'late_interaction="vllm" gives its scores here.' if late else remedy
    return Finding("Scores", "note", f"It declares {said}; vLLM takes {theirs} alone.", remedy)
