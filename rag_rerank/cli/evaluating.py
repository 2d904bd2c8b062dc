"""``rag-rerank eval`` and ``rag-rerank calibrate``."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer
from typer import Argument, Option

from rag_rerank.cli.options import JSONFileOption, ScorerOptions, progress, show, takes_scorer, write_json
from rag_rerank.errors import ConfigError
from rag_rerank.files.formats import check_targets
from rag_rerank.inputs import NEUTRAL
from rag_rerank.scorer import Scorer

if TYPE_CHECKING:
    from rag_rerank.evaluation import Collection, Evaluation, Run
    from rag_rerank.evaluation.calibrating import Calibrating

File = Path | None
Names = list[str] | None
RunOption = Annotated[File, Option(help="A TREC run to rerank, instead of what BM25 finds.")]
QrelsOption = Annotated[File, Option(help="Judgments (BEIR or TREC), instead of the collection's.")]
QueriesOption = Annotated[int | None, Option(min=1, help="Only the first so many.")]
HtmlOption = Annotated[File, Option(help="Write a report with plots to this file.")]
CacheOption = Annotated[File, Option(help="The folder that keeps scores; ~/.cache/rag_rerank if none.")]


@takes_scorer("model", "base_url", "host", "port", "calibration")
def evaluate(
    folder: Annotated[File, Argument(help="A collection in BEIR's layout; the embedded one if none.")] = None,
    run: RunOption = None,
    qrels: QrelsOption = None,
    model: Annotated[Names, Option(help="Hub id or folder; may be repeated. The embedded one if none.")] = None,
    base_url: Annotated[Names, Option(help="A vLLM server; may be repeated. The key is in VLLM_API_KEY.")] = None,
    calibration: Annotated[Names, Option(help="A calibration for each model, then for each server.")] = None,
    depth: Annotated[
        list[int] | None, Option(min=1, help="Candidates; may be repeated. 10, 20, 50, 100 if none.")
    ] = None,
    policy: Annotated[Names, Option(help='Such as "min_precision=0.8 top_n=10"; may be repeated.')] = None,
    queries: QueriesOption = None,
    language: Annotated[str, Option(help='For BM25: a Snowball stemmer, "none", or "characters".')] = "english",
    measures: Annotated[str, Option(help="As in ir-measures; verdicts by the first.")] = "nDCG@10,MRR@10,Recall@10,MAP",
    as_json: JSONFileOption = None,
    trec_run: Annotated[File, Option(help="Write the reranked order to this file, as a TREC run.")] = None,
    html: HtmlOption = None,
    cache: CacheOption = None,
    *,
    chosen: ScorerOptions,
) -> None:
    """Measure whether reranking helps, how much, how sure that is, what depth pays, and what a prompt gets to read.

    BM25, or your run, finds candidates, and each model reranks them. Scores are kept for each model and its settings:
    an evaluation that was interrupted goes on where it was, and the same one again is instant.
    """
    _check("eval", as_json, trec_run, html=html)
    from rag_rerank import evaluation as package

    depths = tuple(depth or package.DEFAULT_DEPTHS)
    collection, candidates = _collection(folder, run, qrels, max(depths))
    with _scoring(cache, run, queries) as (stack, measured):
        scorers: dict[str, Scorer] = {}
        for name, scorer in _scorers(model, base_url, list(map(Path, calibration or ())), chosen):
            distinct = f"{name} ({len(scorers) + 1})" if name in scorers else name
            scorers[distinct] = stack.enter_context(scorer)
        names = measures.replace(",", " ").split()
        options = {"run": candidates, "depths": depths, "measures": names, "policies": policy, "language": language}
        evaluation = measured(collection, scorers, **options)
    show(evaluation)
    _write(evaluation, as_json, html)
    if trec_run is not None:
        for system in evaluation.systems:
            name = re.sub(r"[^\w.-]", "-", system.name)
            several = len(evaluation.systems) > 1
            path = trec_run.with_name(f"{trec_run.stem}.{name}{trec_run.suffix}") if several else trec_run
            package.write_run(path, evaluation.run(system), tag=f"{system.name}@{evaluation.depths[-1]}")
            typer.echo(f"wrote {path}", err=True)


@takes_scorer("calibration")
def calibrate(
    data: Annotated[Path, Argument(help="A collection in BEIR's layout, or .jsonl of query, document, relevant.")],
    chosen: ScorerOptions,
    out: Annotated[Path, Option(help="The file to write.")] = Path("relevance.json"),
    run: RunOption = None,
    qrels: QrelsOption = None,
    depth: Annotated[int, Option(min=1, help="Candidates a query. What has no judgment counts as irrelevant.")] = 50,
    queries: QueriesOption = None,
    as_json: JSONFileOption = None,
    html: HtmlOption = None,
    cache: CacheOption = None,
) -> None:
    """Fit what turns a model's scores into probabilities of relevance, and say which threshold does what.

    Use the file with Calibrated(scorer, FILE), calibration=FILE in both integrations, or --calibration FILE. Scores are
    kept as by eval: what was interrupted goes on where it was.
    """
    _check("calibrate", out, as_json, html=html)
    from rag_rerank.evaluation import read_labelled
    from rag_rerank.evaluation.calibrating import calibrate as fit

    candidates: Run | None
    if data.is_file():
        collection, candidates = read_labelled(data)
        depth = max(map(len, collection.judgments.values()), default=1)
    else:
        collection, candidates = _collection(data, run, qrels, depth)
    with _scoring(cache, run, queries) as (stack, measured):
        scorer = stack.enter_context(chosen.make())
        found = fit(measured(collection, scorer, run=candidates, depths=[depth]), scorer)
    found.calibration.save(out)
    show(found, str(out))
    typer.echo(f"wrote {out}", err=True)
    _write(found, as_json, html)


def _check(command: str, *files: File, html: File) -> None:
    """Refuse, before hours of scoring, files that could not be written after them, and what is not installed."""
    check_targets(*files, html)
    for name in ("bm25s", "Stemmer", "ir_measures", "sklearn", *(["matplotlib"] if html else [])):
        if find_spec(name) is None:
            raise ConfigError(f"{command} needs {name}: pip install 'rag-rerank[eval]'")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def _scoring(cache: File, run: File, queries: int | None) -> Iterator[tuple[ExitStack, "Callable[..., Evaluation]"]]:
    """Yield what closes scorers, and what evaluates with a progress bar on stderr; say what is kept where it ends."""
    from rag_rerank.evaluation import evaluate

    kept = "What was scored is kept: the same command goes on from there."
    first_stage = None if run is None else run.name
    with progress(lambda: kept) as (_, move), ExitStack() as stack:
        yield stack, partial(evaluate, first_stage=first_stage, limit=queries, cache=cache or True, progress=move)


def _collection(folder: File, run: File, qrels: File, deepest: int) -> "tuple[Collection, Run | None]":
    """Read the collection and the run."""
    from rag_rerank.embedded import collection_folder
    from rag_rerank.evaluation import Collection, read_run

    candidates = None if run is None else read_run(run)
    if folder is None and qrels is not None:
        raise ConfigError("judgments alone are not enough: name the collection's FOLDER, which has the texts")
    found = None if candidates is None else {each for by in candidates.values() for each in islice(by, deepest)}
    return Collection.load(folder or collection_folder(), qrels=qrels, documents=found), candidates


def _scorers(
    models: Names, urls: Names, calibrations: Sequence[Path], options: ScorerOptions
) -> Iterator[tuple[str, Scorer]]:
    """Yield (name, scorer) of each model and each server; a server that does not answer fails now."""
    asked = [
        (Path(model).resolve().name if Path(model).is_dir() else model, replace(options, model=model))
        for model in models or ()
    ]
    if not (models or urls):
        asked = [("all-MiniLM-L6-v2", replace(options, model="embedded"))]
    asked += [("", replace(options, base_url=[url])) for url in urls or ()]
    if calibrations and len(calibrations) != len(asked):
        raise ConfigError(f"{len(calibrations)} --calibration for {len(asked)} models and servers: one each, in order")
    for (name, chosen), calibration in zip_longest(asked, calibrations):
        scorer = replace(chosen, calibration=calibration).make(beside_others=bool(models and urls))
        if chosen.base_url:
            scorer.score(NEUTRAL, NEUTRAL)
        host = urlsplit((chosen.base_url or [""])[0]).netloc.rpartition("@")[2]
        yield name or f"{scorer.model_name} on {host}", scorer


def _write(figures: "Evaluation | Calibrating", as_json: File, html: File) -> None:
    """Write all figures and the report, where there are files for them."""
    write_json(as_json, figures)
    if html is not None:
        from rag_rerank.evaluation.report import render

        html.write_text(render(figures), encoding="utf-8", errors="xmlcharrefreplace")  # halves of characters
    for path in filter(None, (as_json, html)):
        typer.echo(f"wrote {path}", err=True)
