"""Who is compared: each as its users get it, with default settings, unless its name says otherwise."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.exports import FLASHRANK_NAME
from benchmarks.models import ROOT, older
from benchmarks.texts import LOADS, Texts
from rag_rerank.families import family

OWN = ".venv"
PEERS = ".venv-peers"
ONNX = ".venv-peers-onnx"
INFINITY = ".venv-peers-infinity"
VLLM = ".venv-vllm"
REFERENCE = "sentence-transformers float32"
CALIBRATION = 300  # pairs: sentence-transformers' own default for static quantisation


class NotThere(Exception):
    """A contestant can't be set up; the message is for the table."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A contestant.

    Attributes:
        name: For tables.
        worker: Its name in `contestants.CONTESTANTS`.
        venv: The virtual environment that it needs.
        kind: The shapes that it runs: ``pairs`` or ``causal``.
        options: What it is loaded with, beside the folder.
        export: What `exports` makes of the model first, and the environment that makes it.
        heavy: Whether it takes part where a call is 2,000 pairs.
        environment: More environment variables.
    """

    name: str
    worker: str
    venv: str = OWN
    kind: str = "pairs"
    options: Mapping[str, Any] = field(default_factory=dict)
    export: tuple[str, str] | None = None
    heavy: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def python(self) -> Path:
        """What runs its worker: a vLLM server is asked from our own environment."""
        return ROOT / (OWN if self.venv == VLLM else self.venv) / "bin" / "python"

    def why_not(self) -> str | None:
        """Why it can't run here, or None."""
        needed = {self.venv, *([self.export[1]] if self.export else [])}
        missing = sorted(venv for venv in needed if not (ROOT / venv / "bin" / "python").exists())
        return f"not installed ({', '.join(missing)}): run make bench" if missing else None

    def loaded_with(self, model: Path) -> dict[str, Any]:
        """The options of its worker; makes what it reads instead of the model's own folder.

        Raises:
            NotThere: The export failed.
        """
        folder = model
        if self.export is not None:
            folder = exported(model, *self.export)
        elif self.venv == INFINITY:
            folder = older(model)
        return {"folder": str(folder), **self.options}


def exported(model: Path, what: str, venv: str) -> Path:
    """The folder that `exports` makes of `model`, made if there is none.

    Raises:
        NotThere: It could not be made.
    """
    made = model.with_name(f"{model.name}.{what}")
    if made.exists():
        return made
    unfinished = model.with_name(f"{made.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    texts = model.with_name("calibration.json")
    if not texts.exists():
        texts.write_text(json.dumps(_calibration()), encoding="utf-8")
    source = older(model) if venv == ONNX else model
    command = [ROOT / venv / "bin" / "python", Path(__file__).with_name("exports.py"), what, source, unfinished, texts]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        raise NotThere(f"export failed: {lines[-1]}")
    unfinished.rename(made)
    return made


def _calibration() -> list[tuple[str, str]]:
    """Pairs of questions that no round asks as long as there are fewer than a hundred."""
    texts = Texts("passages")
    texts.questions.reverse()
    calls = texts.calls(LOADS["1x25"])
    pairs: list[tuple[str, str]] = []
    while len(pairs) < CALIBRATION:
        call = next(calls)
        pairs += [(call.queries[0], text) for text in call.documents[0]]
    return pairs[:CALIBRATION]


def _qwen_vllm(dtype: str) -> dict[str, Any]:
    qwen = family("qwen3-reranker")
    template = ROOT / "rag_rerank" / "templates" / str(qwen.template)
    flags = shlex.split(qwen.vllm_flags.replace("{template}", shlex.quote(str(template))))
    return {
        "dtype": dtype,
        "flags": [*flags, "--max-model-len", "4096"],
        "arguments": {"truncate_prompt_tokens": None},
    }


_QWEN = {"arguments": {"template": "qwen3-reranker", "classifier_tokens": ["no", "yes"]}}
_CARD = {
    "around": [
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ],
    "pair": f"<Instruct>: {family('qwen3-reranker').instruction}\n<Query>: {{query}}\n<Document>: {{doc}}",
}
_OPENVINO = {"backend": "openvino", "dtype": "auto"}
_OPENVINO_FLOAT32 = {
    "backend": "openvino",
    "dtype": "float32",
    "model_kwargs": {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}},
}
_ONNX_INT8 = {
    "backend": "onnx",
    "dtype": "int8",
    "model_kwargs": {"file_name": "onnx/model_qint8_avx512_vnni.onnx"},
}

