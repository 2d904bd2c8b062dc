"""Each pair is scored once; what is known is not asked; times are of calls that are worth comparing."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from rag_rerank import (
    BackendError,
    BackendUnavailable,
    ConfigError,
    DocumentRejected,
    FallbackScorer,
    Scorer,
    VLLMScorer,
)
from rag_rerank.evaluation import System, scoring
from rag_rerank.evaluation.scoring import Latency, ScoringRun
from rag_rerank.identity import Identity
from tests.faulty_server import FaultyServer, Request, Steps, http, on_scores, scores
from tests.scorers import WordOverlap, is_probe, overlap

DEPTHS = (2, 4)
TEXTS = ["a b", "b", "c", "a", "d a", "a b c"]


@contextmanager
def scoring_run(scorer: Scorer, folder: Path | None, depths: Sequence[int] = DEPTHS) -> Iterator[ScoringRun]:
    with closing(ScoringRun(scorer, depths, folder, deadline=60)) as made:
        yield made
        made.finish()


def pairs_of(scorer: WordOverlap) -> list[tuple[str, str]]:
    """Every pair that was scored, without the probes of `Scorer.identity`."""
    return [
        pair
        for queries, documents, _ in scorer.calls
        for pair in zip(queries * len(documents) if len(queries) == 1 else queries, documents, strict=True)
    ]


class TestScores:
    """Of every candidate as deep as the deepest depth."""

    @pytest.mark.parametrize("timed", [0, 200])
    def test_each_pair_is_scored_once(self, monkeypatch: pytest.MonkeyPatch, timed: int):
        """Query by query or many at once, with the same scores in their places."""
        monkeypatch.setattr(scoring, "TIMED_QUERIES", timed)
        scorer = WordOverlap()
        with scoring_run(scorer, None) as made:
            for number in range(5):
                made.add(f"q{number}", f"a {number}", TEXTS)
            made.add("short", "b", ["b"])
            made.add("empty", "b", [])
        assert made.scores == {
            **{f"q{number}": [overlap(f"a {number}", text) for text in TEXTS[:4]] for number in range(5)},
            "short": [1.0],
            "empty": [],
        }
        assert len(pairs_of(scorer)) == len(set(pairs_of(scorer))) == made.pairs_scored == 21
        assert made.pairs_cached == 0

    def test_a_second_time_nothing_is_scored(self, tmp_path: Path):
        """But the probes, and the times are those of the first time."""
        first, second = WordOverlap(), WordOverlap()
        for scorer in (first, second):
            with scoring_run(scorer, tmp_path) as made:
                for number in range(8):
                    made.add(f"q{number}", f"a {number}", TEXTS)
            if scorer is first:
                before = made
        assert second.calls == []
        assert made.scores == before.scores
        assert made.calls == before.calls
        assert (made.pairs_scored, made.pairs_cached) == (0, before.pairs_scored)

    def test_a_changed_text_is_scored_again_and_no_other(self, tmp_path: Path):
        """Of a document or a query."""
        with scoring_run(WordOverlap(), tmp_path) as made:
            made.add("q", "a b", TEXTS)
        scorer = WordOverlap()
        with scoring_run(scorer, tmp_path) as made:
            made.add("q", "a b", [TEXTS[0], "b changed", *TEXTS[2:]])
            made.add("r", "a c", TEXTS[:1])
        assert pairs_of(scorer) == [("a b", "b changed"), ("a c", "a b")]
        assert made.scores["q"] == [1.0, 0.5, 0.0, 0.5]
        assert (made.pairs_scored, made.pairs_cached) == (2, 3)

    def test_a_deeper_depth_scores_only_what_is_new(self, tmp_path: Path):
        """Those behind."""
        with scoring_run(WordOverlap(), tmp_path) as made:
            made.add("q", "a", TEXTS)
        scorer = WordOverlap()
        with scoring_run(scorer, tmp_path, (6,)) as made:
            made.add("q", "a", TEXTS)
        assert pairs_of(scorer) == [("a", "d a"), ("a", "a b c")]
        assert made.calls == {6: []}

    def test_an_interrupted_run_goes_on_where_it_was(self, tmp_path: Path):
        """With the scores of one that was not interrupted."""

        class Failing(WordOverlap):
            fails_at = 9

            def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
                if len(self.calls) == self.fails_at:
                    raise KeyboardInterrupt
                return super()._score(queries, documents, until)

        def run(scorer: Scorer, folder: Path) -> ScoringRun:
            with scoring_run(scorer, folder) as made:
                for number in range(12):
                    made.add(f"q{number}", f"a {number}", TEXTS)
            return made

        interrupted = Failing()
        with pytest.raises(KeyboardInterrupt):
            run(interrupted, tmp_path / "one")
        resumed = Failing()
        resumed.fails_at = -1
        result = run(resumed, tmp_path / "one")
        whole = Failing()
        whole.fails_at = -1
        assert result.scores == run(whole, tmp_path / "two").scores
        assert not set(pairs_of(interrupted)) & set(pairs_of(resumed))
        assert set(pairs_of(interrupted)) | set(pairs_of(resumed)) == set(pairs_of(whole))

    def test_what_is_refused_has_no_score(self, tmp_path: Path):
        """And is asked again another time; the others are kept."""

        class Choosy(WordOverlap):
            def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
                scores: list[float | None] = [*super()._score(queries, documents, until)]
                refused = [place for place, text in enumerate(documents) if text == "c"]
                if refused:
                    for place in refused:
                        scores[place] = None
                    raise DocumentRejected("too long", indices=refused, scores=scores)
                return [score or 0.0 for score in scores]

        for expected in ([("a", text) for text in TEXTS[:4]], [("a", "c")]):
            scorer = Choosy()
            with scoring_run(scorer, tmp_path) as made:
                made.add("q", "a", TEXTS)
            assert made.scores["q"] == [0.5 * 2, 0.0, None, 1.0]
            assert System("choosy", (), made.scores, 0, 0, ()).rejected == 1
            assert pairs_of(scorer) == expected

    def test_a_list_that_is_scored_together_is_never_split(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        """Nor are its scores taken for those of another list; at several depths it would have as many scores."""

        class Listwise(WordOverlap):
            listwise = True

            def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
                return [score + len(documents) for score in super()._score(queries, documents, until)]

        for timed in (0, 200):
            monkeypatch.setattr(scoring, "TIMED_QUERIES", timed)
            for depth, calls in ((4, 1), (4, 0), (2, 1)):
                scorer = Listwise()
                with scoring_run(scorer, tmp_path / str(timed), (depth,)) as made:
                    made.add("q", "a b", TEXTS)
                assert made.scores["q"] == [overlap("a b", text) + depth for text in TEXTS[:depth]]
                assert [documents for _, documents, _ in scorer.calls] == [TEXTS[:depth]] * calls
        with pytest.raises(ConfigError, match="word overlap scores a query's documents together.*one depth at a time"):
            ScoringRun(Listwise(), DEPTHS, None, deadline=60)

    def test_an_error_is_raised(self):
        """As it is."""

        class Down(WordOverlap):
            def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
                raise BackendUnavailable("nobody there")

        with pytest.raises(BackendUnavailable, match="nobody there"), scoring_run(Down(), None) as made:
            made.add("q", "a", TEXTS)

    @pytest.mark.parametrize("timed", [0, 200])
    @pytest.mark.parametrize("texts", [["bad"], ["bad", "bad"], ["a", "bad", "b"]])
    def test_a_document_that_fails_alone_is_not_taken_for_a_failing_scorer(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, timed: int, texts: list[str]
    ):
        """It has no score, whether it is scored with others or, when the run goes on, without."""

        class Odd(WordOverlap):
            def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
                scores = super()._score(queries, documents, until)
                return [math.nan if text == "bad" else score for text, score in zip(documents, scores, strict=True)]

        monkeypatch.setattr(scoring, "TIMED_QUERIES", timed)
        for pairs in (len(texts), texts.count("bad")):
            with scoring_run(Odd(), tmp_path) as made:
                made.add("q", "a", texts)
            assert made.scores["q"] == [None if text == "bad" else overlap("a", text) for text in texts]
            assert System("odd", (), made.scores, 0, 0, ()).rejected == texts.count("bad")
            assert made.pairs_scored == pairs

    def test_a_scorer_that_fails_later_is_not_taken_for_bad_documents(self):
        """Whatever the error is: nothing works then, so the run ends."""

        class Failing(WordOverlap):
            def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
                if not is_probe(documents):
                    raise BackendError("out of memory")
                return super()._score(queries, documents, until)

        with pytest.raises(BackendError, match="out of memory"), scoring_run(Failing(), None) as made:
            made.add("q", "a", ["x"])

    def test_scores_that_may_be_of_several_scorers_are_not_cached(self, tmp_path: Path):
        """Nobody knows which one answers the next time."""
        for _ in range(2):
            with scoring_run(FallbackScorer(WordOverlap(), WordOverlap()), tmp_path) as made:
                made.add("q", "a", TEXTS)
            assert made.pairs_cached == 0
        assert list(tmp_path.iterdir()) == []


def halved(request: Request) -> Steps:
    """What another model behind the same name answers."""
    answer = scores(request)
    for row in answer["data"]:
        row["score"] /= 2
    return [http(json.dumps(answer))]


class TestServers:
    """What a server serves may change without notice."""

    def run(self, server: FaultyServer, folder: Path, queries: int = 1) -> ScoringRun:
        with VLLMScorer(server.base_url) as scorer, scoring_run(scorer, folder) as made:
            for number in range(queries):
                made.add(f"q{number}", f"a {number}", TEXTS)
        return made

    def test_another_model_behind_the_same_name_has_a_cache_of_its_own(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        """The user is told what differs, once; and the first one's scores are not lost."""
        with FaultyServer() as server:
            first, second = self.run(server, tmp_path), self.run(server, tmp_path)
            assert (first.pairs_scored, second.pairs_scored, caplog.text) == (4, 0, "")
            server.behave = on_scores(halved)
            third, told = self.run(server, tmp_path), caplog.text
            fourth = self.run(server, tmp_path)
            server.behave = lambda request: None
            fifth = self.run(server, tmp_path)
        assert [result.pairs_scored for result in (third, fourth, fifth)] == [4, 0, 0]
        assert third.scores["q0"] == [score / 2 for score in first.scores["q0"] if score is not None]
        assert fourth.scores == third.scores
        assert fifth.scores == first.scores
        assert "is not the scorer whose scores are cached; scored anew: scores of the probe:" in told
        assert caplog.text == told

    def test_a_server_that_becomes_another_during_the_run_ends_it(self, tmp_path: Path):
        """Before a score of the new one is kept; a run from the beginning has each one's own."""
        with FaultyServer() as server:
            whole = self.run(server, tmp_path / "other", queries=6)

            before = len(server.score_requests)

            def replaced(request: Request) -> Steps | None:
                return halved(request) if len(server.score_requests) > before + 6 else None

            server.behave = on_scores(replaced)
            with pytest.raises(ConfigError, match="became another scorer during the run: scores of the probe"):
                self.run(server, tmp_path, queries=6)
            server.behave = lambda request: None
            again = self.run(server, tmp_path, queries=6)
        assert again.scores == whole.scores
        assert 0 < again.pairs_cached < whole.pairs_scored


