"""`evaluate`: the figures that were measured elsewhere, and what must hold whatever is evaluated."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_rerank import Calibrated, ConfigError, LocalScorer, Scorer
from rag_rerank.embedded import collection_folder
from rag_rerank.evaluation import Collection, Evaluation, Kept, evaluate, read_run, write_run
from rag_rerank.evaluation.results import reranked
from tests.evaluation.collections import SHARED, small
from tests.scorers import Answers, WordOverlap
from tests.test_calibration import calibration


class Known(Scorer):
    """Gives scores that are known beforehand."""

    model_name = "known"

    def __init__(self, scores: dict[tuple[str, str], float]) -> None:
        self._scores = scores

    def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
        rows = queries * len(documents) if len(queries) == 1 else queries
        return [self._scores.get(pair, 0.0) for pair in zip(rows, documents, strict=True)]


def ahead(local: LocalScorer, collection: Collection, evaluated: Evaluation) -> Known:
    """The model's own scores of all candidates, document by document: embedded once each, that takes a tenth."""
    pairs = [
        (collection.queries[query], collection.documents[name])
        for query, found in evaluated.candidates.items()
        for name in found[:100]
    ]
    pairs.sort(key=lambda pair: pair[1])
    queries, documents = zip(*pairs, strict=True)
    return Known(dict(zip(pairs, local.score(queries, documents), strict=True)))


class TestExpectedValues:
    """As ir-measures and the published runs have them."""

    @pytest.mark.slow
    def test_python_faq(self, local: LocalScorer):
        """BM25 0.5354, reranked by MiniLM 0.7884, at best 0.9235: it helps clearly, 86 up and 15 down."""
        collection = Collection.load(collection_folder())
        scorer = ahead(local, collection, evaluate(collection, {}))
        found = evaluate(collection, scorer, measures=("nDCG@10", "MRR@10", "R@100"), cache=False)
        (system,) = found.systems
        gain = system.deepest.gains["nDCG@10"]
        assert sum(found.before["nDCG@10"].values()) / 170 == pytest.approx(0.5354, abs=1e-3)
        assert system.deepest.mean("nDCG@10") == pytest.approx(0.7884, abs=1e-3)
        assert system.deepest.mean("MRR@10") == pytest.approx(0.7490, abs=1e-3)
        assert system.deepest.mean("R@100") == pytest.approx(0.9235, abs=1e-3)
        assert sum(found.ceilings[100]["nDCG@10"].values()) / 170 == pytest.approx(0.9235, abs=1e-3)
        assert (gain.low, gain.high) == pytest.approx((0.193, 0.312), abs=0.003)
        assert (gain.wins, gain.losses, gain.verdict) == (86, 15, "helps")
        assert system.enough("nDCG@10").depth == 100

    @pytest.mark.parametrize(
        ("name", "before", "after", "recall", "interval", "wins", "losses", "ceiling", "verdict"),
        [
            ("python_faq", 0.5354, 0.7884, 0.9235, (0.193, 0.312), 86, 15, 0.9235, "helps"),
            ("scifact", 0.6791, 0.6635, 0.9127, (-0.049, 0.019), 62, 65, 0.9137, "no clear difference"),
            ("scifact_mini", 0.6868, 0.7144, 0.9500, (-0.020, 0.076), 29, 15, 0.9500, "no clear difference"),
            ("cranfield", 0.5186, 0.5142, 0.7494, (-0.028, 0.018), 106, 99, 0.8570, "no clear difference"),
            ("xquad_en", 0.9672, 0.9483, 0.9966, (-0.029, -0.009), 59, 108, 0.9966, "hurts"),
        ],
    )
    def test_runs_from_files(
        self,
        name: str,
        before: float,
        after: float,
        recall: float,
        interval: tuple[float, float],
        wins: int,
        losses: int,
        ceiling: float,
        verdict: str,
    ):
        """A BM25 run, and another run's scores for a scorer: all three verdicts, as they were measured elsewhere."""
        if not (SHARED / name).is_dir():
            pytest.skip(f"{SHARED} is not there")
        first = read_run(SHARED / "runs" / f"{name}.bm25.trec.gz")
        second = read_run(SHARED / "runs" / f"{name}.bm25-minilm.trec.gz")
        collection = Collection.load(SHARED / name)
        scores = {
            (collection.queries[query], collection.documents[document]): score
            for query, ranking in second.items()
            for document, score in ranking.items()
        }
        found = evaluate(collection, Known(scores), run=first, depths=[100], measures=("nDCG@10", "R@100"), cache=False)
        level = found.systems[0].deepest
        gain = level.gains["nDCG@10"]
        assert sum(found.before["nDCG@10"].values()) / len(found.candidates) == pytest.approx(before, abs=2e-4)
        assert level.mean("nDCG@10") == pytest.approx(after, abs=2e-4)
        assert level.mean("R@100") == pytest.approx(recall, abs=2e-4)
        assert sum(found.ceilings[100]["nDCG@10"].values()) / len(found.candidates) == pytest.approx(ceiling, abs=2e-4)
        assert (gain.low, gain.high) == pytest.approx(interval, abs=0.003)
        assert (gain.wins, gain.losses) == (pytest.approx(wins, abs=1), pytest.approx(losses, abs=1))
        assert gain.verdict == verdict


