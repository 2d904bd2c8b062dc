"""Documents in, documents out: what is taken, which text is scored, and where a score is put."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from pydantic import Field
from typing_extensions import TypedDict  # pydantic refuses typing's own before Python 3.12

import rag_rerank  # names are touched where they are needed: the package loads them, and what they import, lazily
from rag_rerank import Ranked

Formatter = Callable[[Document], Any]
"""What makes the content that is scored from a document: a text, or what `texts_of` takes beside."""


class RerankInput(TypedDict):
    """What the rerankers take as Runnables.

    Attributes:
        query: The query: a text, or a `rag_rerank.Image` or `rag_rerank.Content`.
        documents: What to rerank, in retrieval order.
    """

    query: Any
    documents: Sequence[Document]


class Seen(Document):
    """A document of `rerank` that is no text: its content is scored, and traces don't show it."""

    content: Any = Field(exclude=True, repr=False)


class RerankResult(TypedDict):
    """One document of what ``rerank`` returns.

    Attributes:
        index: Its position in the documents that were passed.
        relevance_score: Its score; None only under ``on_error="passthrough"``.
    """

    index: int
    relevance_score: float | None


def checked(given: Any, name: str) -> RerankInput:
    """The input of a run, its documents as a list.

    Args:
        given: What was passed.
        name: Of the reranker.

    Raises:
        TypeError: It is something else; the message says what and where, and shows the chain that would be right.
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
            raise TypeError(
                f"documents[{position}] (id={document.id!r}): page_content must be str, got {type(text).__name__}"
            )
    return {"query": query, "documents": documents}


def as_documents(given: Iterable[Any]) -> list[Document]:
    """Texts, images and mappings as documents.

    Of a mapping, ``text`` or ``page_content`` is the text and the rest metadata, or ``content`` is a list of parts.

    Raises:
        TypeError: Something is none of these; the message names the position.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"documents must be a sequence of texts or documents, got {type(given).__name__}")
    return [_as_document(item, position) for position, item in enumerate(given)]


def _as_document(given: object, position: int) -> Document:
    if isinstance(given, Document):
        return given
    if _is_content(given):
        return Seen(page_content="", content=given)
    if isinstance(given, Mapping):
        rest = dict(given)
        text = rest.pop("text" if "text" in rest else "page_content", None)
        if isinstance(text, str):
            return Document(page_content=text, metadata=rest)
        raise TypeError(f'documents[{position}] must have its text under "text" or "page_content"')
    if isinstance(given, str):
        return Document(page_content=given)
    raise TypeError(f"documents[{position}] must be str, Document or a mapping, got {type(given).__name__}")


def _is_content(given: object) -> bool:
    """Whether it is what a `rag_rerank.Scorer` takes beside texts."""
    if isinstance(given, Mapping):
        return isinstance(given.get("content"), list | tuple)
    return isinstance(given, rag_rerank.Image | rag_rerank.Video | rag_rerank.Content)


def texts_of(documents: Sequence[Document], formatter: Formatter | None) -> list[Any]:
    """What is scored of each document.

    A formatter may return a text, a `rag_rerank.Image`, `rag_rerank.Video` or `rag_rerank.Content`, vLLM's and OpenAI's
    ``{"content": [part, ...]}``, or just a list of such parts.

    Raises:
        TypeError: The formatter returned something else.
    """
    contents = [_content(document, formatter) for document in documents]
    for position, content in enumerate(contents):
        if isinstance(content, list | tuple):
            contents[position] = {"content": content}
        elif not isinstance(content, str) and not _is_content(content):
            kind = type(content).__name__
            raise TypeError(f"document_formatter must return str or content, got {kind} for documents[{position}]")
    return contents


def _content(document: Document, formatter: Formatter | None) -> Any:
    if isinstance(document, Seen):
        return document.content
    return document.page_content if formatter is None else formatter(document)


def in_order(documents: Sequence[Document], ranked: Sequence[Ranked], score_key: str) -> list[Document]:
    """Copies of the documents that were kept, best first, each with its score."""
    return [_with_score(documents[place.index], place.score, score_key) for place in ranked]


def _with_score(document: Document, score: float | None, score_key: str) -> Document:
    """A copy with its own metadata dict. The values are shared: a deep copy fails on a lock or a client in them."""
    # Without a score, one from an earlier reranker must not stay behind and be taken for ours.
    metadata = {key: value for key, value in document.metadata.items() if key != score_key}
    if score is not None:
        metadata[score_key] = score
    return document.model_copy(update={"metadata": metadata})