CONTESTANTS = (
    Peer(REFERENCE, "cross_encoder", heavy=True),
    Peer("sentence-transformers bfloat16", "cross_encoder", options={"dtype": "bfloat16"}),
    Peer("sentence-transformers float32, batch_size=4", "cross_encoder", options={"batch_size": 4}),
    Peer(
        "sentence-transformers bfloat16, batch_size=8", "cross_encoder", options={"dtype": "bfloat16", "batch_size": 8}
    ),
    Peer("LangChain CrossEncoderReranker", "langchain"),
    Peer("LlamaIndex SentenceTransformerRerank", "llama_index"),
    Peer("transformers, plain loop", "plain_transformers"),
    Peer("sentence-transformers ONNX", "cross_encoder", ONNX, options={"backend": "onnx"}, export=("onnx", ONNX)),
    Peer("sentence-transformers ONNX int8", "cross_encoder", ONNX, options=_ONNX_INT8, export=("onnx_int8", ONNX)),
    Peer(
        "sentence-transformers OpenVINO",
        "cross_encoder",
        PEERS,
        options=_OPENVINO,
        export=("openvino", PEERS),
        heavy=True,
    ),
    Peer(
        "sentence-transformers OpenVINO, float32 asked for",
        "cross_encoder",
        PEERS,
        options=_OPENVINO_FLOAT32,
        export=("openvino", PEERS),
    ),
    Peer(
        "sentence-transformers OpenVINO, batch_size=8",
        "cross_encoder",
        PEERS,
        options={**_OPENVINO, "batch_size": 8},
        export=("openvino", PEERS),
        heavy=True,
    ),
    Peer(
        "sentence-transformers OpenVINO int8",
        "cross_encoder",
        PEERS,
        options={**_OPENVINO, "dtype": "int8"},
        export=("openvino_int8", PEERS),
        heavy=True,
    ),
    Peer("FlashRank", "flashrank", PEERS, options={"name": FLASHRANK_NAME}, export=("flashrank", ONNX)),
    Peer("infinity", "infinity", INFINITY),
    Peer("vLLM CPU server float32", "vllm", VLLM, options={"dtype": "float32"}),
    Peer("vLLM CPU server bfloat16", "vllm", VLLM, options={"dtype": "bfloat16"}),
    Peer("rag_rerank float32", "rag_rerank", options={"dtype": "float32"}, heavy=True),
    Peer("rag_rerank dtype=auto", "rag_rerank", options={"dtype": "auto"}, heavy=True),
    Peer("model card's loop float32", "qwen_card", kind="causal", options={**_CARD, "dtype": "float32"}, heavy=True),
    Peer("model card's loop bfloat16", "qwen_card", kind="causal", options={**_CARD, "dtype": "bfloat16"}),
    Peer("vLLM CPU server float32", "vllm", VLLM, "causal", options=_qwen_vllm("float32")),
    Peer("vLLM CPU server bfloat16", "vllm", VLLM, "causal", options=_qwen_vllm("bfloat16")),
    Peer("rag_rerank float32", "rag_rerank", kind="causal", options={**_QWEN, "dtype": "float32"}, heavy=True),
    Peer("rag_rerank dtype=auto", "rag_rerank", kind="causal", options={**_QWEN, "dtype": "auto"}, heavy=True),
    Peer(
        "rag_rerank dtype=auto, prefix not shared",
        "rag_rerank",
        kind="causal",
        options={**_QWEN, "dtype": "auto"},
        environment={"RAG_RERANK_BENCH_NO_SHARING": "1"},
    ),
)
REFERENCES = {"pairs": REFERENCE, "causal": "model card's loop float32"}
