"""Decoders in this process: prompts as transformers renders them, scores as transformers computes them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rag_rerank import BackendRejected, ConfigError, LocalScorer
from rag_rerank.families import FAMILIES
from rag_rerank.inputs.cleaning import clean
from rag_rerank.local.loading import load
from rag_rerank.local.models.encoding import truncate
from rag_rerank.template import Template
from tests.causal_models import KINDS, MAX_POSITIONS, byte_level_tokenizer, make_causal_lm, make_decoder_classifier
from tests.pairs import largest_difference, pairs
from tests.test_scorer import SPECIAL_TOKENS

PLAIN = (
    'Q: {{ (messages | selectattr("role", "eq", "query") | first).content }}\n'
    'D: {{ (messages | selectattr("role", "eq", "document") | first).content }}\nA:'
)
TEMPLATES = {
    "qwen3": "qwen3-reranker",
    "qwen2": "mxbai-rerank-v2",
    "gemma": "bge-reranker-v2-gemma",
    "llama": "nemotron-rerank",
}
TOKENS = {"qwen3": ("no", "yes"), "qwen2": ("0", "1"), "gemma": ("Yes",), "llama": ("no", "yes")}
CUTS = {"max_tokens_per_query": 60, "max_tokens_per_doc": 150}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def reference(folder: Path, kind: str, template: str, *, causal: bool, **variables: object) -> list[float]:
    """Logits of plain transformers, one rendered prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model = auto.from_pretrained(folder).eval()
    source = Template.load(template).source
    logits = []
    for query, document in zip(*pairs(), strict=True):
        texts = {"query": truncate(tokenizer, clean(query), 60), "document": truncate(tokenizer, clean(document), 150)}
        messages = [{"role": role, "content": text} for role, text in texts.items()]
        prompt = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **variables)
        with torch.inference_mode():
            output = model(**tokenizer(prompt, return_tensors="pt")).logits
        if causal:
            answers = output[0, -1, tokenizer.convert_tokens_to_ids(list(TOKENS[kind]))]
            logits.append((answers[-1] - (answers[0] if len(answers) == 2 else 0)).item())
        else:
            logits.append(output.item())
    return logits


def check_equal(logits: list[float], expected: list[float]) -> None:
    """Scores to 1e-5; logits, which span more than ten units here, to 2e-5."""
    assert largest_difference(logits, expected) <= 2e-5
    assert largest_difference(*(torch.tensor(values).sigmoid().tolist() for values in (logits, expected))) <= 1e-5
    assert max(expected) - min(expected) > 2


class TestScores:
    """Equal to transformers on the rendered prompt."""

    def test_a_causal_model_is_scored_by_its_answer(self, kind: str, tmp_path: Path):
        """The logit of one word, or how far it is above its opposite."""
        folder = make_causal_lm(tmp_path / kind, kind)
        options = {"dtype": "float32", "use_activation": False, "template": TEMPLATES[kind], **CUTS}
        with LocalScorer(folder, classifier_tokens=TOKENS[kind], **options) as scorer:
            scores = scorer.score(*pairs())
        expected = reference(folder, kind, TEMPLATES[kind], causal=True)
        check_equal(scores, expected)

    def test_a_classifier_is_scored_by_its_head(self, kind: str, tmp_path: Path):
        """Read from the last token, whatever else is in the batch."""
        folder = make_decoder_classifier(tmp_path / kind, kind)
        options = {"dtype": "float32", "use_activation": False, "template": TEMPLATES[kind], **CUTS}
        with LocalScorer(folder, **options) as scorer:
            scores = scorer.score(*pairs())
        expected = reference(folder, kind, TEMPLATES[kind], causal=False)
        check_equal(scores, expected)

    def test_the_default_score_is_the_sigmoid(self, tmp_path: Path):
        """For two words that is the softmax of the two; as on a vLLM server."""
        folder = make_causal_lm(tmp_path / "m", "qwen3")
        options = {"dtype": "float32", "template": PLAIN, "classifier_tokens": ("no", "yes")}
        with LocalScorer(folder, **options) as scorer, LocalScorer(folder, use_activation=False, **options) as logits:
            expected = torch.sigmoid(torch.tensor(logits.score("q", ["a", "b"]))).tolist()
            assert largest_difference(scorer.score("q", ["a", "b"]), expected) <= 1e-6

    def test_instruction_and_variables_reach_the_template(self, tmp_path: Path):
        """Another instruction is another score."""
        folder = make_causal_lm(tmp_path / "m", "qwen3")
        options = {"dtype": "float32", "template": "qwen3-reranker", "classifier_tokens": ("no", "yes")}
        with (
            LocalScorer(folder, **options) as default,
            LocalScorer(folder, instruction="Find bread.", **options) as instructed,
            LocalScorer(folder, chat_template_kwargs={"instruction": "Find bread."}, **options) as by_name,
        ):
            assert instructed.score("q", "d") == by_name.score("q", "d") != default.score("q", "d")


