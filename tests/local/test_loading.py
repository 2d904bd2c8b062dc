"""What loading does to the rest of the process."""

import threading
from pathlib import Path

import pytest
import torch

from rag_rerank import LocalScorer
from rag_rerank.local.checkpoint import checkpoint


def test_models_are_loaded_one_after_the_other(cross_encoder: Path, monkeypatch: pytest.MonkeyPatch):
    """Two at a time would put back each other's default dtype: transformers has one for the process."""
    monkeypatch.setattr(checkpoint, "_SMALL", 0)  # large ones load with a progress bar, small ones hold a lock anyway
    failures: list[BaseException] = []

    def load(start: threading.Barrier) -> None:
        try:
            with LocalScorer(cross_encoder, dtype="bfloat16") as scorer:
                start.wait(60)
                scorer.score("query", "document")
        except BaseException as error:  # noqa: BLE001 - for the main thread
            failures.append(error)

    for _ in range(20):
        start = threading.Barrier(2)
        threads = [threading.Thread(target=load, args=(start,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() is torch.float32
    assert failures == []
