"""What a query or document may be beside text: images, videos, or several parts together.

    from rag_rerank import Content, Image

    scorer.rerank("sales in March", [Image(Path("page1.png")), Content("Figure 2", Image(data)), "plain text"])

A file is read because the caller wraps its path in `Image`, never because a text looks like a path or an address.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from rag_rerank.errors import ConfigError, ContentError
from rag_rerank.inputs.images import MOST_BYTES
from rag_rerank.inputs.multimodal import host_of, is_data, shown

if TYPE_CHECKING:
    import PIL.Image


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Image:
    """An image.

    Args:
        source: A `Path`, which is read when it is scored; the bytes of a PNG, JPEG, WebP, GIF, BMP or TIFF file; or a
            PIL image, which is sent as PNG, turned as its EXIF data says. None where `url` is given.
        url: An ``https://`` (or ``http://``) address, which a vLLM server fetches for itself, so that it learns that
            somebody asked for it, and may reach what this process can't; or a ``data:`` URL with base64. Nothing is
            ever fetched in this process.
        max_pixels: Scale it down, width times height, before it is scored; None leaves it as it is.

    Raises:
        TypeError: `source` is none of these: a plain string is not taken for a path, nor for an address.
        ValueError: Neither or both of `source` and `url`, another kind of URL, `max_pixels` below 1.

    What is in it is checked when it is scored, see `Scorer.score`.
    """

    source: "Path | bytes | PIL.Image.Image | None" = None
    url: str | None = field(default=None, kw_only=True)
    max_pixels: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        source, url, max_pixels = self.source, self.url, self.max_pixels
        if (source is None) == (url is None):
            raise ValueError("an Image needs a source (Path, bytes, PIL image) or a url, and not both")
        if isinstance(source, str):
            raise TypeError(
                "an Image from a file needs a Path, from an address url=...; got a str, which could be either"
            )
        if source is not None and not (isinstance(source, Path | bytes) or is_pil(source)):
            raise TypeError(f"an Image's source must be a Path, bytes or a PIL image, got {type(source).__name__}")
        if url is not None:
            _check_url(url)
        if max_pixels is not None and (type(max_pixels) is not int or max_pixels < 1):
            raise ValueError(f"max_pixels must be 1 or more, or None; got {max_pixels!r}")

    def held(self) -> "Path | bytes | PIL.Image.Image | None":
        """Find what the image can be read from in this process; None where only a server can fetch it."""
        return decode_base64(self.url.partition(",")[2]) if self.url and is_data(self.url) else self.source

    def __repr__(self) -> str:
        if self.url is not None:
            return f"Image(url={shown(self.url)!r})"
        if isinstance(self.source, bytes):
            return f"Image(<{len(self.source):,} bytes>)"
        return f"Image({self.source!r})"  # a path or a PIL image, whose repr has no pixels


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Video:
    """A video, for servers whose model reads them. It is passed on as it is.

    Args:
        url: An ``https://`` (or ``http://``) address, which the server fetches, or a ``data:`` URL.

    Raises:
        ValueError: Another kind of URL.
    """

    url: str

    def __post_init__(self) -> None:
        _check_url(self.url)

    def __repr__(self) -> str:
        return f"Video({shown(self.url)!r})"


class Content:
    """A query or document of several parts.

    vLLM puts the images before the text, whatever their order here, and so does `LocalScorer`.

    Args:
        *parts: Texts, images and videos.

    Raises:
        TypeError: A part is something else.
        ValueError: There is none.
    """

    __slots__ = ("parts",)

    def __init__(self, *parts: str | Image | Video) -> None:
        if not parts:
            raise ValueError("Content needs at least one part")
        for position, part in enumerate(parts):
            if not isinstance(part, str | Image | Video):
                raise TypeError(f"part {position} must be str, Image or Video, got {type(part).__name__}")
        self.parts = parts

    def __repr__(self) -> str:
        return f"Content({', '.join(repr(part if not isinstance(part, str) else part[:60]) for part in self.parts)})"


Input = Union[str, Image, Video, Content, Mapping[str, Any]]  # noqa: UP007 - evaluated where PEP 604 would need types
"""A query or document. A mapping is vLLM's and OpenAI's form, ``{"content": [part, ...]}``, see `from_mapping`."""


def from_mapping(value: Mapping[str, Any]) -> Content:
    """Make content of parts as LLM APIs write them, ``{"content": [part, ...]}``.

    Parts are texts, `Image`, `Video`, or mappings: ``{"type": "text", "text": ...}``, ``{"type": "image_url",
    "image_url": {"url": ...}}``, the same with ``video_url`` (OpenAI and vLLM), or LangChain's ``{"type": "image",
    "base64" or "url": ...}``. A TypeError or ValueError names the position of what is none of these.
    """
    parts = value.get("content")
    if not isinstance(parts, list | tuple):
        raise ValueError('as a mapping must be {"content": [part, ...]}')  # noqa: TRY004 - a wrong shape
    made: list[str | Image | Video] = []
    for position, part in enumerate(parts):
        try:
            made.append(_part(part))
        except (TypeError, ValueError) as error:
            raise placed(error, f"content[{position}]:") from error
    return Content(*made)


def _part(part: Any) -> str | Image | Video:
    match part:
        case str() | Image() | Video():
            return part
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image", "base64": str(data)}:
            return Image(decode_base64(data))
        case {"type": "image_url", "image_url": {"url": str(url)} | str(url)} | {"type": "image", "url": str(url)}:
            return Image(url=url)
        case {"type": "video_url", "video_url": {"url": str(url)} | str(url)}:
            return Video(url)
        case Mapping():
            raise ValueError(f"{part.get('type')!r} is no type of part that is known, or it lacks what belongs to it")
    raise TypeError(f"a part must be str, Image, Video or a mapping with a type, got {type(part).__name__}")


def decode_base64(text: str) -> bytes:
    """Decode base64, or raise a ContentError."""
    if len(text) > MOST_BYTES * 4 // 3 + 4:
        raise ContentError(f"is an image of about {len(text) * 3 // 4:,} bytes; {MOST_BYTES:,} are the most")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ContentError(f"is an image whose base64 is damaged: {error}") from error


def placed(error: Exception, where: str) -> Exception:
    """Put a position before an error's message; the result is of a kind that is made from a message, as not all are."""
    kinds = (ContentError, ConfigError, TypeError, ValueError)
    return next(kind for kind in kinds if isinstance(error, kind))(f"{where} {error}")


def _check_url(url: str) -> None:
    if not isinstance(url, str):
        raise TypeError(f"a url must be str, got {type(url).__name__}")
    scheme = url[: url.find(":")].lower() if ":" in url[:20] else ""
    if scheme not in ("https", "http", "data") or (scheme != "data" and not host_of(url)):
        raise ValueError(f"{shown(url)!r} is no https, http or data URL; for a file pass Image(Path(...))")
    if scheme == "data" and (";base64," not in url[:100] or not url.isascii()):
        raise ValueError("a data URL must be base64: data:image/png;base64,...")
    if not url.isprintable():  # line breaks, which some URL readers drop, and lone surrogates, which no JSON can hold
        raise ValueError("a url has characters that no URL can have")


def is_pil(value: object) -> bool:
    """Tell a PIL image without importing PIL: where PIL was never imported, nothing can be one."""
    return any(kind.__module__ == "PIL.Image" and kind.__name__ == "Image" for kind in type(value).__mro__)
