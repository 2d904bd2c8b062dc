"""What came out: a table for each shape and load, all of it as JSON, and a picture."""

import json
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table


@dataclass
class Row:
    """One contestant under one load.

    Attributes:
        name: The contestant.
        version: Of its library.
        dtype: What it computes in.
        error: Why there are no figures.
        cold_seconds: From the start of its process to the score of one pair.
        seconds: For each round's call.
        ratios: The reference's seconds by its own, in the same round.
        peak_mb: Most memory so far.
        rate: GFLOP/s, counted without padding.
        roofline: Share of the best rate at which the machine multiplies matrices in this number format.
        tau: Kendall's, to the reference's order, mean over all queries.
        difference: The largest between a score and the reference's.
        others: How many processors were busy with something else during each call.
    """

    name: str
    version: str = ""
    dtype: str = ""
    error: str | None = None
    cold_seconds: float | None = None
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    rate: float | None = None
    roofline: float | None = None
    tau: float | None = None
    difference: float | None = None
    others: list[float] = field(default_factory=list)


@dataclass
class Result:
    """All contestants under one load.

    Attributes:
        shape: Its name.
        title: What the shape is.
        load: How much was asked at once.
        documents: ``passages`` or ``whole``.
        pairs: Of one call.
        tokens: Of one call, padding not counted; the mean over rounds.
        gflop: Of one call, as `roofline` counts; the mean over rounds.
        rows: The contestants.
        gflops: The machine's best rates by number format.
    """

    shape: str
    title: str
    load: str
    documents: str
    pairs: int
    tokens: float
    gflop: float
    rows: list[Row]
    gflops: dict[str, float] = field(default_factory=dict)


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau: 1 for the same order, -1 for the reverse."""
    pairs = [(i, j) for i in range(len(first)) for j in range(i)]
    signs = [(first[i] - first[j]) * (second[i] - second[j]) for i, j in pairs]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(pairs)


def compare(
    rows: Sequence[Row], reference: Row, scores: dict[str, list[list[list[float]]]], gflop: list[float]
) -> None:
    """Fill in what is relative to the reference. `scores` are by contestant, round and query; `gflop` by round."""
    for row in rows:
        if not row.seconds:
            continue
        row.ratios = [theirs / own for theirs, own in zip(reference.seconds, row.seconds, strict=False)]
        row.rate = statistics.median(each / own for each, own in zip(gflop, row.seconds, strict=False))
        both = [
            (own, theirs)
            for ours, others in zip(scores[row.name], scores[reference.name], strict=False)
            for own, theirs in zip(ours, others, strict=True)
        ]
        if both:
            row.tau = statistics.mean(kendall(*pair) for pair in both)
            row.difference = max(abs(a - b) for own, theirs in both for a, b in zip(own, theirs, strict=True))


def relate(result: Result, gflops: dict[str, float]) -> None:
    """Fill in what is relative to the machine; int8 has no rate to compare with."""
    result.gflops = gflops
    for row in result.rows:
        if row.rate is not None and row.dtype in gflops:
            row.roofline = row.rate / gflops[row.dtype]


def table(result: Result) -> Table:
    """For the terminal."""
    rates = ", ".join(f"{rate:,.0f} GFLOP/s {dtype}" for dtype, rate in result.gflops.items())
    title = (
        f"{result.title}\n{result.load} ({result.documents}), {result.tokens:,.0f} tokens, {result.gflop:,.0f} GFLOP "
        f"a call; the machine's best: {rates}"
    )
    shown = Table(title=title)
    shown.add_column("")
    for column in ("p50 ms", "pairs/s", "times the reference\n[min-max]", "% of best\nGEMM rate", "peak\nRSS MB"):
        shown.add_column(column, justify="right")
    for column in ("cold\nstart s", "tau", "largest\ndifference"):
        shown.add_column(column, justify="right")
    for row in result.rows:
        name = f"{row.name} [dim]{row.version}, {row.dtype}[/]"
        if not row.seconds:
            shown.add_row(row.name, *[""] * 8)
            shown.rows[-1].style = "red"
            continue
        p50 = statistics.median(row.seconds)
        shown.add_row(
            name,
            f"{p50 * 1000:,.0f}",
            f"{result.pairs / p50:,.0f}",
            escape(spread(row.ratios)),
            "" if row.roofline is None else f"{row.roofline:.0%}",
            "" if row.peak_mb is None else f"{row.peak_mb:,.0f}",
            "" if row.cold_seconds is None else f"{row.cold_seconds:.1f}",
            "" if row.tau is None else f"{row.tau:.4f}",
            "" if row.difference is None else f"{row.difference:.1e}",
        )
    others = [share for row in result.rows for share in row.others]
    notes = [textwrap.shorten(f"{row.name}: {row.error}", 200) for row in result.rows if row.error]
    if others:
        note = "beyond 0.1, believe neither times nor ratios"
        notes.append(
            f"Processors busy with something else: {statistics.mean(others):.2f}, at most {max(others):.2f}; {note}"
        )
    shown.caption, shown.caption_justify = escape("\n".join(notes)), "left"
    return shown


def spread(ratios: Sequence[float]) -> str:
    """Median, and least and most."""
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]" if ratios else ""


def save(results: Sequence[Result], about: dict[str, Any], path: Path) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**about, "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def draw(results: Sequence[Result], path: Path) -> None:
    """One panel per shape and load: the ratio to the reference, whiskers from least to most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [sum(bool(row.ratios) for row in result.rows) + 2 for result in results]
    figure, panels = pyplot.subplots(
        len(results),
        1,
        figsize=(11, 0.32 * sum(heights) + 1),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for result, panel in zip(results, panels[:, 0], strict=True):
        rows = [row for row in reversed(result.rows) if row.ratios]
        medians = [statistics.median(row.ratios) for row in rows]
        below = [median - min(row.ratios) for median, row in zip(medians, rows, strict=True)]
        above = [max(row.ratios) - median for median, row in zip(medians, rows, strict=True)]
        colours = ["#c2410c" if row.name.startswith("rag_rerank") else "#64748b" for row in rows]
        panel.barh([row.name for row in rows], medians, xerr=[below, above], color=colours, capsize=2)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_title(f"{result.title}; {result.load}", fontsize=9)
        panel.tick_params(labelsize=8)
    panels[-1, 0].set_xlabel("times as fast as the reference in the same round")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
