"""A small folder is loaded without progress bars, and whoever else shows some goes on doing so."""

import threading
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from rag_rerank import LocalScorer
from rag_rerank.local.checkpoint import checkpoint
from tests.models import make_bert_cross_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert_cross_encoder(tmp_path_factory.mktemp("model"))


def load(folder: Path) -> None:
    with LocalScorer(folder) as scorer:
        scorer.score("query", "document")


def test_a_small_folder_shows_no_bar_and_changes_nothing(folder: Path, capfd: pytest.CaptureFixture[str]):
    load(folder)
    assert "Loading weights" not in capfd.readouterr().err
    AutoModelForSequenceClassification.from_pretrained(folder)
    assert "Loading weights" in capfd.readouterr().err


def test_what_takes_longer_shows_one(folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "_SMALL", 0)
    load(folder)
    assert "Loading weights" in capfd.readouterr().err


def test_a_hook_of_the_users_sees_the_bar_hidden_and_stays(folder: Path):
    seen = []

    def hook(make, args, kwargs):
        seen.append(kwargs)
        return make(*args, **kwargs)

    before = logging.set_tqdm_hook(hook)
    try:
        load(folder)
    finally:
        assert logging.set_tqdm_hook(before) is hook
    assert seen
    assert all(kwargs["disable"] for kwargs in seen)


def test_bars_of_other_threads_stay():
    shown = []
    with checkpoint._without_bars():
        thread = threading.Thread(target=lambda: shown.append(not logging.tqdm([]).disable))
        thread.start()
        thread.join()
        shown.append(not logging.tqdm([]).disable)
    assert shown == [True, False]
