"""``rag-rerank check``."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from rag_rerank import LocalScorer, VLLMScorer
from rag_rerank.check import Finding
from rag_rerank.check import check as examine
from rag_rerank.cli.options import EndpointOption, KeyOverHTTPOption, console
from rag_rerank.display import printable

_MARKS = {"good": ("✓", "green"), "note": ("·", "cyan"), "warning": ("!", "yellow"), "problem": ("✗", "red")}


def check(
    targets: Annotated[
        list[str], typer.Argument(help="A vLLM server, or several of one model; or a model's folder or hub id.")
    ],
    model: Annotated[str | None, typer.Option(help="The name on the server, where it serves several.")] = None,
    endpoint: EndpointOption = "score",
    as_json: Annotated[bool, typer.Option("--json", help="JSON Lines, one a finding.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that a call may take.")] = 30.0,
    send_key_over_http: KeyOverHTTPOption = False,
) -> None:
    """Examine a vLLM server: does it answer, score, rank, use the right prompt, and how fast?

    Of a model in a folder or on the hub: what its files declare, and the proof that it is run rightly here.

    The key is read from VLLM_API_KEY. The exit code is 1 if a problem was found; warnings are not problems.
    """
    verdicts: Counter[str] = Counter()
    scorer: LocalScorer | VLLMScorer
    if len(targets) == 1 and (":" not in targets[0] or Path(targets[0]).is_dir()):
        from rag_rerank.check.local import check_local

        scorer = LocalScorer(targets[0])
        findings = check_local(scorer)
    else:
        settings: dict[str, Any] = {"model": model, "endpoint": endpoint, "send_key_over_http": send_key_over_http}
        scorer = VLLMScorer(targets, timeout=timeout, **settings)
        findings = examine(scorer)
    with scorer:
        for finding in findings:
            verdicts[finding.verdict] += 1
            if as_json:
                typer.echo(json.dumps(dataclasses.asdict(finding), ensure_ascii=False))
            else:
                _show_finding(finding)
    if not as_json:
        _show_verdict(verdicts)
    if verdicts["problem"]:
        raise typer.Exit(1)


def _show_finding(finding: Finding) -> None:
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
