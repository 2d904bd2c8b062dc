"""What a reranked list looks like: in a notebook, in a terminal, in a log."""

import io
import json
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rag_rerank import Ranked
from rag_rerank.display import Reranked

DOCUMENTS = ["Bread needs flour.", "The giant panda eats bamboo.", "Pandas sleep.", "Tea."]
RANKED = [Ranked(1, 0.75), Ranked(2, 0.25), Ranked(0, -0.25), Ranked(3, None)]


def terminal(reranked: Reranked, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(reranked)
    return console.file.getvalue().splitlines()


def cells(reranked: Reranked) -> list[list[str]]:
    """The texts of the terminal's rows."""
    return [[cell.strip() for cell in line[1:-1].split("│")] for line in terminal(reranked) if line.startswith("│")]


class Page(HTMLParser):
    """The tags, attributes and texts of HTML; fails where tags are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.titles: list[str] = []
        self.styles: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.titles += [value or "" for name, value in attrs if name == "title"]
        self.styles += [value or "" for name, value in attrs if name == "style"]
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data


def page(reranked: Reranked) -> Page:
    return Page(reranked._repr_html_())


class TestColumns:
    """Rank, index, movement, score, document: the same everywhere."""

    def test_the_terminal(self):
        """Bars from the lowest score to the highest; no bar and no arrow without a score."""
        assert cells(Reranked("pandas?", DOCUMENTS, RANKED)) == [
            ["1", "1", "▲ 1", "0.7500 ████████", "The giant panda eats bamboo."],
            ["2", "2", "▲ 1", "0.2500 ████", "Pandas sleep."],
            ["3", "0", "▼ 2", "-0.2500", "Bread needs flour."],
            ["4", "3", "", "not scored", "Tea."],
        ]

    def test_the_notebook(self):
        """The same cells; the bars are styles."""
        shown = page(Reranked("pandas?", DOCUMENTS, RANKED))
        assert shown.rows == [
            ["rank", "index", "moved", "score", "document"],
            ["1", "1", "▲ 1", "0.7500", "The giant panda eats bamboo."],
            ["2", "2", "▲ 1", "0.2500", "Pandas sleep."],
            ["3", "0", "▼ 2", "-0.2500", "Bread needs flour."],
            ["4", "3", "", "not scored", "Tea."],
        ]
        widths = [style.partition(";")[0] for style in shown.styles if style.startswith("width:") and "%" in style]
        assert widths == ["width:100%", "width:50%", "width:0%"]

    def test_the_log(self):
        """One line, without the documents' texts."""
        assert repr(Reranked("pandas?", DOCUMENTS, RANKED)) == (
            "Reranked('pandas?', 4 documents: 1 (0.7500 ▲ 1), 2 (0.2500 ▲ 1), 0 (-0.2500 ▼ 2), 1 more)"
        )
        long = repr(Reranked("a\nb" * 1000, ["x" * 1000], [Ranked(0, None)]))
        assert len(long) < 120
        assert long.endswith("1 documents: 0 (not scored))")

    @pytest.mark.parametrize("count", [1, 3])
    def test_ties(self, count: int):
        """They have not moved, and none is the worst of them."""
        ranked = [Ranked(index, -2.0) for index in range(count)]
        assert {tuple(row[2:4]) for row in cells(Reranked("q", ["d"] * count, ranked))} == {("=", "-2.0000 ████████")}

    def test_small_scores_keep_their_digits(self):
        """A sigmoid's, of documents that are all wrong."""
        rows = cells(Reranked("q", ["a", "b"], [Ranked(1, 2.5e-5), Ranked(0, 1.25e-6)]))
        assert [row[3] for row in rows] == ["2.50e-05 ████████", "1.25e-06"]
        assert cells(Reranked("q", ["a"], [Ranked(0, 0.0)]))[0][3] == "0.0000 ████████"

    def test_nothing(self):
        """No documents, or none kept."""
        nothing = Reranked("q", [], [])
        assert (cells(nothing), page(nothing).rows[1:]) == ([], [])
        assert repr(nothing) == "Reranked('q', 0 documents: none kept)"
        assert "2 of 2 documents not kept" in Reranked("q", ["a", "b"], [])._repr_html_()


class TestRows:
    """How many there are."""

    def test_the_rest_is_counted(self):
        """What is below the last row, and what top_n or the threshold left out; right answers are always shown."""
        ranked = [Ranked(index, 1.0 - index / 20) for index in range(15)]
        reranked = Reranked("q", ["d"] * 20, ranked, gold=[12, 19])
        assert [row[0] for row in cells(reranked)] == [*map(str, range(1, 11)), "13"]
        assert cells(reranked)[-1][-1] == "✓ d"
        assert terminal(reranked)[-1].strip() == "4 more, 5 of 20 documents not kept"
        assert "4 more, 5 of 20 documents not kept" in reranked._repr_html_()
        assert page(reranked).rows[0][-1] == "document (✓ right answer)"
        assert page(reranked).rows[-1][-1] == "✓ d"
        assert len(cells(Reranked("q", ["d"] * 20, ranked, rows=None))) == 15

    @pytest.mark.parametrize(("ranked", "gold"), [([Ranked(2, 1.0)], []), ([Ranked(-1, 1.0)], []), ([], [2])])
    def test_other_documents_than_were_ranked(self, ranked: list[Ranked], gold: list[int]):
        """It would show one for the other."""
        with pytest.raises(ValueError, match="but there are 2 documents"):
            Reranked("q", ["a", "b"], ranked, gold)


class TestTexts:
    """Texts are shown, and are nothing else."""

    def test_html_is_text(self):
        """In cells, titles and the query."""
        evil = """<script>alert('1')</script><img src=x onerror="x">&amp;"""
        shown = page(Reranked(evil, [evil], [Ranked(0, 1.0)]))
        assert not {"script", "img"} & shown.tags
        assert shown.attributes == {"style", "title", "dir"}
        assert shown.rows[1][-1] == shown.titles[0] == evil

    def test_markup_and_commands_are_text(self):
        """Of rich, of the terminal, and those that turn the text around them."""
        row = cells(Reranked("q", ["[bold]x[/]\x1b[31m\x07\u202e :smile:"], [Ranked(0, 1.0)]))[0]
        assert row[-1] == r"[bold]x[/]\x1b[31m\x07\u202e :smile:"
        assert terminal(Reranked("[red]q\x1b", [], []))[0].strip() == r"[red]q\x1b"

    def test_long_texts_are_cut(self):
        """On one line; a notebook has more of it where the mouse rests."""
        reranked = Reranked("q", ["word\n" * 300_000], [Ranked(0, 1.0)])
        shown = page(reranked)
        assert (len(shown.rows[1][-1]), len(shown.titles[0])) == (160, 1000)
        assert shown.rows[1][-1].startswith("word word")
        assert shown.rows[1][-1].endswith("…")
        assert len(reranked._repr_html_()) < 5000
        for width in (60, 100):
            lines = terminal(reranked, width)
            assert (len(lines), max(map(len, lines))) == (6, width)
            assert "0.0000" not in lines[4]
            assert "1.0000 ████████" in lines[4]

    def test_no_colour_is_for_one_ground_only(self):
        """Backgrounds and texts have the colours of the page, light or dark."""
        styles = page(Reranked("q", DOCUMENTS, RANKED, gold=[1])).styles
        assert {part for style in styles for part in style.split(";") if part.startswith("background")} == {
            "background:transparent",
            "background:rgba(66,133,244,.55)",
        }
        assert {part for style in styles for part in style.split(";") if part.startswith("color")} == {
            "color:inherit",
            "color:#2e9e5b",
            "color:#d5504e",
        }

    @given(st.text(), st.lists(st.text(), max_size=5), st.lists(st.none() | st.floats(-1e6, 1e6), max_size=5))
    def test_any_text(self, query: str, documents: list[str], scores: list[float | None]):
        """Balanced tags, what JSON and UTF-8 can hold, and a table."""
        reranked = Reranked(query, documents, [Ranked(index, s) for index, s in enumerate(scores[: len(documents)])])
        assert page(reranked)
        assert json.loads(json.dumps(reranked._repr_html_()).encode())
        assert ("\n".join(terminal(reranked)) + repr(reranked)).encode()


def test_rich_is_not_needed():
    """For notebooks and logs."""
    script = (
        "import sys; sys.modules['rich'] = None\n"
        "from rag_rerank.display import Reranked\nfrom rag_rerank import Ranked\n"
        "r = Reranked('q', ['d'], [Ranked(0, 1.0)]); print(r, len(r._repr_html_()) > 100)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "Reranked('q', 1 documents: 0 (1.0000 =)) True\n"