class TestOrder:
    """What is measured is what `Scorer.rerank` gives."""

    @given(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=8),
        st.integers(1, 9),
    )
    def test_the_first_are_reranked_and_the_rest_stays(self, scores: list[float], depth: int):
        """Ties in the order of the first stage."""
        names = [f"d{number}" for number in range(len(scores))]
        with Answers(lambda documents: scores[: len(documents)]) as scorer:
            ranked = scorer.rerank("q", names[:depth])
        assert reranked(names, scores, depth) == [names[item.index] for item in ranked] + names[depth:]

    def test_what_was_refused_comes_behind_what_was_scored(self):
        """As with on_error="passthrough"."""
        assert reranked(["a", "b", "c", "d", "e"], [0.1, None, 0.9, None, 5.0], 4) == ["c", "a", "b", "d", "e"]

    @given(st.data())
    def test_nothing_is_better_than_at_best(self, data: st.DataObject):
        """For every query, measure and depth, whatever the scorer says; and deeper is at best better."""
        collection = small()
        values = st.floats(-1, 1)
        scores = {
            (query, text): data.draw(values)
            for query in collection.queries.values()
            for text in collection.documents.values()
        }
        depths = [1, 2, 3, 7]
        found = evaluate(collection, Known(scores), depths=depths, measures=("nDCG@2", "RR", "AP", "R@1"), cache=False)
        for level in found.systems[0].levels:
            for measure, best in found.ceilings[level.depth].items():
                for query, value in best.items():
                    assert value >= level.values[measure][query] - 1e-9
                    assert value >= found.before[measure][query] - 1e-9
        for shallow, deep in pairwise(depths):
            for measure, best in found.ceilings[deep].items():
                assert all(best[query] >= value - 1e-9 for query, value in found.ceilings[shallow][measure].items())


