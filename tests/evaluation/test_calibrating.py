"""``rag-rerank calibrate``: what is fitted on what, and what is said of it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag_rerank import Calibrated, ConfigError, FallbackScorer, LocalScorer
from rag_rerank.embedded import collection_folder, minilm_folder
from rag_rerank.evaluation import Collection, evaluate, read_labelled
from rag_rerank.evaluation.calibrating import (
    Pairs,
    calibrate,
    fit,
    over,
    quality,
    target,
)
from tests.commands import run
from tests.evaluation.test_report import Page
from tests.scorers import Answers, WordOverlap

RELEVANT = {
    "how do bees make honey": "Bees turn nectar into honey in the comb.",
    "who wrote hamlet": "Hamlet is a play by William Shakespeare.",
    "capital of france": "Paris is the capital and largest city of France.",
    "why is the sky blue": "Air scatters blue light from the sun more than red light, so the sky looks blue.",
    "boiling point of water": "At sea level, water boils at 100 degrees Celsius.",
    "what do pandas eat": "Giant pandas eat bamboo nearly all day.",
}


def drawn(queries: int, *, seed: int = 0, step: bool = False) -> tuple[Pairs, Any]:
    """Twenty pairs for each query, whose probabilities are known: a sigmoid of a line, or one step."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=queries * 20)
    right = np.where(values > 1, 0.8, 0.02) if step else 1 / (1 + np.exp(3 - 2 * values))
    return Pairs(values, rng.random(len(values)) < right, np.repeat(np.arange(queries), 20)), right


class TestFit:
    """Platt's curve or an isotonic one."""

    def test_a_sigmoid_of_a_line_is_found_again(self):
        pairs, right = drawn(400)
        curve, left_out = fit(pairs)
        assert curve.method == "platt"
        assert curve.points[0][1] == pytest.approx(-3, abs=0.3)
        assert curve.points[1][1] == pytest.approx(-1, abs=0.3)
        assert np.abs(left_out - right).max() < 0.06

    def test_a_step_is_found_by_the_isotonic_one(self):
        pairs, right = drawn(400, step=True)
        curve, _ = fit(pairs)
        assert curve.method == "isotonic"
        assert np.abs(over(curve, pairs.values) - right).mean() < 0.03

    def test_the_scale_of_the_scores_does_not_matter(self):
        pairs, _ = drawn(100)
        for factor, shift in ((1e-3, 0.0), (1e4, 5e4)):
            other = Pairs(pairs.values * factor + shift, pairs.relevant, pairs.queries)
            assert over(fit(other)[0], other.values) == pytest.approx(over(fit(pairs)[0], pairs.values), abs=1e-3)

    def test_scores_that_part_all_do_not_become_certainties(self):
        values = np.tile([0.0, 1.0], 10)
        curve, _ = fit(Pairs(values, values, np.repeat(np.arange(10), 2)))
        assert 0.8 < curve.probability(1.0) < 0.99
        assert 0.01 < curve.probability(0.0) < 0.2

    @pytest.mark.parametrize(
        ("values", "relevant", "queries", "said"),
        [
            ([0.1, 0.9], [0, 1], [0, 0], "of 1 queries, 1 have a relevant document"),
            ([0.1, 0.9] * 9, [0, 0] * 9, range(18), "of 18 queries, 0 have a relevant"),
            ([0.1, 0.9] * 9, [1, 1] * 9, range(18), "irrelevant ones are needed"),
            ([0.5, 0.5] * 9, [0, 1] * 9, range(18), "all scores are equal"),
            ([0.9, 0.1] * 9, [0, 1] * 9, range(18), "no higher|don't have higher"),
        ],
    )
    def test_what_tells_nothing_is_a_config_error(self, values: Any, relevant: Any, queries: Any, said: str):
        with pytest.raises(ConfigError, match=said):
            fit(Pairs(values, relevant, list(queries)))


class TestFigures:
    """What is said of probabilities and thresholds."""

    def test_right_probabilities_are_within_their_bins_intervals(self):
        pairs, right = drawn(400)
        found = quality(pairs, right)
        assert all(each.low <= each.observed <= each.high for each in found.bins)
        assert found.calibration_error.value < 0.02
        assert found.brier_skill.low > 0
        assert found.log_loss.low < found.log_loss.value < found.log_loss.high

    def test_wrong_ones_are_not(self):
        pairs, right = drawn(400)
        found = quality(pairs, np.sqrt(right))
        assert sum(not each.low <= each.observed <= each.high for each in found.bins) > 5
        assert found.brier_skill.high < 0.2

    def test_a_target_holds_for_other_queries(self):
        pairs, right = drawn(300)
        others, theirs = drawn(300, seed=1)
        for kind, wanted in (("precision", 0.5), ("recall", 0.8)):
            found = target(pairs, right, kind, wanted)
            assert not found.why_not
            assert found.elsewhere.value >= wanted
            kept = theirs >= found.threshold.value
            reached = others.relevant[kept].sum() / (kept.sum() if kind == "precision" else others.relevant.sum())
            assert found.elsewhere.low <= reached <= found.elsewhere.high

    def test_what_the_data_can_not_tell_is_said(self):
        pairs, right = drawn(300)
        assert "no threshold that keeps 20" in target(pairs, right, "precision", 0.999).why_not
        few, theirs = drawn(12)
        assert target(few, theirs, "precision", 0.7).why_not

    def test_equal_probabilities_are_kept_together(self):
        pairs, _ = drawn(100, step=True)
        found = target(pairs, np.where(pairs.values > 1, 0.8, 0.02), "precision", 0.7)
        assert found.threshold.value == 0.8


