"""Reports: what reranking did, or what calibrated scores mean, as an HTML page that needs no network, or as text.

The templates beside this module are the pages and texts. What is in a page is escaped by Jinja, save the plots' SVG.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from rag_rerank import __version__
from rag_rerank.evaluation.measures import CONFIDENCE, RESAMPLES, mean
from rag_rerank.evaluation.results import Evaluation
from rag_rerank.evaluation.scoring import TIMED_QUERIES

if TYPE_CHECKING:
    from rag_rerank.evaluation.calibrating import Calibrating


def render(found: "Evaluation | Calibrating", form: Literal["html", "txt"] = "html", **more: Any) -> str:
    """Render the report; a ConfigError where it is HTML and matplotlib is not installed.

    `more` is for the templates.
    """
    if form == "html":
        from rag_rerank.evaluation import plots  # noqa: PLC0415 - matplotlib, which texts do without

        more["plots"] = plots
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        keep_trailing_newline=form == "txt",
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"value": _value, "signed": _signed, "milliseconds": _milliseconds, "count": _count}
    name = "report" if isinstance(found, Evaluation) else "calibration"
    return environment.get_template(f"{name}.{form}.jinja").render(
        found=found,
        mean=mean,
        timed_queries=TIMED_QUERIES,
        resamples=RESAMPLES,
        confidence=round(100 * CONFIDENCE),
        version=__version__,
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        **more,
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
