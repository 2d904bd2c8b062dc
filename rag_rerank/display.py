"""A reranked list to look at: as a table in a notebook or a terminal, as one line in a log.

from rag_rerank.display import Reranked

Reranked(query, documents, scorer.rerank(query, documents))               # the last line of a notebook's cell
rich.print(Reranked(query, documents, scorer.rerank(query, documents)))   # in a terminal (pip install rich)
"""

import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rag_rerank.errors import ConfigError
from rag_rerank.inputs.content import Content, Image, Input, Video, decode_base64, from_parts, parts_of
from rag_rerank.inputs.images import size_of, thumbnail
from rag_rerank.inputs.multimodal import is_data, shown
from rag_rerank.ranking import Ranked

if TYPE_CHECKING:
    import PIL.Image
    from rich.table import Table

_SNIPPET, _MORE = 160, 1000  # characters of a document in the table, and where the mouse rests on it
_BAR = 8  # cells of a bar in the terminal
_EIGHTHS = " ▏▎▍▌▋▊▉"
_UNSCORED = "not scored"
_TURNING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
# Seen on light and on dark ground alike; all else has the colour of the page.
_GREEN, _RED, _BLUE, _GREY = "#2e9e5b", "#d5504e", "rgba(66,133,244,.55)", "rgba(128,128,128,.35)"


@dataclass(frozen=True, slots=True)
class _Row:
    """One document: `rank` from 1, `index` from 0, `share` of the bar 0 to 1 (None if not scored)."""

    rank: int
    index: int
    moved: int
    score: str
    share: float | None
    text: str
    gold: bool


@dataclass(frozen=True, slots=True, repr=False)
class Reranked:
    """What a reranker made of the documents of one query, ready to be shown.

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
        for name, positions in (("ranked", [item.index for item in self.ranked]), ("gold", self.gold)):
            for position in positions:
                if not 0 <= position < len(self.documents):
                    raise ValueError(
                        f"{name} has the position {position}, but there are {len(self.documents)} documents"
                    )

    def __repr__(self) -> str:
        """One line: the query, and position, score and movement of the first few documents."""
        rows = list(self._rows())
        shown = [f"{row.index} ({row.score}{_arrow(row, ' ')})" for row in rows[:3]]
        left = len(rows) - len(shown)
        more = [f"{left} more"] if left else []
        found = ", ".join(shown + more) or "none kept"
        return f"Reranked({_cut(described(self.query), 60)!r}, {len(self.documents)} documents: {found})"

    def _repr_html_(self) -> str:
        """The table for a notebook: all styles are inline, nothing is loaded, no text is markup."""
        line = f"border-bottom:1px solid {_GREY};padding:2px 8px"
        head = "".join(
            f'<th style="{line};text-align:{side}">{name}</th>'
            for name, side in (("rank", "right"), ("index", "right"), ("moved", "right"), ("score", "left"))
        )
        head += f'<th style="{line};text-align:left">document{" (✓ right answer)" if self.gold else ""}</th>'
        body = "".join(_html_row(row, line, _thumbnail(self.documents[row.index])) for row in self._shown())
        note = f'<div style="opacity:.7;padding:2px 8px">{escape(self._note())}</div>' if self._note() else ""
        return (
            f'<div style="color:inherit;background:transparent;overflow-x:auto"><div dir="auto" '
            f'style="font-weight:bold;padding:2px 8px">{escape(_cut(described(self.query), _MORE))}</div>'
            f'<table style="border-collapse:collapse;table-layout:auto;width:100%;min-width:40em;max-width:80em;'
            f'margin:0;color:inherit;background:transparent">'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}</div>"
        )

    def __rich__(self) -> "Table":
        """The table for a terminal."""
        from rich.table import Table  # noqa: PLC0415 - the core does without rich
        from rich.text import Text  # noqa: PLC0415

        table = Table(
            title=Text(_cut(described(self.query), _MORE)),
            title_justify="left",
            title_style="bold",
            caption=self._note() or None,
            caption_justify="left",
        )
        for name in ("rank", "index", "moved", "score"):
            table.add_column(name, justify="left" if name == "score" else "right", no_wrap=True)
        # The cells are not wrapped but cut; a column that says so would be given its width before all others.
        table.add_column("document" + (" (✓ right answer)" if self.gold else ""))
        width = max((len(row.score) for row in self._shown()), default=0)
        for row in self._shown():
            score = Text(row.score.rjust(width), style="dim" if row.share is None else "")
            score.append(f" {_bar(row.share)}", style="blue")
            colour = "green" if row.moved > 0 else "red" if row.moved < 0 else ""
            text = Text("", no_wrap=True, overflow="ellipsis")
            text.append("✓ " if row.gold else "", style="bold green").append(_cut(row.text, _SNIPPET))
            table.add_row(str(row.rank), str(row.index), Text(_arrow(row), style=colour), score, text)
        return table

    def _rows(self) -> Iterator[_Row]:
        scores = [item.score for item in self.ranked if item.score is not None]
        low, high = min(scores, default=0.0), max(scores, default=0.0)
        # Four digits, as long as they tell anything.
        form = ".4f" if not scores or max(abs(low), abs(high)) >= 0.001 or low == high == 0 else ".2e"
        for rank, item in enumerate(self.ranked, 1):
            share = None if item.score is None else (item.score - low) / (high - low) if high > low else 1.0
            score = _UNSCORED if item.score is None else format(item.score, form)
            moved = 0 if item.score is None else item.index + 1 - rank
            text = described(self.documents[item.index])
            yield _Row(rank, item.index, moved, score, share, text, item.index in self.gold)

    def _shown(self) -> list[_Row]:
        return [row for row in self._rows() if self.rows is None or row.rank <= self.rows or row.gold]

    def _note(self) -> str:
        """What the table doesn't show."""
        hidden, dropped = len(self.ranked) - len(self._shown()), len(self.documents) - len(self.ranked)
        parts = [f"{hidden} more"] if hidden else []
        parts += [f"{dropped} of {len(self.documents)} documents not kept"] if dropped else []
        return ", ".join(parts)


