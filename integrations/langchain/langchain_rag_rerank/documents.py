"""Documents in, documents out: what is taken, which text is scored, and where a score is put."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from langchain_core.documents import Document
from typing_extensions import TypedDict  # pydantic refuses typing's own before Python 3.12

from rag_rerank import Ranked


class RerankInput(TypedDict):
    """What the rerankers take as Runnables.

    Attributes:
        query: The query.
        documents: What to rerank, in retrieval order.
    """

    query: str
    documents: Sequence[Document]


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
    if not isinstance(query, str):
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


def as_documents(given: Iterable[str | Document | Mapping[str, Any]]) -> list[Document]:
    """Texts and mappings as documents: of a mapping, ``text`` or ``page_content`` is the text, the rest metadata.

    Raises:
        TypeError: Something is neither; the message names the position.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"documents must be a sequence of texts or documents, got {type(given).__name__}")
    return [_as_document(item, position) for position, item in enumerate(given)]


def _as_document(given: object, position: int) -> Document:
    if isinstance(given, Document):
        return given
    if isinstance(given, Mapping):
        rest = dict(given)
        text = rest.pop("text" if "text" in rest else "page_content", None)
        if isinstance(text, str):
            return Document(page_content=text, metadata=rest)
        raise TypeError(f'documents[{position}] must have its text under "text" or "page_content"')
    if isinstance(given, str):
        return Document(page_content=given)
    raise TypeError(f"documents[{position}] must be str, Document or a mapping, got {type(given).__name__}")


def texts_of(documents: Sequence[Document], formatter: Callable[[Document], str] | None) -> list[str]:
    """What is scored of each document.

    Raises:
        TypeError: The formatter returned no text.
    """
    if formatter is None:
        return [document.page_content for document in documents]
    texts = [formatter(document) for document in documents]
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise TypeError(f"document_formatter must return str, got {kind} for documents[{position}]")
    return texts


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
