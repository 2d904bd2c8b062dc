"""All commands, put together."""

import typer

from rag_rerank.cli.demo import demo
from rag_rerank.cli.evaluating import calibrate, evaluate
from rag_rerank.cli.examining import check
from rag_rerank.cli.models import convert, template_app
from rag_rerank.cli.scoring import rerank, score

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Rerank documents for RAG, with a local model or a vLLM server.",
)
for command in (score, rerank, check, demo, convert, calibrate):
    app.command()(command)
app.command("eval")(evaluate)
app.add_typer(template_app, name="template")
