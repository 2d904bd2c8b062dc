"""Is a difference more than luck?"""

import random
from itertools import product
from statistics import mean, quantiles

import pytest

from rag_rerank.evaluation import Comparison, compare


def reference(differences: list[float], resamples: int) -> tuple[float, float]:
    """The same interval in a few lines of plain Python, with draws of its own."""
    draws = random.Random(1)  # noqa: S311 - no secrets
    means = [mean(draws.choices(differences, k=len(differences))) for _ in range(resamples)]
    cuts = quantiles(means, n=1000, method="inclusive")
    return cuts[24], cuts[974]


class TestInterval:
    """The paired bootstrap."""

    def test_two_queries_can_be_checked_by_hand(self):
        """Of the means of (0, 1), drawn twice, a quarter are 0, half are 0.5, a quarter are 1."""
        (found,) = compare([[0.0, 1.0]])
        assert found == Comparison(0.5, 0.0, 1.0, wins=1, losses=0, ties=1)

    def test_four_queries_have_all_their_drawings(self):
        """256 of them, so that their quantiles are known."""
        differences = [-0.2, 0.1, 0.4, 0.5]
        means = sorted(mean(drawn) for drawn in product(differences, repeat=4))
        (found,) = compare([differences], resamples=200_000)
        assert found.low == pytest.approx(means[round(0.025 * 256)], abs=0.03)
        assert found.high == pytest.approx(means[round(0.975 * 256)], abs=0.03)

    def test_it_agrees_with_plain_python(self):
        """On 60 queries of which most are ties."""
        numbers = random.Random(2)  # noqa: S311 - no secrets
        differences = [numbers.choice([0, 0, 0, 0.1, 0.5, -0.3]) for _ in range(60)]
        (found,) = compare([differences])
        assert (found.low, found.high) == pytest.approx(reference(differences, 10_000), abs=0.01)
        assert found.gain == pytest.approx(mean(differences))

    def test_the_same_input_has_the_same_output(self):
        """And several comparisons share their draws, so that none depends on its neighbours."""
        one, two = [0.1, -0.2, 0.3, 0.0], [0.2, 0.2, -0.1, 0.0]
        assert compare([one, two]) == compare([one, two])
        for together, alone in zip(compare([one, two]), compare([one]) + compare([two]), strict=True):
            assert (together.low, together.high) == pytest.approx((alone.low, alone.high))

    def test_many_queries_are_drawn_in_parts(self, monkeypatch: pytest.MonkeyPatch):
        """To bound the memory; the interval is as good."""
        differences = [0.1, -0.2, 0.3, 0.0] * 25
        (whole,) = compare([differences])
        monkeypatch.setattr("rag_rerank.evaluation.measures._NUMBERS_DRAWN", 1)
        (parts,) = compare([differences], resamples=2000)
        assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=0.01)


class TestVerdict:
    """Three answers."""

    @pytest.mark.parametrize(
        ("differences", "verdict", "counts"),
        [
            ([0.1] * 20 + [-0.1] * 2, "helps", (20, 2, 0)),
            ([-0.1] * 20 + [0.1] * 2, "hurts", (2, 20, 0)),
            ([0.1] * 11 + [-0.1] * 10, "no clear difference", (11, 10, 0)),
            ([0.0] * 5, "no clear difference", (0, 0, 5)),
            ([1e-12, -1e-12], "no clear difference", (0, 0, 2)),
            ([0.5], "helps", (1, 0, 0)),
        ],
    )
    def test_it_helps_or_hurts_where_the_interval_excludes_zero(
        self, differences: list[float], verdict: str, counts: tuple[int, int, int]
    ):
        """And rounding is no win."""
        (found,) = compare([differences])
        assert (found.verdict, (found.wins, found.losses, found.ties)) == (verdict, counts)

    def test_no_queries_are_an_error(self):
        """No comparisons are not."""
        assert compare([]) == []
        for wrong in ([[]], [[0.1], [0.1, 0.2]]):
            with pytest.raises(ValueError, match="difference|inhomogeneous"):
                compare(wrong)
