"""What people look at, in a real browser: the report of `rag-rerank eval`, and a reranked list in a notebook."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from rag_rerank import Ranked
from rag_rerank.display import Reranked
from rag_rerank.evaluation import Collection, Evaluation, evaluate
from rag_rerank.evaluation.report import render
from tests import browser as browsers
from tests.browser import CONTRAST, shown
from tests.scorers import Answers

LEGIBLE = 4.5  # WCAG 2.2, level AA
HOSTILE = '<script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>\x1b[31m\u202e</table></details>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsers.running() as browser:
        yield browser


def evaluation(queries: int, text: str = "text") -> Evaluation:
    """Of queries with twelve candidates: a third gets better, a third worse; `text` is in all that can be shown."""
    names = [f"q{number}" for number in range(queries)]
    documents = {f"{name}-{place}": f"{text} {name} {place} " * 30 for name in names for place in range(12)}
    judgments = {name: {f"{name}-{number % 12}": 1} for number, name in enumerate(names)}
    asked = {name: f"{text} {name}?" for name in names}
    run = {name: {f"{name}-{place}": float(-place) for place in range(12)} for name in names}

    def scores(texts: list[str]) -> list[float]:
        return [float(hash_of(each) % 1000) for each in texts]

    collection = Collection(documents, asked, judgments, f"made {text}")
    scorers = {f"first {text}": Answers(scores), "second": Answers(lambda texts: [-score for score in scores(texts)])}
    return evaluate(collection, scorers, run=run, first_stage=f"run {text}", depths=[5, 10], cache=False)


def hash_of(text: str) -> int:
    """The same in every process."""
    return sum(position * ord(letter) for position, letter in enumerate(text[-400:], 1))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 60 queries, two rerankers, hostile texts."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(render(evaluation(60, HOSTILE)), encoding="utf-8")
    return file


class TestReport:
    """`rag-rerank eval --html`."""

    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    def test_every_text_is_legible(self, browser: Browser, report: Path, dark: bool):
        """In both colour schemes, plots and folded parts too."""
        with shown(browser, report, dark=dark) as found:
            found.page.evaluate("() => document.querySelectorAll('details').forEach((each) => { each.open = true })")
            contrasts = found.page.evaluate(CONTRAST)
            assert len(contrasts) > 300
            assert contrasts[0][0] >= LEGIBLE, contrasts[:5]
            assert (found.background == "rgb(255, 255, 255)") is not dark

    @pytest.mark.parametrize("width", [320, 360, 768, 1400])
    def test_no_screen_is_too_narrow(self, browser: Browser, report: Path, width: int):
        """Tables scroll within themselves, the page only down; letters in plots stay at 9 pixels and more."""
        with shown(browser, report, width=width) as found:
            found.page.evaluate("() => document.querySelectorAll('details').forEach((each) => { each.open = true })")
            assert found.overflow <= 0
            heights = found.page.evaluate(
                "() => [...document.querySelectorAll('.plot text')].map((each) => each.getBoundingClientRect().height)"
            )
            assert len(heights) > 20
            assert min(heights) >= 9

    def test_hostile_text_stays_text_and_nothing_is_loaded(self, browser: Browser, report: Path):
        """No script of it runs, no address is asked, no tag of it closes one of ours."""
        with shown(browser, report) as found:
            found.page.evaluate("() => document.querySelectorAll('details').forEach((each) => { each.open = true })")
            assert found.asked == []
            assert found.trouble == []
            assert found.page.locator("img").count() == 0
            assert found.page.locator("main h2").last.text_content() == "How it was measured"
            assert 'alert("x")' in (found.page.locator(".answers").text_content() or "")

    def test_a_thousand_queries_can_be_sorted(self, browser: Browser, tmp_path: Path):
        """By what they gained, in both directions; the folded table unfolds, the page is not wider for it."""
        file = tmp_path / "report.html"
        file.write_text(render(evaluation(1000)), encoding="utf-8")
        with shown(browser, file, width=360) as found:
            table = found.page.locator("table.sortable")
            assert not table.is_visible()
            found.page.get_by_text("of all 1,000 queries").click()
            assert table.locator("tbody tr").count() == 1000
            for falling in (True, False):
                table.get_by_role("button", name="change").first.click()
                changes = [
                    float(text.replace("\u2212", "-")) for text in table.locator("td:nth-child(4)").all_inner_texts()
                ]
                assert changes == sorted(changes, reverse=falling)
                assert changes[0] != changes[-1]
            assert found.overflow <= 0
            assert found.trouble == []


class TestReranked:
    """What a notebook shows, on the page's own colours."""

    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    @pytest.mark.parametrize("width", [360, 1000])
    def test_it_is_legible_and_fits(self, browser: Browser, tmp_path: Path, dark: bool, width: int):
        """With hostile and long texts, right answers and documents that were not scored."""
        documents = [HOSTILE, "A long text. " * 500, "x" * 5000, "short"]
        ranked = [Ranked(3, 0.9), Ranked(1, 0.5), Ranked(0, -0.2), Ranked(2, None)]
        html = Reranked(HOSTILE, documents, ranked, gold=[1])._repr_html_()
        colours = "background:#111;color:#e6e6e6" if dark else "background:#fff;color:#111"
        file = tmp_path / "cell.html"
        file.write_text(f"<!doctype html><meta charset=utf-8><body style='{colours}'>{html}</body>", encoding="utf-8")
        with shown(browser, file, dark=dark, width=width) as found:
            assert found.asked == []
            assert found.trouble == []
            assert found.overflow <= 0
            assert found.page.locator("tbody tr").count() == 4
            assert found.page.locator("tbody td:nth-child(3)").all_inner_texts() == ["▲ 3", "=", "▼ 2", ""]
            assert found.page.evaluate(CONTRAST)[0][0] >= 3, found.page.evaluate(CONTRAST)[:3]  # arrows and marks
