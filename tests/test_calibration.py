"""Calibrated: probabilities from one file, for the model that it was fitted for and no other."""

import asyncio
import json
import logging
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rag_rerank import (
    Calibrated,
    Calibration,
    ConfigError,
    DocumentRejected,
    FallbackScorer,
    LocalScorer,
    Scorer,
)
from rag_rerank.calibration import Curve, known_facts, on_scale
from rag_rerank.identity import PROBES
from rag_rerank.ranking import Ranked
from tests.scorers import Answers, WordOverlap

PLATT = Curve("platt", [(0.0, -2.0), (1.0, 3.0)])
STEPS = Curve("isotonic", [(0.0, -4.0), (0.2, -1.0), (0.6, -1.0), (1.0, 2.0)])


def calibration(scorer: Scorer, curve: Curve = PLATT, scale: Any = "score") -> Calibration:
    """A calibration whose references are this scorer's own."""
    queries, documents = zip(*PROBES, strict=True)
    values = [on_scale(score, scale) for score in scorer.score(queries, documents)]
    references = list(zip(queries, documents, values, strict=True))
    return Calibration(known_facts(scorer, scorer.identity()), references, scale, curve)


class Refusing(WordOverlap):
    """Refuses what says "poison", and knows which it was."""

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        scores = super()._score(queries, documents, until)
        bad = [position for position, document in enumerate(documents) if "poison" in document]
        if bad:
            left = [None if position in bad else score for position, score in enumerate(scores)]
            raise DocumentRejected("odd", indices=bad, scores=left, reason="odd")
        return scores


class TestCurve:
    """From values to probabilities."""

    def test_platts_is_a_sigmoid_of_a_line_and_goes_on_beyond_its_points(self):
        for value in (-1e6, -3.0, 0.0, 0.25, 1.0, 7.0, 1e6):
            odds = -2.0 + 5.0 * value
            right = 0.0 if odds < -700 else 1 / (1 + math.exp(-odds))
            assert PLATT.probability(value) == pytest.approx(right, abs=1e-12)

    def test_an_isotonic_one_has_steps_and_is_level_beyond_its_points(self):
        found = [STEPS.probability(value) for value in (-9.0, 0.0, 0.1, 0.2, 0.4, 0.6, 1.0, 9.0)]
        assert found == sorted(found)
        assert found[0] == found[1] < found[2] < found[3] == found[4] == found[5] < found[6] == found[7]

    @pytest.mark.parametrize(
        ("method", "points"),
        [
            ("platt", [(0.0, 1.0)]),
            ("platt", [(0.0, 1.0), (1.0, 0.0)]),
            ("isotonic", [(0.0, 0.0), (0.0, 1.0)]),
            ("isotonic", [(0.0, 0.0), (1.0, math.inf)]),
            ("linear", [(0.0, 0.0), (1.0, 1.0)]),
        ],
    )
    def test_what_is_none_is_refused(self, method: Any, points: Any):
        with pytest.raises(ValueError, match=r"point|method"):
            Curve(method, points)


class TestFile:
    """One small JSON file."""

    def test_it_gives_the_same_calibration(self, tmp_path: Path):
        for curve in (PLATT, STEPS):
            made = replace(calibration(WordOverlap(), curve), fitted_on={"collection": "x"})
            made.save(tmp_path / "relevance.json")
            assert Calibration.load(tmp_path / "relevance.json") == made

    @pytest.mark.parametrize(
        "damage",
        [
            lambda values: {},
            lambda values: [],
            lambda values: values | {"format": "another"},
            lambda values: values | {"references": []},
            lambda values: values | {"scale": "stars"},
            lambda values: values | {"curve": {"method": "platt", "points": [[0, 1], [1, 0]]}},
            lambda values: values | {"facts": {}},
        ],
    )
    def test_what_is_none_is_a_config_error_that_names_it(self, tmp_path: Path, damage: Callable[[Any], Any]):
        path = tmp_path / "relevance.json"
        calibration(WordOverlap()).save(path)
        path.write_text(json.dumps(damage(json.loads(path.read_text()))))
        with pytest.raises(ConfigError, match=r"relevance\.json is no calibration"):
            Calibrated(WordOverlap(), path)

    def test_a_missing_file_is_told_at_construction(self, tmp_path: Path):
        with pytest.raises(ConfigError, match="nowhere.json can't be read: No such file"):
            Calibrated(WordOverlap(), tmp_path / "nowhere.json")


