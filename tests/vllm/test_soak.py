"""Servers that die and come back under load: the short form of ``make soak``."""

from pathlib import Path

from tests.soak import Servers, expectations, run


def test_a_server_that_dies_costs_no_call(vllm_pair: Servers, cross_encoder: Path):
    """One of two is killed after ten seconds, with calls of eight threads under way: all are answered, and rightly."""
    report = run(vllm_pair, expectations(cross_encoder), seconds=25, every=10)
    assert (report.wrong, report.lost, report.late) == (0, 0, 0)
    assert report.answered >= 0.999, report.errors
    assert report.calls > 100
    assert report.kills >= 1
