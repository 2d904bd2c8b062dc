"""Repositories with code of their own, loaded without it: the layouts are the hub's, see `tests.native_models`.

That their scores are those of a server is seen in ``tests/vllm/test_family_parity.py``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder

from rag_rerank import ConfigError, LocalScorer
from rag_rerank.families import family, find_family
from tests.native_models import (
    make_gte,
    make_jina_colbert,
    make_jina_reranker,
    make_jina_v3,
    make_lfm2_colbert,
    make_nemotron,
)
from tests.vision_models import make_jina_m0

MAKERS: dict[str, Callable[..., Path]] = {
    "gte-multilingual-reranker-base": make_gte,
    "jina-reranker-v2-base-multilingual": make_jina_reranker,
    "llama-nemotron-rerank-1b-v2": make_nemotron,
    "jina-reranker-m0": make_jina_m0,
    "jina-reranker-v3": make_jina_v3,
}
PAIRS = ["how is a file copied?"] * 3, ["With shutil.", "Ask a question. " * 20, "A list is mutable."]


def loaded(folder: Path, **options: Any) -> LocalScorer:
    return LocalScorer(folder, dtype="float32", use_activation=False, **options)


@pytest.mark.parametrize("name", MAKERS)
class TestAllOfThem:
    def test_score_on_the_fast_path_and_run_no_code(self, name: str, tmp_path: Path):
        """Their module fails as soon as it is run."""
        with loaded(MAKERS[name](tmp_path / name)) as scorer:
            scores = scorer.score(*PAIRS)
            assert max(scores) - min(scores) > 0.1
            assert scorer.proof().path == find_family(name).local
            assert scorer.score(PAIRS[0][:1], PAIRS[1][:1]) == pytest.approx(scores[:1], abs=1e-5)

    def test_score_the_same_with_trust_in_remote_code(self, name: str, tmp_path: Path):
        """There is no use in it."""
        folder = MAKERS[name](tmp_path / name)
        with loaded(folder) as one, loaded(folder, trust_remote_code=True) as other:
            assert one.score(*PAIRS) == other.score(*PAIRS)

    def test_lack_no_weight_unnoticed(self, name: str, tmp_path: Path):
        folder = MAKERS[name](tmp_path / name)
        weights = load_file(folder / "model.safetensors")
        del weights[next(key for key in weights if "qkv" in key or "q_proj" in key)]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match="has no weights for"):
            loaded(folder).score("q", ["d"])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("gte-multilingual-reranker-base", "rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("gte-multilingual-reranker-base", "rope_scaling", {"type": "ntk", "factor": 2.0, "mixed_b": 0.5}),
        ("gte-multilingual-reranker-base", "layer_norm_type", "rms_norm"),
        ("gte-multilingual-reranker-base", "hidden_size", "wide"),
        ("llama-nemotron-rerank-1b-v2", "pooling", "max"),
        ("llama-nemotron-rerank-1b-v2", "temperature", 0.02),
        ("jina-reranker-v3", "model_type", "llama"),
        ("jina-reranker-v3", "use_sliding_window", True),
        ("jina-reranker-v3", "layer_types", ["full_attention", "sliding_attention"]),
        ("jina-reranker-v3", "global_attn_every_n_layers", 5),
    ],
)
def test_what_is_asked_for_and_cannot_be_done_is_refused(name: str, field: str, value: object, tmp_path: Path):
    """By file and field."""
    folder = MAKERS[name](tmp_path / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, field: value}), encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{name}.*config.json"):
        loaded(folder).score("q", ["d"])


class TestNemotron:
    @pytest.mark.parametrize("pooling", ["avg", "cls", "last"])
    def test_the_pooling_is_the_configs(self, pooling: str, tmp_path: Path):
        """Each gives other scores."""
        with loaded(make_nemotron(tmp_path / "llama-nemotron-rerank-1b-v2", pooling=pooling)) as scorer:
            [got] = scorer.score("q", ["a document"])
        assert got == pytest.approx(self.expected(tmp_path / "llama-nemotron-rerank-1b-v2", pooling), abs=1e-5)

    def expected(self, folder: Path, pooling: str) -> float:
        """By transformers, with a mask that hides nothing."""
        from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = LlamaConfig.from_dict({key: value for key, value in fields.items() if key != "auto_map"})
        weights = load_file(folder / "model.safetensors")
        body = {key.removeprefix("model."): weight for key, weight in weights.items() if key.startswith("model.")}
        model = LlamaModel.from_pretrained(None, config=config, state_dict=body, attn_implementation="eager")
        ids = PreTrainedTokenizerFast.from_pretrained(folder)(
            "question:q \n \n passage:a document", return_tensors="pt"
        )
        length = ids["input_ids"].shape[1]
        with torch.inference_mode():
            mask = torch.zeros(1, 1, length, length)
            states = model(ids["input_ids"], attention_mask=mask).last_hidden_state[0]
        vector = {"avg": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
        return float(vector @ weights["score.weight"][0])

    def test_its_weights_may_be_in_several_files(self, tmp_path: Path):
        """The head is in one of them."""
        folder = make_nemotron(tmp_path / "llama-nemotron-rerank-1b-v2")
        with loaded(folder) as scorer:
            expected = scorer.score(*PAIRS)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        homes = {name: f"model-0000{1 + (name > 'model.layers.1')}-of-00002.safetensors" for name in weights}
        for home in set(homes.values()):
            save_file({name: weights[name] for name in weights if homes[name] == home}, folder / home, {"format": "pt"})
        index = json.dumps({"metadata": {}, "weight_map": homes})
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
        with loaded(folder) as scorer:
            assert scorer.score(*PAIRS) == expected

    def test_its_prompt_must_be_known(self, tmp_path: Path):
        with pytest.raises(ConfigError, match="the score template of .* is not known"):
            loaded(make_nemotron(tmp_path / "renamed")).score("q", ["d"])


class TestColBERTs:
    """By the recipes that their folders declare, as sentence-transformers goes by them."""

    def test_jina_colbert_is_scored_without_its_code(self, tmp_path: Path):
        """Markers, queries filled up, lengths, punctuation; its rope's base is its own."""
        folder = make_jina_colbert(tmp_path / "jina-colbert-v2", tmp_path / "plain")
        self.assert_alike(folder, tmp_path / "plain")

    def test_lfm2_colbert_needs_no_translation(self, tmp_path: Path):
        """A decoder with convolutions is padded."""
        folder = make_lfm2_colbert(tmp_path / "LFM2-ColBERT-350M")
        self.assert_alike(folder, folder)
        with loaded(folder) as scorer:
            scorer.score("q", ["d"])
            assert scorer.proof().path == family("lfm2-colbert").local

    def assert_alike(self, folder: Path, plain: Path) -> None:
        texts = [*PAIRS[0], "short"], [*PAIRS[1], "One, two. " * 40]
        model = MultiVectorEncoder(str(plain), device="cpu")
        theirs = model.similarity_pairwise(model.encode_query(texts[0]), model.encode_document(texts[1])).tolist()
        with LocalScorer(folder, dtype="float32") as scorer:
            got = scorer.score(*texts)
        assert max(theirs) - min(theirs) > 0.5
        assert got == pytest.approx(theirs, abs=1e-4)
