"""All commands, put together."""

from typing import Annotated

import typer
from typer import Option

from rag_rerank import __version__
from rag_rerank.cli.demo import demo
from rag_rerank.cli.evaluating import calibrate, evaluate
from rag_rerank.cli.examining import check
from rag_rerank.cli.models import convert, template_app
from rag_rerank.cli.scoring import rerank, score

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
for command in (score, rerank, check, demo, convert, calibrate):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(template_app, name="template")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rag-rerank {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
    traceback: Annotated[bool, Option("--traceback", help="Show where in the code an error comes from.")] = False,
) -> None:
    """Rerank documents for RAG, with a local model or a vLLM server."""
