"""Two real servers of one model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require_server
from tests.soak import Servers


@pytest.fixture(scope="session")
def vllm_pair(cross_encoder: Path) -> Iterator[Servers]:
    """The tiny cross-encoder twice; a test that kills one brings it back."""
    require_server()
    with Servers(cross_encoder) as servers:
        yield servers