class TestCalibrate:
    """From an evaluation to a file."""

    def test_by_words_in_common(self):
        scorer, collection = WordOverlap(), Collection.load(collection_folder())
        evaluation = evaluate(collection, scorer, depths=(20,), measures=["nDCG@10"], cache=False)
        found = calibrate(evaluation, scorer)
        assert found.after.log_loss.value < found.base_log_loss < found.before.log_loss.value
        assert found.calibration.fitted_on["queries"] == 170
        assert (
            found.calibration.fitted_on["unjudged"]
            == found.calibration.fitted_on["pairs"] - found.calibration.fitted_on["relevant"]
        )
        assert [each.policy for each in found.kept][:3] == [f"score_threshold={each}" for each in (0.05, 0.1, 0.2)]
        assert all(0 <= each <= 1 for each in Calibrated(WordOverlap(), found.calibration).score("a b", ["a", "b c"]))
        assert json.loads(json.dumps(found.as_json()))["base_rate"] == found.base_rate

    def test_several_scorers_are_refused(self):
        scorer, collection = FallbackScorer(WordOverlap()), Collection.load(collection_folder())
        evaluation = evaluate(collection, scorer, depths=(5,), measures=["nDCG@10"], cache=False, limit=20)
        with pytest.raises(ConfigError, match="calibrate each of them"):
            calibrate(evaluation, scorer)

    def test_constant_scores_are_refused(self):
        scorer = Answers(lambda documents: [0.5] * len(documents))
        evaluation = evaluate(
            Collection.load(collection_folder()), scorer, depths=(5,), measures=["nDCG@10"], cache=False, limit=40
        )
        with pytest.raises(ConfigError, match="all scores are equal"):
            calibrate(evaluation, scorer)


class TestCommand:
    """The command, with labelled pairs."""

    def test_writes_a_file_that_gives_probabilities(self, tmp_path: Path):
        rows = [
            {"query": query, "document": document, "relevant": query == other}
            for query in RELEVANT
            for other, document in RELEVANT.items()
        ]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        model = ["--model", minilm_folder(), "--dtype", "float32"]
        surroundings = {"folder": tmp_path, "COLUMNS": "100", "XDG_CACHE_HOME": str(tmp_path)}
        files = ["--json", "figures.json", "--html", "report.html"]
        done = run("calibrate", "pairs.jsonl", *files, *model, **surroundings)
        assert done.returncode == 0, done.stderr
        for said in (
            "6 queries, 36 candidates",
            "6 relevant",
            "log loss",
            "the data can't tell",
            "score_threshold=0.5",
        ):
            assert said in done.stdout
        assert "pooler-config" not in done.stdout  # MiniLM is no cross-encoder
        page = Page((tmp_path / "report.html").read_text())
        for said in ("Predicted against relevant", "6 queries, 36 candidates", "score_threshold=0.5", "80 % precision"):
            assert said in page.words
        assert [attributes["class"] for tag, attributes in page.tags if tag == "svg"] == ["plot"]
        with LocalScorer(minilm_folder(), dtype="float32") as scorer:
            right, wrong = Calibrated(scorer, tmp_path / "relevance.json").score(
                "where does honey come from", ["Bees make honey.", "Hamlet is a play."]
            )
        assert 0 <= wrong < 0.2
        assert 0.5 < right <= 1
        assert json.loads((tmp_path / "figures.json").read_text())["calibration"]["fitted_on"]["pairs"] == 36
        asked = ["--calibration", "relevance.json", "--min-precision", "0.6", "--in", "in.jsonl", "--out", "out.jsonl"]
        row = {"query": "where does honey come from", "documents": ["Hamlet is a play.", "Bees make honey."]}
        (tmp_path / "in.jsonl").write_text(json.dumps(row))
        assert run("rerank", *model, *asked, **surroundings).returncode == 0
        ranked = json.loads((tmp_path / "out.jsonl").read_text())["ranked"]
        assert ranked == [{"index": 1, "score": pytest.approx(right, abs=1e-4)}]

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ({"document": "e"}, r"not an object with query \(str\), document \(str\), relevant \(int \| float\)"),
            ({"document": 1, "relevant": 1}, "not an object with"),
            ({"document": "e", "relevant": 0.5}, "the grade 0.5 is no whole number"),
            ({"document": "d", "relevant": False}, "the document 'd' has another grade for 'q' further up"),
        ],
    )
    def test_a_line_that_is_no_labelled_pair_is_named(self, tmp_path: Path, row: dict[str, Any], words: str):
        """Nor may one contradict another, as in judgments. The first one here is as pandas writes it."""
        path = tmp_path / "pairs.jsonl"
        first = {"query": "q", "document": "d", "relevant": 1.0}
        path.write_text(json.dumps(first) + "\n")
        assert read_labelled(path)[0].judgments == {"q": {"d": 1}}
        path.write_text(json.dumps(first) + "\n" + json.dumps({"query": "q", **row}))
        with pytest.raises(ConfigError, match=rf"pairs\.jsonl, line 2: {words}"):
            read_labelled(path)


def test_a_server_is_told_the_same_curve():
    """vLLM takes the sigmoid of (logit - mean) / sigma."""
    scorer = WordOverlap()
    evaluation = evaluate(Collection.load(collection_folder()), scorer, depths=(20,), measures=["nDCG@10"], cache=False)
    made = calibrate(evaluation, scorer).calibration
    options = made.pooler_options
    if made.curve.method == "platt":
        pooler = json.loads(options.split("'")[1])
        odds = (0.7 - pooler["logit_mean"]) / pooler["logit_sigma"]
        assert 1 / (1 + math.exp(-odds)) == pytest.approx(made.curve.probability(0.7))
