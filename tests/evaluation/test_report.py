"""The report: whole, honest, readable in light and dark, and nothing in it is taken for a command."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from rag_rerank.cli.options import show
from rag_rerank.evaluation import Collection, Evaluation, evaluate
from rag_rerank.evaluation.report import render
from tests.evaluation.collections import small
from tests.scorers import Answers, WordOverlap

VOID = {"meta", "br", "hr", "img", "input", "link", "use", "path", "rect", "circle"}
EVIL = '<script>alert("x")</script><img src=http://evil/x onerror=1>{{ 7919 * 7919 }}$\\alpha$'


class Page(HTMLParser):
    """The elements of a page; fails where they do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def evaluation(queries: int = 3, better: int = 3, worse: int = 0, systems: int = 1) -> Evaluation:
    """Of queries with two candidates, the right one first or second; `better` are put right, `worse` wrong."""
    names = [f"q{number}" for number in range(queries)]
    documents = {f"{name}{side}": f"text {side} of {name}" for name in names for side in "ab"}
    judgments = {name: {f"{name}{'b' if number < better else 'a'}": 1} for number, name in enumerate(names)}
    collection = Collection(documents, {name: f"query {name}?" for name in names}, judgments, "made")
    run = {name: {f"{name}a": 2.0, f"{name}b": 1.0} for name in names}
    turned = {f"text b of {name}" for name in names[: better + worse]}
    scorer = Answers(lambda texts: [float(text in turned) for text in texts])
    named = {f"scorer {number}": scorer for number in range(systems)}
    return evaluate(collection, named, run=run, depths=[1, 2], measures=["nDCG@10", "MRR@10"], cache=False)


class TestPage:
    """One file."""

    def test_it_is_well_formed_and_needs_nothing_else(self):
        """No address is loaded, no style sheet, no image, no font, no script from elsewhere."""
        html = render(evaluate(small(), {"a": WordOverlap(), "b": WordOverlap()}, cache=False))
        page = Page(html)
        assert html.startswith("<!doctype html>")
        assert not re.search(r"https?://|//[a-z]|@import|url\((?!#)", html)
        loading = {"src", "srcset", "action", "poster", "data"}
        assert not [tag for tag, attributes in page.tags if loading & attributes.keys()]
        links = {
            attributes[name] or ""
            for _, attributes in page.tags
            for name in ("href", "xlink:href")
            if name in attributes
        }
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert all(link.startswith("#") and link[1:] in ids for link in links)
        assert len(ids) == len(set(ids))
        assert {"viewport", "color-scheme"} <= {attributes.get("name") for _, attributes in page.tags}

    def test_texts_are_texts(self):
        """Of documents, queries, ids, and the names of collection, run and reranker."""
        collection = Collection({EVIL: EVIL, "b": "x"}, {EVIL: EVIL}, {EVIL: {EVIL: 1}}, EVIL)
        scorer = Answers(lambda texts: [float(len(text)) for text in texts])
        run = {EVIL: {"b": 2.0, EVIL: 1.0}}
        found = evaluate(collection, {EVIL: scorer, "b": scorer}, run=run, first_stage=EVIL, cache=False)
        html = render(found)
        page = Page(html)
        assert [tag for tag, _ in page.tags].count("script") == 1  # the page's own
        assert not [tag for tag, _ in page.tags if tag == "img"]
        assert page.text.count(EVIL) > 8
        assert "62710561" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)

    def test_both_colour_schemes_have_all_colours(self):
        """And nothing is coloured but through them."""
        html = render(evaluate(small(), {f"s{number}": WordOverlap() for number in range(7)}, cache=False))
        light, dark = re.findall(r":root \{([^}]*)\}", html)
        variables = [set(re.findall(r"(--[\w-]+):", scheme)) for scheme in (light, dark)]
        assert variables[0] == variables[1]
        assert "prefers-color-scheme: dark" in html
        used = set(re.findall(r"var\((--[\w-]+)\)", html))
        assert used <= variables[0]
        assert {f"--series-{number}" for number in range(1, 7)} <= used
        outside = html.replace(light, "").replace(dark, "")
        assert not re.search(r"(?:fill|stroke|color|background)[:=]\s*\"?(?:#|rgb|black|white)", outside)

    def test_plots_have_letters_and_fit_the_width(self):
        """Text as text, in the font of the page, scaled to the room there is, with a label for those who can't see."""
        html = render(evaluate(small(), WordOverlap(), cache=False))
        plots = re.findall(r'<svg class="plot".*?</svg>', html, flags=re.DOTALL)
        assert len(plots) == 3
        for plot in plots:
            head = plot[: plot.index(">")]
            assert "viewBox=" in head
            assert "aria-label=" in head
            assert not re.search(r"\b(?:width|height)=", head)
            assert "<text" in plot
            assert "DejaVu" not in plot
        assert re.search(r"\.plot \{ width: 100%", html)

    def test_a_thousand_queries_stay_usable(self):
        """20 of each kind with texts, the table of all of them folded."""
        html = render(evaluation(1000, better=600, worse=300))
        page = Page(html)
        classes = [attributes.get("class") for _, attributes in page.tags]
        assert classes.count("case") == 40
        assert "The 20 that lost most" in page.words
        assert "nDCG@10 of all 1,000 queries" in page.words
        assert len(html) < 1_500_000


