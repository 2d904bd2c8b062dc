"""``rag-rerank check``."""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from rag_rerank.cli.options import ScorerOptions, console, takes_scorer
from rag_rerank.display import printable
from rag_rerank.errors import ConfigError

if TYPE_CHECKING:
    from rag_rerank.check import Finding

_MARKS = {"good": ("✓", "green"), "note": ("·", "cyan"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


@takes_scorer("base_url", "host", "port", "calibration")
def check(
    targets: Annotated[
        list[str], typer.Argument(help="A vLLM server, or several of one model; or a model's folder or hub id.")
    ],
    chosen: ScorerOptions,
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines, one a finding.")] = False,
) -> None:
    """Examine a vLLM server: does it answer, score, rank, use the right prompt, and how fast?

    Of a model in a folder or on the hub: what its files declare, and the proof that it is run rightly here.

    The key is read from VLLM_API_KEY. The exit code is 1 if a problem was found; warnings are not problems.
    """
    verdicts: Counter[str] = Counter()
    if len(targets) == 1 and (":" not in targets[0] or Path(targets[0]).is_dir()):
        if chosen.model is not None:
            raise ConfigError("--model is a model's name on a server; here the folder or hub id names it")
        from rag_rerank.check.local import check_local

        scorer: Any = replace(chosen, model=targets[0]).make()
        findings = check_local(scorer)
    else:
        from rag_rerank.check import check as examine

        scorer = replace(chosen, base_url=targets).make()
        findings = examine(scorer)
    with scorer:
        for finding in findings:
            verdicts[finding.verdict] += 1
            if as_json:
                typer.echo(json.dumps(asdict(finding)))
            else:
                _show_finding(finding)
    if not as_json:
        _show_verdict(verdicts)
    if verdicts["problem"]:
        raise typer.Exit(1)


def _show_finding(finding: "Finding") -> None:
    mark, colour = _MARKS[finding.verdict]
    row = Table.grid(Column(width=1), Column(width=14), Column(overflow="fold"), padding=(0, 1))  # 14: longest title
    row.add_row(f"[bold {colour}]{mark}[/]", f"[bold]{finding.title}[/]", escape(printable(finding.says)))
    if finding.remedy is not None:
        row.add_row("", "", f"[{colour}]→[/] {escape(printable(finding.remedy))}")
    console().print(row)


def _show_verdict(verdicts: Counter[str]) -> None:
    """Show the last line: how bad it is, all in all."""
    counts = [(verdicts[verdict], verdict) for verdict in ("problem", "warning", "note") if verdicts[verdict]]
    counted = [f"{count} {verdict}{'' if count == 1 else 's'}" for count, verdict in counts]
    colour = next((_MARKS[verdict][1] for verdict in ("problem", "warning") if verdicts[verdict]), "green")
    healthy = "" if verdicts["problem"] else "It can be used: "
    console().print(f"\n[bold {colour}]{healthy}{', '.join(counted) or 'all is well'}.[/]")
