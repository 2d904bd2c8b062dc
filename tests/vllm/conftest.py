"""Two real servers of one model."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import require_server

if TYPE_CHECKING:
    from tests.soak import Servers


@pytest.fixture(scope="session")
def vllm_pair(cross_encoder: Path) -> "Iterator[Servers]":
    """The tiny cross-encoder twice; a test that kills one brings it back."""
    require_server()
    from tests.soak import Servers  # needs the extra eval, which the lowest versions' tests do without

    with Servers(cross_encoder) as servers:
        yield servers
