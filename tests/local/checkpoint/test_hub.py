"""Models from the hub, or rather from its cache."""

import shutil
import socket
from pathlib import Path

import pytest

from rag_rerank import ConfigError, LocalScorer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts that were looked for; none is found."""
    hosts: list[str] = []

    def getaddrinfo(host: str, *_: object, **__: object) -> None:
        hosts.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", None, raising=False)
    # With peft installed, transformers looks for an adapter in its own way.
    monkeypatch.setattr("transformers.models.auto.auto_factory.is_peft_available", lambda: True)
    monkeypatch.setattr("transformers.integrations.peft.is_peft_available", lambda: True)
    return hosts


def test_local_files_only_asks_nobody(cross_encoder: Path, tmp_path: Path, asked: list[str]):
    """For nothing that a checkpoint may have, and for no statistics."""
    repository = tmp_path / "models--org--name"
    shutil.copytree(cross_encoder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    options = {"dtype": "float32", "local_files_only": True, "cache_dir": tmp_path}
    with LocalScorer("org/name", **options) as scorer, LocalScorer(cross_encoder, dtype="float32") as folder:
        assert scorer.score("q", ["a", "b c"]) == folder.score("q", ["a", "b c"])
    with pytest.raises(ConfigError, match="'org/other' can't be loaded: it is not in the hub's cache"):
        LocalScorer("org/other", **options).score("q", "d")
    assert asked == []


def test_a_hub_out_of_reach_is_told_at_once(tmp_path: Path, asked: list[str]):
    """Its client would try each file six times, three minutes in all."""
    with pytest.raises(ConfigError, match=r"'org/other' is not on this machine, and .* can't be reached: no network"):
        LocalScorer("org/other", cache_dir=tmp_path).score("q", "d")
    assert len(asked) <= 2  # one request
