"""Who a LocalScorer is: the same for the same scores, and another one's difference in words."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rag_rerank import LocalScorer
from rag_rerank.identity import Identity
from tests.causal_models import make_causal_lm
from tests.encoder_models import make_colbert
from tests.models import make_bert_cross_encoder

PLAIN = (
    '{{ instruction | default("Judge.") }} Q: {{ (messages | selectattr("role", "eq", "query") | first).content }}\n'
    'D: {{ (messages | selectattr("role", "eq", "document") | first).content }}\nA:'
)
CAUSAL: dict[str, Any] = {"template": PLAIN, "classifier_tokens": ("no", "yes")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal_lm(tmp_path_factory.mktemp("identity") / "m", "qwen3")


def identity(folder: Path | str, **options: Any) -> Identity:
    with LocalScorer(folder, **{"dtype": "float32", **options}) as scorer:
        return scorer.identity()


def differing(one: Identity, other: Identity) -> list[str]:
    """The facts' names."""
    return [difference.partition(":")[0] for difference in one.differences(other)]


def test_facts_suffice(folder: Path):
    """No pair is scored to tell; what is told is text, and can be stored."""
    told = identity(folder, **CAUSAL)
    assert list(told.probes) == []
    assert all(isinstance(fact, str) for fact in told.facts.values())
    again = Identity(**json.loads(json.dumps(asdict(told))))
    assert identity(folder, **CAUSAL).differences(again) == []


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"dtype": "bfloat16"}, ["dtype"]),
        ({"template": PLAIN.replace("Q:", "Query:")}, ["template"]),
        ({"instruction": "Find bread."}, ["instruction"]),
        ({"chat_template_kwargs": {"other": 1}}, ["chat_template_kwargs"]),
        ({"classifier_tokens": ("yes", "no")}, ["classifier tokens"]),
        ({"classifier_tokens": ("yes",)}, ["classifier tokens"]),
        ({"use_activation": False}, ["activation"]),
        ({"max_length": 100}, ["max_length"]),
        ({"max_tokens_per_query": 5}, ["max_tokens_per_query"]),
        ({"max_tokens_per_doc": 5}, ["max_tokens_per_doc"]),
        ({"long_documents": "max-passage"}, ["long_documents"]),
        ({"query_prompt": "query: "}, ["query_prompt"]),
        ({"document_prompt": "passage: "}, ["document_prompt"]),
        ({"model_kwargs": {"attn_implementation": "eager"}}, ["model_kwargs"]),
        ({"tokenizer_kwargs": {"add_eos_token": True}}, ["tokenizer_kwargs"]),
    ],
)
def test_each_setting_that_changes_scores_is_named(folder: Path, options: dict[str, Any], names: list[str]):
    """Nothing else is."""
    assert differing(identity(folder, **CAUSAL | options), identity(folder, **CAUSAL)) == names


@pytest.mark.parametrize(
    "options",
    [
        {"max_waiting_calls": 3},
        {"local_files_only": True},
        {"model_kwargs": {"proxies": {"https": "http://user:secret@proxy"}}},
        {"device": "cpu"},
        {"chat_template_kwargs": {"instruction": None}},
    ],
)
def test_a_setting_that_changes_none_is_not(folder: Path, options: dict[str, Any]):
    """Nor is what gives access told."""
    told = identity(folder, **CAUSAL | options)
    assert differing(told, identity(folder, **CAUSAL)) == []
    assert "secret" not in str(told)


def test_what_was_left_open_is_told_as_it_became(folder: Path):
    """dtype="auto" is another dtype on another machine, and the same as the one it became."""
    auto = identity(folder, dtype="auto", **CAUSAL)
    assert auto.facts["dtype"] in ("float32", "bfloat16")
    assert differing(auto, identity(folder, dtype=auto.facts["dtype"], device="cpu", **CAUSAL)) == []
    assert auto.facts["device"] in ("cpu", "cuda", "mps")


def test_an_instruction_is_one_however_it_is_given(folder: Path):
    """By its own name or among the template's variables."""
    by_name = identity(folder, chat_template_kwargs={"instruction": "i"}, **CAUSAL)
    assert differing(identity(folder, instruction="i", **CAUSAL), by_name) == []


class TestWeights:
    """The folder may be the same, and the model another."""

    def test_replaced_weights_in_the_same_folder(self, tmp_path: Path):
        """Size and time as before."""
        folder = make_bert_cross_encoder(tmp_path / "m")
        before, path = identity(folder), folder / "model.safetensors"
        stat, weights = path.stat(), load_file(path)
        weights["classifier.weight"] = -weights["classifier.weight"]
        save_file(weights, path, metadata={"format": "pt"})
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
        assert differing(identity(folder), before) == ["weights"]

    def test_a_loaded_scorer_is_what_it_loaded(self, tmp_path: Path):
        """Files that were replaced later are not what it scores with."""
        folder = make_bert_cross_encoder(tmp_path / "m")
        with LocalScorer(folder, dtype="float32") as scorer:
            before = scorer.identity()
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"problem_type": "regression"}))
            assert differing(scorer.identity(), before) == []
        assert differing(identity(folder), before) == ["activation", "checkpoint files"]

    def test_a_moved_folder_is_the_same(self, tmp_path: Path):
        """Whatever it is called now."""
        folder = make_bert_cross_encoder(tmp_path / "m")
        shutil.copytree(folder, tmp_path / "elsewhere" / "renamed")
        renamed = identity(tmp_path / "elsewhere" / "renamed")
        assert differing(renamed, identity(folder)) == []
        assert renamed.name == "renamed"  # which is what users are told

    def test_of_a_hub_model_in_the_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """The snapshot is fingerprinted, and the model is known by its id."""
        snapshot = tmp_path / "hub" / "models--org--m" / "snapshots" / ("0" * 40)
        folder = make_bert_cross_encoder(tmp_path / "m")
        shutil.copytree(folder, snapshot)
        refs = tmp_path / "hub" / "models--org--m" / "refs"
        refs.mkdir()
        (refs / "main").write_text("0" * 40)
        told = identity("org/m", local_files_only=True, cache_dir=tmp_path / "hub")
        assert differing(told, identity(folder)) == ["model"]
        assert told.facts["model"] == "org/m"

    def test_another_kind_of_model_is_told(self, tmp_path: Path, minilm: Path):
        """Of the same size or not."""
        kinds = {identity(each).facts["score type"] for each in (minilm, make_colbert(tmp_path / "c"))}
        assert kinds == {"bi-encoder", "late-interaction"}


class TestImages:
    """Whether images are accepted is known once the model is loaded."""

    def test_of_a_model_that_reads_text(self, tmp_path: Path):
        """True before: the first call may ask; and it says no."""
        with LocalScorer(make_bert_cross_encoder(tmp_path / "m")) as scorer:
            assert scorer.accepts_images
            scorer.warmup()
            assert not scorer.accepts_images
