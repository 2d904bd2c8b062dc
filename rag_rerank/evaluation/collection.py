"""A collection: documents, queries, and judgments of which documents answer which query."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rag_rerank.errors import ConfigError
from rag_rerank.evaluation.measures import Run
from rag_rerank.evaluation.trec import graded, read_judgments, rows

_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet", "-*.parquet", "/*.parquet")


@dataclass(frozen=True, slots=True)
class Collection:
    """Documents, queries and judgments.

    Attributes:
        documents: Document id to text: title and text with a space between, as the published BM25 baselines index them.
        queries: Query id to text; only queries with a judgment.
        judgments: Query id to document id to grade; 0 is not relevant.
        name: What reports call it.
    """

    documents: dict[str, str]
    queries: dict[str, str]
    judgments: dict[str, dict[str, int]]
    name: str = "collection"

    @classmethod
    def load(
        cls, folder: str | Path, *, qrels: str | Path | None = None, documents: Container[str] | None = None
    ) -> "Collection":
        """Read a folder in BEIR's layout.

        That is ``corpus.jsonl`` and ``queries.jsonl`` (or ``.jsonl.gz``, or ``.parquet``, in one file or several) and
        ``qrels.tsv`` or ``qrels/test.tsv`` with one header line (or gzipped, JSON Lines, Parquet).

        Args:
            folder: The folder.
            qrels: Judgments from this file instead, see `read_judgments`.
            documents: Ids of the only documents to keep, beside those judged relevant, where a run tells which are
                needed; None keeps all.

        Raises:
            ConfigError: A file is missing or a line is not as it should be; the message has file and line number. Or
                a query is judged that has no text, or there are no documents or no queries.
        """
        folder = Path(folder)
        corpus = _find(folder, [f"corpus{ending}" for ending in _ENDINGS])
        if qrels is None:
            endings = (".tsv", ".tsv.gz", *_ENDINGS[:-1])
            files = _find(folder, [f"{stem}{ending}" for ending in endings for stem in ("qrels", "qrels/test")])
        judgments = read_judgments(*(files if qrels is None else [qrels]))
        relevant = {document for grades in judgments.values() for document, grade in grades.items() if grade > 0}
        texts = {key: text for key, text in _texts(corpus) if documents is None or key in documents or key in relevant}
        asked = _find(folder, [f"queries{ending}" for ending in _ENDINGS])
        queries = {name: text for name, text in _texts(asked) if name in judgments}
        if not texts:
            raise ConfigError(f"{folder} has no documents, or none of those that the run needs")
        if not queries:
            raise ConfigError(f"{folder} has no query with a judgment")
        if missing := [query for query in judgments if query not in queries]:
            raise ConfigError(f"{folder}: {len(missing)} judged queries have no text, such as {missing[0]!r}")
        return cls(texts, queries, judgments, folder.resolve().name)


def _find(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Find the files that match the first of `patterns` which any file matches."""
    for pattern in patterns:
        if paths := sorted(folder.glob(pattern)):
            return paths
    raise ConfigError(f"{folder / patterns[0]} can't be read: no such file (nor any of {', '.join(patterns[1:])})")


def _texts(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield (id, title and text) of every row."""
    names = set()
    for path in paths:
        for place, name, title, text in rows(path, {"_id": str | int, "title": str | None, "text": str}):
            if str(name) in names:
                raise ConfigError(f"{place}: the id {name!r} is there twice")
            names.add(str(name))
            yield str(name), f"{title} {text}" if title else text


def read_labelled(path: Path) -> tuple[Collection, Run]:
    """Read labelled pairs, JSON Lines or Parquet with ``query``, ``document`` and ``relevant`` (a grade, or true).

    A ConfigError has the number of a line that is not so, or contradicts another one.
    """
    judgments = graded(rows(path, {"query": str, "document": str, "relevant": int | float}))
    documents = {document: document for grades in judgments.values() for document in grades}
    run = {query: dict.fromkeys(grades, 0.0) for query, grades in judgments.items()}
    return Collection(documents, {query: query for query in judgments}, judgments, path.stem), run