class TestScores:
    """Everything that a scorer promises, with probabilities."""

    def test_are_probabilities_in_the_same_order(self):
        raw, scorer = WordOverlap(), Calibrated(WordOverlap(), calibration(WordOverlap()))
        documents = ["a b", "a", "c", "b a c"]
        right = [PLATT.probability(score) for score in raw.score("a b", documents)]
        assert scorer.score("a b", documents) == right
        assert asyncio.run(scorer.ascore("a b", documents)) == right
        assert [each.index for each in scorer.rerank("a b", documents)] == [0, 3, 1, 2]
        assert scorer.calibrated
        assert scorer.model_name == raw.model_name

    def test_of_logits_and_of_what_an_activation_makes_of_them_are_the_same(self, cross_encoder: Path):
        """Whichever of both was fitted."""
        with (
            LocalScorer(cross_encoder, dtype="float32") as activated,
            LocalScorer(cross_encoder, dtype="float32", use_activation=False) as logits,
        ):
            assert all(0 < score < 1 for score in activated.score("a", ["b", "c"]))
            for made in (calibration(activated, scale="logit"), calibration(logits)):
                one, other = (Calibrated(scorer, made).score("who?", ["me", "you"]) for scorer in (activated, logits))
                assert one == pytest.approx(other, abs=1e-6)

    def test_of_the_others_come_with_a_rejected_document(self):
        scorer = Calibrated(Refusing(), calibration(WordOverlap()))
        with pytest.raises(DocumentRejected) as caught:
            scorer.score("a b", ["a b", "poison", "c"])
        assert caught.value.indices == (1,)
        assert caught.value.scores == (PLATT.probability(1.0), None, PLATT.probability(0.0))
        ranked = scorer.rerank("a b", ["poison", "c", "a b"], on_error="passthrough")
        assert [each.index for each in ranked] == [2, 1, 0]

    def test_identity_tells_it_from_the_scorer_and_from_another_curve(self):
        raw, made = WordOverlap(), calibration(WordOverlap())
        one, other = Calibrated(raw, made), Calibrated(raw, replace(made, curve=STEPS))
        assert one.identity().differences(raw.identity())
        assert one.identity().differences(other.identity())
        assert not one.identity().differences(Calibrated(WordOverlap(), made).identity())

    def test_a_pickle_gives_the_same(self):
        scorer = Calibrated(WordOverlap(), calibration(WordOverlap()))
        assert pickle.loads(pickle.dumps(scorer)).score("a", ["a"]) == scorer.score("a", ["a"])  # noqa: S301

    def test_closing_closes_the_scorer(self):
        inner = WordOverlap()
        with Calibrated(inner, calibration(WordOverlap())):
            pass
        with pytest.raises(Exception, match="closed"):
            inner.score("a", ["a"])


