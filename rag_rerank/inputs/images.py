"""Images, read within bounds: what is broken, too large, or no image is refused before anything is sent."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_rerank.errors import ConfigError, ContentError

if TYPE_CHECKING:
    import PIL.Image

MOST_BYTES = 20 << 20
"""Of a file, as it is on the disk."""
MOST_PIXELS = 40_000_000
"""Width times height; A4 scanned at 600 dpi has 35 million. Decoded, that is 120 MB."""

_FORMATS = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",  # what Pillow calls a JPEG file with a second image in it, as telephones write
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}


@dataclass(frozen=True, repr=False)
class ImageFile:
    """An image file that can be decoded."""

    data: bytes
    media_type: str  # such as image/png
    width: int  # in pixels
    height: int

    def decoded(self) -> "PIL.Image.Image":
        """Decode it as vLLM does: turned as its EXIF data says, in RGB, transparent parts white."""
        with _opened(self.data) as image:
            return _as_rgb(image)


BLANK = ImageFile((Path(__file__).parent / "blank.png").read_bytes(), "image/png", 64, 64)
"""A white square, which no model that sees refuses."""


def read_image(source: "Path | bytes | PIL.Image.Image", max_pixels: int | None = None) -> ImageFile:
    """Read, check and, where it has more than `max_pixels`, scale down an image; of a PIL image, make a PNG.

    It is decoded once to see that it is whole: about 10 ms for a million pixels. Raises ContentError for what is no
    image that can be used, and ConfigError where Pillow is not installed.
    """
    pil = _pillow()
    if isinstance(source, Path | bytes):
        data = source if isinstance(source, bytes) else _file(source)
        if len(data) > MOST_BYTES:
            raise ContentError(f"is an image of {len(data):,} bytes; {MOST_BYTES:,} are the most")
        with _opened(data) as image:
            _check_size(image)
            kind = str(image.format)
            # Whatever may be wrong with a file: Pillow has no one error for that (OSError, SyntaxError, struct.error).
            try:
                image.load()
                scaled = _scaled(image, max_pixels)
            except Exception as error:
                raise ContentError(f"is a damaged image: {error}") from error
            if scaled is None:
                return ImageFile(data, _FORMATS[kind], *image.size)
            return _encoded(scaled, "JPEG" if kind in ("JPEG", "MPO") else "PNG")
    _check_size(source)
    try:
        return _encoded(_scaled(source, max_pixels) or _as_rgb(source), "PNG")
    except ContentError:
        raise
    except (OSError, SyntaxError, ValueError, IndexError, pil.DecompressionBombError) as error:  # it may not be loaded
        raise ContentError(f"is an image that can't be written as PNG: {error}") from error


def size_of(source: "Path | bytes | PIL.Image.Image") -> tuple[int, int]:
    """Tell width and height in pixels, without decoding any; raises as `read_image`."""
    if not isinstance(source, Path | bytes):
        return source.size
    with _opened(source if isinstance(source, bytes) else _file(source)) as image:
        return image.size


def thumbnail(source: "Path | bytes | PIL.Image.Image", max_pixels: int = 96 * 96) -> str:
    """Make a small JPEG, about 3 kB, as a data URL; raises as `read_image`."""
    image = read_image(source, max_pixels)
    file = io.BytesIO()
    image.decoded().save(file, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _pillow() -> Any:
    try:
        import PIL.Image  # noqa: PLC0415 - only who scores images needs it
    except ImportError as error:
        raise ConfigError("images need Pillow: pip install 'rag-rerank[images]'") from error
    return PIL.Image


def _file(path: Path) -> bytes:
    """Read its bytes, no more of them than are allowed, and of files only: a pipe or device would never end."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return file.read(MOST_BYTES + 1)
        there = path.exists()
    except OSError as error:
        raise ContentError(f"is the file {path}, which can't be read: {error.strerror or error}") from error
    raise ContentError(f"is the path {path}, which is {'no file' if there else 'not there'}")


def _opened(data: bytes) -> "PIL.Image.Image":
    """Read its header, no pixel yet."""
    pil = _pillow()
    try:
        image: PIL.Image.Image = pil.open(io.BytesIO(data), formats=[name for name in _FORMATS if name != "MPO"])
    except (pil.DecompressionBombError, pil.DecompressionBombWarning) as error:  # the latter where warnings are errors
        raise ContentError(f"is an image with too many pixels: {error}") from error
    except Exception as error:  # as for what is damaged
        raise ContentError("is no PNG, JPEG, WebP, GIF, BMP or TIFF image") from error
    return image


def _check_size(image: "PIL.Image.Image") -> None:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ContentError(f"is an image of {width:,} x {height:,} pixels; {MOST_PIXELS:,} are the most: scale it down")
    if width < 1 or height < 1:
        raise ContentError(f"is an image of {width} x {height} pixels")


def _scaled(image: "PIL.Image.Image", max_pixels: int | None) -> "PIL.Image.Image | None":
    """Scale it to RGB of no more pixels; None where it is small enough."""
    width, height = image.size
    if max_pixels is None or width * height <= max_pixels:
        return None
    ratio = (max_pixels / (width * height)) ** 0.5
    image = _as_rgb(image)  # upright: width and height may have changed places
    size = max(1, int(image.width * ratio)), max(1, int(image.height * ratio))
    return image.resize(size, _pillow().Resampling.LANCZOS)


def _as_rgb(image: "PIL.Image.Image") -> "PIL.Image.Image":
    """Convert step by step as vLLM 0.32 (``multimodal/image.py``), so that a model sees the same."""
    image = _upright(image)
    if image.mode == "RGB":
        return image
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    ground: PIL.Image.Image = _pillow().new("RGB", image.size, (255, 255, 255))
    ground.paste(image, mask=image.getchannel("A"))
    return ground


def _upright(image: "PIL.Image.Image") -> "PIL.Image.Image":
    from PIL import ImageOps  # noqa: PLC0415

    try:
        return ImageOps.exif_transpose(image) or image
    except Exception:  # noqa: BLE001 - damaged EXIF data, of which there is much: as if there were none, as in vLLM
        return image


def _encoded(image: "PIL.Image.Image", kind: str) -> ImageFile:
    file = io.BytesIO()
    image.save(file, format=kind, **({"quality": 90} if kind == "JPEG" else {"compress_level": 1}))
    if file.tell() > MOST_BYTES:
        raise ContentError(f"is an image that takes {file.tell():,} bytes as {kind}, {MOST_BYTES:,} are the most")
    return ImageFile(file.getvalue(), _FORMATS[kind], *image.size)
