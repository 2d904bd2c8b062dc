"""The report: one HTML file that needs no network and shows what reranking did, where it hurt with the texts.

`report.html.jinja` beside this module is the page; everything in it is escaped by Jinja, save the plots' SVG.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2

from rag_rerank import __version__
from rag_rerank.evaluation import plots
from rag_rerank.evaluation.measures import CONFIDENCE, RESAMPLES, mean
from rag_rerank.evaluation.results import GAIN, Evaluation, System
from rag_rerank.evaluation.scoring import TIMED_QUERIES

if TYPE_CHECKING:
    from rag_rerank.evaluation.calibrating import Calibrating

_TOP = 3
_LONGEST = 1500  # letters of a document


class Document(NamedTuple):
    """A document of a case: `before` and `after` are its ranks, from 1; None where the first stage did not find it."""

    name: str
    text: str
    before: int | None
    after: int | None
    grade: int | None
    score: float | None


class Case(NamedTuple):
    """A query, the first measure before and after, and the first few documents; `more` relevant ones are left out."""

    name: str
    text: str
    before: float
    after: float
    relevant: Sequence[Document]
    top_before: Sequence[Document]
    top_after: Sequence[Document]
    more: int


def render(found: "Evaluation | Calibrating") -> str:
    """Render the report as HTML; importing this module raises a ConfigError if matplotlib is not installed."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"value": _value, "signed": _signed, "milliseconds": _milliseconds, "count": _count}
    return environment.get_template(
        "report.html.jinja" if isinstance(found, Evaluation) else "calibration.html.jinja"
    ).render(
        found=found,
        plots=plots,
        worst_and_best=worst_and_best,
        mean=mean,
        gain_of_ndcg=GAIN,
        timed_queries=TIMED_QUERIES,
        resamples=RESAMPLES,
        confidence=round(100 * CONFIDENCE),
        version=__version__,
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def worst_and_best(evaluation: Evaluation, system: System, most: int = 20) -> tuple[list[Case], list[Case]]:
    """Choose up to `most` queries that lost most, and that gained most, at the deepest depth by the first measure."""
    gains = evaluation.query_gains(system)
    ordered = sorted(gains, key=gains.__getitem__)
    worst = [_case(evaluation, system, query) for query in ordered[:most] if gains[query] < 0]
    best = [_case(evaluation, system, query) for query in ordered[::-1][:most] if gains[query] > 0]
    return worst, best


def _case(evaluation: Evaluation, system: System, query: str) -> Case:
    collection, measure = evaluation.collection, evaluation.measure
    candidates, ranking = evaluation.candidates[query], evaluation.ranking(system, query)
    before = {name: rank for rank, name in enumerate(candidates, 1)}
    after = {name: rank for rank, name in enumerate(ranking, 1)}
    scores = dict(zip(candidates, system.scores[query], strict=False))
    grades = collection.judgments[query]

    def document(name: str) -> Document:
        text = collection.documents.get(name, "")
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
        return Document(name, text, before.get(name), after.get(name), grades.get(name), scores.get(name))

    relevant = sorted((name for name in grades if grades[name] > 0), key=lambda name: after.get(name, len(after) + 1))
    right, old, new = ([document(name) for name in names[:_TOP]] for names in (relevant, candidates, ranking))
    values = evaluation.before[measure][query], system.deepest.values[measure][query]
    return Case(query, collection.queries[query], *values, right, old, new, max(0, len(relevant) - _TOP))


def _value(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.4f}"


def _signed(value: float, digits: int = 4) -> str:
    """With a sign that is as wide as a digit."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _milliseconds(seconds: float) -> str:
    return f"{number:.1f}" if (number := 1000 * seconds) < 10 else _count(number)


def _count(number: float | Mapping[Any, Any]) -> str:
    return f"{len(number) if isinstance(number, Mapping) else round(number):,}"
