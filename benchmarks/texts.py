"""What is scored: passages of the embedded collection, as a RAG splitter leaves them, found with BM25.

Questions are the collection's own. `passages` are its documents cut at paragraph ends into pieces of at most about
1,000 characters, about 200 tokens a pair; `short` ones have 250 characters, about 60 tokens a pair; `whole` are the
documents as they are, about 400 tokens each.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice

from rag_rerank.embedded import collection_folder
from rag_rerank.evaluation import BM25, Collection

LONGEST = {"short": 250, "passages": 1000, "whole": None}  # characters


@dataclass(frozen=True, slots=True)
class Call:
    """What a contestant is asked at once.

    Attributes:
        queries: The questions.
        documents: For each question, what is to be reranked.
    """

    queries: list[str]
    documents: list[list[str]]

    @property
    def pairs(self) -> int:
        """How many pairs are scored."""
        return sum(map(len, self.documents))


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked at once.

    Attributes:
        queries: Questions in a call.
        depth: Documents for each.
    """

    queries: int
    depth: int

    @property
    def title(self) -> str:
        """For tables."""
        return f"{self.queries} {'query' if self.queries == 1 else 'queries'} x {self.depth} documents"


LOADS = {"1x25": Load(1, 25), "1x100": Load(1, 100), "20x100": Load(20, 100)}  # small first: peak memory only grows


@dataclass
class Texts:
    """Questions and what BM25 finds for them.

    Args:
        kind: One of `LONGEST`.
    """

    kind: str
    documents: dict[str, str] = field(init=False)
    questions: list[str] = field(init=False)

    def __post_init__(self) -> None:
        collection = Collection.load(collection_folder())
        longest = LONGEST[self.kind]
        self.documents = collection.documents if longest is None else dict(passages(collection.documents, longest))
        self._bm25 = BM25(self.documents)
        deepest = max(load.depth for load in LOADS.values())
        self.questions = [text for text in collection.queries.values() if len(self._found(text, deepest)) == deepest]

    def calls(self, load: Load) -> Iterator[Call]:
        """One call after the other, each with questions of its own as long as there are any."""
        questions = cycle(self.questions)
        while True:
            queries = list(islice(questions, load.queries))
            yield Call(queries, [self._found(query, load.depth) for query in queries])

    def _found(self, query: str, depth: int) -> list[str]:
        return [self.documents[name] for name in self._bm25.retrieve(query, depth)]


def passages(documents: dict[str, str], longest: int) -> Iterator[tuple[str, str]]:
    """Every document in pieces: paragraphs, sentences or words joined while they fit."""
    for name, text in documents.items():
        for number, piece in enumerate(split(text, longest)):
            yield f"{name}#{number}", piece


def split(text: str, longest: int, marks: tuple[str, ...] = ("\n\n", "\n", ". ", " ")) -> list[str]:
    """Pieces of at most about `longest` characters, cut at the coarsest mark that makes them fit."""
    if len(text) <= longest or not marks:
        return [text] if text.strip() else []
    pieces: list[str] = []
    current = ""
    for part in text.split(marks[0]):
        if len(part) > longest:
            pieces += [current, *split(part, longest, marks[1:])]
            current = pieces.pop()
        elif len(current) + len(part) > longest:
            pieces.append(current)
            current = part
        else:
            current = f"{current}{marks[0]}{part}" if current else part
    return [piece for piece in [*pieces, current] if piece.strip()]