def described(value: Input) -> str:
    """A query or document in words, for people: a text as it is, an image as ``[image 300x200] page1.png``."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = from_parts(parts_of(value))
    parts = value.parts if isinstance(value, Content) else (value,)
    return " ".join(part if isinstance(part, str) else _described(part) for part in parts)


def _first_image(value: Input) -> "Path | bytes | PIL.Image.Image | None":
    """What its first image can be read from; None where it has none, or one that is elsewhere."""
    if isinstance(value, Mapping):
        value = from_parts(parts_of(value))
    parts = value.parts if isinstance(value, Content) else (value,)
    for part in parts:
        if isinstance(part, Image):
            if part.source is not None:
                return part.source
            if part.url is not None and is_data(part.url):
                return decode_base64(part.url.partition(",")[2])
    return None


def _described(part: Image | Video) -> str:
    kind = "image" if isinstance(part, Image) else "video"
    url = part.url
    if url is not None and not is_data(url):
        return f"[{kind}] {shown(url)}"
    if isinstance(part, Video):
        return "[video]"
    try:
        source = _first_image(part)
        size = "" if source is None else " {}x{}".format(*size_of(source))
    except ConfigError:  # it is gone, or Pillow is: no reason not to show the rest
        size = ""
    return f"[image{size}]" + (f" {part.source.name}" if isinstance(part.source, Path) else "")


def _thumbnail(document: Input) -> str:
    """A small copy of a document's image, if it has one that can be read here; nothing is fetched."""
    if isinstance(document, str):
        return ""
    try:
        source = _first_image(document)
        url = None if source is None else thumbnail(source)
    except ConfigError:  # it is gone, or Pillow is: the rest is shown all the same
        return ""
    return "" if url is None else f'<img src="{url}" alt="" style="max-height:64px;vertical-align:middle" /> '


def _html_row(row: _Row, line: str, image: str) -> str:
    numbers = f"{line};text-align:right;font-variant-numeric:tabular-nums"
    colour = f";color:{_GREEN}" if row.moved > 0 else f";color:{_RED}" if row.moved < 0 else ""
    bar = (
        ""
        if row.share is None
        else (f'<div style="width:80px"><div style="width:{row.share:.0%};height:5px;background:{_BLUE}"></div></div>')
    )
    score = f'<span style="opacity:.6">{row.score}</span>' if row.share is None else row.score
    mark = f'<b style="color:{_GREEN}">✓</b> ' if row.gold else ""
    # The text has the width that the other columns leave (100 %), and is cut there whatever its length (0).
    return (
        f'<tr style="background:transparent">'
        f'<td style="{numbers}">{row.rank}</td><td style="{numbers}">{row.index}</td>'
        f'<td style="{numbers}{colour}">{_arrow(row)}</td><td style="{line};text-align:left">{score}{bar}</td>'
        f'<td dir="auto" title="{escape(_cut(row.text, _MORE))}" style="{line};text-align:start;width:100%;'
        f'max-width:0;overflow:hidden;text-overflow:ellipsis;white-space:nowrap">'
        f"{mark}{image}{escape(_cut(row.text, _SNIPPET))}</td></tr>"
    )


def _arrow(row: _Row, before: str = "") -> str:
    """How far up or down, with `before` before it; nothing for a document that was not ranked by a score."""
    if row.share is None:
        return ""
    return before + (f"▲ {row.moved}" if row.moved > 0 else f"▼ {-row.moved}" if row.moved < 0 else "=")


def _bar(share: float | None) -> str:
    eighths = round((share or 0.0) * _BAR * 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).ljust(_BAR)[:_BAR]


def _cut(text: str, length: int) -> str:
    """`text` on one line of at most `length` characters."""
    # A document can be megabytes, of which no more is looked at than could be shown.
    joined = " ".join(text[: 4 * length].split())
    cut = joined if len(joined) <= length and len(text) <= 4 * length else joined[: length - 1] + "…"
    return "".join(letter if _harmless(letter) else repr(letter)[1:-1] for letter in cut)


def _harmless(letter: str) -> bool:
    """Neither a command to the terminal, nor one that turns the text around it, nor half a character."""
    return unicodedata.category(letter) not in {"Cc", "Cs"} and unicodedata.bidirectional(letter) not in _TURNING
