"""The tables of ``rag-rerank eval`` and ``rag-rerank calibrate`` in a terminal, 80 columns wide."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rag_rerank.evaluation import Comparison, Evaluation, Kept, System
from rag_rerank.evaluation.calibrating import Bin, Calibrating, Interval, pooler_options
from rag_rerank.evaluation.measures import CONFIDENCE, mean

_MARKS = {"helps": ("▲", "green"), "hurts": ("▼", "red"), "no clear difference": ("≈", "default")}
_INTERVAL = f"{round(100 * CONFIDENCE)} % interval"


def show(evaluation: Evaluation, console: Console) -> None:
    """Print verdict, measures, depths and policies of each reranker; then each two compared."""
    collection = evaluation.collection
    documents = f"{len(collection.documents):,} documents, " if evaluation.retrieval is not None else ""
    console.print(
        f"[bold]{escape(collection.name)}[/]: {documents}{len(evaluation.candidates):,} judged queries, "
        f"candidates by {escape(evaluation.first_stage)}; linear gain."
    )
    if empty := evaluation.without_candidates:
        some = escape(", ".join(empty[:3]) + (", …" if len(empty) > 3 else ""))
        console.print(f"[yellow]{len(empty):,} queries have no candidates and count as 0:[/] {some}")
    console.print()
    if not evaluation.systems:  # what it could be if the judgments ordered its first 10, 20, ... candidates
        table = _table("", "as it is", *(f"at best, {depth}" for depth in evaluation.depths))
        for name in evaluation.measures:
            values = evaluation.before[name], *(evaluation.ceilings[depth][name] for depth in evaluation.depths)
            table.add_row(name, *(f"{mean(each):.4f}" for each in values))
        console.print(table)
    for system in evaluation.systems:
        console.print(
            f"[bold]{escape(system.name)}[/] {_verdict(system.deepest.gains[evaluation.measure], evaluation)}"
        )
        for table in (_measures(evaluation, system), _depths(evaluation, system), _kept(system.kept)):
            console.print(table, "")
        console.print(_remarks(evaluation, system))
    if evaluation.between:
        table = _table(f"from … to, {evaluation.measure}", "change", _INTERVAL, "better/worse")
        for first, second, gains in evaluation.between:
            table.add_row(f"{escape(first)} … {escape(second)}", *_change(gains[evaluation.measure]))
        console.print(table)


def _verdict(comparison: Comparison, evaluation: Evaluation) -> str:
    """Say whether it helps, by the first measure at the deepest depth."""
    mark, colour = _MARKS[comparison.verdict]
    word = "makes " + comparison.verdict if comparison.verdict == "no clear difference" else comparison.verdict
    gain = f"{evaluation.measure} {comparison.gain:+.4f}"
    return f"[bold {colour}]{mark} {word}[/]: {gain}, {comparison.wins} queries better, {comparison.losses} worse"


def _table(*columns: str) -> Table:
    """Make a table of figures, with text in the first column."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _change(comparison: Comparison) -> tuple[str, str, str]:
    """Change, in the colour of its verdict, interval, and on how many queries it was better and worse."""
    mark, colour = _MARKS[comparison.verdict]
    gain, interval = f"{mark} {comparison.gain:+.4f}", f"{comparison.low:+.3f} … {comparison.high:+.3f}"
    return f"[{colour}]{gain}[/]", interval, f"{comparison.wins}/{comparison.losses}"


def _measures(evaluation: Evaluation, system: System) -> Table:
    level = system.deepest
    table = _table(f"first {level.depth}", "before", "reranked", "at best", "change", _INTERVAL, "better/worse")
    for name in evaluation.measures:
        values = evaluation.before[name], level.values[name], evaluation.ceilings[level.depth][name]
        table.add_row(name, *(f"{mean(each):.4f}" for each in values), *_change(level.gains[name]))
    return table


def _depths(evaluation: Evaluation, system: System) -> Table:
    """Show how much each depth gains, and how long it takes."""
    measure = evaluation.measure
    table = _table("depth", measure, "at best", "change", _INTERVAL, "p50 ms", "p95 ms", "pairs/s")
    for level in system.levels:
        times = ["", "", ""]
        if (latency := level.latency) is not None:
            milliseconds = [f"{1000 * each:,.{1 if each < 0.01 else 0}f}" for each in (latency.p50, latency.p95)]
            times = [*milliseconds, f"{latency.pairs_per_second:,.0f}"]
        values = f"{level.mean(measure):.4f}", f"{mean(evaluation.ceilings[level.depth][measure]):.4f}"
        table.add_row(str(level.depth), *values, *_change(level.gains[measure])[:2], *times)
    return table


