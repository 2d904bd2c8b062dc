"""Who a scorer is: what changes scores makes it another, and nothing else does."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rag_rerank import FallbackScorer, LocalScorer, Scorer, VLLMScorer
from rag_rerank.evaluation.identity import Identity, identify
from rag_rerank.template import Template
from tests.faulty_server import FaultyServer
from tests.scorers import WordOverlap


def identity(scorer: Scorer) -> Identity:
    found = identify(scorer)
    assert found is not None
    return found


class TestLocal:
    """Settings, and the files of a folder."""

    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("dtype", "bfloat16"),
            ("device", "cpu"),
            ("template", "qwen3-reranker"),
            ("template", None),
            ("instruction", "Find it."),
            ("chat_template_kwargs", {"instruction": "Find it."}),
            ("classifier_tokens", ("no", "yes")),
            ("query_prompt", "query: "),
            ("document_prompt", "passage: "),
            ("use_activation", False),
            ("max_length", 128),
            ("max_tokens_per_query", 16),
            ("max_tokens_per_doc", 64),
            ("long_documents", "max-passage"),
            ("score_type", "bi-encoder"),
            ("revision", "main"),
            ("model_kwargs", {"attn_implementation": "eager"}),
            ("tokenizer_kwargs", {"use_fast": False}),
        ],
    )
    def test_what_changes_scores_makes_it_another(self, setting: str, value: Any):
        """Every such setting."""
        assert identity(LocalScorer("m", **{setting: value})).text() != identity(LocalScorer("m")).text()

    @pytest.mark.parametrize(
        ("setting", "value"), [("max_waiting_calls", 3), ("cache_dir", "/x"), ("local_files_only", True)]
    )
    def test_what_does_not_is_left_out(self, setting: str, value: Any):
        """Or a cache would be lost for nothing."""
        assert identity(LocalScorer("m", **{setting: value})).text() == identity(LocalScorer("m")).text()

    def test_the_text_of_a_template_counts_and_not_its_name(self, tmp_path: Path):
        """A file may be edited."""
        shipped = Template.load("qwen3-reranker")
        (tmp_path / "mine.jinja").write_text(shipped.source)
        same = LocalScorer("m", template=tmp_path / "mine.jinja")
        assert identity(same).text() == identity(LocalScorer("m", template="qwen3-reranker")).text()
        (tmp_path / "mine.jinja").write_text(shipped.source + "x")
        edited = LocalScorer("m", template=tmp_path / "mine.jinja")
        assert identity(edited).text() != identity(same).text()

    def test_a_folder_is_known_by_its_files(self, tmp_path: Path):
        """A model that was trained further is another one."""
        (tmp_path / "model.safetensors").write_bytes(b"weights")
        before = identity(LocalScorer(tmp_path)).text()
        assert identity(LocalScorer(tmp_path)).text() == before
        os.utime(tmp_path / "model.safetensors", ns=(0, 0))
        assert identity(LocalScorer(tmp_path)).text() != before

    def test_automatic_choices_depend_on_the_machine(self, monkeypatch: pytest.MonkeyPatch):
        """And explicit ones do not."""
        automatic, explicit = LocalScorer("m"), LocalScorer("m", device="cpu", dtype="float32")
        before = identity(automatic).text(), identity(explicit).text()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
        assert identity(automatic).text() != before[0]
        assert identity(explicit).text() == before[1]

    def test_what_cant_be_written_down_is_not_known(self):
        """So its scores are not kept."""
        assert identify(LocalScorer("m", model_kwargs={"quantization_config": object()})) is None


class TestRemote:
    """A server's checkpoint, and what it is asked."""

    def test_a_server_must_have_been_asked(self):
        """Before, nobody knows what it serves."""
        with FaultyServer() as server, VLLMScorer(server.base_url) as scorer:
            assert identify(scorer) is None
            scorer.score("q", "d")
            assert identity(scorer).facts["checkpoint"]

    def test_what_it_is_asked_makes_a_difference_and_where_it_runs_does_not(self):
        """But the time does depend on where."""
        with FaultyServer() as server, FaultyServer() as other:
            variants: list[Callable[[], VLLMScorer]] = [
                lambda: VLLMScorer(server.base_url),
                lambda: VLLMScorer(server.base_url, use_activation=False),
                lambda: VLLMScorer(server.base_url, document_prompt="passage: "),
                lambda: VLLMScorer(server.base_url, truncate_prompt_tokens=64),
                lambda: VLLMScorer(server.base_url, truncate_prompt_tokens=None),
            ]
            texts = []
            for make in variants:
                with make() as scorer:
                    scorer.score("q", "d")
                    texts.append(identity(scorer).text())
            assert len(set(texts)) == len(texts)
            with VLLMScorer(server.base_url, timeout=7, priority=3) as one, VLLMScorer(other.base_url) as two:
                one.score("q", "d")
                two.score("q", "d")
                assert identity(one).text() == identity(two).text() == texts[0]
                assert identity(one).place != identity(two).place


class Mine(WordOverlap):
    """A scorer of a user's own."""

    def __init__(self, fingerprint: str | None = None) -> None:
        super().__init__()
        if fingerprint is not None:
            self.fingerprint = fingerprint


class TestOthers:
    """Scorers that this package does not know."""

    def test_class_source_and_fingerprint_tell(self):
        """The last is theirs to set."""
        assert identity(Mine()).text() == identity(Mine()).text()
        assert identity(Mine()).text() != identity(WordOverlap()).text()
        assert identity(Mine("a")).text() != identity(Mine("b")).text()
        assert "A scorer of a user's own." in identity(Mine()).facts["source"]

    def test_a_class_without_a_source_is_not_known(self):
        """It may be another one in the next session, under the same name."""
        space: dict[str, Any] = {"Base": WordOverlap}
        exec("class Typed(Base): pass", space)  # noqa: S102 - as in an interactive session
        assert identify(space["Typed"]()) is None

    def test_a_fallback_is_not_known(self):
        """Whoever answers may change from call to call."""
        assert identify(FallbackScorer(WordOverlap(), Mine())) is None
