"""Each pair is scored once; what is known is not asked; times are of calls that are worth comparing."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from rag_rerank import BackendUnavailable, DocumentRejected, Scorer, VLLMScorer
from rag_rerank.evaluation import scoring
from rag_rerank.evaluation.scoring import Asking, Latency
from tests.faulty_server import FaultyServer, Request, Steps, http, on_scores, scores
from tests.scorers import WordOverlap, overlap

DEPTHS = (2, 4)
TEXTS = ["a b", "b", "c", "a", "d a", "a b c"]


@contextmanager
def asking(scorer: Scorer, folder: Path | None, depths: Sequence[int] = DEPTHS) -> Iterator[Asking]:
    with closing(Asking(scorer, depths, folder, deadline=60)) as made:
        yield made
        made.finish()


def pairs_of(scorer: WordOverlap) -> list[tuple[str, str]]:
    """Every pair that was scored, without the probe."""
    probe = {query for query, _ in scoring.PROBE}
    found = []
    for queries, documents, _ in scorer.calls:
        rows = queries * len(documents) if len(queries) == 1 else queries
        found += [pair for pair in zip(rows, documents, strict=True) if pair[0] not in probe]
    return found


class TestScores:
    """Of every candidate as deep as the deepest depth."""

    @pytest.mark.parametrize("timed", [0, 200])
    def test_each_pair_is_scored_once(self, monkeypatch: pytest.MonkeyPatch, timed: int):
        """Query by query or many at once, with the same scores in their places."""
        monkeypatch.setattr(scoring, "TIMED", timed)
        scorer = WordOverlap()
        with asking(scorer, None) as made:
            for number in range(5):
                made.ask(f"q{number}", f"a {number}", TEXTS)
            made.ask("short", "b", ["b"])
            made.ask("empty", "b", [])
        assert made.result.scores == {
            **{f"q{number}": [overlap(f"a {number}", text) for text in TEXTS[:4]] for number in range(5)},
            "short": [1.0],
            "empty": [],
        }
        assert len(pairs_of(scorer)) == len(set(pairs_of(scorer))) == made.result.pairs_scored == 21
        assert made.result.pairs_cached == made.result.rejected == 0

    def test_a_second_time_nothing_is_scored(self, tmp_path: Path):
        """Not even the probe, and the times are those of the first time."""
        first, second = WordOverlap(), WordOverlap()
        for scorer in (first, second):
            with asking(scorer, tmp_path) as made:
                for number in range(8):
                    made.ask(f"q{number}", f"a {number}", TEXTS)
            if scorer is first:
                before = made.result
        assert second.calls == []
        assert made.result.scores == before.scores
        assert made.result.calls == before.calls
        assert (made.result.pairs_scored, made.result.pairs_cached) == (0, before.pairs_scored)

    def test_a_changed_text_is_scored_again_and_no_other(self, tmp_path: Path):
        """Of a document or a query."""
        with asking(WordOverlap(), tmp_path) as made:
            made.ask("q", "a b", TEXTS)
        scorer = WordOverlap()
        with asking(scorer, tmp_path) as made:
            made.ask("q", "a b", [TEXTS[0], "b changed", *TEXTS[2:]])
            made.ask("r", "a c", TEXTS[:1])
        assert pairs_of(scorer) == [("a b", "b changed"), ("a c", "a b")]
        assert made.result.scores["q"] == [1.0, 0.5, 0.0, 0.5]
        assert (made.result.pairs_scored, made.result.pairs_cached) == (2, 3)

    def test_a_deeper_depth_scores_only_what_is_new(self, tmp_path: Path):
        """Those behind."""
        with asking(WordOverlap(), tmp_path) as made:
            made.ask("q", "a", TEXTS)
        scorer = WordOverlap()
        with asking(scorer, tmp_path, (6,)) as made:
            made.ask("q", "a", TEXTS)
        assert pairs_of(scorer) == [("a", "d a"), ("a", "a b c")]
        assert made.result.calls == {6: []}

    def test_an_interrupted_run_goes_on_where_it_was(self, tmp_path: Path):
        """With the scores of one that was not interrupted."""

        class Failing(WordOverlap):
            fails_at = 9

            def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
                if len(self.calls) == self.fails_at:
                    raise KeyboardInterrupt
                return super()._score(queries, documents, until)

        def run(scorer: Scorer, folder: Path) -> scoring.Scored:
            with asking(scorer, folder) as made:
                for number in range(12):
                    made.ask(f"q{number}", f"a {number}", TEXTS)
            return made.result

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
            with asking(scorer, tmp_path) as made:
                made.ask("q", "a", TEXTS)
            assert made.result.scores["q"] == [0.5 * 2, 0.0, None, 1.0]
            assert made.result.rejected == 1
            assert pairs_of(scorer) == expected

    def test_an_error_is_raised(self):
        """As it is."""

        class Down(WordOverlap):
            def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
                raise BackendUnavailable("nobody there")

        with pytest.raises(BackendUnavailable, match="nobody there"), asking(Down(), None) as made:
            made.ask("q", "a", TEXTS)


class TestServers:
    """What a server serves may change without notice."""

    def test_its_scores_are_kept_as_long_as_its_answers_to_the_probe_are_the_same(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        """Another template or number format under the same name would spoil them; the user is told."""

        def other(request: Request) -> Steps:
            answer = scores(request)
            for row in answer["data"]:
                row["score"] /= 2
            return [http(json.dumps(answer))]

        def run() -> scoring.Scored:
            with VLLMScorer(server.base_url) as scorer, asking(scorer, tmp_path) as made:
                made.ask("q", "a", TEXTS)
            return made.result

        with FaultyServer() as server:
            first, second = run(), run()
            assert (first.pairs_scored, second.pairs_scored, caplog.text) == (4, 0, "")
            server.behave = on_scores(other)
            third = run()
        assert third.pairs_scored == 4
        assert third.scores["q"] == [score / 2 for score in first.scores["q"] if score is not None]
        assert "m does not score as it did" in caplog.text


class TestTimes:
    """What a query waits for, at each depth."""

    def test_queries_take_turns(self):
        """One is timed at the first depth, the next at the second; those with fewer candidates count for both."""
        scorer = WordOverlap()
        with asking(scorer, None) as made:
            for number in range(4):
                made.ask(f"q{number}", f"a {number}", TEXTS)
            made.ask("short", "b", ["b"])
        counts = {depth: [count for count, _ in calls] for depth, calls in made.result.calls.items()}
        assert counts == {2: [2, 2, 1], 4: [4, 4, 1]}
        assert [len(documents) for _, documents, _ in scorer.calls] == [4, 2, 2, 4, 2, 2, 4, 1]

    def test_loading_is_in_no_time(self):
        """The first call is for the probe."""

        class Slow(WordOverlap):
            def _score(self, queries: list[str], documents: list[str], until: float | None) -> list[float]:
                time.sleep(0.001 if self.calls else 0.3)
                return super()._score(queries, documents, until)

        with asking(Slow(), None) as made:
            made.ask("q", "a", TEXTS)
        ((_, seconds),) = made.result.calls[2]
        assert seconds < 0.3

    def test_after_enough_times_queries_are_asked_together(self, monkeypatch: pytest.MonkeyPatch):
        """In calls of about ten seconds."""
        monkeypatch.setattr(scoring, "TIMED", 2)
        scorer = WordOverlap()
        with asking(scorer, None) as made:
            for number in range(50):
                made.ask(f"q{number}", f"a {number}", TEXTS)
        assert [len(documents) for _, documents, _ in scorer.calls] == [4, 2, 2, 4, 48 * 4]
        assert all(scores == [overlap("a x", text) for text in TEXTS[:4]] for scores in made.result.scores.values())

    def test_percentiles(self):
        """Linear between the two nearest; of no calls there are none."""
        assert Latency.of([]) is None
        assert Latency.of([(10, 2.0)]) == Latency(1, 2.0, 2.0, 2.0, 5.0)
        assert Latency.of([(10, float(second)) for second in range(101)]) == Latency(
            101, 50.0, 95.0, 99.0, pytest.approx(1010 / 5050)
        )