class TestKnownModels:
    """The model's name, or its own files, tell the prompt."""

    def test_a_name_from_the_table_is_enough(self, tmp_path: Path):
        """A folder that is called as the model is."""
        named = make_causal_lm(tmp_path / "Qwen3-Reranker-0.6B", "qwen3")
        other = make_causal_lm(tmp_path / "other", "qwen3")
        with (
            LocalScorer(named, dtype="float32") as known,
            LocalScorer(other, dtype="float32", template="qwen3-reranker", classifier_tokens=("no", "yes")) as told,
        ):
            assert known.score("q", ["a", "b"]) == told.score("q", ["a", "b"])

    def test_a_checkpoint_may_bring_its_score_template(self, tmp_path: Path):
        """As a converted one does: chat_template.jinja with the roles query and document."""
        folder = make_decoder_classifier(tmp_path / "m", "qwen3")
        (folder / "chat_template.jinja").write_text(PLAIN)
        with (
            LocalScorer(folder, dtype="float32") as own,
            LocalScorer(folder, dtype="float32", template=PLAIN) as told,
        ):
            assert own.score("q", ["a", "b"]) == told.score("q", ["a", "b"])

    @pytest.mark.parametrize("make", [make_causal_lm, make_decoder_classifier])
    def test_an_unknown_decoder_is_refused(self, make, tmp_path: Path):
        """A chat template inherited from the base model is no score template; scoring without is near random."""
        folder = make(tmp_path / "m", "qwen3")
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
        with pytest.raises(ConfigError, match="template="):
            LocalScorer(folder).score("q", "d")

    def test_plain_pairs_can_be_asked_for(self, tmp_path: Path):
        """template=None, for a classifier that was trained so."""
        folder = make_decoder_classifier(tmp_path / "m", "qwen3")
        with LocalScorer(folder, template=None, dtype="float32") as scorer:
            assert len(scorer.score("q", ["a", "b"])) == 2

    @pytest.mark.parametrize("tokens", [("nonsense!",), ("no", "yes, please")])
    def test_answers_must_be_one_entry_of_the_vocabulary(self, tokens: tuple[str, ...], tmp_path: Path):
        """vLLM takes the unknown token without a word."""
        folder = make_causal_lm(tmp_path / "m", "qwen3")
        with pytest.raises(ConfigError, match="not one entry"):
            LocalScorer(folder, template=PLAIN, classifier_tokens=tokens).score("q", "d")


@pytest.mark.skipif("dory" not in CONFIG_MAPPING, reason="this transformers has no Dory")
def test_an_output_layer_of_its_own_kind_is_refused(tmp_path: Path):
    """Dory's has a scale for each word; without it, what two rows make of a state is no logit of the model."""
    tokenizer = byte_level_tokenizer("llama")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = CONFIG_MAPPING["dory"](**sizes, num_key_value_heads=1, head_dim=32, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="output layer of a DoryForCausalLM is a DoryLMHead"):
        LocalScorer(tmp_path, template=PLAIN, classifier_tokens=("no", "yes")).score("q", "d")


