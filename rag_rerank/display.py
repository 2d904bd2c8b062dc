"""A reranked list to look at: as a table in a notebook or a terminal, as one line in a log.

from rag_rerank.display import Reranked

Reranked(query, documents, scorer.rerank(query, documents))               # the last line of a notebook's cell
rich.print(Reranked(query, documents, scorer.rerank(query, documents)))   # in a terminal (pip install rich)
"""

import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rag_rerank.errors import ConfigError
from rag_rerank.inputs.content import Content, Image, Input, Video, from_mapping
from rag_rerank.inputs.images import size_of, thumbnail
from rag_rerank.inputs.multimodal import is_data, shown
from rag_rerank.ranking import Ranked

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("rank", "index", "moved", "score")  # and the document
_SNIPPET, _TITLE = 160, 1000  # characters of a document in the table, and where the mouse rests on it
_BAR_CELLS = 8  # in the terminal
_EIGHTHS = " ▏▎▍▌▋▊▉"
_BIDI_CONTROLS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


@dataclass(frozen=True, slots=True)
class _Row:
    """One document: `rank` from 1, `index` from 0, `bar` from 0 to 1 (None if not scored), `gold` if a right answer."""

    rank: int
    index: int
    moved: int
    arrow: str
    score: str
    bar: float | None
    text: str
    gold: bool


@dataclass(frozen=True, slots=True, repr=False)
class Reranked:
    """The ranking of one query's documents, ready to be shown.

    Attributes:
        query: The query.
        documents: The documents, in retrieval order. Images are shown by their size, in a notebook with a small copy.
        ranked: What `Scorer.rerank` gave for them.
        gold: Positions of right answers, where they are known: marked, and shown however far down they are.
        rows: How many rows to show from the top; None shows all.

    Raises:
        ValueError: `ranked` or `gold` has a position that no document has.
    """

    query: Input
    documents: Sequence[Input]
    ranked: Sequence[Ranked]
    gold: Collection[int] = ()
    rows: int | None = 10

    def __post_init__(self) -> None:
        given = [("ranked", item.index) for item in self.ranked] + [("gold", position) for position in self.gold]
        for name, position in given:
            if not 0 <= position < len(self.documents):
                raise ValueError(f"{name} has the position {position}, but there are {len(self.documents)} documents")

    def __repr__(self) -> str:
        """One line: the query, and position, score and movement of the first few documents."""
        rows = list(self._rows())
        shown = [f"{row.index} ({' '.join(filter(None, (row.score, row.arrow)))})" for row in rows[:3]]
        more = [f"{len(rows) - 3} more"] if len(rows) > 3 else []
        found = ", ".join(shown + more) or "none kept"
        return f"Reranked({one_line(described(self.query), 60)!r}, {len(self.documents)} documents: {found})"

    def _repr_html_(self) -> str:
        """Make the table for a notebook: all styles are inline, nothing is loaded, no text is markup."""
        import jinja2  # noqa: PLC0415 - terminals do without it
        from markupsafe import Markup  # noqa: PLC0415

        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["text"] = lambda text: Markup(escape(text))  # noqa: S704 - escaped
        html = environment.get_template("display.html.jinja").render(
            query=one_line(described(self.query), _TITLE),
            columns=(*_COLUMNS, self._document_column()),
            rows=self._shown(),
            note=self._note(),
            one_line=one_line,
            thumbnail=lambda row: _thumbnail(self.documents[row.index]),
        )
        return "".join(map(str.strip, html.split("\n")))

    def __rich__(self) -> "Table":
        """Make the table for a terminal."""
        from rich.table import Table  # noqa: PLC0415 - the core does without rich
        from rich.text import Text  # noqa: PLC0415

        title, note = Text(one_line(described(self.query), _TITLE)), self._note() or None
        table = Table(title=title, title_justify="left", title_style="bold", caption=note, caption_justify="left")
        for name in _COLUMNS:  # where it is narrow, the bar comes below its score
            table.add_column(name, justify="left" if name == "score" else "right", no_wrap=name != "score")
        # The cells are not wrapped but cut; a column that says so would be given its width before all others.
        table.add_column(self._document_column(), min_width=10)
        rows = self._shown()
        width = max((len(row.score) for row in rows), default=0)
        for row in rows:
            score = Text(row.score.rjust(width), style="dim" if row.bar is None else "")
            eighths = round((row.bar or 0.0) * _BAR_CELLS * 8)
            bar = ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).ljust(_BAR_CELLS)[:_BAR_CELLS]
            score.append(f" {bar}", style="blue")
            colour = "green" if row.moved > 0 else "red" if row.moved < 0 else ""
            text = Text("", no_wrap=True, overflow="ellipsis")
            text.append("✓ " if row.gold else "", style="bold green").append(one_line(row.text, _SNIPPET))
            table.add_row(str(row.rank), str(row.index), Text(row.arrow, style=colour), score, text)
        return table

    def _document_column(self) -> str:
        return "document" + (" (✓ right answer)" if self.gold else "")

    def _rows(self) -> Iterator[_Row]:
        scores = [item.score for item in self.ranked if item.score is not None]
        low, high = min(scores, default=0.0), max(scores, default=0.0)
        # Four digits, as long as they tell anything.
        form = ".4f" if not scores or max(abs(low), abs(high)) >= 0.001 or low == high == 0 else ".2e"
        for rank, (index, score) in enumerate(((item.index, item.score) for item in self.ranked), 1):
            text, gold = described(self.documents[index]), index in self.gold
            if score is None:
                yield _Row(rank, index, 0, "", "not scored", None, text, gold)
                continue
            moved = index + 1 - rank
            arrow = f"▲ {moved}" if moved > 0 else f"▼ {-moved}" if moved < 0 else "="
            bar = (score - low) / (high - low) if high > low else 1.0
            yield _Row(rank, index, moved, arrow, format(score, form), bar, text, gold)

    def _shown(self) -> list[_Row]:
        return [row for row in self._rows() if self.rows is None or row.rank <= self.rows or row.gold]

    def _note(self) -> str:
        """Count what the table doesn't show."""
        hidden, dropped = len(self.ranked) - len(self._shown()), len(self.documents) - len(self.ranked)
        parts = {f"{hidden} more": hidden, f"{dropped} of {len(self.documents)} documents not kept": dropped}
        return ", ".join(part for part, count in parts.items() if count)


