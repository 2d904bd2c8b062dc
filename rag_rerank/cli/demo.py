"""``rag-rerank demo``."""

import os
from typing import Annotated

import typer
from rich.console import Console

from rag_rerank.cli.options import (
    BaseURLOption,
    DeviceOption,
    DtypeOption,
    HostOption,
    ModelOption,
    PortOption,
    make_scorer,
)
from rag_rerank.errors import ConfigError


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
    if model is None and not base_url and host is None and port is None:
        model, shown = str(minilm_folder()), "all-MiniLM-L6-v2 (embedded, a bi-encoder)"
    with make_scorer(model, base_url, host, port, device, dtype, logits=False) as scorer:
        run_demo(scorer, Console(), model=shown or "the server's model", limit=queries)
