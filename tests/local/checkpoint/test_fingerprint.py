"""The fingerprint of a checkpoint: whatever can change a score changes it, and nothing else does."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rag_rerank import ConfigError
from rag_rerank.local.checkpoint.fingerprint import _samples, fingerprint

SIZES = {"small": (16,), "medium": (64, 64), "large": (512, 700)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As sentence-transformers saves one: weights, tokenizer, and a module in a folder of its own."""
    folder = tmp_path / "model"
    (folder / "1_Dense").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for path, names in (("model.safetensors", SIZES), ("1_Dense/model.safetensors", ["large"])):
        save_file({name: torch.randn(SIZES[name], generator=generator) for name in names}, folder / path)
    modules = [{"idx": 0, "path": "", "type": "Transformer"}, {"idx": 1, "path": "1_Dense", "type": "Dense"}]
    for path, content in {
        "config.json": {"hidden_size": 64},
        "modules.json": modules,
        "tokenizer.json": {"model": {"vocab": {"a": 1}}},
        "1_Dense/config.json": {"activation_function": "torch.nn.modules.linear.Identity"},
        "adapter_config.json": {"r": 8},
        "model.safetensors.index.json": {"weight_map": {}},
    }.items():
        (folder / path).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def changed(folder: Path, before: dict[str, str]) -> set[str]:
    after = fingerprint(folder)
    assert after.keys() == before.keys()
    return {name for name in before if before[name] != after[name]}


class TestWeights:
    """Replaced weights are noticed, whatever the file looks like from outside."""

    @pytest.mark.parametrize("tensor", list(SIZES))
    def test_one_tensor_changed_under_the_same_size_name_and_time(self, folder: Path, tensor: str):
        """As a retrained model that is copied over the old one with its times."""
        before, path = fingerprint(folder), folder / "model.safetensors"
        stat = path.stat()
        weights = load_file(path)
        weights[tensor] = weights[tensor] * 1.001
        save_file(weights, path)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
        assert changed(folder, before) == {"weights"}

    def test_a_tensor_in_a_modules_folder(self, folder: Path):
        """The projection of a ColBERT, for example."""
        before = fingerprint(folder)
        save_file({"large": torch.zeros(SIZES["large"])}, folder / "1_Dense" / "model.safetensors")
        assert changed(folder, before) == {"weights"}

    @pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "adapter_model.safetensors"])
    def test_another_file_of_weights(self, folder: Path, name: str):
        """A shard or an adapter beside the others, new or changed."""
        before = fingerprint(folder)
        save_file({"small": torch.zeros(16)}, folder / name)
        assert changed(folder, before) == {"weights"}
        before = fingerprint(folder)
        save_file({"small": torch.ones(16)}, folder / name)
        assert changed(folder, before) == {"weights"}

    def test_names_that_changed_places(self, folder: Path):
        """The same numbers under other names are another model."""
        before, weights = fingerprint(folder), {"a": torch.zeros(16), "b": torch.ones(16)}
        save_file(weights, folder / "model.safetensors")
        one = fingerprint(folder)
        save_file({"a": weights["b"], "b": weights["a"]}, folder / "model.safetensors")
        assert len({each["weights"] for each in (before, one, fingerprint(folder))}) == 3

    def test_of_the_model_that_an_adapter_adapts(self, folder: Path, tmp_path: Path):
        """Its weights score, too."""
        shutil.copytree(folder, tmp_path / "base")
        before = fingerprint(folder, tmp_path / "base")
        save_file({"small": torch.zeros(16)}, tmp_path / "base" / "model.safetensors")
        after = fingerprint(folder, tmp_path / "base")
        assert before["weights"] != after["weights"] != fingerprint(folder)["weights"]

    @pytest.mark.parametrize("damage", [b"", b"\xff" * 64, (10**6).to_bytes(8, "little") + b"{}"])
    def test_a_damaged_file_is_named(self, folder: Path, damage: bytes):
        """It can't be loaded either."""
        (folder / "model.safetensors").write_bytes(damage)
        with pytest.raises(ConfigError, match=r"model\.safetensors.*safetensors"):
            fingerprint(folder)

    def test_a_file_that_was_cut_off(self, folder: Path):
        """Its header promises more."""
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(ConfigError, match="ends before"):
            fingerprint(folder)

    @given(st.sampled_from(list(SIZES)), st.data())
    def test_any_change_of_a_whole_tensor(
        self, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
    ):
        """However small the step, and in bfloat16 as in float32."""
        folder = tmp_path_factory.mktemp("weights")
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
        weights = {each: torch.randn(size).to(dtype) for each, size in SIZES.items()}
        save_file(weights, folder / "model.safetensors")
        before = fingerprint(folder)
        factor = data.draw(st.sampled_from([-1.0, 0.5, 1.01, 1.1]))
        save_file({**weights, name: weights[name] * factor}, folder / "model.safetensors")
        assert changed(folder, before) == {"weights"}


