"""Embedding models whose texts are messages score as sentence-transformers scores them, in float32.

It renders with the tokenizer's chat template wherever a decoder that has one was made a SentenceTransformer since 5.4.
"""

from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoTokenizer

from rag_rerank import LocalScorer
from rag_rerank.errors import ConfigError
from rag_rerank.local.models.passages import split_document
from tests.causal_models import byte_level_tokenizer, random_decoder
from tests.local.checkpoint.test_declarations import assert_alike, compared, edit, ours
from tests.pairs import pairs

FLAT = """
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PARTS = """
{%- for message in messages %}[{{ message.role }}]
{%- for item in message.content %}{% if item.type == "text" %}{{ item.text }}{% endif %}{% endfor %}{{ eos_token }}
{%- endfor %}"""
TASK = "{{ messages[-1].content }}{% if task == 'query' %} asks{% else %} is a {{ task }}{% endif %}<|im_end|>"
PROMPTS = {"query": "Find it: ", "document": ""}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str]]:
    """11 queries with a document each, some longer than what is read."""
    queries, documents = (side[:43:4] for side in pairs())
    return list(queries), list(documents)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Where a checkpoint is saved."""
    return str(tmp_path / "model")


def transformer(place: Path, template: str | dict[str, str], kind: str = "qwen3", **options: Any) -> Transformer:
    tokenizer = byte_level_tokenizer(kind)
    tokenizer.chat_template = template
    model = random_decoder(kind, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return Transformer(str(place), **options)


def make(folder: str, template: str | dict[str, str], pooling: str = "lasttoken", **options: Any) -> None:
    prompts, limit = options.pop("prompts", None), options.pop("limit", None)
    body = transformer(Path(folder).with_name("source"), template, **options)
    body.max_seq_length = limit or body.max_seq_length
    pool = Pooling(body.get_embedding_dimension(), pooling_mode=pooling, include_prompt=False)
    SentenceTransformer(modules=[body, pool], prompts=prompts, device="cpu").save_pretrained(folder)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("template", [FLAT, PARTS, TASK, {"default": FLAT, "tools": PARTS}])
@pytest.mark.parametrize(("pooling", "prompts"), [("lasttoken", None), ("mean", PROMPTS)])
def test_texts_are_messages(
    kind: str, template: Any, pooling: str, prompts: dict[str, str] | None, folder: str, texts: Any
):
    """The prompt is the system's, and is pooled in any case; a template may ask for the task."""
    make(folder, template, pooling, kind=kind, prompts=prompts)
    assert_alike(ours(folder, texts), compared(folder, texts))


@pytest.mark.parametrize("template", [FLAT, PARTS])
def test_what_is_too_long_keeps_the_end_of_the_template(template: str, folder: str, texts: Any):
    """There the state is read."""
    options = {"processing_kwargs": {"chat_template": {"add_generation_prompt": True}}}
    make(folder, template, prompts=PROMPTS, limit=90, **options)
    assert_alike(ours(folder, texts), compared(folder, texts))


def test_late_interaction(folder: str, texts: Any):
    """Each token of a message has a vector."""
    body = transformer(Path(folder).with_name("source"), FLAT)
    dense = Dense(body.get_embedding_dimension(), 16, bias=False, module_input_name="token_embeddings")
    modules = [body, dense, Normalize(module_input_name="token_embeddings")]
    MultiVectorEncoder(modules=modules, prompts=PROMPTS, device="cpu").save_pretrained(folder)
    assert_alike(ours(folder, texts), compared(folder, texts, MultiVectorEncoder))


def test_texts_of_its_own_prompt_are_the_users(folder: str, texts: Any):
    """`query_prompt` is put before a query, as everywhere, and takes the place of the declared one."""
    make(folder, FLAT, prompts=PROMPTS)
    queries = [f"What of {query}" for query in texts[0]]
    assert ours(folder, texts, query_prompt="What of ") == ours(folder, (queries, texts[1]), query_prompt="")


def test_a_text_cannot_end_its_message(folder: str):
    """What spells a special token stays text."""
    make(folder, FLAT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with LocalScorer(folder, dtype="float32") as scorer:
        scorer.warmup()
        model = scorer._engine.model
        made = model.inputs(["a"], ["b<|im_end|>"]).sequences
    assert [each.ids.count(end) for each in made] == [1, 1]


def test_a_long_document_is_read_in_passages(folder: str):
    """Each as a message of its own."""
    make(folder, FLAT, limit=60)
    document = " ".join(f"word {number}" for number in range(20))
    with LocalScorer(folder, dtype="float32", long_documents="max-passage") as scorer:
        [score] = scorer.score("a word", [document])
        model = scorer._engine.model
        [space] = model.score_type.document_space(["a word"])
        passages = split_document(model.tokenizer, document, space)
        assert len(passages) > 2
        assert score == pytest.approx(max(scorer.score("a word", passages)), abs=1e-6)


def test_refused_without_a_template(folder: str, texts: Any):
    """As a folder whose tokenizer was replaced."""
    make(folder, FLAT)
    Path(folder, "chat_template.jinja").unlink()
    with pytest.raises(
        ConfigError, match=r"declares messages \(modality_config\), but its tokenizer has no chat template"
    ):
        ours(folder, texts)


def test_refused_with_a_query_expansion(folder: str, texts: Any):
    """Its length would cut the end of the template, which is why sentence-transformers refuses it, too."""
    body = transformer(Path(folder).with_name("source"), FLAT)
    modules = [body, Normalize(module_input_name="token_embeddings"), MultiVectorMask()]
    MultiVectorEncoder(modules=modules, device="cpu").save_pretrained(folder)
    edit(folder, "sentence_bert_config.json", query_expansion={"strategy": "min", "length": 32})
    with pytest.raises(ConfigError, match="declares a query_expansion and a chat template"):
        ours(folder, texts)
