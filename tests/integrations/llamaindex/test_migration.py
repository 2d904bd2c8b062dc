"""The guide's way from other rerankers to these: the code runs, and no argument of theirs is left without a word.

LlamaIndex's own SentenceTransformerRerank is here to be compared with. Of the others, what was written is read, and the
arguments are those of the newest packages on PyPI in 2026.
"""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch
from llama_index.core.postprocessor import SentenceTransformerRerank
from sentence_transformers import CrossEncoder

from llama_index.postprocessor.rag_rerank import LocalReranker, VLLMReranker
from tests.integrations.llamaindex.support import GUIDE, QUERY, TEXTS, found, ids, made_by, migrations, scores

ARGUMENTS = {
    "SentenceTransformerRerank": "model device cache_folder top_n keep_retrieval_score cross_encoder_kwargs",  # 0.6.0
    "FlagEmbeddingReranker": "top_n model use_fp16",  # 0.6.0
    "CohereRerank": "top_n model api_key base_url max_retries",  # 0.10.0
    "TextEmbeddingInference": "top_n base_url text_instruction query_instruction timeout truncate_text auth_token "
    "model_name",  # 0.6.0
    "XinferenceRerank": "top_n model base_url",  # 0.5.0
}
PAIRS = migrations()
each = pytest.mark.parametrize("other", ARGUMENTS)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANK_KEY", "k3y")


def table() -> dict[str, list[str]]:
    """For each of their arguments the fields that the guide names for it."""
    text = GUIDE.read_text(encoding="utf-8").partition("### Their arguments\n")[2]
    rows = re.findall(r"^\| (`.*?) \| .*? \| (.*?) \|$", text, re.MULTILINE)
    return {
        theirs: re.findall(r"`([a-z_]+)`", here) for names, here in rows for theirs in re.findall(r"`(\w+)`", names)
    }


def arguments(code: str, function: str) -> dict[str, ast.expr]:
    """The keyword arguments of a call in some code, which has no others."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    (call,) = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == function]
    assert call.args == []
    return {str(keyword.arg): keyword.value for keyword in call.keywords}


def test_every_reranker_has_a_pair() -> None:
    """Code before and code after."""
    assert PAIRS.keys() == ARGUMENTS.keys()
    assert all(len(pair) == 2 for pair in PAIRS.values())


@each
def test_the_code_after_makes_a_reranker(other: str) -> None:
    """It runs as it stands; nothing is loaded or sent."""
    before, after = PAIRS[other]
    reranker = made_by(after)
    assert isinstance(reranker, LocalReranker | VLLMReranker)
    assert reranker.top_n == ast.literal_eval(arguments(before, other)["top_n"])


@each
def test_the_code_before_has_arguments_that_there_are(other: str) -> None:
    """And each is one of the fields after it, by the name that the table says, or left out on purpose."""
    before, after = PAIRS[other]
    used = arguments(after, type(made_by(after)).__name__)
    for name in arguments(before, other):
        assert name in ARGUMENTS[other].split()
        left_out = (other, name) == ("CohereRerank", "model")  # the server's only one
        assert left_out or used.keys() & set(table()[name])


@each
def test_the_table_knows_all_arguments(other: str) -> None:
    """And what it names here is a field of one of the rerankers."""
    fields = LocalReranker.model_fields.keys() | VLLMReranker.model_fields.keys()
    for name in ARGUMENTS[other].split():
        assert table()[name]
        assert set(table()[name]) <= fields
    assert not set(table()) - {name for names in ARGUMENTS.values() for name in names.split()} - {"trust_remote_code"}


def test_the_core_class_is_known_too() -> None:
    """LlamaIndex has a SentenceTransformerRerank beside the package's, with arguments of its own."""
    assert inspect.signature(SentenceTransformerRerank).parameters.keys() <= table().keys()


def test_before_and_after_give_the_same(cross_encoder: Path) -> None:
    """Order, scores and kept retrieval scores of SentenceTransformerRerank, with a small model."""
    before, after = (
        code.replace('"cross-encoder/ms-marco-MiniLM-L6-v2"', repr(str(cross_encoder)))
        for code in PAIRS["SentenceTransformerRerank"]
    )
    reference = made_by(before).postprocess_nodes(found(), query_str=QUERY)
    with made_by(after) as reranker:
        results = reranker.postprocess_nodes(found(), query_str=QUERY)
    assert ids(results) == ids(reference)
    assert scores(results) == pytest.approx(scores(reference), abs=1e-5)
    assert [result.metadata for result in results] == [result.metadata for result in reference]


def test_flag_embedding_gives_logits(cross_encoder: Path) -> None:
    """As its ``compute_score``, which applies no sigmoid unless told to."""
    code = PAIRS["FlagEmbeddingReranker"][1].replace('"BAAI/bge-reranker-v2-m3"', repr(str(cross_encoder)))
    model = CrossEncoder(str(cross_encoder), activation_fn=torch.nn.Identity(), device="cpu")
    logits = sorted((float(logit) for logit in model.predict([(QUERY, text) for text in TEXTS])), reverse=True)
    with made_by(code.replace('"auto"', '"float32"')) as reranker:
        results = reranker.postprocess_nodes(found(), query_str=QUERY)
    assert scores(results) == pytest.approx(logits[:3], abs=1e-4)
