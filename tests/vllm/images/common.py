"""What the tests of images on a server share: images, and how they are sent."""

import base64
from typing import Any

from tests import drawn
from tests.faulty_server import oracle, spelled

RED, GREEN, BLUE = (drawn.png(colour) for colour in (drawn.RED, drawn.GREEN, drawn.BLUE))
BEYOND = "https://images.example/a.png"


def sent(*parts: bytes | str) -> dict[str, Any]:
    """What vLLM's API takes for images and texts."""
    return {"content": [text(part) if isinstance(part, str) else image_part(part) for part in parts]}


def text(part: str) -> dict[str, Any]:
    return {"type": "text", "text": part}


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def exact(query: Any, *documents: Any) -> list[float]:
    """The server's scores of what is sent."""
    return [oracle(spelled(query), spelled(document)) for document in documents]
