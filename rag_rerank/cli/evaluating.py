"""``rag-rerank eval`` and ``rag-rerank calibrate``."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typer import Argument, Option

from rag_rerank.cli.options import (
    JSONFileOption,
    ScorerOptions,
    console,
    said_what_is_kept,
    takes_scorer,
    write_json,
)
from rag_rerank.errors import ConfigError
from rag_rerank.inputs import NEUTRAL
from rag_rerank.scorer import Scorer

if TYPE_CHECKING:
    from rag_rerank.evaluation import Collection, Evaluation, Run

_KEPT, _NOT_KEPT = "What was scored is kept: the same command goes on from there.\n", "Nothing was kept.\n"

File = Path | None
Names = list[str] | None


@takes_scorer("model", "base_url", "host", "port", "calibration")
def evaluate(
    folder: Annotated[File, Argument(help="A collection in BEIR's layout; the embedded one if none.")] = None,
    run: Annotated[File, Option(help="A TREC run to rerank, instead of what BM25 finds.")] = None,
    qrels: Annotated[File, Option(help="Judgments (BEIR or TREC), instead of the collection's.")] = None,
    model: Annotated[
        Names, Option(help="Hub id or folder; may be repeated to compare. The embedded one if none.")
    ] = None,
    base_url: Annotated[
        Names, Option(help="A vLLM server to compare; may be repeated. The key is in VLLM_API_KEY.")
    ] = None,
    depth: Annotated[
        list[int] | None, Option(min=1, help="Candidates to rerank; may be repeated. 10, 20, 50, 100 if none.")
    ] = None,
    queries: Annotated[int | None, Option(min=1, help="Only the first so many.")] = None,
    language: Annotated[
        str, Option(help='Of the texts, for BM25: a Snowball stemmer, "none", or "characters" for Chinese or Japanese.')
    ] = "english",
    measures: Annotated[
        str, Option(help="As ir-measures calls them. Verdicts are by the first.")
    ] = "nDCG@10,MRR@10,Recall@10,MAP",
    as_json: JSONFileOption = None,
    trec_run: Annotated[File, Option(help="Write the reranked order to this file, as a TREC run.")] = None,
    html: Annotated[File, Option(help="Write a report with plots to this file.")] = None,
    cache: Annotated[File, Option(help="The folder that keeps scores; ~/.cache/rag_rerank if none.")] = None,
    no_cache: Annotated[bool, Option("--no-cache", help="Score everything anew and keep nothing.")] = False,
    *,
    chosen: ScorerOptions,
) -> None:
    """Measure whether reranking helps, how much, how sure that is, and what depth pays.

    BM25, or your run, finds candidates, and each model reranks them. Scores are kept for each model and its settings:
    an evaluation that was interrupted goes on where it was, and the same one again is instant.

    A run with its qrels, but without a folder and a model, is measured as it is.
    """
    _check_files(as_json, trec_run, html=html)
    try:
        from rag_rerank import evaluation as package
        from rag_rerank.cli.evaluation_tables import show
    except ModuleNotFoundError as error:
        raise ConfigError(f"eval needs {error.name}: pip install 'rag-rerank[eval]'") from error
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    depths = tuple(depth or package.DEFAULT_DEPTHS)
    collection, candidates = _collection(folder, run, qrels, max(depths), bare=not (model or base_url))
    where: Path | bool = not no_cache if cache is None or no_cache else cache
    with ExitStack() as stack:
        stack.enter_context(said_what_is_kept(lambda: _KEPT if where else _NOT_KEPT))
        scorers: dict[str, Scorer] = {}
        if collection.documents:
            for name, scorer in _scorers(model, base_url, chosen):
                scorers[_distinct(name, scorers)] = stack.enter_context(scorer)
        evaluation = package.evaluate(
            collection,
            scorers,
            run=candidates,
            first_stage=None if run is None else run.name,
            depths=depths,
            measures=measures.replace(",", " ").split(),
            limit=queries,
            language=language,
            cache=where,
            progress=stack.enter_context(_bar()),
        )
    show(evaluation, console())
    _write(evaluation, as_json, trec_run, html)


@takes_scorer("calibration")
def calibrate(
    data: Annotated[
        Path, Argument(help="A collection in BEIR's layout, or a .jsonl file of pairs: query, document, relevant.")
    ],
    chosen: ScorerOptions,
    out: Annotated[Path, Option(help="The file to write.")] = Path("relevance.json"),
    run: Annotated[File, Option(help="A TREC run with candidates, instead of what BM25 finds.")] = None,
    qrels: Annotated[File, Option(help="Judgments (BEIR or TREC), instead of the collection's.")] = None,
    depth: Annotated[int, Option(min=1, help="Candidates a query. What has no judgment counts as irrelevant.")] = 50,
    queries: Annotated[int | None, Option(min=1, help="Only the first so many.")] = None,
    as_json: JSONFileOption = None,
    cache: Annotated[File, Option(help="The folder that keeps scores; ~/.cache/rag_rerank if none.")] = None,
    no_cache: Annotated[bool, Option("--no-cache", help="Score everything anew and keep nothing.")] = False,
) -> None:
    """Fit what turns a model's scores into probabilities of relevance, and say which threshold does what.

    Use the file with Calibrated(scorer, FILE), calibration=FILE in both integrations, or --calibration FILE. Scores are
    kept as by eval: what was interrupted goes on where it was.
    """
    _check_files(out, as_json)
    try:
        from rag_rerank import evaluation as package
        from rag_rerank.cli.evaluation_tables import show_calibration
        from rag_rerank.evaluation import calibrating
    except ModuleNotFoundError as error:
        raise ConfigError(f"calibrate needs {error.name}: pip install 'rag-rerank[eval]'") from error
    candidates: Run | None
    if data.is_file():
        collection, candidates = calibrating.read_labelled(data)
        depth = max(map(len, collection.judgments.values()), default=1)
    else:
        collection, candidates = _collection(data, run, qrels, depth, bare=False)
    where: Path | bool = not no_cache if cache is None or no_cache else cache
    kept = said_what_is_kept(lambda: _KEPT if where else _NOT_KEPT)
    with kept, _bar() as progress, chosen.make() as scorer:
        evaluation = package.evaluate(
            collection,
            scorer,
            run=candidates,
            first_stage=None if run is None else run.name,
            depths=[depth],
            limit=queries,
            cache=where,
            progress=progress,
        )
        found = calibrating.calibrate(evaluation, scorer)
    found.calibration.save(out)
    show_calibration(found, str(out), console())
    typer.echo(f"wrote {out}", err=True)
    write_json(as_json, found)


def _collection(folder: File, run: File, qrels: File, deepest: int, *, bare: bool) -> "tuple[Collection, Run | None]":
    """Read the collection and the run; `bare` if nothing is reranked, so that no text is needed."""
    from rag_rerank.embedded import collection_folder
    from rag_rerank.evaluation import Collection, read_judgments, read_run

    candidates = None if run is None else read_run(run)
    if folder is None and run is not None and qrels is not None:
        if not bare:
            raise ConfigError("to rerank the run, name the folder that has the texts: rag-rerank eval FOLDER --run ...")
        judgments = read_judgments(qrels)
        return Collection({}, dict.fromkeys(judgments, ""), judgments, run.name), candidates
    if folder is None and qrels is not None:
        raise ConfigError("judgments alone are not enough: name a collection's FOLDER, or a --run")
    found = None if candidates is None else {each for by in candidates.values() for each in islice(by, deepest)}
    return Collection.load(folder or collection_folder(), qrels=qrels, documents=found), candidates


def _scorers(models: Names, urls: Names, options: ScorerOptions) -> Iterator[tuple[str, Scorer]]:
    """Yield (name, scorer) of each model and each server; a server that does not answer fails now."""
    local, remote = options.split() if models and urls else (options, options)
    if not (models or urls):
        yield "all-MiniLM-L6-v2", replace(local, model="embedded").make()
    for model in models or ():
        yield Path(model).resolve().name if Path(model).is_dir() else model, replace(local, model=model).make()
    for url in urls or ():
        server = replace(remote, base_url=[url]).make()
        server.score(NEUTRAL, NEUTRAL)
        yield f"{server.model_name} on {urlsplit(url).netloc.rpartition('@')[2]}", server


def _distinct(name: str, names: "dict[str, Scorer]") -> str:
    """Add a number to `name` if there is one like it."""
    number = sum(other == name or other.startswith(f"{name} (") for other in names)
    return f"{name} ({number + 1})" if number else name


@contextmanager
def _bar() -> "Iterator[Callable[[str, int, int], None]]":
    """Show a progress bar on stderr; yield what moves it."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    tasks: dict[str, TaskID] = {}
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:

        def report(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = bar.add_task(task, total=total)
            bar.update(tasks[task], completed=done)

        yield report


def _check_files(*files: File, html: File = None) -> None:
    """Refuse, before hours of scoring, a file that could not be written after them, with a ConfigError."""
    for path in (*files, html):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"{path} can't be written: {'it is a' if path.is_dir() else 'there is no such'} folder")
    if html is not None and find_spec("matplotlib") is None:
        raise ConfigError("the report's plots need matplotlib: pip install 'rag-rerank[eval]'")


def _write(evaluation: "Evaluation", as_json: File, trec_run: File, html: File) -> None:
    """Write the files; a run for each of several rerankers, with its name in the file's."""
    from rag_rerank.evaluation import write_run

    write_json(as_json, evaluation)
    runs = []
    if trec_run is not None:
        for system in evaluation.systems:
            name = re.sub(r"[^\w.-]", "-", system.name)
            several = len(evaluation.systems) > 1
            runs.append(trec_run.with_name(f"{trec_run.stem}.{name}{trec_run.suffix}") if several else trec_run)
            write_run(runs[-1], evaluation.run(system), tag=f"{system.name}@{evaluation.depths[-1]}")
    if html is not None:
        from rag_rerank.evaluation.report import render

        html.write_text(render(evaluation), encoding="utf-8")
    for path in filter(None, (as_json, *runs, html)):
        typer.echo(f"wrote {path}", err=True)
