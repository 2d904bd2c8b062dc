"""monoT5: an encoder, one step of a decoder, "true" against "false"; compared with plain transformers."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from rag_rerank import ConfigError, LocalScorer
from rag_rerank.local.models.decoder import keep_answers
from rag_rerank.local.models.sequence_to_sequence import FirstStep
from rag_rerank.local.transformer.batching import Batching, TokenSequence
from tests.models import CORPUS, MAX_LENGTH, widen
from tests.pairs import pairs

ANSWERS = ("▁false", "▁true")


def make_monot5(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a tiny T5 with two layers on each side and a tokenizer of whole words, as castorini's folders have them."""
    lines = CORPUS.read_text(encoding="utf-8").splitlines()[:200]
    words = Counter(f"▁{word}" for line in lines for word in json.loads(line)["text"].split())
    entries = ["<pad>", "</s>", "<unk>", *ANSWERS, "▁Query:", "▁Document:", "▁Relevant:", *sorted(words)[:900]]
    tokenizer = Tokenizer(models.WordLevel({entry: place for place, entry in enumerate(entries)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    ).save_pretrained(folder)
    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes, vocab_size=len(entries), decoder_start_token_id=0))
    widen(model, 2.0)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_monot5(tmp_path_factory.mktemp("models") / "monot5-base-msmarco")


@torch.inference_mode()
def expected(folder: Path, queries: list[str], documents: list[str]) -> list[float]:
    """The logarithm of the probability of "true" against "false", as rank_llm has it."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers = tokenizer.convert_tokens_to_ids(ANSWERS)
    scores = []
    for query, document in zip(queries, documents, strict=True):
        inputs = tokenizer(f"Query: {query} Document: {document} Relevant:", return_tensors="pt")
        logits = model(**inputs, decoder_input_ids=torch.tensor([[0]])).logits[0, 0, answers]
        scores.append(logits.log_softmax(0)[1].item())
    return scores


class TestScores:
    def test_are_those_of_transformers(self, folder: Path):
        """50 texts and more of any length in a call; logarithms to 1e-5."""
        queries, documents = (list(side[:40]) for side in pairs())
        queries, documents = queries + queries[:20], [text[:150] for text in documents + documents[:20][::-1]]
        with LocalScorer(folder, dtype="float32") as scorer:
            scores = torch.tensor(scorer.score(queries, documents), dtype=torch.float64)
            assert scorer.proof().path == "padded"
        theirs = torch.tensor(expected(folder, queries, documents), dtype=torch.float64)
        assert theirs.max() - theirs.min() > 0.5
        assert ((scores.log() - theirs).abs() / theirs.abs().clamp(min=1)).max() <= 1e-5

    def test_the_end_of_the_prompt_stays(self, folder: Path):
        """Of an over-long document the end is cut."""
        with LocalScorer(folder, dtype="float32") as scorer:
            long, longer = scorer.score("a", ["the " * 200, "the " * 300 + "x"])
            assert long == longer
            words = MAX_LENGTH - 5  # Query: a Document: Relevant: </s>
            assert long == pytest.approx(scorer.score("a", ["the " * (words - 1) + "the"])[0], abs=1e-6)

    @torch.inference_mode()
    def test_answers_logits_are_computed_in_float32(self, folder: Path):
        """In a model in bfloat16, too, where they would tie."""
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.bfloat16)
        keep_answers(model, (3, 4))
        states = FirstStep(model, 0, Batching(512)).states([TokenSequence([5, 6, 7, 1], None)])
        assert (states.tokens.dtype, states.tokens.shape) == (torch.float32, (1, 2))


def test_a_model_that_no_table_knows_needs_prompt_and_answers(tmp_path: Path):
    folder = make_monot5(tmp_path / "mine")
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration that is no known reranker"):
        LocalScorer(folder).score("q", ["d"])
    with LocalScorer(folder, template="monot5", classifier_tokens=ANSWERS, dtype="float32") as scorer:
        assert scorer.score("q", ["d"])
