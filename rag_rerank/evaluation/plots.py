"""The report's plots: SVG to stand within HTML, in the colours of the page around it, its text as text.

Drawn small, so that letters are legible on a telephone, and scaled to the width that there is. Which line is which is
said by the page: `mark` gives the colour and marker of each reranker.
"""

import html
import io
import re
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from rag_rerank.evaluation.measures import mean
from rag_rerank.evaluation.results import Evaluation

if TYPE_CHECKING:
    from rag_rerank.evaluation.calibrating import Calibrating

# Colours that stand for the page's own, CSS variables, until the drawing is done.
_ROLES = {"ink": "#010101", "muted": "#020202", "line": "#030303", "better": "#040404", "worse": "#050505"}
_SERIES = tuple(f"#0606{number:02x}" for number in range(1, 7))
_MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "*": "★"}  # matplotlib's, and as text
_LINES = list(zip(_SERIES, _MARKERS, strict=True))
_VARIABLES = {colour: f"var(--{role})" for role, colour in _ROLES.items()}
_VARIABLES |= {colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, 1)}


def quality_by_depth(evaluation: Evaluation) -> str:
    """Plot the first measure at every depth, with the interval around each gain, between first stage and ceiling."""

    def draw(axes: Axes) -> None:
        depths, before = evaluation.depths, mean(evaluation.before[evaluation.measure])
        axes.axhline(before, color=_ROLES["ink"], linestyle=":", linewidth=1.4)
        ceiling = [mean(evaluation.ceilings[depth][evaluation.measure]) for depth in depths]
        axes.plot(depths, ceiling, color=_ROLES["muted"], linestyle="--", linewidth=1.4)
        for system, (colour, marker) in zip(evaluation.systems, cycle(_LINES), strict=False):
            gains = [level.gains[evaluation.measure] for level in system.levels]
            low, high = [before + gain.low for gain in gains], [before + gain.high for gain in gains]
            axes.fill_between(depths, low, high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(depths, [before + gain.gain for gain in gains], color=colour, marker=marker)
        axes.set_xscale("log")
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
        axes.set(xlabel="candidates reranked", ylabel=evaluation.measure)

    return _svg("depth", f"{evaluation.measure} against depth", draw)


def quality_by_latency(evaluation: Evaluation) -> str | None:
    """Plot the first measure against a query's median time, a point for each depth; None where no time is known."""
    if not any(level.latency for system in evaluation.systems for level in system.levels):
        return None

    def draw(axes: Axes) -> None:
        axes.axhline(mean(evaluation.before[evaluation.measure]), color=_ROLES["ink"], linestyle=":", linewidth=1.4)
        for system, (colour, marker) in zip(evaluation.systems, cycle(_LINES), strict=False):
            points = [
                (1000 * level.latency.p50, level.mean(evaluation.measure), str(level.depth))
                for level in system.levels
                if level.latency
            ]
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=colour, marker=marker)
            for x, y, depth in points:
                axes.annotate(depth, (x, y), (-10, 5), textcoords="offset points", color=colour, fontsize=8.5)
        axes.margins(x=0.1, y=0.15)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
        axes.minorticks_off()
        axes.set(xlabel="median milliseconds a query, to rerank", ylabel=evaluation.measure)

    return _svg("latency", f"{evaluation.measure} against latency", draw)


def gains(evaluation: Evaluation, number: int) -> str:
    """Plot what each query gained, from the one that gained most to the one that lost most."""
    measure = evaluation.measure
    values = sorted(evaluation.query_gains(evaluation.systems[number]).values(), reverse=True)

    def draw(axes: Axes) -> None:
        x, y = range(len(values) + 1), [*values, values[-1]]
        for colour, part in (("better", [max(0.0, value) for value in y]), ("worse", [min(0.0, value) for value in y])):
            axes.fill_between(x, part, step="post", color=_ROLES[colour], linewidth=0)
        axes.axhline(0, color=_ROLES["ink"], linewidth=0.8)
        axes.set(xlim=(0, len(values)), xlabel="queries, by what they gained", ylabel=f"change of {measure}")

    return _svg(f"gains{number}", f"change of {measure} of every query", draw)


def reliability(found: "Calibrating") -> str:
    """Plot the share of relevant pairs against the predicted one, before and after, with the latter's intervals."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=_ROLES["muted"], linestyle="--", linewidth=1.4)
        for (colour, marker), quality in zip(_LINES, (found.before, found.after), strict=False):
            x = [each.predicted for each in quality.bins]
            axes.plot(x, [each.observed for each in quality.bins], color=colour, marker=marker)
        low, high = [each.low for each in found.after.bins], [each.high for each in found.after.bins]
        axes.vlines(x, low, high, color=_SERIES[1], alpha=0.5)
        axes.set(xlabel="predicted probability", ylabel="share that is relevant")

    return _svg("reliability", "predicted against relevant shares", draw)


def mark(number: int) -> str:
    """Give the line and marker of the reranker at that position, as HTML."""
    colour, marker = _LINES[number % len(_LINES)]
    return f'<span style="color: {_VARIABLES[colour]}">\N{EN DASH}{_MARKERS[marker]}\N{EN DASH}</span>'


def _svg(name: str, label: str, draw: Callable[[Axes], None]) -> str:
    """Draw an SVG with `name` before all ids, for they count in the whole page, and a label for who can't see it."""
    with mpl.rc_context({"svg.hashsalt": name}, fname=Path(__file__).with_name("report.mplstyle")):
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # Strip it of what a page has no use for, and give it the page's colours and font.
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :].rstrip(), flags=re.DOTALL)
    head = rf'<svg class="plot" role="img" aria-label="{html.escape(label)}" \1>'
    svg = re.sub(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', head, svg, count=1)
    svg = re.sub(r' id="([^"]*)"', rf' id="{name}-\1"', svg)
    svg = re.sub(r'url\(#|xlink:href="#', lambda start: f"{start[0].removeprefix('xlink:')}{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*(?:; )?", "", svg)
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: _VARIABLES.get(colour[0], "currentColor"), svg)