class TestTimes:
    """What a query waits for, at each depth."""

    def test_queries_take_turns(self):
        """One is timed at the first depth, the next at the second; those with fewer candidates count for both."""
        scorer = WordOverlap()
        with scoring_run(scorer, None) as made:
            for number in range(4):
                made.add(f"q{number}", f"a {number}", TEXTS)
            made.add("short", "b", ["b"])
        counts = {depth: [count for count, _ in calls] for depth, calls in made.calls.items()}
        assert counts == {2: [2, 2, 1], 4: [4, 4, 1]}
        assert [len(documents) for _, documents, _ in scorer.calls] == [2, 2, 4, 2, 2, 4, 1]

    @pytest.mark.parametrize("has_probes", [True, False])
    def test_loading_is_in_no_time(self, monkeypatch: pytest.MonkeyPatch, has_probes: bool):
        """The first call is none of a query's, also where no scores are needed to tell who the scorer is."""
        clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)

        class Slow(WordOverlap):
            def identity(self, *, deadline: float | None = None) -> Identity:
                return super().identity(deadline=deadline) if has_probes else Identity({"model": "slow"})

            def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
                clock.now += 1.0 if clock.now else 300.0
                return super()._score(queries, documents, until)

        monkeypatch.setattr(scoring, "time", clock)
        with scoring_run(Slow(), None) as made:
            made.add("q", "a", TEXTS)
        assert made.calls == {2: [(2, 1.0)], 4: []}

    def test_after_enough_times_queries_are_scored_together(self, monkeypatch: pytest.MonkeyPatch):
        """In calls of about ten seconds."""
        monkeypatch.setattr(scoring, "TIMED_QUERIES", 2)
        scorer = WordOverlap()
        with scoring_run(scorer, None) as made:
            for number in range(50):
                made.add(f"q{number}", f"a {number}", TEXTS)
        assert [len(documents) for _, documents, _ in scorer.calls] == [2, 2, 4, 48 * 4]
        assert all(scores == [overlap("a x", text) for text in TEXTS[:4]] for scores in made.scores.values())

    def test_percentiles(self):
        """Linear between the two nearest; of no calls there are none."""
        assert Latency.of([]) is None
        assert Latency.of([(10, 2.0)]) == Latency(1, 2.0, 2.0, 2.0, 5.0)
        assert Latency.of([(10, float(second)) for second in range(101)]) == Latency(
            101, 50.0, 95.0, 99.0, pytest.approx(1010 / 5050)
        )