class TestAnotherModel:
    """The file is for one model with one template and instruction."""

    def test_is_refused_where_the_file_has_no_number_to_compare(self):
        fitted = calibration(WordOverlap())
        references = [(query, document, math.nan) for query, document, _ in fitted.references]
        with pytest.raises(ConfigError, match="the calibration was fitted for"):
            Calibrated(Answers(lambda texts: [9.0] * len(texts)), replace(fitted, references=references)).score(
                "q", "d"
            )

    def test_is_refused_with_what_differs(self):
        scorer = Calibrated(WordOverlap(weight=2.0), calibration(WordOverlap()))
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"fitted for word overlap.*rag-rerank calibrate"):
                scorer.score("a", ["a"])
        with pytest.raises(ConfigError, match="fitted for word overlap"):
            asyncio.run(scorer.ascore("a", ["a"]))

    def test_is_refused_although_an_activation_has_made_the_scores_alike(self):
        """Both say 1 and 0 of what is clear; their logits differ."""
        clear = [8.0, -9.0, 7.0, -4.0]
        one, other = (
            Answers(lambda documents, by=by: [1 / (1 + math.exp(-each * by)) for each in clear][: len(documents)])
            for by in (1.0, 1.1)
        )
        with pytest.raises(ConfigError, match="reference pairs"):
            Calibrated(other, calibration(one, scale="logit")).score("a", ["b"])

    def test_another_dtype_is_one_warning(self, cross_encoder: Path, caplog: pytest.LogCaptureFixture):
        with (
            LocalScorer(cross_encoder, dtype="float32") as fitted,
            LocalScorer(cross_encoder, dtype="bfloat16") as half,
        ):
            exact = Calibrated(fitted, calibration(fitted, scale="logit"))
            rough = Calibrated(half, calibration(fitted, scale="logit"))
            with caplog.at_level(logging.WARNING, logger="rag_rerank.calibration"):
                right = exact.score("who?", ["me", "you"])
                assert not caplog.records
                for _ in range(2):
                    assert rough.score("who?", ["me", "you"]) == pytest.approx(right, abs=0.05)
            assert [record.getMessage() for record in caplog.records] == [
                f"{cross_encoder.name} was fitted with another dtype: probabilities differ a little"
            ]

    def test_an_instruction_of_a_call_is_refused(self):
        class Instructed(WordOverlap):
            accepts_instruction = True

        with pytest.raises(ConfigError, match="calibrated with its own instruction, not with one of a call"):
            Calibrated(Instructed(), calibration(WordOverlap())).score("a", ["b"], instruction="be kind")

    def test_fallback_scorers_are_calibrated_one_by_one(self):
        made = calibration(WordOverlap())
        with pytest.raises(ConfigError, match=r"FallbackScorer\(Calibrated"):
            Calibrated(FallbackScorer(WordOverlap()), made)
        both = FallbackScorer(Calibrated(WordOverlap(), made), Calibrated(WordOverlap(), made))
        assert both.calibrated
        assert not FallbackScorer(Calibrated(WordOverlap(), made), WordOverlap()).calibrated
        assert both.rerank("a b", ["a b", "c"], min_precision=0.6) == [Ranked(0, PLATT.probability(1.0))]


class TestCutOff:
    """What `min_precision` and `min_n` keep."""

    @pytest.mark.parametrize(
        ("limits", "kept"),
        [
            ({"min_precision": 0.9}, 1),
            ({"min_precision": 0.75}, 2),  # (0.9 + 0.6) / 2
            ({"min_precision": 0.55}, 3),  # (0.9 + 0.6 + 0.2) / 3 = 0.57
            ({"min_precision": 0.95}, 0),
            ({"min_precision": 0.95, "min_n": 2}, 2),
            ({"min_precision": 0.5, "top_n": 1}, 1),
            ({"min_precision": 0.5, "score_threshold": 0.5}, 2),
            ({"score_threshold": 0.7, "min_n": 3}, 3),
            ({"min_n": 9}, 4),
        ],
    )
    def test_as_many_as_have_the_mean(self, limits: dict[str, Any], kept: int):
        class Probabilities(Answers):
            calibrated = True

        scorer = Probabilities(lambda documents: [0.2, 0.9, 0.01, 0.6])
        ranked = scorer.rerank("q", ["a", "b", "c", "d"], **limits)
        assert [each.index for each in ranked] == [1, 3, 0, 2][:kept]
        assert scorer.rerank_batch(["q"], [["a", "b", "c", "d"]], **limits) == [ranked]
        assert asyncio.run(scorer.arerank("q", ["a", "b", "c", "d"], **limits)) == ranked

    def test_needs_probabilities(self):
        for call in (
            lambda: WordOverlap().rerank("a", ["a"], min_precision=0.5),
            lambda: asyncio.run(WordOverlap().arerank_batch(["a"], [["a"]], min_precision=0.5)),
        ):
            with pytest.raises(ConfigError, match=r"min_precision needs probabilities.*Calibrated"):
                call()

    @pytest.mark.parametrize(
        ("limits", "error"),
        [
            ({"min_precision": 0.0}, ValueError),
            ({"min_precision": 1.1}, ValueError),
            ({"min_precision": math.nan}, ValueError),
            ({"min_precision": "high"}, TypeError),
            ({"min_precision": True}, TypeError),
            ({"min_n": -1}, ValueError),
            ({"min_n": 1.5}, TypeError),
            ({"min_n": 3, "top_n": 2}, ValueError),
        ],
    )
    def test_what_can_not_be_is_refused(self, limits: dict[str, Any], error: type[Exception]):
        with pytest.raises(error, match="min_"):
            WordOverlap().rerank("a", ["a"], **limits)