class TestOtherFiles:
    """Configuration, tokenizer and code count whole; what no model reads does not."""

    @pytest.mark.parametrize(
        "path",
        [
            *("config.json", "modules.json", "tokenizer.json", "1_Dense/config.json", "chat_template.jinja"),
            *("adapter_config.json", "model.safetensors.index.json"),
            *("modeling.py", "vocab.txt", "sentencepiece.bpe.model", "1_Dense/new.json", "sentence_bert_config.json"),
        ],
    )
    def test_one_that_counts(self, folder: Path, path: str):
        """Changed, or new; the weights are as they were."""
        before, file = fingerprint(folder), folder / path
        file.write_text(file.read_text() + "\n" if file.exists() else "{}")
        assert changed(folder, before) == {"checkpoint files"}

    @pytest.mark.parametrize(
        "path",
        ["README.md", ".git/config", ".hidden.json", "pytorch_model.bin", "trainer_state.json", "onnx/model.json"],
    )
    def test_one_that_does_not(self, folder: Path, path: str):
        """Notes, histories, other formats."""
        before = fingerprint(folder)
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text("anything")
        assert changed(folder, before) == set()

    def test_a_renamed_file(self, folder: Path):
        """The name says what it is for."""
        before = fingerprint(folder)
        (folder / "tokenizer.json").rename(folder / "vocab.json")
        assert changed(folder, before) == {"checkpoint files"}


@pytest.mark.parametrize("move", [shutil.copytree, lambda old, new: new.symlink_to(old)], ids=["copy", "link"])
def test_where_the_folder_lies_makes_no_difference(folder: Path, tmp_path: Path, move: Callable[[Path, Path], object]):
    """Nor does it whether files are links, as in the hub's cache."""
    move(folder, tmp_path / "elsewhere")
    assert fingerprint(tmp_path / "elsewhere") == fingerprint(folder)


def test_torch_is_not_needed(folder: Path):
    """Whoever only compares must not wait for it."""
    code = (
        "import sys, pathlib\nfrom rag_rerank.local.checkpoint.fingerprint import fingerprint\n"
        f"print(fingerprint(pathlib.Path({str(folder)!r}))['weights'])\nassert 'torch' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == fingerprint(folder)["weights"]


def test_little_is_read_of_a_gigabyte(tmp_path: Path):
    """Of 1,190 tensors of MiniLM's sizes, more than most models have: 15 ms where 50 are allowed."""
    shapes = [(384, 384)] * 3 + [(384, 1536)] * 2 + [(384, 1), (384, 1)]
    sizes = [4 * rows * columns for _ in range(170) for rows, columns in shapes]
    ends = list(itertools.accumulate(sizes))
    header = json.dumps({str(end): {"data_offsets": [end - size, end]} for size, end in zip(sizes, ends, strict=True)})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + ends[-1])
    assert ends[-1] > 1e9
    assert sum(map(len, _samples(tmp_path / "model.safetensors"))) < 3e6
