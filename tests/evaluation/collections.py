"""Small collections, written as files or made in memory, for testing what is done with them."""

import json
from pathlib import Path

from rag_rerank.evaluation import Collection

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
"""Where the larger collections are, on machines that have them."""

QUERIES = {"q1": "big black bears", "q2": "how do bees make honey", "q3": "red wine stain"}
DOCUMENTS = {
    "d1": "bears are big",
    "d2": "big black dogs and big black bears",
    "d3": "bees make honey from nectar",
    "d4": "honey on bread",
    "d5": "a red wine stain comes out with salt",
    "d6": "red is a colour and wine is a drink",
    "d7": "black bread",
}
JUDGMENTS = {"q1": {"d1": 1, "d2": 2}, "q2": {"d3": 1, "d4": 0}, "q3": {"d6": 1}}


def small() -> Collection:
    """Three queries, seven documents."""
    judgments = {query: dict(grades) for query, grades in JUDGMENTS.items()}
    return Collection(dict(DOCUMENTS), dict(QUERIES), judgments, "small")


def write(folder: Path, corpus: list[dict[str, str]] | None = None) -> None:
    """A folder in BEIR's layout: one document, one query with a judgment and one without."""
    rows = corpus or [{"_id": "a", "title": "", "text": "x"}]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "what?"}\n{"_id": "unjudged", "text": "why?"}')
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\n")


def write_small(folder: Path) -> Path:
    """`small` as a folder."""
    documents = [json.dumps({"_id": name, "title": "", "text": text}) for name, text in DOCUMENTS.items()]
    queries = [json.dumps({"_id": name, "text": text}) for name, text in QUERIES.items()]
    rows = [
        f"{query}\t{document}\t{grade}" for query, grades in JUDGMENTS.items() for document, grade in grades.items()
    ]
    for name, lines in {"corpus.jsonl": documents, "queries.jsonl": queries}.items():
        (folder / name).write_text("\n".join(lines))
    (folder / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]))
    return folder