class TestEvaluate:
    """One call."""

    def test_by_hand(self):
        """One query, the right document found second, put first."""
        collection = Collection({"x": "bear", "y": "bear honey"}, {"q": "bear"}, {"q": {"y": 1}})
        scorer = Answers(lambda documents: [float(len(text)) for text in documents])
        found = evaluate(collection, scorer, depths=[2], measures=["nDCG@10", "MRR"], cache=False)
        assert found.before == {"nDCG@10": {"q": pytest.approx(1 / math.log2(3))}, "MRR": {"q": 0.5}}
        (level,) = found.systems[0].levels
        assert level.values == {"nDCG@10": {"q": 1.0}, "MRR": {"q": 1.0}}
        assert level.gains["MRR"].gain == 0.5
        assert found.ranking(found.systems[0], "q") == ["y", "x"]
        assert found.run(found.systems[0]) == {"q": [("y", 10.0), ("x", 4.0)]}

    def test_several_scorers_are_compared_with_each_other(self):
        """Each two at the deepest depth: the second gains what the first loses."""
        good, bad = WordOverlap(), Answers(lambda documents: [-float(len(text)) for text in documents])
        found = evaluate(small(), {"good": good, "bad": bad, "good again": WordOverlap()}, cache=False)
        assert [pair[:2] for pair in found.between] == [("good", "bad"), ("good", "good again"), ("bad", "good again")]
        by_name = {system.name: system.deepest.mean("nDCG@10") for system in found.systems}
        for first, second, gains in found.between:
            assert gains["nDCG@10"].gain == pytest.approx(by_name[second] - by_name[first])
        assert found.between[1][2]["nDCG@10"].gain == 0.0

    def test_queries_without_candidates_count_as_nothing(self):
        """They are named, and nothing is asked about them; where there are no candidates at all, there is no result."""
        collection = Collection({"d": "bear"}, {"q": "submarine", "r": "bear"}, {"q": {"d": 1}, "r": {"d": 1}})
        scorer = WordOverlap()
        found = evaluate(collection, scorer, measures=["RR"], cache=False)
        assert found.before == {"RR": {"q": 0.0, "r": 1.0}}
        assert all("submarine" not in queries for queries, _, _ in scorer.calls)
        assert found.without_candidates == found.as_json()["queries_without_candidates"] == ["q"]
        with pytest.raises(ConfigError, match="no candidate for any of 1 queries as english: name the language"):
            evaluate(collection, scorer, limit=1, cache=False)
        for text in ("", "x", "the"):  # texts without a word that is indexed
            with pytest.raises(ConfigError, match="no candidate for any of 2 queries"):
                evaluate(replace(collection, documents={"d": text}), scorer, cache=False)

    def test_empty_documents_are_scored_as_any_other(self):
        """Two of cranfield's are."""
        collection = Collection({"d": "", "e": "bear"}, {"q": "bear"}, {"q": {"d": 1}})
        found = evaluate(collection, WordOverlap(), run={"q": {"d": 1.0, "e": 0.5}}, measures=["RR"], cache=False)
        assert found.systems[0].scores == {"q": [0.0, 1.0]}

    def test_a_run_is_measured_as_deep_as_it_is(self):
        """However few of it are reranked, so that its MAP is that of any other tool."""
        collection, run = small(), {"q1": {"d1": 3.0, "d5": 2.0, "d2": 1.0}}
        found = evaluate(collection, WordOverlap(), run=run, depths=[1], measures=["AP"], cache=False)
        assert found.before["AP"]["q1"] == pytest.approx((1 + 2 / 3) / 2)
        assert found.candidates["q1"] == ["d1", "d5", "d2"]
        assert found.systems[0].scores["q1"] == [pytest.approx(2 / 3)]

    def test_what_is_written_as_a_run_measures_the_same(self, tmp_path: Path):
        """In this package as in any other: ties and unscored documents keep their places."""
        found = evaluate(small(), WordOverlap(), depths=[1, 2], cache=False)
        write_run(tmp_path / "run.trec", found.run(found.systems[0]))
        again = evaluate(small(), {}, run=read_run(tmp_path / "run.trec"))
        assert again.before == found.systems[0].deepest.values

    def test_only_the_first_queries(self):
        """And means over them."""
        found = evaluate(small(), WordOverlap(), limit=2, cache=False)
        assert list(found.candidates) == list(found.before["MAP"]) == ["q1", "q2"]

    def test_progress_is_told(self):
        """From nothing to all, for retrieval and for each scorer."""
        told: list[tuple[str, int, int]] = []
        evaluate(small(), {"a": WordOverlap()}, cache=False, progress=lambda *what: told.append(what))
        assert told == [("BM25", done, 3) for done in range(4)] + [("a", done, 3) for done in range(4)]

    def test_scores_are_kept_in_the_cache_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        """The usual one unless told, or none."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        evaluate(small(), WordOverlap(), cache=False)
        assert not (tmp_path / "home").exists()
        evaluate(small(), WordOverlap())
        evaluate(small(), WordOverlap(), cache=tmp_path / "mine")
        assert len([*(tmp_path / "home" / "rag_rerank").iterdir()]) == len([*(tmp_path / "mine").iterdir()]) == 1
        again = WordOverlap()
        assert evaluate(small(), again).systems[0].pairs_scored == 0
        assert again.calls == []

    def test_policies_are_compared_by_what_a_prompt_gets(self):
        """Two queries: two of three kept documents are relevant, and two of the three relevant candidates are kept."""
        texts = {"x": "a" * 40, "y": "b" * 80, "z": "é" * 10}
        collection = Collection(texts, {"q": "q?", "r": "r?"}, {"q": {"x": 1, "y": 2, "gone": 1}, "r": {"z": 1}})
        run = {"q": {"x": 2.0, "y": 1.0}, "r": {"x": 2.0, "z": 1.0}}
        scorer = Known(
            {("q?", texts["x"]): 0.9, ("q?", texts["y"]): 0.4, ("r?", texts["x"]): 0.8, ("r?", texts["z"]): 0.6}
        )
        scorer.calibrated = True
        policies = ["score_threshold=0.5", "min_precision=0.75", "score_threshold=0.85", "top_n=1 score_threshold=0.95"]
        found = evaluate(collection, scorer, run=run, policies=policies, cache=False)
        by_policy = {each.policy: each for each in found.systems[0].kept}
        assert list(by_policy) == policies
        assert by_policy["score_threshold=0.5"] == Kept("score_threshold=0.5", 2 / 3, 2 / 3, 1.5, 100 / 4 / 2, 0)
        assert by_policy["min_precision=0.75"] == Kept("min_precision=0.75", 1 / 2, 1 / 3, 1.0, 80 / 4 / 2, 0)
        assert by_policy["score_threshold=0.85"] == Kept("score_threshold=0.85", 1.0, 1 / 3, 0.5, 40 / 4 / 2, 1)
        assert by_policy[policies[3]] == Kept(policies[3], None, 0.0, 0.0, 0.0, 2)
        assert found.as_json()["systems"][0]["kept"][0]["tokens"] == 12.5

    @pytest.mark.parametrize(
        ("policy", "words"),
        [
            ("top_n=0", "'top_n=0' is no policy.*top_n must be at least 1"),
            ("best=3", "'best=3' is no policy"),
            ("top_n", "'top_n' is no policy"),
            ("top_n=many", "'top_n=many' is no policy"),
            ("min_precision=0.8", "min_precision needs probabilities"),
        ],
    )
    def test_a_policy_that_can_not_be_is_told_before_anything_is_scored(self, policy: str, words: str):
        scorer = WordOverlap()
        with pytest.raises(ConfigError, match=words):
            evaluate(small(), scorer, policies=[policy], cache=False)
        assert scorer.calls == []

    def test_policies_of_probabilities_are_shown_where_there_are_any(self):
        raw = evaluate(small(), {"raw": WordOverlap()}, cache=False).systems[0]
        made = Calibrated(WordOverlap(), calibration(WordOverlap()))
        calibrated = evaluate(small(), {"calibrated": made}, cache=False).systems[0]
        assert [each.policy for each in raw.kept] == ["top_n=3", "top_n=5", "top_n=10"]
        assert {"score_threshold=0.5", "min_precision=0.8"} < {each.policy for each in calibrated.kept}

    def test_as_json_it_is_complete(self):
        """Every depth, measure and query, and how it was measured; nothing that JSON has no word for."""
        found = evaluate(small(), {"a": WordOverlap(), "b": WordOverlap()}, depths=[1, 3], cache=False)
        written = json.loads(json.dumps(found.as_json(), allow_nan=False))
        assert written["ndcg_gain"] == "linear"
        assert written["interval"] == {"confidence": 0.95, "method": "paired bootstrap", "resamples": 10_000, "seed": 0}
        assert [system["name"] for system in written["systems"]] == ["a", "b"]
        for system in written["systems"]:
            assert [level["depth"] for level in system["depths"]] == [1, 3]
            for level in system["depths"]:
                assert level["per_query"].keys() == level["gains"].keys() == set(found.measures)
                assert all(values.keys() == {"q1", "q2", "q3"} for values in level["per_query"].values())
                assert level["gains"]["MAP"]["verdict"] in ("helps", "hurts", "no clear difference")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"depths": []}, "depths is empty"),
            ({"depths": [0]}, "a depth is a number of candidates, at least 1; got 0"),
            ({"depths": [True]}, "got True"),
            ({"depths": [2.5]}, r"got 2\.5"),
            ({"measures": []}, "nothing to measure"),
            ({"measures": ["nDGC@10"]}, "is not known"),
            ({"limit": 0}, "no queries"),
            ({"run": {"other": {"d1": 1.0}}}, "none of the collection's queries"),
            ({"run": {"q1": {"other": 1.0}}}, r"the document 'other' \(for the query 'q1'\), the collection has not"),
        ],
    )
    def test_what_cant_be_is_said_before_anything_is_scored(self, arguments: dict[str, object], words: str):
        """In one line."""
        scorer = WordOverlap()
        with pytest.raises(ConfigError, match=words):
            evaluate(small(), scorer, cache=False, **arguments)
        assert scorer.calls == []
