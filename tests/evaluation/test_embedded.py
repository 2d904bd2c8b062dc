"""What ships for trying things out."""

import pytest

from rag_rerank import ConfigError
from rag_rerank.embedded import MINILM_SHA256, minilm_folder


class TestEmbedded:
    """The embedded model is the one that we know."""

    def test_its_weights_are_checked(self, monkeypatch: pytest.MonkeyPatch):
        """By sha256; others are refused with both digests."""
        assert (minilm_folder() / "modules.json").is_file()
        monkeypatch.setattr("rag_rerank.embedded.MINILM_SHA256", "0" * 64)
        with pytest.raises(ConfigError, match=f"{MINILM_SHA256}, expected 0000"):
            minilm_folder()