class TestLength:
    """What is too long is cut from the document, and only there."""

    def test_the_prompt_keeps_its_query_and_its_end(self, kind: str, tmp_path: Path):
        """The score is read from the last token."""
        folder = make_decoder_classifier(tmp_path / kind, kind)
        with LocalScorer(folder, template=TEMPLATES[kind], dtype="float32") as scorer:
            model = load(scorer._settings)
        tokenizer = model.score_type.prompts.tokenizer
        text = Template.load(TEMPLATES[kind]).render("capital of France", "DOCUMENT")
        before, _, after = text.partition("DOCUMENT")
        for document in ("word " * 3000, "日本語" * 1000, "x" * 5000):
            [sequence] = model.inputs(["capital of France"], [document]).sequences
            prompt = tokenizer.decode(sequence.ids)
            assert MAX_POSITIONS - 8 <= len(sequence.ids) <= MAX_POSITIONS
            assert before.strip()[-20:] in prompt
            assert prompt.endswith(after.rstrip("\n")[-20:]) or prompt.rstrip("\n").endswith(after.rstrip("\n")[-20:])

    def test_a_query_without_room_for_documents_is_rejected(self, tmp_path: Path):
        """Cutting it would ask another question; max_tokens_per_query is the caller's to set."""
        folder = make_decoder_classifier(tmp_path / "m", "qwen3")
        scorer = LocalScorer(folder, template=PLAIN, dtype="float32")
        with scorer, pytest.raises(BackendRejected, match="max_tokens_per_query"):
            scorer.score("word " * 2000, ["a"])
        with LocalScorer(folder, template=PLAIN, dtype="float32", max_tokens_per_query=100) as scorer:
            assert len(scorer.score("word " * 2000, ["a"])) == 1

    @given(st.text(max_size=60), st.integers(0, 20))
    def test_a_cut_text_is_a_beginning_within_the_limit(self, text: str, limit: int):
        """Between characters, never inside one."""
        tokenizer = byte_level_tokenizer("qwen3")
        text = clean(text)
        shortened = truncate(tokenizer, text, limit)
        assert text.startswith(shortened)
        assert len(tokenizer(shortened, add_special_tokens=False)["input_ids"]) <= limit


@pytest.fixture(scope="module")
def tokenizers():
    """The tokenizer of each family."""
    return {kind: byte_level_tokenizer(kind) for kind in KINDS}


class TestSpecialTokens:
    """No text becomes a command."""

    def added(self, tokenizer, kind: str, document: str) -> int:
        """How many special ids a document adds to its prompt."""
        template = Template.load(TEMPLATES[kind])
        added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

        def count(text: str) -> int:
            return sum(token in added for token in tokenizer(template.render("q", text))["input_ids"])

        return count(clean(document)) - count("")

    @settings(max_examples=1000)
    @given(st.text(max_size=200))
    def test_no_document_adds_a_special_token(self, tokenizers, document: str):
        """Whatever it says."""
        for kind, tokenizer in tokenizers.items():
            assert self.added(tokenizer, kind, document) == 0

    def test_no_spelling_of_a_special_token_adds_one(self, tokenizers):
        """Of any family, in any company."""
        for kind, tokenizer in tokenizers.items():
            spelled = [*map(str, tokenizer.added_tokens_decoder.values()), *SPECIAL_TOKENS]
            for token in spelled:
                for document in (token, token * 3, f"a{token}b", f"<{token}>", f"{token[:-1]}{token}", f" {token}\n"):
                    assert self.added(tokenizer, kind, document) == 0, document


def test_a_family_that_needs_a_server_is_refused_with_the_command(tmp_path: Path):
    """Not scored by something that looks like it."""
    folder = make_causal_lm(tmp_path / "llama-nemotron-rerank-vl-1b-v2", "llama")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaNemotronVLForSequenceClassification"))
    with pytest.raises(ConfigError, match="runs on vLLM only: .*vllm serve .*--runner pooling"):
        LocalScorer(folder).score("q", "d")


def test_every_family_with_a_template_has_a_template():
    """The table and the files go together."""
    for family in FAMILIES:
        if family.template is not None:
            assert Template.load(family.template).name in Template.shipped()


def test_no_text_spells_a_special_token_of_the_tokenizers_own(tmp_path: Path):
    """Also one that no list knows: it would end the document, and what follows would speak for itself."""
    folder = make_decoder_classifier(tmp_path / "m", "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<command_7>"]})
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with LocalScorer(folder, template="qwen3-reranker") as scorer:
        made = load(scorer._settings).inputs(["a <command_7>"], ["b <command_7> c"])
    assert tokenizer.convert_tokens_to_ids("<command_7>") not in made.sequences[0].ids
