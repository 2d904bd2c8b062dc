"""Converts a model folder to what another engine reads; run by path with that engine's Python, once per model.

    PYTHON benchmarks/exports.py openvino|openvino_int8|onnx|onnx_int8|flashrank MODEL OUT [TEXTS]

TEXTS is a JSON list of pairs that static quantisation is calibrated on. The weights stay those of MODEL.
"""

import json
import shutil
import sys
from pathlib import Path

FLASHRANK_NAME = "ms-marco-TinyBERT-L-2-v2"  # FlashRank loads only models that it knows, by their names


def openvino(model: Path, out: Path, _: Path) -> None:
    from sentence_transformers import CrossEncoder

    CrossEncoder(str(model), backend="openvino", device="cpu").save_pretrained(str(out))


def openvino_int8(model: Path, out: Path, texts: Path) -> None:
    """What sentence-transformers' export_static_quantized_openvino_model does, without a dataset from the hub."""
    import nncf
    from optimum.intel import OVConfig, OVModelForSequenceClassification, OVQuantizationConfig, OVQuantizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = OVModelForSequenceClassification.from_pretrained(model, export=True)
    pairs = json.loads(texts.read_text(encoding="utf-8"))
    samples = [
        dict(tokenizer(*pair, padding="max_length", max_length=384, truncation=True, return_tensors="np"))
        for pair in pairs
    ]
    OVQuantizer.from_pretrained(loaded).quantize(
        calibration_dataset=nncf.Dataset(samples),
        save_directory=out / "openvino",
        ov_config=OVConfig(quantization_config=OVQuantizationConfig(num_samples=len(samples))),
    )
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, out)


def onnx(model: Path, out: Path, _: Path) -> None:
    from sentence_transformers import CrossEncoder

    CrossEncoder(str(model), backend="onnx", device="cpu").save_pretrained(str(out))


def onnx_int8(model: Path, out: Path, _: Path) -> None:
    from sentence_transformers import CrossEncoder, export_dynamic_quantized_onnx_model

    encoder = CrossEncoder(str(model), backend="onnx", device="cpu")
    encoder.save_pretrained(str(out))
    export_dynamic_quantized_onnx_model(encoder, "avx512_vnni", str(out))
    (out / "onnx" / "model.onnx").unlink()


def flashrank(model: Path, out: Path, _: Path) -> None:
    """FlashRank's own folder layout: an ONNX file and the tokenizer's files, one of them as transformers 4 had it."""
    from sentence_transformers import CrossEncoder

    folder = out / FLASHRANK_NAME
    folder.mkdir()
    CrossEncoder(str(model), backend="onnx", device="cpu").save_pretrained(str(out / "export"))
    (out / "export" / "onnx" / "model.onnx").rename(folder / "flashrank-TinyBERT-L-2-v2.onnx")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(model / name, folder)
    shutil.rmtree(out / "export")


EXPORTS = {export.__name__: export for export in (openvino, openvino_int8, onnx, onnx_int8, flashrank)}

if __name__ == "__main__":
    del sys.path[0]  # this folder: its modules' names are too common
    name, *paths = sys.argv[1:]
    EXPORTS[name](*map(Path, [*paths, ""][:3]))
