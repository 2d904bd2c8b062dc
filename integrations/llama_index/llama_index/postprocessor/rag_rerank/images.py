"""The image of a node, from where the user allows: nothing is read or fetched because a node says where it lies.

Nodes come out of stores that others may have filled. A path in one could name any file of this machine, an address any
server that this machine, or the vLLM server, can reach.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_index.core.schema import BaseNode

import rag_rerank


@dataclass(frozen=True, slots=True)
class Sources:
    """Where images may come from, beside the nodes themselves.

    Attributes:
        folder: Files really in it, links followed, are read; None: no files are.
        urls: Whether http and https addresses are passed on for the server to fetch.
    """

    folder: str | None = None
    urls: bool = False


def image_of(node: BaseNode, sources: Sources) -> "rag_rerank.Image | None":
    """A node's image: the one that it holds, else its file, else its address; None where there is none to be had.

    `ImageNode` has fields of its own, `Node`, `Document` and `ImageDocument` a resource.

    Raises:
        ValueError: What the node holds can't be base64.
    """
    resource: Any = getattr(node, "image_resource", None)
    held = getattr(resource, "data", None) or getattr(node, "image", None)
    path = getattr(resource, "path", None) or getattr(node, "image_path", None)
    url = str(getattr(resource, "url", None) or getattr(node, "image_url", None) or "")
    if held:
        return _held(held.decode("ascii", "replace") if isinstance(held, bytes) else held)
    if url[:5].lower() == "data:":
        return _held(url)
    if path and sources.folder is not None:
        file = _within(sources.folder, str(path))
        if file is not None:
            return rag_rerank.Image(file)
    if sources.urls and url.lower().startswith(("http://", "https://")):
        return rag_rerank.Image(url=url)
    return None


def _held(encoded: str) -> "rag_rerank.Image":
    """Base64, as data URL or plain, and with line breaks or without."""
    encoded = "".join(encoded.split())
    return rag_rerank.Image(url=encoded if encoded[:5].lower() == "data:" else f"data:image/png;base64,{encoded}")


def _within(folder: str, path: str) -> Path | None:
    """The file, if it is one and really lies in the folder; a relative path may count from there or from here."""
    try:
        root = Path(folder).resolve(strict=True)
        for candidate in (root / path, Path(path)):
            file = candidate.resolve()
            if file.is_relative_to(root) and file.is_file():
                return file
    except (OSError, ValueError, RuntimeError):  # no such folder, a null byte, links in a circle
        pass
    return None
