"""What came out: tables, a picture, JSON."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.load.local import Beside, Versus
from benchmarks.load.servers import Point, saturation
from benchmarks.load.traffic import quantile
from benchmarks.report import spread


def ms(seconds: float) -> str:
    """Milliseconds; nothing for NaN."""
    return "" if seconds != seconds else f"{1000 * seconds:,.0f}"  # noqa: PLR0124


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, caption_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "ended") else "right")
    return table


def _others(shares: Iterable[float]) -> str:
    known = list(shares)
    busy = f"Processors busy with something else: {statistics.mean(known):.2f}, at most {max(known):.2f}"
    return f"{busy}; beyond 0.1, believe only what was measured in turn"


def sweep(points: Sequence[Point], title: str) -> Table:
    """By the number of callers, with the point of saturation of each."""
    table = _table(title, "", "callers", "calls/s", "pairs/s", "p50 ms", "p95 ms", "p99 ms")
    best = []
    for what in dict.fromkeys(point.what for point in points):
        own = [point for point in points if point.what == what]
        full = saturation(own)
        best.append(f"{what}: {full.calls:,.0f} calls/s from {full.asked:.0f} callers on")
        for point in own:
            times = (ms(point.p50), ms(point.p95), ms(point.p99))
            row = (what, f"{point.asked:.0f}", f"{point.calls:,.1f}", f"{point.pairs:,.0f}", *times)
            table.add_row(*row, style="bold" if point is full else None)
        table.add_section()
    table.caption = (
        "Saturated (95 % of the most): " + "; ".join(best) + "\n" + _others(point.others for point in points)
    )
    return table


def overload(points: Sequence[Point], title: str) -> Table:
    """By how much more comes than can be answered."""
    what = list(dict.fromkeys(point.what for point in points))
    table = _table(title, "", "times capacity", "goodput, calls/s", "p50 ms", "p95 ms", "at once", "ended")
    for point in sorted(points, key=lambda point: what.index(point.what)):
        ended = ", ".join(f"{count} {name}" for name, count in point.ended.items())
        rate = f"{point.calls:,.1f}"
        row = (point.what, f"{point.asked:g}", rate, ms(point.p50), ms(point.p95), str(point.under_way), ended)
        table.add_row(*row)
    table.caption = _others(point.others for point in points)
    return table


def fairness(points: Sequence[Point], title: str) -> Table:
    """Small calls and large ones at a time."""
    table = _table(title, "", "callers", "calls/s", "p50 ms", "p95 ms", "p99 ms")
    for point in points:
        times = (ms(point.p50), ms(point.p95), ms(point.p99))
        table.add_row(point.what, f"{point.asked:.0f}", f"{point.calls:,.2f}", *times)
    table.caption = _others(point.others for point in points)
    return table


def versus(results: Sequence[Versus]) -> Table:
    """Shared against locked."""
    columns = ("", "callers", "pairs/s, lock", "pairs/s", "times the lock's\n[min-max]")
    table = _table("LocalScorer asked by threads: shared, against behind a lock", *columns)
    for column in ("p50, p95 ms,\nlock", "p50, p95 ms", "p95 by the lock's\n[min-max]"):
        table.add_column(column, justify="right")
    for before, result in zip([None, *results], results, strict=False):
        if before is not None and before.shape != result.shape:
            table.add_section()
        times = {which: ", ".join(ms(_median(of[which])) for of in (result.p50, result.p95)) for which in result.p50}
        table.add_row(
            result.shape.title,
            str(result.callers),
            f"{result.rate('locked'):,.0f}",
            f"{result.rate('shared'):,.0f}",
            escape(spread(result.ratios)),
            times["locked"],
            times["shared"],
            escape(spread(result.ratios_p95)),
        )
    table.caption = _others(share for result in results for share in result.others)
    return table


def beside(results: Sequence[Beside]) -> Table:
    """Small calls beside a large one."""
    table = _table(
        "LocalScorer: 4 callers of 10 short documents each beside one call of 1,000",
        "",
        "small calls",
        "p50 ms",
        "p95 ms",
        "1,000 documents, ms",
    )
    for result in results:
        times = (ms(quantile(result.small, 0.5)), ms(quantile(result.small, 0.95)), ms(result.large))
        table.add_row(result.which, str(len(result.small)), *times)
    return table


def save(results: dict[str, Any], path: Path) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, default=_plain), encoding="utf-8")


def _plain(value: Any) -> Any:
    return asdict(value)


def draw(points: Sequence[Point], beyond: Sequence[Point], results: Sequence[Versus], path: Path) -> None:
    """Throughput and p95 by the number of callers; goodput beyond capacity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    (rate, wait), (goodput, shared) = panels
    for what in dict.fromkeys(point.what for point in points):
        own = [point for point in points if point.what == what]
        callers = [point.asked for point in own]
        rate.plot(callers, [point.pairs for point in own], marker="o", label=what)
        wait.plot(callers, [1000 * point.p95 for point in own], marker="o", label=what)
        rate.axvline(saturation(own).asked, color="grey", linewidth=0.6, linestyle=":")
    for what in dict.fromkeys(point.what for point in beyond):
        own = [point for point in beyond if point.what == what]
        goodput.plot([point.asked for point in own], [point.calls for point in own], marker="o", label=what)
    for shape in dict.fromkeys(result.shape for result in results):
        versus = [result for result in results if result.shape == shape]
        callers = [result.callers for result in versus]
        shared.plot(callers, [_median(result.ratios) for result in versus], marker="o", label=shape.title)
    shared.axhline(1, color="grey", linewidth=0.8)
    for panel, title, x, y in (
        (rate, "vLLM: throughput", "callers", "pairs/s"),
        (wait, "vLLM: p95", "callers", "ms"),
        (goodput, "vLLM: more than it can do", "calls sent, times capacity", "calls/s answered in time"),
        (shared, "LocalScorer: shared, against behind a lock", "callers", "times the throughput"),
    ):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(x, fontsize=8)
        panel.set_ylabel(y, fontsize=8)
        if panel is wait:
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=8)
        if panel is not goodput:
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:g}")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)