def _kept(policies: Sequence[Kept]) -> Table:
    """Show what policies keep for a prompt."""
    table = _table("keep, of each query", "precision", "recall", "documents", "tokens", "without any")
    for each in policies:
        precision = "" if each.precision is None else f"{each.precision:.2f}"
        sizes = f"{each.documents:.1f}", f"{each.tokens:,.0f}", f"{each.queries_without:,}"
        table.add_row(each.policy, precision, f"{each.recall:.2f}", *sizes)
    return table


def _remarks(evaluation: Evaluation, system: System) -> str:
    """Say what follows from the figures, and where the scores are from."""
    remarks = [f"{system.pairs_scored:,} pairs scored, {system.pairs_cached:,} from the cache."]
    comparison, enough = system.deepest.gains[evaluation.measure], system.enough(evaluation.measure)
    if comparison.verdict == "helps" and enough.depth < system.deepest.depth:
        less = enough.against_deepest[evaluation.measure]
        more = f"{0 - less.high:+.3f} … {0 - less.low:+.3f} ({_INTERVAL})"
        remarks.insert(0, f"{system.deepest.depth} candidates change {evaluation.measure} of {enough.depth} by {more}.")
    if system.rejected:
        remarks.append(f"{system.rejected:,} documents could not be scored; they are ranked last.")
    return f"{' '.join(remarks)}\n"


def show_calibration(found: Calibrating, file: str, console: Console) -> None:
    """Print what was fitted on what, how good it is, what thresholds do, and how to use it."""
    calibration, data = found.calibration, found.calibration.fitted_on
    console.print(
        f"[bold]{escape(data['collection'])}[/]: {data['queries']:,} queries, {data['pairs']:,} candidates "
        f"({escape(data['candidates'])}), {data['relevant']:,} relevant ({found.base_rate:.1%}). "
        f"{data['unjudged']:,} have no judgment and count as irrelevant: where those may be relevant, true "
        f"probabilities are higher; judge more, or lower --depth.\n\n"
        f"[bold]{escape(calibration.model)}[/]: {calibration.curve.method} over the {calibration.scale}, chosen by "
        f"queries left out. Log loss of the base rate alone: {found.base_log_loss:.4f}"
    )
    table = _table("", "before", _INTERVAL, "calibrated", _INTERVAL)
    for name in ("log_loss", "brier_skill", "calibration_error"):
        both: list[Interval] = [getattr(quality, name) for quality in (found.before, found.after)]
        table.add_row(name.replace("_", " "), *(text for each in both for text in (f"{each.value:.4f}", _range(each))))
    bins = _table("predicted", "pairs", "relevant", "expected", "")
    for each in found.after.bins:
        mark = "" if each.low <= each.observed <= each.high else " ✗"
        bar = f"{'█' * round(20 * each.observed):<20}"
        bins.add_row(f"{each.predicted:.3f}", f"{each.pairs:,}", f"{each.observed:.3f}{mark}", _range(each), bar)
    for shown in (table, bins, _kept(found.kept)):
        console.print(shown, "")
    for target in found.targets:
        told = f"the data can't tell: {target.why_not}."
        if not target.why_not and target.threshold is not None and target.elsewhere is not None:
            at = f"threshold {target.threshold.value:.3f} ({_range(target.threshold)})"
            told = f"{at}; other queries: {_range(target.elsewhere)} {target.kind}"
        console.print(f"[bold]{target.wanted:.0%} {target.kind}[/]: {told}")
    ties = " Documents on one of its steps have equal scores." if calibration.curve.method == "isotonic" else ""
    console.print(f"\nUse it: [bold]Calibrated(scorer, {file!r})[/].{ties}")
    if (options := pooler_options(calibration)) is not None:
        console.print("A vLLM server of a cross-encoder gives these probabilities itself with:")
        console.print(escape(options), soft_wrap=True)


def _range(interval: Interval | Bin) -> str:
    return f"{interval.low:.3f} … {interval.high:.3f}"