def described(value: Input) -> str:
    """Describe a query or document for people: a text as it is, an image as ``[image 300x200] page1.png``."""
    return " ".join(part if isinstance(part, str) else _described(part) for part in _parts(value))


def _parts(value: Input) -> Sequence[str | Image | Video]:
    if isinstance(value, Mapping):
        value = from_mapping(value)
    return value.parts if isinstance(value, Content) else (value,)


def _described(part: Image | Video) -> str:
    kind, name = "video", ""
    if isinstance(part, Image):
        kind, name = "image", f" {part.source.name}" if isinstance(part.source, Path) else ""
        with suppress(ConfigError):  # it is gone, or Pillow is: the rest is shown all the same
            if (source := part.held()) is not None:
                kind += " {}x{}".format(*size_of(source))
    if part.url is not None and not is_data(part.url):
        name = f" {shown(part.url)}"
    return f"[{kind}]{name}"


def _thumbnail(document: Input) -> str:
    """Make a small copy of a document's first image that can be read here, as a data URL; empty if it has none."""
    with suppress(ConfigError):  # as above
        for part in _parts(document):
            if isinstance(part, Image) and (source := part.held()) is not None:
                return thumbnail(source)
    return ""


def one_line(text: str, length: int) -> str:
    """Cut a text to one line of at most `length` characters."""
    # A document can be megabytes, of which no more is looked at than could be shown.
    joined = " ".join(text[: 4 * length].split())
    cut = joined if len(joined) <= length and len(text) <= 4 * length else joined[: length - 1] + "…"
    return printable(cut)


def printable(text: str) -> str:
    """Escape commands to the terminal, what turns the text around it, and halves of characters."""
    unsafe = {each for each in text if unicodedata.category(each) in {"Cc", "Cs"}}
    unsafe |= {each for each in text if unicodedata.bidirectional(each) in _BIDI_CONTROLS}
    return "".join(repr(letter)[1:-1] if letter in unsafe else letter for letter in text)
