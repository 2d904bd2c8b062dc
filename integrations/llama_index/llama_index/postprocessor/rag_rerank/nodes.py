"""What of a node is scored, and what comes back. No node that was passed in is changed.

Nodes come out of stores that others may have filled. A path in one could name any file of this machine, an address any
server that this machine, or the vLLM server, can reach. So nothing is read or fetched only because a node names it.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore

import rag_rerank

RETRIEVAL_SCORE = "retrieval_score"  # the metadata key that LlamaIndex's own rerankers use


class ImageSources(NamedTuple):
    """Where images may come from, beside the nodes themselves."""

    folder: str | None  # files really in it, links followed, are read
    urls: bool  # http and https addresses are passed on for the server to fetch


def contents_of(
    nodes: Sequence[NodeWithScore], mode: MetadataMode, sources: ImageSources | None
) -> "dict[int, rag_rerank.Input]":
    """Collect what is to be scored, by position in `nodes`: text, image, or both. Nodes with neither are left out.

    A node with metadata only has no text: otherwise images, and pages that were scanned, would be ranked by their file
    names. A retrieval score that a reranker before this one has kept in the metadata is no text either.

    Raises:
        TypeError, ContentError: Something is no NodeWithScore, or holds what can't be an image; with the position.
    """
    contents: dict[int, rag_rerank.Input] = {}
    for position, item in enumerate(nodes):
        if not isinstance(item, NodeWithScore):
            got = type(item).__name__
            raise TypeError(f"nodes[{position}] must be NodeWithScore, got {got}; wrap it: NodeWithScore(node=...)")
        text = ""
        if item.get_content(metadata_mode=MetadataMode.NONE).strip():
            metadata = {key: value for key, value in item.metadata.items() if key != RETRIEVAL_SCORE}
            read = _with_node(item, metadata=metadata) if RETRIEVAL_SCORE in item.metadata else item
            text = read.get_content(metadata_mode=mode)
        try:
            image = None if sources is None else _image_of(item.node, sources)
        except ValueError as error:
            raise rag_rerank.ContentError(f"nodes[{position}]: {error}") from error
        if image is not None:
            contents[position] = rag_rerank.Content(image, text) if text.strip() else image
        elif text.strip():
            contents[position] = text
    return contents


def result_of(item: NodeWithScore, score: float | None, *, keep_retrieval_score: bool) -> NodeWithScore:
    """Copy a node with its new score; the copy is of the same subclass.

    It shares the node, unless the score that it came with is kept: in the metadata of a copy of the node, where neither
    an embedding nor a language model reads it.
    """
    if keep_retrieval_score:
        node = item.node
        item = _with_node(
            item,
            metadata={**node.metadata, RETRIEVAL_SCORE: item.score},
            excluded_embed_metadata_keys=[*node.excluded_embed_metadata_keys, RETRIEVAL_SCORE],
            excluded_llm_metadata_keys=[*node.excluded_llm_metadata_keys, RETRIEVAL_SCORE],
        )
    return item.model_copy(update={"score": score})


def _with_node(item: NodeWithScore, **changes: Any) -> NodeWithScore:
    return item.model_copy(update={"node": item.node.model_copy(update=changes)})


def _image_of(node: BaseNode, sources: ImageSources) -> "rag_rerank.Image | None":
    """Take the image that the node holds, else its file, else its address, as far as `sources` allow."""
    resource: Any = getattr(node, "image_resource", None)  # of a Node, Document or ImageDocument; an ImageNode has none
    held = getattr(resource, "data", None) or getattr(node, "image", None)
    path = getattr(resource, "path", None) or getattr(node, "image_path", None)
    url = str(getattr(resource, "url", None) or getattr(node, "image_url", None) or "")
    if held:
        return _decoded(held.decode("ascii", "replace") if isinstance(held, bytes) else held)
    if url[:5].lower() == "data:":
        return _decoded(url)
    if path and sources.folder is not None and (file := _within(sources.folder, str(path))) is not None:
        return rag_rerank.Image(file)
    if sources.urls and url.lower().startswith(("http://", "https://")):
        return rag_rerank.Image(url=url)
    return None


def _decoded(encoded: str) -> "rag_rerank.Image":
    """Read base64, as data URL or plain, with line breaks or without."""
    encoded = "".join(encoded.split())
    return rag_rerank.Image(url=encoded if encoded[:5].lower() == "data:" else f"data:image/png;base64,{encoded}")


def _within(folder: str, path: str) -> Path | None:
    """Find a file that really lies in the folder; a relative path may count from there or from here."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # no such folder, a null byte, links in a circle
        root = Path(folder).resolve(strict=True)
        for candidate in (root / path, Path(path)):
            file = candidate.resolve()
            if file.is_relative_to(root) and file.is_file():
                return file
    return None