class TestHonesty:
    """What is said is what was found."""

    @pytest.mark.parametrize(
        ("better", "worse", "words", "not_words"),
        [
            (20, 0, "▲ helps", ["▼ hurts", "may be luck", "leave it"]),
            (0, 20, "▼ hurts", ["▲ helps", "may be luck"]),
            (6, 5, "≈ no clear difference", ["▼ hurts", "▲ helps", "leave it"]),
        ],
    )
    def test_three_verdicts_are_told_apart(self, better: int, worse: int, words: str, not_words: list[str]):
        """At the top, with the interval and the queries on both sides."""
        page = Page(render(evaluation(40, better, worse)))
        answer = page.words.partition("Before, after, and at best")[0]
        assert words in answer
        assert not [each for each in not_words if each in answer]
        assert f"{better} queries better, {worse} worse, {40 - better - worse} the same" in answer
        assert "with 95 % confidence" in answer

    def test_it_says_how_it_was_measured(self):
        """Gain, depth, number of queries, interval, what was scored; and that few queries are few."""
        words = Page(render(evaluation(3))).words
        for part in (
            "nDCG has linear gain",
            "the first 1, 2 of them",
            "3 judged queries",
            "10,000 paired bootstrap resamples",
            "one will exclude 0",
            "With fewer than 30 queries",
            "scorer 0: 6 pairs of query and document scored, 0 from the cache",
        ):
            assert part in words
        assert "fewer than 30" not in Page(render(evaluation(30))).words

    def test_nothing_known_of_times_is_nothing_said(self):
        """No plot and no column."""
        found = evaluation(3)
        (system,) = found.systems
        untimed = replace(system, levels=tuple(replace(level, latency=None) for level in system.levels))
        words = Page(render(replace(found, systems=(untimed,)))).words
        assert "median ms" not in words
        assert "the time that reranking adds" not in words
        assert "median ms" in Page(render(found)).words

    def test_a_first_stage_alone(self):
        """Its measures, and what could be reached."""
        words = Page(render(evaluate(small(), {}))).words
        assert "Nothing was reranked" in words
        assert "Query by query" not in words

    def test_what_policies_keep(self):
        """For each reranker."""
        words = Page(render(evaluation(3))).words
        assert "What a prompt gets to read: scorer 0" in words
        assert "top_n=3" in words

    def test_the_rerankers_are_compared(self):
        """Where there are several."""
        assert "The rerankers compared" in Page(render(evaluation(3, systems=2))).words
        assert "The rerankers compared" not in Page(render(evaluation(3))).words

    def test_an_enough_depth_is_named(self):
        """Where the deepest is not clearly better, but reranking helps."""
        collection, run = small(), {"q1": {"d1": 3.0, "d2": 2.0, "d3": 1.0}}
        scorer = Answers(lambda texts: [float("black" in text) for text in texts])
        found = evaluate(collection, scorer, run=run, depths=[2, 3], limit=1, cache=False)
        words = Page(render(found)).words
        assert "Reranking 3 candidates is not clearly better than 2: it changes nDCG@10 by +0.000 to +0.000" in words


def test_a_bar_in_a_name_parts_no_cells():
    """In the terminal, where bars do."""
    console = Console(file=io.StringIO(), width=200)
    show(evaluate(small(), {"a│b": WordOverlap(), "c": WordOverlap()}, cache=False), on=console)
    assert "a|b … c ≈ +0.0000 +0.000 … +0.000 0/0" in " ".join(console.file.getvalue().split())


class TestCases:
    """What happened to single queries."""

    def test_those_that_lost_most_come_first(self):
        """And those that changed nothing are no case."""
        words = Page(render(evaluation(10, better=4, worse=3))).words
        assert re.findall(r"· query q(\d)", words) == ["4", "5", "6", "3", "2", "1", "0"]
        assert "All 3 that lost" in words
        assert "All 4 that gained" in words

    def test_only_so_many_are_shown(self):
        """Of those that lost, and of those that gained."""
        words = Page(render(evaluation(50, better=22, worse=21))).words
        assert len(re.findall(r"· query q\d", words)) == 40
        assert "The 20 that lost most" in words
        assert "The 20 that gained most" in words

    def test_a_case_has_the_texts_and_the_ranks(self):
        """Of what is relevant, and of what was and is on top."""
        words = Page(render(evaluation(10, better=4, worse=3))).words
        case = words[words.index("query q4?") :].partition("query q5?")[0]
        relevant, _, tops = case.partition("On top after reranking")
        assert "nDCG@10 1.0000 → 0.6309 · query q4" in relevant
        assert "✓ relevant 1 → 2 score 0.0000 text a of q4" in relevant
        after, _, before = tops.partition("On top before")
        assert re.findall(r"text [ab] of q4", after)[::2] == ["text b of q4", "text a of q4"]
        assert re.findall(r"text [ab] of q4", before)[::2] == ["text a of q4", "text b of q4"]

    def test_long_texts_are_cut_and_missing_ones_are_said(self):
        """A relevant document that the first stage did not find has no ranks."""
        collection = Collection({"a": "y" * 5000, "b": "x"}, {"q": "x?"}, {"q": {"a": 1, "gone": 1, "b": 0}})
        run = {"q": {"a": 2.0, "b": 1.0}}
        found = evaluate(collection, Answers(lambda texts: [-float(len(text)) for text in texts]), run=run, cache=False)
        page = Page(render(found))
        assert "✓ relevant 1 → 2" in page.words
        assert "✓ relevant not found → not found" in page.words
        assert f"{'y' * 1500} …" in page.text
        assert "y" * 1591 not in page.text  # 90 are the summary's
