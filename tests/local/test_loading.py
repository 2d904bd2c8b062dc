"""What loading does to the rest of the process."""

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from rag_rerank import LocalScorer
from rag_rerank.local.checkpoint import checkpoint


def test_models_are_loaded_one_after_the_other(cross_encoder: Path, monkeypatch: pytest.MonkeyPatch):
    """Two at a time would put back each other's default dtype: transformers has one for the process."""
    monkeypatch.setattr(checkpoint, "_SMALL", 0)  # small ones take turns: their bars are hidden
    set_dtype, changed, most, failures = torch.set_default_dtype, 0, 0, []

    def slowly(dtype: torch.dtype) -> None:
        nonlocal changed, most
        set_dtype(dtype)
        changed += 1 if dtype is torch.bfloat16 else -1
        most = max(most, changed)
        time.sleep(0.001)  # the other thread's turn

    def load() -> None:
        try:
            with LocalScorer(cross_encoder, dtype="bfloat16") as scorer:
                scorer.score("query", "document")
        except BaseException as error:  # noqa: BLE001 - for the main thread
            failures.append(error)

    monkeypatch.setattr(torch, "set_default_dtype", slowly)
    for _ in range(20):
        threads = [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_default_dtype() is torch.float32
    assert failures == []
    assert most == 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_is_its_own(dtype: str, cross_encoder: Path, tmp_path: Path):
    """What is written over the file of its weights is not scored with, and an empty one ends no process."""
    folder = shutil.copytree(cross_encoder, tmp_path / "model")
    with LocalScorer(folder, dtype=dtype) as scorer:
        expected = scorer.score("query", ["document", "city"])
        assert str(folder) not in Path("/proc/self/maps").read_text(encoding="utf-8")
        (folder / "model.safetensors").write_bytes(b"")
        assert scorer.score("query", ["document", "city"]) == expected
