"""``rag-rerank convert`` and ``rag-rerank template``."""

import json
import shlex
from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from rag_rerank.cli.options import console, progress
from rag_rerank.errors import ConfigError
from rag_rerank.families import FAMILIES, find_family
from rag_rerank.families import family as family_called


def convert(
    model: Annotated[str, typer.Argument(help="Hub id or folder, with safetensors weights.")],
    out: Annotated[str, typer.Argument(help="The folder to make.")],
    token: Annotated[
        list[str] | None, typer.Option(help="The answer, or twice: the false and the true one. Known for known models.")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Score template to put into it. Known for known models.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as it is if none.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
) -> None:
    """Write a causal or modular reranker as a classifier, which vLLM and transformers load without overrides."""
    from rag_rerank.convert import convert as write
    from rag_rerank.template import Template

    family = find_family(model)
    tokens = tuple(token or (family.tokens if family else ()))
    template = template or (family.template if family else None)
    with progress() as (_, move):
        write(
            model,
            out,
            tokens=tokens,
            template=None if template is None else Template.load(template).source,
            dtype=dtype,  # type: ignore[arg-type]  # checked there
            overwrite=overwrite,
            progress=partial(move, "Writing weights"),
        )
    typer.echo(f"vllm serve {out}" + ("" if template is None else f" --chat-template {out}/chat_template.jinja"))


template_app = typer.Typer(no_args_is_help=True, help="Score templates and the families of models that they are for.")


@template_app.command("list")
def list_templates(
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines, one a family, with all that is known.")] = False,
) -> None:
    """Every family that vLLM's score API scores: its models, its template, and where its score comes from."""
    if as_json:
        typer.echo("\n".join(json.dumps(asdict(family)) for family in FAMILIES))
        return
    table = Table("family", "models", "template", "score from", "instruction", show_lines=True)
    for family in FAMILIES:
        answer = f" ({' / '.join(family.tokens)})" if family.tokens else ""
        cells = family.name, "\n".join(family.models), family.template or "", family.method + answer
        table.add_row(*map(escape, (*cells, family.instruction or "")))
    console().print(table)


@template_app.command("serve")
def serve_model(
    model: Annotated[str, typer.Argument(help="Hub id, or a folder that is called as the model is.")],
) -> None:
    """Print the commands that serve a model on vLLM: the right flags, and its template where it needs one."""
    family = find_family(model)
    if family is None:
        typer.echo(
            f"note: {model} is in no family that is known, so no flags and no template are; rag-rerank check URL tells "
            "whether it ranks",
            err=True,
        )
    typer.echo("\n".join([f"vllm serve {shlex.quote(model)}"] if family is None else family.serve(model)))


@template_app.command("show")
def show_template(name: Annotated[str, typer.Argument(help="A family's, a model's or a template's name.")]) -> None:
    """Print a template file, as ``vllm serve --chat-template`` takes it."""
    from rag_rerank.template import Template

    if name not in Template.shipped():
        found = (find_family(name) or family_called(name)).template
        if found is None:
            raise ConfigError(f"the family {name!r} has no template: query and document are encoded as a pair")
        name = found
    typer.echo(Template.load(name).source, nl=False)
