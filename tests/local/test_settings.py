"""Arguments of LocalScorer: what is wrong is refused at construction, with its name."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rag_rerank import ConfigError, LocalScorer
from tests.models import make_bert_cross_encoder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": ""}, "model is empty"),
        ({"model": 7}, "model must be str, got int"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"dtype": torch.int8}, "dtype must be one of"),
        ({"score_type": "causal"}, "score_type must be one of"),
        ({"instruction": 3}, "instruction must be str, got int"),
        ({"trust_remote_code": "no"}, "trust_remote_code must be bool, got str"),
        ({"use_activation": "identity"}, "use_activation must be bool, got str"),
        ({"max_length": 0}, "max_length must be a whole number, at least 1, got 0"),
        ({"max_length": "512"}, "max_length must be a whole number, at least 1, got '512'"),
        ({"max_tokens_per_doc": True}, "max_tokens_per_doc must be a whole number"),
        ({"max_waiting_calls": None}, "max_waiting_calls must be a whole number"),
        ({"classifier_tokens": "no"}, "classifier_tokens must be .*, got 'no'"),
        ({"classifier_tokens": (1, 2)}, "classifier_tokens must be"),
        ({"classifier_tokens": ["a", "b", "c"]}, "classifier_tokens must be"),
        ({"classifier_tokens": ()}, "classifier_tokens must be"),
        ({"device": ["cpu", "cpu"]}, "device must be None or one device"),
        ({"device": 0}, "device must be .*, got 0"),
        ({"device": "gpu"}, "device must be .*, got 'gpu'"),
        ({"device": "cuda:first"}, "device must be .*, got 'cuda:first'"),
        ({"model_kwargs": ["token"]}, "model_kwargs must be Mapping, got list"),
        ({"model_kwargs": {"token": "hf_canary"}}, "HF_TOKEN"),
        ({"model_kwargs": {"trust_remote_code": True}}, "pass trust_remote_code= to LocalScorer itself"),
        ({"model_kwargs": {"torch_dtype": "bfloat16"}}, "pass dtype= to LocalScorer itself"),
        ({"model_kwargs": {"load_in_8bit": True}}, "load_in_8bit: pass a quantization_config"),
        ({"model_kwargs": {"use_safetensors": False}}, "use_safetensors: it is always set"),
        ({"model_kwargs": {"ignore_mismatched_sizes": True}}, "ignore_mismatched_sizes: it is always set"),
        ({"tokenizer_kwargs": {"max_length": 512}}, "tokenizer_kwargs can't hold max_length: pass max_length="),
    ],
)
def test_wrong_ones(arguments: dict[str, object], words: str):
    """Before anything is loaded, and with nothing secret in the message."""
    with pytest.raises(ConfigError, match=words) as caught:
        LocalScorer(**arguments)
    assert "canary" not in str(caught.value)


def test_numbers_and_types_of_numpy_and_torch(cross_encoder):
    """They are as good as Python's, in a call, too."""
    options = {"dtype": torch.float32, "device": torch.device("cpu"), "max_length": np.int64(32)}
    with (
        LocalScorer(cross_encoder, **options) as scorer,
        LocalScorer(cross_encoder, dtype="float32", device="cpu", max_length=32) as plain,
    ):
        ranked = scorer.rerank(
            "q", ["a", "b"], top_n=np.int32(1), score_threshold=np.float32(0), deadline=np.float32(60)
        )
        assert ranked == plain.rerank("q", ["a", "b"], top_n=1)
        assert scorer.identity() == plain.identity()


def test_python_without_docstrings():
    """Transformers reads them; its own error blames the model."""
    script = "from rag_rerank import LocalScorer; LocalScorer()"
    environment = {**os.environ, "PYTHONOPTIMIZE": "2"}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert "ConfigError: transformers needs docstrings" in ended.stderr


def test_a_relative_folder_counts_from_where_the_scorer_was_made(
    cross_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The model is loaded with the first call, when the process may work in a folder with another one of that name."""
    make_bert_cross_encoder(tmp_path / "other" / cross_encoder.name, seed=1)
    monkeypatch.chdir(cross_encoder.parent)
    with LocalScorer(cross_encoder, dtype="float32") as whole, LocalScorer(cross_encoder.name, dtype="float32") as part:
        monkeypatch.chdir(tmp_path / "other")
        assert part.score("a", "b") == whole.score("a", "b")
