"""Nodes in and out: what of a node is scored, and what comes back. Neither changes a node that was passed in."""

from collections.abc import Sequence
from typing import Any

from llama_index.core.schema import MetadataMode, NodeWithScore

import rag_rerank
from llama_index.postprocessor.rag_rerank.images import Sources, image_of

RETRIEVAL_SCORE = "retrieval_score"  # the metadata key that LlamaIndex's own rerankers use


def contents_of(
    nodes: Sequence[NodeWithScore], mode: MetadataMode, sources: Sources | None = None
) -> "dict[int, rag_rerank.Input]":
    """What is to be scored, by position in `nodes`: texts, images, or both; nodes with nothing of it are left out.

    A node with metadata only has no text: otherwise images, and pages that were scanned, would be ranked by their file
    names. Nor is a score text: one that a reranker before this one has kept is not read, whatever `mode` says.

    Args:
        nodes: The nodes.
        mode: Which metadata goes with a text. An image without text has none.
        sources: Where images may come from; None: nowhere.

    Raises:
        TypeError: Something is no NodeWithScore; the message names the position.
        ContentError: An image is none, as far as that is seen without reading it; with the position.
    """
    contents: dict[int, rag_rerank.Input] = {}
    for position, item in enumerate(nodes):
        if not isinstance(item, NodeWithScore):
            got = type(item).__name__
            raise TypeError(f"nodes[{position}] must be NodeWithScore, got {got}; wrap it: NodeWithScore(node=...)")
        text = ""
        if item.get_content(metadata_mode=MetadataMode.NONE).strip():
            text = _without_retrieval_score(item).get_content(metadata_mode=mode)
        try:
            image = None if sources is None else image_of(item.node, sources)
        except ValueError as error:
            raise rag_rerank.ContentError(f"nodes[{position}]: {error}") from error
        if image is not None:
            contents[position] = rag_rerank.Content(image, text) if text.strip() else image
        elif text.strip():
            contents[position] = text
    return contents


def result_of(item: NodeWithScore, score: float | None, *, keep_retrieval_score: bool) -> NodeWithScore:
    """A copy with its new score, of the same subclass.

    It shares the node, unless the score that it came with is kept: then the node is a copy that has it in its metadata,
    where neither an embedding nor a language model gets to read it.
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


def _without_retrieval_score(item: NodeWithScore) -> NodeWithScore:
    if RETRIEVAL_SCORE not in item.metadata:
        return item
    return _with_node(item, metadata={key: value for key, value in item.metadata.items() if key != RETRIEVAL_SCORE})


def _with_node(item: NodeWithScore, **changes: Any) -> NodeWithScore:
    """A copy around a copy of its node that has other values in some fields."""
    return item.model_copy(update={"node": item.node.model_copy(update=changes)})
