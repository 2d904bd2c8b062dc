"""Measures: small enough to check by hand."""

import math

import pytest

from rag_rerank import ConfigError
from rag_rerank.evaluation.measures import Measurer, mean


def measure(judgments: dict[str, dict[str, int]], rankings: dict[str, list[str]], *names: str) -> dict[str, float]:
    """The means."""
    return {name: mean(values) for name, values in Measurer(judgments, names).measure(rankings).items()}


class TestMeasures:
    """Means."""

    def test_means_are_over_every_judged_query(self):
        """One right answer at rank 2, one query without results."""
        judgments = {"q1": {"a": 1}, "q2": {"b": 1}}
        means = measure(judgments, {"q1": ["x", "a"]}, "RR@10", "nDCG@10")
        assert means["RR@10"] == pytest.approx(0.5 / 2)
        assert means["nDCG@10"] == pytest.approx(1 / math.log2(3) / 2)

    def test_the_gain_is_linear(self):
        """Grade 2 on rank 2, grade 1 on rank 1: (1 + 2 / log2(3)) / (2 + 1 / log2(3)), not with 3 for the grade 2."""
        means = measure({"q": {"a": 1, "b": 2}}, {"q": ["a", "b"]}, "nDCG")
        assert means["nDCG"] == pytest.approx((1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)))

    def test_measures_may_be_called_as_people_call_them(self):
        """MRR, MAP and Recall are RR, AP and R."""
        judgments, rankings = {"q": {"a": 1, "b": 1}}, {"q": ["x", "a", "b"]}
        means = measure(judgments, rankings, "MRR@10", "RR@10", "MAP", "AP", "Recall@2", "R@2")
        assert means == {
            **dict.fromkeys(["MRR@10", "RR@10"], 0.5),
            **dict.fromkeys(["MAP", "AP"], pytest.approx((1 / 2 + 2 / 3) / 2)),
            **dict.fromkeys(["Recall@2", "R@2"], 0.5),
        }

    @pytest.mark.parametrize("name", ["nDGC@10", "nDCG@ten", "R@0", "", "nDCG@10)", "__import__('os')"])
    def test_an_unknown_measure_is_named(self, name: str):
        """With some that are known."""
        with pytest.raises(ConfigError, match="is not known.*nDCG@10, MRR@10"):
            measure({"q": {"a": 1}}, {}, name)

    def test_nothing_to_measure(self):
        """Is said."""
        for judgments, measures in (({}, ["RR"]), ({"q": {"a": 1}}, [])):
            with pytest.raises(ConfigError, match="nothing to measure"):
                Measurer(judgments, measures)


class TestMeasurer:
    """Values of every query."""

    def test_order_alone_counts(self):
        """Rankings have no ties that ids could decide."""
        measurer = Measurer({"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"a": 0}}, ["RR"])
        assert measurer.measure({"q1": ["z", "a"], "q2": []}) == {"RR": {"q1": 0.5, "q2": 0.0, "q3": 0.0}}

    def test_the_deepest_cutoff_is_known(self):
        """0 where there is none."""
        assert Measurer({"q": {"a": 1}}, ["nDCG@10", "R@250", "MAP"]).deepest == 250
        assert Measurer({"q": {"a": 1}}, ["MAP"]).deepest == 0
