"""Small pictures, drawn by the tests: files as bytes, whole and broken."""

import io
import struct
import zlib
from typing import Any

from PIL import Image

RED, GREEN, BLUE = (220, 40, 30), (20, 160, 60), (30, 60, 200)


def png(colour: Any = RED, size: tuple[int, int] = (8, 6), mode: str = "RGB", **options: Any) -> bytes:
    return encoded(Image.new(mode, size, colour), "PNG", **options)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """No two columns, no two rows alike, so that a turned or cut one is another picture."""
    width, height = size
    across, down = Image.linear_gradient("L").resize(size), Image.linear_gradient("L").rotate(90).resize(size)
    return Image.merge("RGB", (across, down, Image.new("L", (width, height), 40))).convert(mode)


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"\0" * 64)) + _chunk(b"IEND")


def wordy(megabytes: int) -> bytes:
    """A PNG with a compressed comment that becomes so many megabytes."""
    whole = png()
    comment = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * (megabytes << 20), 9))
    return whole[:33] + comment + whole[33:]  # behind the signature and IHDR


def _chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
