"""Who a scorer is: equal for the same, and for another one it says in words what differs."""

import json
import math
from dataclasses import asdict
from typing import Any

import pytest

from rag_rerank import BackendUnavailable, FallbackScorer, Scorer
from rag_rerank.identity import PROBES, Identity
from tests.scorers import Answers, WordOverlap


class Other(WordOverlap):
    """Another class with the same scores."""


class TestAnyScorer:
    """A back end that says nothing of itself is known by class, model and the scores of a few pairs."""

    def test_the_same_again_does_not_differ(self):
        """Two objects of the same kind are the same scorer."""
        assert WordOverlap().identity().differences(WordOverlap().identity()) == []

    def test_another_class_or_model_is_named(self):
        """With what is there now, and what was before."""
        renamed = WordOverlap()
        renamed.model_name = "word overlap 2"
        [difference] = renamed.identity().differences(WordOverlap().identity())
        assert difference == "model: word overlap 2, before word overlap"
        [difference] = Other().identity().differences(WordOverlap().identity())
        assert difference == "scorer: tests.test_identity.Other, before tests.scorers.WordOverlap"

    def test_other_scores_under_the_same_name_are_noticed(self):
        """Beyond rounding; a NaN is a failure of its own."""
        one = Answers(lambda documents: [0.5] * len(documents))
        near = Answers(lambda documents: [0.5001] * len(documents))
        far = Answers(lambda documents: [0.55] * len(documents))
        assert near.identity().differences(one.identity()) == []
        [difference] = far.identity().differences(one.identity())
        assert difference == "scores of the probe: 0.55, 0.55, 0.55, 0.55, before 0.5, 0.5, 0.5, 0.5"

    def test_facts_are_added(self):
        """What a back end says about its settings, in `_facts`."""

        class Set(WordOverlap):
            def _facts(self, until: float | None) -> dict[str, str]:
                return {"depth": "3"}

        assert Set().identity().facts["depth"] == "3"

    def test_one_that_does_not_answer_has_none(self):
        """It can't be told whether it is the same."""

        def down(documents: list[str]) -> list[float]:
            raise BackendUnavailable("can't connect")

        with pytest.raises(BackendUnavailable):
            Answers(down).identity()

    def test_it_outlives_json(self):
        """As runs and caches keep it."""
        identity = WordOverlap().identity()
        again = Identity(**json.loads(json.dumps(asdict(identity))))
        assert again.differences(identity) == []
        assert (again.steady, again.place) == (identity.steady, identity.place)

    def test_probes_of_different_number_differ(self):
        """One that has none is not the same as one that has."""
        identity = WordOverlap().identity()
        assert len(identity.probes) == len(PROBES)
        assert Identity(identity.facts).differences(identity)
        assert not any(math.isnan(score) for score in identity.probes)


class TestFallback:
    """Several scorers are who their parts are."""

    def test_each_part_counts(self):
        """Another second one is another scorer, and so is another order."""
        one, two = WordOverlap(), Answers(lambda documents: [0.5] * len(documents))
        identity = FallbackScorer(one, two).identity()
        assert FallbackScorer(one, two).identity().differences(identity) == []
        assert FallbackScorer(one).identity().differences(identity)
        assert FallbackScorer(two, one).identity().differences(identity)
        assert not identity.steady

    def test_what_it_accepts_depends_on_its_parts(self):
        """An instruction must reach whichever answers; an image only one that takes it."""

        class Capable(Scorer):
            model_name = "capable"
            accepts_images = accepts_instruction = remote = True

            def _score(self, queries: Any, documents: Any, until: Any, instruction: str | None = None) -> list[float]:
                return [1.0] * len(documents)

        both: Scorer = FallbackScorer(Capable(), Answers(lambda documents: [1.0]))
        assert (both.accepts_images, both.accepts_instruction, both.remote) == (True, False, False)
        both = FallbackScorer(Capable(), Capable())
        assert (both.accepts_instruction, both.remote, both.listwise) == (True, True, False)
        assert both.score("q", ["a"], instruction="i") == [1.0]
