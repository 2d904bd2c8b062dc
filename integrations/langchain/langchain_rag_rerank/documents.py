"""Documents in, documents out: what is taken, what of it is scored, and where a score is put."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from pydantic import Field
from typing_extensions import TypedDict  # pydantic refuses typing's own before Python 3.12

import rag_rerank  # names are touched where they are needed: the package loads them, and what they import, lazily
from rag_rerank import Ranked


class RerankInput(TypedDict):
    """A query with its documents, as the rerankers take it in chains.

    Attributes:
        query: The query: a text, or a `rag_rerank.Image` or `rag_rerank.Content`.
        documents: What to rerank, in retrieval order.
    """

    query: Any
    documents: Sequence[Document]


class RerankResult(TypedDict):
    """A document's place among those that were passed to ``rerank``, and its score.

    Attributes:
        index: Its position in the documents that were passed.
        relevance_score: Its score; None only under ``on_error="passthrough"``.
    """

    index: int
    relevance_score: float | None


class ContentDocument(Document):
    """A document of ``rerank`` that is more than text: its content is scored, and traces don't show it."""

    content: Any = Field(exclude=True, repr=False)


def check(given: Any, name: str) -> RerankInput:
    """Check the input of a reranker's run; give it with its documents as a list.

    Raises:
        TypeError: The message says what is wrong and where, and shows the chain that would be right.
    """
    if not isinstance(given, Mapping) or not {"query", "documents"} <= given.keys():
        got = f"the keys {sorted(map(str, given))}" if isinstance(given, Mapping) else type(given).__name__
        raise TypeError(
            f'{name} takes {{"query": ..., "documents": [...]}}, got {got}. To rerank what a retriever finds: '
            'reranker.as_retriever(retriever), or {"query": RunnablePassthrough(), "documents": retriever} | reranker, '
            'or RunnablePassthrough.assign(documents=itemgetter("query") | retriever) | reranker'
        )
    query, documents = given["query"], given["documents"]
    if not isinstance(query, str) and not _is_content(query):
        raise TypeError(f"query must be str, got {type(query).__name__}")
    if isinstance(documents, str) or not isinstance(documents, Iterable):
        raise TypeError(f"documents must be a sequence of Document, got {type(documents).__name__}")
    documents = list(documents)
    for position, document in enumerate(documents):
        if not isinstance(document, Document):
            raise TypeError(f"documents[{position}] must be a Document, got {type(document).__name__}")
        text: object = document.page_content  # Document.model_construct lets anything in
        if not isinstance(text, str):
            kind = type(text).__name__
            raise TypeError(f"documents[{position}] (id={document.id!r}): page_content must be str, got {kind}")
    return {"query": query, "documents": documents}


def as_documents(given: Iterable[Any], *, needs_text: bool) -> list[Document]:
    """Make documents of texts, images and mappings, with a text in each mapping if needed.

    Raises:
        TypeError: Something is none of these; the message names the position.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"documents must be a sequence of texts or documents, got {type(given).__name__}")
    return [_as_document(item, position, needs_text) for position, item in enumerate(given)]


def _as_document(given: object, position: int, needs_text: bool) -> Document:
    if isinstance(given, Document):
        return given
    if _is_content(given):
        return ContentDocument(page_content="", content=given)
    if isinstance(given, str):
        return Document(page_content=given)
    if not isinstance(given, Mapping):
        raise TypeError(f"documents[{position}] must be str, Document or a mapping, got {type(given).__name__}")
    rest = dict(given)
    text = rest.pop("text" if "text" in rest else "page_content", None)
    if isinstance(text, str):
        return Document(page_content=text, metadata=rest)
    if needs_text:
        remedy = "or the reranker a document_formatter"
        raise TypeError(f'documents[{position}] must have its text under "text" or "page_content", {remedy}')
    return Document(page_content="", metadata=dict(given))


def _is_content(given: object) -> bool:
    """Tell whether a `rag_rerank.Scorer` takes it beside texts."""
    if isinstance(given, Mapping):
        return isinstance(given.get("content"), list | tuple)
    return isinstance(given, rag_rerank.Image | rag_rerank.Video | rag_rerank.Content)


def contents_of(documents: Sequence[Document], formatter: Callable[[Document], Any] | None) -> list[Any]:
    """Give what is scored of each document; `ScorerReranker` says what a formatter may return.

    Raises:
        TypeError: The formatter returned something else.
    """
    contents: list[Any] = []
    for position, document in enumerate(documents):
        if isinstance(document, ContentDocument):
            content = document.content
        else:
            content = document.page_content if formatter is None else formatter(document)
        content = {"content": content} if isinstance(content, list | tuple) else content
        if not isinstance(content, str) and not _is_content(content):
            kind = type(content).__name__
            raise TypeError(f"document_formatter must return str or content, got {kind} for documents[{position}]")
        contents.append(content)
    return contents


def places(_: Sequence[Document], ranked: Sequence[Ranked]) -> list[RerankResult]:
    """Give the places and scores of the documents that were kept."""
    return [{"index": place.index, "relevance_score": place.score} for place in ranked]


def copies(documents: Sequence[Document], ranked: Sequence[Ranked], score_key: str | None) -> list[Document]:
    """Copy the documents that were kept, best first, each with its score where there is a key for it."""
    results = []
    for place in ranked:
        document = documents[place.index]
        # A dict of its own with the same values: a deep copy fails on a lock or a client in them. Without a score, one
        # from an earlier reranker must not stay behind and be taken for ours.
        metadata = {key: value for key, value in document.metadata.items() if key != score_key}
        if place.score is not None and score_key is not None:
            metadata[score_key] = place.score
        results.append(document.model_copy(update={"metadata": metadata}))
    return results
