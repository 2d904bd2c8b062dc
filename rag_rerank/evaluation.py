"""Does reranking help? A collection with judgments, a first stage to rerank, and the usual measures.

Needs the extra `eval`: bm25s for BM25, ir-measures (on pytrec_eval) for the measures.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import ir_measures
import Stemmer

from rag_rerank.errors import ConfigError

Run = Mapping[str, Mapping[str, float]]
"""Query id to document id to score."""


@dataclass(frozen=True, slots=True)
class Collection:
    """Documents, queries and judgments.

    Attributes:
        documents: Document id to text: title and text with a space between, as the published BM25 baselines index them.
        queries: Query id to text; only queries with a judgment.
        judgments: Query id to document id to grade; 0 is not relevant.
    """

    documents: dict[str, str]
    queries: dict[str, str]
    judgments: dict[str, dict[str, int]]

    @classmethod
    def load(cls, folder: str | Path) -> "Collection":
        """Read ``corpus.jsonl``, ``queries.jsonl`` and ``qrels.tsv`` (BEIR's layout, one header line) from a folder.

        Raises:
            ConfigError: A file is missing or a line is not as it should be; the message has file and line number.
        """
        folder = Path(folder)
        documents = {
            row["_id"]: f"{row['title']} {row['text']}" if row.get("title") else row["text"]
            for row in _rows(folder / "corpus.jsonl")
        }
        judgments: dict[str, dict[str, int]] = {}
        for query, document, grade in _judgments(folder / "qrels.tsv"):
            judgments.setdefault(query, {})[document] = grade
        queries = {row["_id"]: row["text"] for row in _rows(folder / "queries.jsonl") if row["_id"] in judgments}
        return cls(documents, queries, judgments)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_open(path).splitlines(), 1):
        try:
            row = json.loads(line)
            if not (isinstance(row["_id"], str) and isinstance(row["text"], str)):
                raise TypeError("_id and text must be strings")  # noqa: TRY301 - joins the other ways to be malformed
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}, line {number}: not an object with _id and text ({error})") from error
        yield row


def _judgments(path: Path) -> Iterator[tuple[str, str, int]]:
    rows = csv.reader(_open(path).splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    next(rows, None)
    for number, row in enumerate(rows, 2):
        try:
            query, document, grade = row
            yield query, document, int(grade)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not query, document and grade ({error})") from error


def _open(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error


class BM25:
    """A BM25 index: Lucene's variant, k1 1.2, b 0.75, English stop words and Snowball stems.

    Args:
        documents: Document id to text.
    """

    def __init__(self, documents: Mapping[str, str]) -> None:
        self._ids = list(documents)
        self._stemmer = Stemmer.Stemmer("english")
        self._index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
        self._index.index(self._tokens(list(documents.values())), show_progress=False)

    def retrieve(self, query: str, depth: int) -> dict[str, float]:
        """The `depth` best documents, best first, with their scores; fewer where fewer share a word with the query."""
        found, scores = self._index.retrieve(self._tokens([query]), k=min(depth, len(self._ids)), show_progress=False)
        # Documents with score 0 share no word with the query: keeping them would inflate recall on small collections.
        return {self._ids[row]: float(score) for row, score in zip(found[0], scores[0], strict=True) if score > 0}

    def _tokens(self, texts: list[str]) -> Any:
        return bm25s.tokenize(texts, stopwords="en", stemmer=self._stemmer, show_progress=False)


def measure(
    judgments: Mapping[str, Mapping[str, int]], run: Run, measures: Sequence[str] = ("nDCG@10", "RR@10")
) -> dict[str, float]:
    """Means over every judged query; one without results counts as 0.

    Args:
        judgments: Query id to document id to grade.
        run: What was retrieved or reranked.
        measures: Names as in ir-measures. nDCG has linear gain, ties are broken by document id: pytrec_eval's habits.
    """
    wanted = {name: ir_measures.parse_measure(name) for name in measures}
    means = ir_measures.calc_aggregate(wanted.values(), judgments, run)
    return {name: float(means[measure]) for name, measure in wanted.items()}
