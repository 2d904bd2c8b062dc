"""Reports: one HTML file that needs no network and shows what reranking did, or what calibrated scores mean.

The templates beside this module are the pages; everything in them is escaped by Jinja, save the plots' SVG.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from rag_rerank import __version__
from rag_rerank.evaluation import plots
from rag_rerank.evaluation.measures import CONFIDENCE, RESAMPLES, mean
from rag_rerank.evaluation.results import GAIN, Evaluation
from rag_rerank.evaluation.scoring import TIMED_QUERIES

if TYPE_CHECKING:
    from rag_rerank.evaluation.calibrating import Calibrating


def render(found: "Evaluation | Calibrating") -> str:
    """Render the report as HTML; importing this module raises a ConfigError if matplotlib is not installed."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"value": _value, "signed": _signed, "milliseconds": _milliseconds, "count": _count}
    page = environment.get_template(f"{'report' if isinstance(found, Evaluation) else 'calibration'}.html.jinja")
    return page.render(
        found=found,
        plots=plots,
        mean=mean,
        gain_of_ndcg=GAIN,
        timed_queries=TIMED_QUERIES,
        resamples=RESAMPLES,
        confidence=round(100 * CONFIDENCE),
        version=__version__,
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _value(value: float | None) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.4f}"


def _signed(value: float, digits: int = 4) -> str:
    """With a sign that is as wide as a digit."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _milliseconds(seconds: float) -> str:
    return f"{number:.1f}" if (number := 1000 * seconds) < 10 else _count(number)


def _count(number: float | Mapping[Any, Any]) -> str:
    return f"{len(number) if isinstance(number, Mapping) else round(number):,}"
