"""The examination of a model in this process: its declaration, and the proof that it is run rightly."""

import json
import re
from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoTokenizer

from rag_rerank import LocalScorer
from rag_rerank.check import Finding
from rag_rerank.check.local import check_local
from tests.causal_models import make_causal_lm
from tests.commands import run
from tests.encoder_models import make_bi_encoder, make_encoder_cross_encoder, make_pylate_colbert, modular_modules
from tests.local.checkpoint.test_chat import FLAT
from tests.local.checkpoint.test_chat import make as make_embedder_of_messages
from tests.native_models import make_jina_v3


def examine(folder: Path, **options: object) -> dict[str, Finding]:
    """What is found, by title."""
    with LocalScorer(folder, dtype="float32", device="cpu", **options) as scorer:
        found = {finding.title: finding for finding in check_local(scorer)}
    assert all(finding.says.endswith(".") for finding in found.values())
    return found


def test_a_classifier(tmp_path: Path):
    """All that there is to say, and nothing to be done."""
    found = examine(make_encoder_cross_encoder(tmp_path / "model", "bert"))
    assert list(found) == ["Model", "Files", "Scores", "Prompt", "Window", "Proof"]
    assert {finding.verdict for finding in found.values()} == {"good"}
    assert f"{tmp_path / 'model'} is a cross-encoder, run as classifier in float32 on cpu." == found["Model"].says
    assert found["Scores"].says == "A score is the sigmoid of its logit."
    assert found["Window"].says == "It reads 96 tokens."
    assert found["Proof"].says.startswith("It is run unpadded; largest difference from plain transformers: unpadded: ")


def test_without_the_proof(tmp_path: Path):
    """The settings are the scorer's."""
    found = examine(make_encoder_cross_encoder(tmp_path / "model", "bert"), verify=False)
    assert found["Proof"].verdict == "note"


def test_a_modular_cross_encoder(tmp_path: Path):
    """With what it is made of, and what a server takes it for."""
    options = {"activation_fn": torch.nn.Identity(), "prompts": {"q": "query: "}, "default_prompt_name": "q"}
    CrossEncoder(modules=modular_modules(tmp_path / "parts", "modernbert"), device="cpu", **options).save_pretrained(
        str(tmp_path / "model")
    )
    found = examine(tmp_path / "model")
    assert found["Files"].says == (
        "modules.json declares Transformer (feature-extraction), Pooling (cls), Dense (GELU), LayerNorm, "
        "Dense (Identity). vLLM takes such a model for an embedding model."
    )
    assert "rag-rerank convert" in str(found["Files"].remedy)
    assert found["Scores"].says == "A score is the identity of its logit."
    assert found["Prompt"].says == "Query and document are read as a pair, by default with the prompt 'query: '."


def test_a_causal_model_that_declares_its_answers(tmp_path: Path):
    """Where sentence-transformers' scale is another, it is said."""
    source = make_causal_lm(tmp_path / "source", "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    tokenizer.save_pretrained(source)
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    modules = [Transformer(str(source), transformer_task="text-generation"), LogitScore(yes, no)]
    options = {"activation_fn": torch.nn.Identity(), "prompts": {"web": "Find it"}, "default_prompt_name": "web"}
    CrossEncoder(modules=modules, device="cpu", **options).save_pretrained(str(tmp_path / "model"))
    found = examine(tmp_path / "model")
    assert found["Answers"].says == f'Its score is the logit of ["no", "yes"], ids {no}, {yes} (false, true).'
    assert "a score template, by default with the instruction 'Find it'" in found["Prompt"].says
    assert (found["Scores"].verdict, "sentence-transformers has the Identity" in found["Scores"].says) == ("note", True)


def test_embeddings(tmp_path: Path):
    """What vLLM doesn't go by is a note with a remedy."""
    plain = make_bi_encoder(tmp_path / "plain", "cls_token")
    assert examine(plain)["Scores"].says == "It declares cosine, as vLLM has it."
    modules = [Transformer(str(plain)), Pooling(64, ["cls", "mean"])]
    model = SentenceTransformer(modules=modules, prompts={"query": "q: "}, similarity_fn_name="dot", device="cpu")
    model.save_pretrained(str(tmp_path / "model"))
    found = examine(tmp_path / "model")
    assert "Pooling (cls + mean)" in found["Files"].says
    assert found["Scores"].says == "It declares dot, query prompt 'q: '; vLLM takes cosine alone."
    assert "query_prompt=" in str(found["Scores"].remedy)
    colbert = make_pylate_colbert(tmp_path / "colbert")
    declared = {"query_prefix": "[Q] ", "do_query_expansion": True, "query_length": 20}
    (colbert / "config_sentence_transformers.json").write_text(json.dumps(declared))
    found = examine(colbert)["Scores"]
    assert "maxsim, query prompt '[Q] ', queries filled up to 20, skipped words 32; vLLM takes" in found.says
    assert 'late_interaction="vllm"' in str(found.remedy)
    make_embedder_of_messages(str(tmp_path / "messages"), FLAT)
    assert "It declares cosine, texts as 'messages'; vLLM" in examine(tmp_path / "messages")["Scores"].says


def test_a_listwise_model(tmp_path: Path):
    """How much the order of the documents matters is tried out."""
    found = examine(make_jina_v3(tmp_path / "jina-reranker-v3"))
    assert found["Model"].says.startswith(str(tmp_path))
    assert found["Batches"].verdict == "note"
    assert 0.001 < float(re.search(r"score up to ([\d.e-]+) otherwise", found["Batches"].says)[1]) < 2


@pytest.mark.parametrize("as_json", [True, False])
def test_on_the_command_line(as_json: bool, tmp_path: Path):
    """As a server's; a model that can't be loaded is a problem."""
    folder = make_encoder_cross_encoder(tmp_path / "model", "bert")
    result = run("check", str(folder), *["--json"] * as_json)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    titles = (
        [json.loads(line)["title"] for line in lines] if as_json else [line[2:7] for line in lines if line[:1].strip()]
    )
    assert titles[:2] == ["Model", "Files"]
    (folder / "model.safetensors").write_bytes(b"x")
    broken = run("check", str(folder), *["--json"] * as_json)
    assert broken.returncode == 1
    assert "is damaged" in " ".join(broken.stdout.split())
