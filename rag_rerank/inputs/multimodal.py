"""A query or document with images in it, read and checked: what back ends get beside text, and how it is sent."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from rag_rerank.inputs.images import ImageFile


@dataclass(frozen=True, slots=True, repr=False)
class Link:
    """What the server is to fetch: ``kind`` is ``"image_url"`` or ``"video_url"``."""

    kind: str
    url: str

    def __repr__(self) -> str:
        return f"Link({shown(self.url)!r})"


@dataclass(frozen=True)
class Multimodal:
    """A query or document with more in it than text, checked and read: what back ends get beside ``str``."""

    parts: tuple[str | ImageFile | Link, ...]

    @property
    def text(self) -> str:
        """Its text parts, a line each, as vLLM joins them."""
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[ImageFile]:
        """Its images that were read here."""
        return [part for part in self.parts if isinstance(part, ImageFile)]

    @property
    def size(self) -> int:
        """About how many bytes `encoded` has, without encoding."""
        files = sum(len(image.data) * 4 // 3 for image in self.images)
        return files + len(self.text) + sum(100 + len(getattr(part, "url", "")) for part in self.parts)

    def encoded(self) -> bytes:
        """Write it as JSON for vLLM's score API; not kept, for it takes a third more memory than the images."""
        return b'{"content": [' + b", ".join(_encoded(part) for part in self.parts) + b"]}"


Prepared = str | Multimodal
Contents = Sequence[Prepared]


def _encoded(part: str | ImageFile | Link) -> bytes:
    if isinstance(part, ImageFile):  # base64 has nothing that JSON would escape
        url = f"data:{part.media_type};base64,".encode() + base64.b64encode(part.data)
        return b'{"type": "image_url", "image_url": {"url": "' + url + b'"}}'
    made = (
        {"type": part.kind, part.kind: {"url": part.url}} if isinstance(part, Link) else {"type": "text", "text": part}
    )
    return json.dumps(made, ensure_ascii=False).encode()


def host_of(url: str) -> str | None:
    """Find the host that a URL names; None if it names none."""
    try:
        return urlsplit(url).hostname
    except ValueError:  # a bracket that is not closed
        return None


def is_data(url: str) -> bool:
    """Tell a data URL, which holds what others only point to."""
    return url[:5].lower() == "data:"


def shown(url: str) -> str:
    """Shorten a URL for messages, without what may be a password or a signature."""
    if host_of(url) and not is_data(url):
        parts = urlsplit(url)
        url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{'?...' if parts.query else ''}"
    return url if len(url) <= 60 else f"{url[:57]}..."


def hidden(text: str, url: str) -> str:
    """Strip a text, which may quote a URL wholly or in part, of what gives access: the URL's query and password."""
    parts = urlsplit(url)
    for secret in (parts.query, parts.netloc.rpartition("@")[0]):
        found = text.find(secret[:4]) if len(secret) >= 4 else -1
        while found >= 0:
            end = found
            while end < len(text) and end - found < len(secret) and text[end] == secret[end - found]:
                end += 1
            text = f"{text[:found]}...{text[end:]}"
            found = text.find(secret[:4], found + 3)
    return text
