"""Checkpoints as sentence-transformers saves them score here as they score there.

Each is made of a tiny random model with that library's own `save_pretrained`, of every layout that it writes, and the
scores are compared with its own, in float32: to 1e-5 of a score's size, and of 1 for smaller ones.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling, MultiVectorMask
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from tokenizers.processors import TemplateProcessing
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rag_rerank import LocalScorer
from rag_rerank.errors import ConfigError, DocumentRejected
from rag_rerank.local.checkpoint.fingerprint import fingerprint
from rag_rerank.local.models.layers import activation
from tests.causal_models import byte_level_tokenizer, make_causal_lm, make_decoder_classifier, random_decoder
from tests.encoder_models import make_colbert, make_pylate_colbert, random_encoder
from tests.models import BERT_SPECIALS, MAX_LENGTH, word_piece_tokenizer
from tests.pairs import pairs

TOLERANCE = 1e-5
CHAT = """
{%- set task = messages | selectattr("role", "eq", "system") | map(attribute="content") | first -%}
<|im_start|>system
Answer yes or no.<|im_end|>
<|im_start|>user
<Instruct>: {{ task | default("Find what answers the query", true) }}
<Query>: {{ (messages | selectattr("role", "eq", "query") | first).content }}
<Document>: {{ (messages | selectattr("role", "eq", "document") | first).content }}<|im_end|>
{% if add_generation_prompt %}<|im_start|>assistant
<think></think>

{% endif %}"""

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 1}
EXPERTS |= {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str]]:
    """12 queries with a document each, some longer than what is read, some with marks and capitals."""
    queries, documents = (side[:43:4] for side in pairs())
    return [*queries, "Why, oh why?"], [*documents, "Because [it] is: so, and (so); 'tis."]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes the folder of a tiny random model and its tokenizer, once for each."""
    made: dict[tuple[str, Any], Path] = {}

    def make(kind: str, auto: Any = AutoModel, **options: Any) -> Path:
        key = kind, (auto, *options.items())
        if key not in made:
            folder = made[key] = tmp_path_factory.mktemp(kind)
            if kind in {"qwen3", "llama", "gemma", "mistral"}:
                tokenizer = byte_level_tokenizer("qwen3" if kind == "mistral" else kind)
                model = random_decoder(kind, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **options)
            else:
                specials = {**BERT_SPECIALS}
                tokenizer = word_piece_tokenizer(specials=specials, token_types=kind in {"bert", "electra"})
                sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH + 2}
                model = random_encoder(kind, auto, **sizes, **options)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return made[key]

    return make


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Where a checkpoint is saved."""
    return str(tmp_path / "model")


def ours(folder: str, texts: tuple[list[str], list[str]], **options: Any) -> list[float]:
    with LocalScorer(folder, dtype="float32", **options) as scorer:
        return scorer.score(*texts)


def assert_alike(ours: list[float], theirs: Any, spread: float = 0.02) -> None:
    expected = torch.as_tensor(theirs, dtype=torch.float64).flatten()
    assert expected.max() - expected.min() >= spread
    differences = (torch.tensor(ours, dtype=torch.float64) - expected).abs() / expected.abs().clamp(min=1)
    assert differences.max() <= TOLERANCE, (ours, expected.tolist())


def predicted(folder: str, texts: tuple[list[str], list[str]], **options: Any) -> Any:
    """The scores of sentence-transformers' cross-encoder, a pair at a time: padding, too, changes the last digits."""
    return CrossEncoder(folder, device="cpu").predict(list(zip(*texts, strict=True)), batch_size=1, **options)


def assert_cross_encoders_agree(folder: str, texts: tuple[list[str], list[str]]) -> None:
    """In their logits, which are well apart, and in the scores that are made of them."""
    logits = predicted(folder, texts, activation_fn=torch.nn.Identity())
    assert_alike(ours(folder, texts, use_activation=False), logits)
    assert_alike(ours(folder, texts), predicted(folder, texts), spread=0)


def compared(folder: str, texts: tuple[list[str], list[str]], auto: Any = SentenceTransformer) -> Any:
    """The scores of its encoders."""
    model = auto(folder, device="cpu")
    queries, documents = model.encode_query(texts[0]), model.encode_document(texts[1])
    return model.similarity_pairwise(queries, documents)


def edit(folder: str, file: str, **fields: Any) -> None:
    """Change fields of a JSON file."""
    path = Path(folder, file)
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **fields}))


class TestClassifiers:
    """A transformer with a head of its own."""

    @pytest.mark.parametrize("kind", ["bert", "distilbert", "electra", "roberta", "modernbert", "deberta-v2", "mpnet"])
    def test_scores_are_sigmoids(self, kind: str, base, folder: str, texts):
        """As vLLM, too, has them."""
        CrossEncoder(str(base(kind, AutoModelForSequenceClassification, num_labels=1))).save_pretrained(folder)
        assert_cross_encoders_agree(folder, texts)

    @pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
    def test_a_config_that_asks_for_tuples(self, kind: str, base, folder: str, texts):
        """As sentence-transformers, we ask for names."""
        CrossEncoder(str(base(kind, AutoModelForSequenceClassification, num_labels=1))).save_pretrained(folder)
        edit(folder, "config.json", return_dict=False)
        assert_cross_encoders_agree(folder, texts)

    @pytest.mark.parametrize("activation", [torch.nn.Identity(), torch.nn.Tanh(), torch.nn.Sigmoid()])
    def test_the_declared_activation_is_applied(self, activation: torch.nn.Module, base, folder: str, texts):
        """From config_sentence_transformers.json, where alone sentence-transformers 6 writes it."""
        source = str(base("bert", AutoModelForSequenceClassification, num_labels=1))
        CrossEncoder(source, activation_fn=activation).save_pretrained(folder)
        assert_cross_encoders_agree(folder, texts)

    def test_config_json_goes_first(self, base, folder: str, texts, caplog: pytest.LogCaptureFixture):
        """It is what vLLM reads; that sentence-transformers reads the other file is said once."""
        source = str(base("bert", AutoModelForSequenceClassification, num_labels=1))
        CrossEncoder(source, activation_fn=torch.nn.Identity()).save_pretrained(folder)
        edit(folder, "config.json", sentence_transformers={"activation_fn": "torch.nn.modules.activation.Sigmoid"})
        assert_alike(ours(folder, texts), predicted(folder, texts, activation_fn=torch.nn.Sigmoid()), spread=0)
        assert [record.message for record in caplog.records if "as vLLM has them" in record.message] == [
            f"{folder}: scores are the Sigmoid of logits, as vLLM has them; sentence-transformers has their Identity. "
            "use_activation=False gives the logits."
        ]

    def test_the_default_prompt_stands_before_the_query(self, base, folder: str, texts):
        """Unless the caller has another, or none."""
        source = str(base("bert", AutoModelForSequenceClassification, num_labels=1))
        prompts = {"default": "as a question: ", "other": "find "}
        options = {"prompts": prompts, "default_prompt_name": "default", "activation_fn": torch.nn.Identity()}
        CrossEncoder(source, **options).save_pretrained(folder)
        assert_alike(ours(folder, texts), predicted(folder, texts))
        assert_alike(ours(folder, texts, query_prompt="find "), predicted(folder, texts, prompt_name="other"))
        assert_alike(ours(folder, texts, query_prompt=""), predicted(folder, texts, prompt=""))

    def test_declared_limits_are_kept(self, base, folder: str, texts):
        """Of the tokenizer, and of the calls of it."""
        source = str(base("modernbert", AutoModelForSequenceClassification, num_labels=1))
        CrossEncoder(source, max_length=48, activation_fn=torch.nn.Identity()).save_pretrained(folder)
        assert_alike(ours(folder, texts), predicted(folder, texts))
        edit(folder, "sentence_bert_config.json", processing_kwargs={"text": {"max_length": 30}})
        edit(folder, "config.json", max_position_embeddings=25)  # which binds no rope
        assert_alike(ours(folder, texts), predicted(folder, texts))
        limits = {"text": {"max_length": 30}, "common": {"max_length": 22}, "chat_template": {"max_length": 12}}
        edit(folder, "sentence_bert_config.json", processing_kwargs=limits)
        assert_alike(ours(folder, texts), predicted(folder, texts))
        options = {"processor_kwargs": {"revision": "x", "subfolder": "y", "model_max_length": 33}}
        edit(folder, "sentence_bert_config.json", processing_kwargs={}, query_length=9, document_length=14, **options)
        assert_alike(ours(folder, texts), predicted(folder, texts))

    @pytest.mark.parametrize("kind", ["cross-encoder", "bi-encoder"])
    def test_texts_and_prompts_are_lowered(self, kind: str, base, folder: str, texts):
        """Where the folder says so and the tokenizer knows no capitals; Greek's last letter of a word, too."""
        prompts = {"prompts": {"query": "The Query: "}}
        if kind == "cross-encoder":
            source = str(base("bert", AutoModelForSequenceClassification, num_labels=1))
            options = {"default_prompt_name": "query", "activation_fn": torch.nn.Identity()}
            CrossEncoder(source, **prompts, **options).save_pretrained(folder)
        else:
            modules = [Transformer(str(base("bert"))), Pooling(64, "mean", include_prompt=False)]
            SentenceTransformer(modules=modules, **prompts).save_pretrained(folder)
        edit(folder, "tokenizer.json", normalizer=None)
        edit(folder, "sentence_bert_config.json", do_lower_case=True)
        texts = [text.title() + " ΣΟΦΟΣ" for text in texts[0]], [text.upper() for text in texts[1]]
        assert_alike(ours(folder, texts), (predicted if kind == "cross-encoder" else compared)(folder, texts))

    @pytest.mark.parametrize("kind", ["bert", "electra", "qwen3", "modules"])
    def test_of_two_labels_the_second_is_relevance(self, kind: str, base, folder: str, tmp_path: Path, texts):
        """Its probability, and as a logit the difference; monoELECTRA is such a model."""
        if kind == "qwen3":
            source = make_decoder_classifier(tmp_path / "source", kind, num_labels=2)
        else:
            source = folder if kind == "modules" else base(kind, AutoModelForSequenceClassification, num_labels=2)
        of_modules = {"modules": TestModular().modules(base("bert"), labels=2)} if kind == "modules" else {}
        CrossEncoder(**of_modules or {"model_name_or_path": str(source)}).save_pretrained(folder)
        options = {"template": None} if kind == "qwen3" else {}
        theirs = predicted(folder, texts, apply_softmax=True)[:, 1]
        assert_alike(ours(folder, texts, **options), theirs, spread=0)
        logits = predicted(folder, texts)
        assert_alike(ours(folder, texts, use_activation=False, **options), logits[:, 1] - logits[:, 0])
        assert_alike(ours(str(source), texts, **options), theirs, spread=0)

    @pytest.mark.parametrize("order", [1, -1])  # in which config.json lists them
    @pytest.mark.parametrize(
        ("labels", "right"),
        [
            (("irrelevant", "relevant"), True),
            (("LABEL_0", "LABEL_1"), True),
            (("relevant", "not_relevant"), False),
            (("entailment", "not_entailment"), False),
            (("1", "0"), False),
            (("Similar", "Dissimilar"), False),
        ],
    )
    def test_two_labels_the_other_way_round_are_refused(
        self, labels: tuple[str, str], right: bool, order: int, base, folder: str, texts
    ):
        """By their names in config.json: the scores would be upside down."""
        source = base("bert", AutoModelForSequenceClassification, num_labels=2)
        CrossEncoder(str(source)).save_pretrained(folder)
        names = dict(list(enumerate(labels))[::order])
        edit(folder, "config.json", id2label=names, label2id={name: number for number, name in names.items()})
        with nullcontext() if right else pytest.raises(ConfigError, match=rf"'{labels[1]}', but the second is taken"):
            ours(folder, texts)

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("place", ["template", "tokenizer"])
    def test_a_decoder_that_pads_with_what_its_inputs_end_with(
        self, place: str, causal: bool, folder: str, tmp_path: Path, texts
    ):
        """As where the end of text is the padding: transformers reads the score from the token before it."""
        source = make_decoder_classifier(tmp_path / "source", "llama")
        tokenizer = AutoTokenizer.from_pretrained(source)
        edit(str(source), "config.json", pad_token_id=tokenizer.eos_token_id, is_causal=causal)
        if place == "template":
            tokenizer.chat_template = CHAT + "{{ eos_token }}{{ eos_token }}"
        else:
            end = ("<|end_of_text|>", tokenizer.eos_token_id)
            ends = TemplateProcessing(single=f"$A {end[0]}", pair=f"$A $B {end[0]}", special_tokens=[end])
            tokenizer.backend_tokenizer.post_processor = ends
        tokenizer.save_pretrained(source)
        CrossEncoder(str(source), activation_fn=torch.nn.Identity()).save_pretrained(folder)
        options = {"template": None} if place == "tokenizer" else {}
        assert_alike(ours(folder, texts, **options), predicted(folder, texts))

    def test_two_labels_that_may_both_be_right_are_refused(self, base, folder: str, texts):
        """They are no share of each other."""
        CrossEncoder(str(base("bert", AutoModelForSequenceClassification, num_labels=2))).save_pretrained(folder)
        edit(folder, "config.json", problem_type="multi_label_classification")
        with pytest.raises(ConfigError, match="problem_type is 'multi_label_classification'"):
            ours(folder, texts)

    @pytest.mark.parametrize("field", ["id2label", "out_features"])
    def test_three_labels_are_refused(self, field: str, base, folder: str, texts):
        """They don't say which of them is relevance."""
        if field == "id2label":
            model = CrossEncoder(str(base("bert", AutoModelForSequenceClassification, num_labels=3)))
        else:
            model = CrossEncoder(modules=TestModular().modules(base("bert"), labels=3))
        model.save_pretrained(folder)
        with pytest.raises(ConfigError, match=rf"has 3 labels \(config\.json: {field}\)"):
            ours(folder, texts)


class TestAnswers:
    """A causal model whose answer is the score: LogitScore."""

    def make(self, folder: str, source: Path, *, false: bool = True, chat: Any = CHAT, **options: Any) -> CrossEncoder:
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.chat_template = chat
        tokenizer.save_pretrained(source)
        true_id, false_id = tokenizer.convert_tokens_to_ids(["yes", "no"])
        transformer_options = {"processing_kwargs": {"chat_template": {"add_generation_prompt": True}}}
        transformer_options |= {key: options.pop(key) for key in ["processing_kwargs"] if key in options}
        transformer = Transformer(str(source), transformer_task="text-generation", **transformer_options)
        model = CrossEncoder(modules=[transformer, LogitScore(true_id, false_id if false else None)], **options)
        model.save_pretrained(folder)
        return model

    @pytest.mark.parametrize("false", [True, False])
    @pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "gemma"])
    def test_scores_are_those_of_the_answer(self, kind: str, false: bool, folder: str, tmp_path: Path, texts):
        """Under a name that no table knows; over-long documents are cut alike, and the end of the prompt stays."""
        self.make(folder, make_causal_lm(tmp_path / "source", kind), false=false)
        assert_cross_encoders_agree(folder, texts)
        model = CrossEncoder(folder, device="cpu")
        model.max_seq_length = 150
        logits = model.predict(list(zip(*texts, strict=True)), batch_size=1, activation_fn=torch.nn.Identity())
        assert_alike(ours(folder, texts, max_length=150, use_activation=False), logits)

    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("granite", {"logits_scaling": 8.0}),
            ("cohere", {"logit_scale": 0.3}),
            ("gemma2", {"final_logit_softcapping": 5.0, "head_dim": 32}),
            ("phi", {}),  # has a bias
            ("llama", {"is_causal": False}),
            ("gemma3_text", {"use_bidirectional_attention": True, "head_dim": 32}),
            # A window of which no layer is told, and longer than what a model is proven on.
            ("qwen2_moe", {**EXPERTS, "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}),
        ],
    )
    @pytest.mark.parametrize("false", [True, False])
    def test_what_a_config_does_to_logits_or_attention(
        self, kind: str, options: dict[str, Any], false: bool, folder: str, tmp_path: Path, texts
    ):
        """Scaled, capped and shifted logits; tokens that attend to those behind them, so that no prefix is shared."""
        source = tmp_path / "source"
        tokenizer = byte_level_tokenizer("qwen3")
        sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 1, "intermediate_size": 128, "max_position_embeddings": 512}
        tokens = {f"{name}_token_id": tokenizer.pad_token_id for name in ("pad", "bos", "eos")}
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes, **tokens, **options))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.mul_(4) if weight.dim() > 1 else weight.add_(0.1 if "bias" in name else 0)
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        self.make(folder, source, false=false, activation_fn=torch.nn.Identity())
        one_query = [texts[0][0]] * 12, texts[1]
        assert_alike(ours(folder, one_query, use_activation=False), predicted(folder, one_query))

    @pytest.mark.parametrize("head", ["answers", "classifier"])
    def test_what_declares_no_chat_template_reads_plain_pairs(self, head: str, folder: str, tmp_path: Path, texts):
        """Though one lies beside it, or none does."""
        if head == "answers":
            self.make(folder, make_causal_lm(tmp_path / "source", "qwen3"))
            edit(folder, "sentence_bert_config.json", modality_config=None, module_output_name=None)
            settings = Path(folder, "sentence_bert_config.json")
            kept = {name: value for name, value in json.loads(settings.read_text()).items() if value is not None}
            settings.write_text(json.dumps(kept))
        else:
            CrossEncoder(str(make_decoder_classifier(tmp_path / "source", "llama"))).save_pretrained(folder)
        assert_cross_encoders_agree(folder, texts)

    def test_as_it_is_on_the_hub(self, tmp_path: Path, texts, caplog: pytest.LogCaptureFixture):
        """Qwen3-Reranker's own name and layout, a default prompt, and the identity, for which vLLM has the sigmoid."""
        folder = str(tmp_path / "Qwen3-Reranker-0.6B")
        prompts = {"web": "Given a web search query, retrieve relevant passages"}
        options = {"prompts": prompts, "default_prompt_name": "web", "activation_fn": torch.nn.Identity()}
        self.make(folder, make_causal_lm(tmp_path / "source", "qwen3"), **options)
        assert_alike(ours(folder, texts, use_activation=False), predicted(folder, texts))
        caplog.clear()
        assert_alike(ours(folder, texts), predicted(folder, texts, activation_fn=torch.nn.Sigmoid()), spread=0)
        assert "sentence-transformers has their Identity" in caplog.text

    def test_an_instruction_takes_the_place_of_the_default_prompt(self, folder: str, tmp_path: Path, texts):
        """The scorer's or a call's."""
        prompts = {"web": "Given a web search query, retrieve relevant passages"}
        source = make_causal_lm(tmp_path / "source", "qwen3")
        self.make(folder, source, prompts=prompts, default_prompt_name="web")
        logits = {"activation_fn": torch.nn.Identity()}
        theirs = predicted(folder, texts, prompt="Find the opposite", **logits)
        assert_alike(ours(folder, texts, instruction="Find the opposite", use_activation=False), theirs)
        with LocalScorer(folder, dtype="float32", use_activation=False) as scorer:
            assert_alike(scorer.score(*texts, instruction="Find the opposite"), theirs)
            assert_alike(scorer.score(*texts), predicted(folder, texts, **logits))

    @pytest.mark.parametrize("several_templates", [False, True])
    def test_special_tokens_come_from_the_template(self, several_templates: bool, folder: str, tmp_path: Path, texts):
        """By their names, and no others are put before it; of several templates it is the default."""
        chat = "{{ bos_token }}" + CHAT.strip("\n") + "{{ eos_token }}"
        several = {"default": chat, "tools": "{{ messages }}"}
        self.make(folder, make_causal_lm(tmp_path / "source", "llama"), chat=several if several_templates else chat)
        assert_cross_encoders_agree(folder, texts)

    @pytest.mark.parametrize("kind", ["llama", "gemma"])
    @pytest.mark.parametrize("place", ["folder", "argument"])
    def test_special_tokens_in_other_templates(self, place: str, kind: str, tmp_path: Path, texts):
        """One that lies in a folder of transformers, and the caller's, are given them by the same names."""
        source = make_causal_lm(tmp_path / "source", kind)
        tokenizer = AutoTokenizer.from_pretrained(source)
        content = '(messages | selectattr("role", "eq", "%s") | first).content'
        query, document = content % "query", content % "document"
        template = f"{{{{ {query} }}}}{{{{ eos_token }}}}{{{{ bos_token }}}}{{{{ {document} }}}} {{{{ pad_token }}}}."
        tokenizer.chat_template = template
        if place == "folder":
            tokenizer.save_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source).eval()
        expected = []
        for pair in zip(*texts, strict=True):
            roles = zip(("query", "document"), (text[:100] for text in pair), strict=True)
            messages = [{"role": role, "content": content} for role, content in roles]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False)
            with torch.inference_mode():
                logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
            no, yes = logits[tokenizer.convert_tokens_to_ids(["no", "yes"])].tolist()
            expected.append(yes - no)
        options = {"classifier_tokens": ("no", "yes"), "use_activation": False}
        options |= {} if place == "folder" else {"template": template}
        short = texts[0], [document[:100] for document in texts[1]]
        assert_alike(ours(str(source), ([query[:100] for query in short[0]], short[1]), **options), expected)

    def test_templates_are_given_what_transformers_gives(self, folder: str, tmp_path: Path, texts):
        """Also where they ask for it by a name that is not set, and the date."""
        given = "{{ strftime_now('%Y') }} {{ tools }} {{ documents }} {{ add_generation_prompt }} {{ more }}"
        options = {"processing_kwargs": {"chat_template": {"tools": [{"x": 1}]}}}
        self.make(folder, make_causal_lm(tmp_path / "source", "qwen3"), chat=CHAT + given, **options)
        assert_cross_encoders_agree(folder, texts)

    @pytest.mark.parametrize("ids", [(5, 5), (-1, 5), (5, -1), (9999, None)])
    def test_answers_that_are_none(self, ids: tuple[int, int | None], folder: str, tmp_path: Path, texts):
        """Not in the vocabulary, or the same twice: every score would be 0."""
        self.make(folder, make_causal_lm(tmp_path / "source", "qwen3"))
        edit(folder, "1_LogitScore/config.json", true_token_id=ids[0], false_token_id=ids[1])
        with pytest.raises(ConfigError, match=r"LogitScore: true_token_id and false_token_id are \(.*no different"):
            ours(folder, texts)

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_a_limit_of_its_calls_is_kept(self, side: str, folder: str, tmp_path: Path, texts):
        """With the end of the prompt."""
        processing = {"text": {"max_length": 120}, "chat_template": {"add_generation_prompt": True}}
        self.make(folder, make_causal_lm(tmp_path / "source", "qwen3"), processing_kwargs=processing)
        edit(folder, "tokenizer_config.json", truncation_side=side)
        assert_cross_encoders_agree(folder, texts)


class TestModular:
    """A transformer, a pooling, and a head of modules: Ettin's layout."""

    def modules(self, source: Path, pooling: str = "cls", labels: int = 1, size: int = 64) -> list[Any]:
        torch.manual_seed(1)
        return [
            Transformer(str(source)),
            Pooling(size, pooling),
            Dense(size, 48, bias=False, activation_function=torch.nn.GELU()),
            LayerNorm(48),
            Dense(48, labels, activation_function=torch.nn.Identity(), module_output_name="scores"),
        ]

    @pytest.mark.parametrize("kind", ["modernbert", "bert", "xlm-roberta", "deberta-v2", "qwen3", "llama"])
    def test_scores_are_those_of_the_modules(self, kind: str, base, folder: str, texts):
        """Of encoders by their first token, of decoders by their last."""
        pooling = "lasttoken" if kind in {"qwen3", "llama"} else "cls"
        CrossEncoder(modules=self.modules(base(kind), pooling)).save_pretrained(folder)
        assert_cross_encoders_agree(folder, texts)

    @pytest.mark.parametrize("pooling", ["mean", "max", "weightedmean", "mean_sqrt_len_tokens", "lasttoken"])
    def test_any_pooling(self, pooling: str, base, folder: str, texts):
        """Of a decoder, too, whose prompts of one query share nothing then."""
        for kind in ("bert", "qwen3"):
            CrossEncoder(modules=self.modules(base(kind), pooling)).save_pretrained(folder)
            one_query = ([texts[0][0] * 3] * 12, texts[1])
            with LocalScorer(folder, dtype="float32") as scorer:
                assert_alike(scorer.score(one_query[0][0], one_query[1]), predicted(folder, one_query), spread=1e-3)

    def test_the_activation_and_prompt_of_the_whole(self, base, folder: str, texts):
        """And a prompt that doesn't count in the pooling."""
        modules = self.modules(base("modernbert"), "mean")
        modules[1].include_prompt = False
        options = {"prompts": {"q": "query: "}, "default_prompt_name": "q", "activation_fn": torch.nn.Identity()}
        CrossEncoder(modules=modules, **options).save_pretrained(folder)
        assert_alike(ours(folder, texts), predicted(folder, texts))

    def test_an_activation_whose_last_digits_depend_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch):
        """Of a GELU a vector's may differ from a single number's: Ettin's layout was refused on such machines."""

        class Rounded(torch.nn.GELU):
            def forward(self, numbers: torch.Tensor) -> torch.Tensor:
                made: torch.Tensor = super().forward(numbers)
                return made * (1 + 2e-7) if numbers.dim() else made

        monkeypatch.setattr(torch.nn, "GELU", Rounded)
        assert isinstance(activation("torch.nn.modules.activation.GELU", "2_Dense/config.json"), Rounded)

    def test_a_head_of_one_dense_is_no_colbert(self, base, folder: str, texts):
        """What calls itself a cross-encoder is one."""
        _, pooling, *_, dense = self.modules(base("bert"))
        dense = Dense(64, 1, activation_function=torch.nn.Identity(), module_output_name="scores")
        CrossEncoder(modules=[Transformer(str(base("bert"))), pooling, dense]).save_pretrained(folder)
        assert_alike(ours(folder, texts), predicted(folder, texts))

    @pytest.mark.parametrize(
        ("options", "reads"),
        [
            ({}, "sentence_embedding"),
            ({}, "token_embeddings"),
            (
                {
                    "modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}},
                    "module_output_name": "sentence_embedding",
                },
                "sentence_embedding",
            ),
        ],
    )
    def test_a_dense_without_a_pooling_is_no_colbert(self, options: dict, reads: str, base, folder: str, texts):
        """What calls itself a cross-encoder and isn't one, or can't be run, is refused."""
        identity = torch.nn.Identity()
        dense = Dense(64, 1, activation_function=identity, module_input_name=reads, module_output_name="scores")
        CrossEncoder(modules=[Transformer(str(base("bert")), **options), dense]).save_pretrained(folder)
        with pytest.raises(
            ConfigError, match=r"1_Dense/config\.json: |is 'feature-extraction' with sentence_embedding"
        ):
            ours(folder, texts)


class TestBiEncoders:
    """What sentence-transformers embeds."""

    @pytest.mark.parametrize("kind", ["bert", "modernbert", "mpnet", "t5", "qwen3", "mistral"])
    @pytest.mark.parametrize("similarity", ["cosine", "dot"])
    def test_dense_modules_prompts_and_fewer_dimensions(self, kind: str, similarity: str, base, folder: str, texts):
        """As embeddinggemma has them; the limit is the folder's own."""
        torch.manual_seed(2)
        dense = [Dense(64, 96, bias=False, activation_function=torch.nn.PReLU(init=0.7)), Dense(96, 32)]
        SentenceTransformer(
            modules=[Transformer(str(base(kind))), Pooling(64, "mean"), *dense, Normalize()],
            prompts={"query": "task: search | query: ", "document": "title: none | text: "},
            similarity_fn_name=similarity,
            truncate_dim=16,
        ).save_pretrained(folder)
        edit(folder, "sentence_bert_config.json", max_seq_length=40)
        assert_alike(ours(folder, texts), compared(folder, texts))

    @pytest.mark.parametrize("similarity", ["euclidean", "manhattan", "dot"])
    def test_any_similarity(self, similarity: str, base, folder: str, texts):
        """A distance counts as less than nothing."""
        modules = [Transformer(str(base("bert"))), Pooling(64, ["cls", "max"])]
        SentenceTransformer(modules=modules, similarity_fn_name=similarity).save_pretrained(folder)
        assert_alike(ours(folder, texts), compared(folder, texts))

    def test_what_pools_is_one(self, base, folder: str, texts):
        """Also on a classifier's transformer, as older versions save it: they don't say what the whole is."""
        SentenceTransformer(modules=[Transformer(str(base("bert"))), Pooling(64, "mean")]).save_pretrained(folder)
        expected = compared(folder, texts)
        edit(folder, "config.json", architectures=["BertForSequenceClassification"])
        edit(folder, "config_sentence_transformers.json", model_type=None)
        assert_alike(ours(folder, texts), expected)

    @pytest.mark.parametrize("pooling", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
    def test_prompts_that_do_not_count(self, pooling: str, base, folder: str, texts):
        """As in INSTRUCTOR: their tokens are read, but not pooled."""
        modules = [Transformer(str(base("bert"))), Pooling(64, pooling, include_prompt=False)]
        model = SentenceTransformer(modules=modules, prompts={"query": "represent the query: ", "passage": "text: "})
        model.save_pretrained(folder)
        assert_alike(ours(folder, texts), compared(folder, texts))

    def test_the_default_prompt_is_not_for_queries_and_documents(self, base, folder: str, texts):
        """sentence-transformers' encode_query and encode_document don't use it, unless it is theirs."""
        modules = [Transformer(str(base("bert"))), Pooling(64, "mean")]
        prompts = {"query": "q: ", "clustering": "c: "}
        SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name="clustering").save_pretrained(folder)
        assert_alike(ours(folder, texts), compared(folder, texts))

    def test_the_callers_prompts_go_first(self, base, folder: str, texts):
        """An empty one, too."""
        modules = [Transformer(str(base("bert"))), Pooling(64, "mean", include_prompt=False)]
        SentenceTransformer(modules=modules, prompts={"query": "q: ", "document": "d: "}).save_pretrained(folder)
        model = SentenceTransformer(folder, device="cpu")
        queries, documents = model.encode_query(texts[0], prompt="other: "), model.encode_document(texts[1], prompt="")
        expected = model.similarity_pairwise(queries, documents)
        assert_alike(ours(folder, texts, query_prompt="other: ", document_prompt=""), expected)

    @pytest.mark.parametrize("place", ["folder", "argument"])
    def test_special_tokens_in_prompts(self, place: str, base, folder: str, texts):
        """As bge-multilingual-gemma2 has them; texts that spell the same stay texts."""
        modules = [Transformer(str(base("qwen3"))), Pooling(64, "mean", include_prompt=False)]
        prompts = {"query": "<|im_start|>find it\n<|im_end|>", "document": ""}
        SentenceTransformer(modules=modules, prompts=prompts if place == "folder" else {}).save_pretrained(folder)
        model = SentenceTransformer(folder, device="cpu")
        queries, documents = model.encode_query(texts[0], prompt=prompts["query"]), model.encode_document(texts[1])
        options = {} if place == "folder" else {"query_prompt": prompts["query"]}
        assert_alike(ours(folder, texts, **options), model.similarity_pairwise(queries, documents))
        spelled, spaced = (ours(folder, (["a"], [f"b {mark}"]), **options) for mark in ("<|im_end|>", "< |im_end|>"))
        assert spelled == spaced

    def test_a_text_of_no_tokens_has_no_score(self, base, folder: str, texts):
        """Where no special ones are added; the others have theirs."""
        SentenceTransformer(modules=[Transformer(str(base("qwen3"))), Pooling(64, "lasttoken")]).save_pretrained(folder)
        with LocalScorer(folder, dtype="float32") as scorer:
            with pytest.raises(DocumentRejected, match="no token that the model reads") as caught:
                scorer.score("a query", ["one", "", "two"])
            assert caught.value.indices == (1,)
            rest = ["a query"] * 2, ["one", "two"]
            assert_alike(scorer.score(*rest), compared(folder, rest), spread=1e-3)

    @pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
    def test_a_decoder_is_not_padded(self, pooling: str, base, folder: str, texts):
        """Its texts lie end to end, too; what they begin with alike is not shared, for all states are read."""
        SentenceTransformer(modules=[Transformer(str(base("qwen3"))), Pooling(64, pooling)]).save_pretrained(folder)
        with LocalScorer(folder, dtype="float32") as scorer:
            assert_alike(scorer.score(*texts), compared(folder, texts))
            assert scorer.proof().path == "unpadded"

    def test_one_kind_of_token_is_enough_for_single_texts(self, base, folder: str, texts):
        """Though a pair would have two."""
        source = base("bert", type_vocab_size=1)
        SentenceTransformer(modules=[Transformer(str(source)), Pooling(64, "mean")]).save_pretrained(folder)
        assert_alike(ours(folder, texts), compared(folder, texts))

    def test_deberta_reads_on_behind_the_positions_of_its_config(self, base, folder: str, texts):
        """Where the folder's own limit is longer: its positions are relative."""
        source = base("deberta-v2", position_biased_input=False)
        SentenceTransformer(modules=[Transformer(str(source)), Pooling(64, "mean")]).save_pretrained(folder)
        edit(folder, "sentence_bert_config.json", max_seq_length=150)
        assert_alike(ours(folder, texts), compared(folder, texts))

    def test_a_router_parts_queries_from_documents(self, base, folder: str, texts):
        """Each with a transformer of its own; or behind a common one."""
        sides = [
            [Transformer(str(base(kind))), Pooling(64, pooling)]
            for kind, pooling in {"bert": "mean", "modernbert": "cls"}.items()
        ]
        SentenceTransformer(modules=[Router.for_query_document(*sides), Normalize()]).save_pretrained(folder)
        assert_alike(ours(folder, texts), compared(folder, texts))
        before = fingerprint(Path(folder))
        edit(folder, "query_0_Transformer/config.json", layer_norm_eps=0.1)
        assert fingerprint(Path(folder)) != before

    def test_a_router_behind_the_transformer(self, base, folder: str, texts):
        """Only the projections differ."""
        torch.manual_seed(3)
        router = Router.for_query_document([Dense(64, 16)], [Dense(64, 16)])
        modules = [Transformer(str(base("bert"))), Pooling(64, "mean"), router]
        SentenceTransformer(modules=modules, prompts={"query": "q: "}).save_pretrained(folder)
        assert_alike(ours(folder, texts), compared(folder, texts))


class TestLateInteraction:
    """A vector a token."""

    def modules(self, source: Path, words: list[str] | None = None, **options: Any) -> list[Any]:
        torch.manual_seed(4)
        activation = torch.nn.Identity()
        return [
            Transformer(str(source), **options),
            Dense(64, 32, bias=False, activation_function=activation, module_input_name="token_embeddings"),
            MultiVectorMask(skiplist_words=words),
            Normalize(module_input_name="token_embeddings"),
        ]

    @pytest.mark.parametrize("kind", ["bert", "modernbert", "xlm-roberta", "electra", "qwen3", "mpnet"])
    def test_as_sentence_transformers_saves_it(self, kind: str, base, folder: str, texts):
        """Without anything that is particular."""
        MultiVectorEncoder(modules=self.modules(base(kind))).save_pretrained(folder)
        assert_alike(ours(folder, texts), compared(folder, texts, MultiVectorEncoder))

    @pytest.mark.parametrize("attend", [True, False])
    @pytest.mark.parametrize("strategy", ["fixed", "min"])
    @pytest.mark.parametrize("kind", ["bert", "modernbert", "roberta"])
    def test_all_that_colbert_does(self, kind: str, strategy: str, attend: bool, base, folder: str, texts):
        """Prompts, lengths, queries filled up, punctuation left out, the mean over the query."""
        expansion = {"strategy": strategy, "length": 24, "attend": attend}
        options = {"document_length": 60, "query_length": 28, "query_expansion": expansion}
        modules = self.modules(base(kind), [",", ".", "the"], **options)
        prompts = {"query": "question: ", "document": "passage: "}
        MultiVectorEncoder(modules=modules, prompts=prompts, similarity_fn_name="meanmaxsim").save_pretrained(folder)
        assert_alike(ours(folder, texts), compared(folder, texts, MultiVectorEncoder), spread=0.01)

    def test_queries_that_are_filled_up_on_the_left_are_refused(self, base, folder: str, texts):
        """As sentence-transformers does where the tokenizer pads there."""
        expansion = {"strategy": "fixed", "length": 24, "attend": True}
        MultiVectorEncoder(modules=self.modules(base("bert"), query_expansion=expansion)).save_pretrained(folder)
        edit(folder, "tokenizer_config.json", padding_side="left")
        with pytest.raises(ConfigError, match="the padding_side of its tokenizer is left"):
            ours(folder, texts)

    @pytest.mark.parametrize("tasks", [[], ["query"], ["query", "document"]])
    def test_words_are_left_out_where_the_mask_says(self, tasks: list[str], base, folder: str, texts):
        """Nowhere, too; without its saying so, of documents."""
        MultiVectorEncoder(modules=self.modules(base("bert"), ["the", "of", "a"])).save_pretrained(folder)
        edit(folder, "2_MultiVectorMask/config.json", skiplist_tasks=tasks)
        assert_alike(ours(folder, texts), compared(folder, texts, MultiVectorEncoder))

    @pytest.mark.parametrize("attend", [True, False])
    def test_pylates_own_words_for_it(self, attend: bool, tmp_path: Path, texts):
        """With markers that its tokenizer knows as tokens; sentence-transformers reads PyLate's folders."""
        folder = str(make_pylate_colbert(tmp_path / "model"))
        self.name_tokens(folder, "[Q] ", "[D] ")
        config = {"model_type": "ColBERT", "query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 20}
        config |= {"document_length": 50, "attend_to_expansion_tokens": attend, "do_query_expansion": True}
        edit(folder, "config_sentence_transformers.json", **config, similarity_fn_name="cosine", prompts={})
        before = ours(folder, texts)
        assert_alike(before, compared(folder, texts, MultiVectorEncoder))
        # What PyLate 1.6 writes; to PyLate's own scores of such a folder there was no difference.
        prompts = {"prompts": {"query": "", "document": ""}, "default_prompt_name": None}
        edit(folder, "config_sentence_transformers.json", similarity_fn_name="MaxSim", **prompts)
        assert ours(folder, texts) == before
        assert_alike(self.saved_again(folder, texts), before)

    def saved_again(self, folder: str, texts) -> list[float]:
        """By sentence-transformers, whose prompts then are the markers, in the text."""
        MultiVectorEncoder(folder, device="cpu").save_pretrained(f"{folder}-again")
        return ours(f"{folder}-again", texts)

    def test_stanfords_own_words_for_it(self, tmp_path: Path, texts):
        """In artifact.metadata; without that file, sentence-transformers' defaults for it."""
        folder = str(make_colbert(tmp_path / "model"))
        self.name_tokens(folder, "[unused0]", "[unused1]")
        assert_alike(ours(folder, texts), compared(folder, texts, MultiVectorEncoder))
        assert_alike(self.saved_again(folder, texts), ours(folder, texts))
        metadata = {"query_maxlen": 16, "doc_maxlen": 40, "attend_to_mask_tokens": True, "mask_punctuation": False}
        edit(folder, "artifact.metadata", **metadata, query_token_id="[unused0]", doc_token_id="[unused1]")
        assert_alike(ours(folder, texts), compared(folder, texts, MultiVectorEncoder))

    def name_tokens(self, folder: str, *tokens: str) -> None:
        """Call the last words of the vocabulary so; BERT's has such words from the beginning."""
        path = Path(folder, "tokenizer.json")
        tokenizer = json.loads(path.read_text())
        vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
        for word, token in zip(list(vocabulary)[-len(tokens) :], tokens, strict=True):
            vocabulary[token] = vocabulary.pop(word)
        path.write_text(json.dumps(tokenizer))

    def test_vllms_way(self, base, folder: str, texts):
        """Goes by none of it, as a server that has the checkpoint doesn't either."""
        expansion = {"strategy": "fixed", "length": 24, "attend": True}
        MultiVectorEncoder(
            modules=self.modules(base("bert"), [",", "."], query_expansion=expansion), prompts={"query": "question: "}
        ).save_pretrained(folder)
        plain = folder + "-plain"
        MultiVectorEncoder(modules=self.modules(base("bert"))).save_pretrained(plain)
        assert_alike(ours(folder, texts, late_interaction="vllm"), compared(plain, texts, MultiVectorEncoder))


class TestRefusals:
    """What is declared and can't be done is named."""

    @pytest.fixture
    def bi_encoder(self, base, folder: str) -> str:
        modules = [Transformer(str(base("bert"))), Pooling(64, "mean"), Dense(64, 8)]
        SentenceTransformer(modules=modules).save_pretrained(folder)
        return folder

    @pytest.mark.parametrize(
        ("file", "fields", "message"),
        [
            ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type is 'SparseEncoder'"),
            ("config_sentence_transformers.json", {"similarity_fn_name": "hamming"}, "similarity_fn_name is 'hamming'"),
            ("config_sentence_transformers.json", {"default_prompt_name": "no"}, "default_prompt_name is 'no'"),
            ("config_sentence_transformers.json", {"truncate_dim": "8"}, "truncate_dim is '8', which is no int"),
            ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
            (
                "sentence_bert_config.json",
                {"tokenizer_name_or_path": "other"},
                "tokenizer_name_or_path is not supported",
            ),
            (
                "sentence_bert_config.json",
                {"processing_kwargs": {"text": {"truncation": "only_first"}}},
                r"processing_kwargs\.text\.truncation is 'only_first'",
            ),
            (
                "sentence_bert_config.json",
                {"model_kwargs": {"add_pooling_layer": False}},
                r"model_kwargs\.add_pooling_layer",
            ),
            ("1_Pooling/config.json", {"pooling_mode": "median"}, r"1_Pooling/config\.json: pooling_mode is median"),
            ("2_Dense/config.json", {"activation_function": "my.Act"}, r"2_Dense/config\.json.*'my\.Act'"),
            (
                "2_Dense/config.json",
                {"activation_function": "torch.nn.modules.activation.Softmax2d"},
                "works on each number alone",
            ),
            ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "reads token_embeddings"),
        ],
    )
    def test_by_file_and_field(self, file: str, fields: dict[str, Any], message: str, bi_encoder: str, texts):
        """With the checkpoint's name."""
        edit(bi_encoder, file, **fields)
        with pytest.raises(ConfigError, match=message) as caught:
            ours(bi_encoder, texts)
        assert str(caught.value).startswith(repr(bi_encoder)) or "Dense" in message or "alone" in message

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            ({"type": "custom_st.Transformer", "path": ""}, r"custom_st\.Transformer is code of the checkpoint's own"),
            ({"type": "sentence_transformers.models.LSTM", "path": "1_LSTM"}, "has a LSTM, which is not supported"),
            ({"type": "sentence_transformers.models.Dense", "path": "../x"}, "leads out of the checkpoint"),
        ],
    )
    def test_other_modules(self, module: dict[str, str], message: str, bi_encoder: str, texts):
        """Code of the checkpoint's own, or what has no counterpart here."""
        path = Path(bi_encoder, "modules.json")
        modules = json.loads(path.read_text())
        modules[0 if "custom" in message else 1] = {"idx": 0, "name": "0", **module}
        path.write_text(json.dumps(modules))
        with pytest.raises(ConfigError, match=message):
            ours(bi_encoder, texts)

    def test_several_masks(self, base, folder: str, texts):
        """Each has words of its own."""
        modules = TestLateInteraction().modules(base("bert"), ["the"])
        MultiVectorEncoder(modules=[*modules, MultiVectorMask(["a"])]).save_pretrained(folder)
        with pytest.raises(ConfigError, match="has several MultiVectorMask"):
            ours(folder, texts)

    def test_token_pooling(self, base, folder: str, texts):
        """It makes other vectors."""
        modules = TestLateInteraction().modules(base("bert"))
        MultiVectorEncoder(modules=[*modules, HierarchicalTokenPooling(2.0)]).save_pretrained(folder)
        with pytest.raises(ConfigError, match="has a HierarchicalTokenPooling"):
            ours(folder, texts)


class TestFiles:
    """What is missing or not what it seems is told with the file and the remedy, before anything is scored."""

    @pytest.fixture
    def cross_encoder(self, base, folder: str) -> str:
        shutil.copytree(base("bert", AutoModelForSequenceClassification, num_labels=1), folder)
        return folder

    def test_a_tokenizer_that_transformers_makes_up(self, cross_encoder: str, texts):
        """Of five tokens, to which every word is unknown; tokenizer.json alone is enough for it to be right."""
        before = ours(cross_encoder, texts)
        Path(cross_encoder, "tokenizer_config.json").unlink()
        assert ours(cross_encoder, texts, max_length=MAX_LENGTH) == before
        Path(cross_encoder, "tokenizer.json").unlink()
        with pytest.raises(ConfigError, match=r"knows no word at all: copy the model's tokenizer\.json"):
            ours(cross_encoder, texts)

    def test_a_tokenizer_of_another_model(self, cross_encoder: str, texts):
        """With more tokens than the model has."""
        tokenizer = AutoTokenizer.from_pretrained(cross_encoder)
        tokenizer.add_tokens(["anothertoken"])
        tokenizer.save_pretrained(cross_encoder)
        with pytest.raises(ConfigError, match="has 2001 tokens, but the model only 2000"):
            ours(cross_encoder, texts)

    def test_weights_that_config_json_does_not_tell_of(self, cross_encoder: str, texts):
        """Of other sizes, or quantized in a way that nobody knows, with scales or without."""
        edit(cross_encoder, "config.json", quantization_config={"quant_method": "new"})
        with pytest.raises(ConfigError, match=r"config\.json: its weights are quantized, but"):
            ours(cross_encoder, texts)
        edit(cross_encoder, "config.json", quantization_config=None)
        weights = load_file(Path(cross_encoder, "model.safetensors"))
        scale = {"bert.pooler.dense.weight_scale": torch.ones(1)}
        save_file(weights | scale, Path(cross_encoder, "model.safetensors"), metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=r"config\.json: its weights are quantized, but"):
            ours(cross_encoder, texts)
        edit(cross_encoder, "config.json", intermediate_size=96)
        with pytest.raises(ConfigError, match=r"dense\.\w+ is .*128.* in the weights, .*96.* by config\.json"):
            ours(cross_encoder, texts)

    def test_an_adapter_without_peft(self, cross_encoder: str, texts, monkeypatch: pytest.MonkeyPatch):
        """Its model alone would score otherwise."""
        find = importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest)
        )
        Path(cross_encoder, "adapter_config.json").write_text("{}")
        with pytest.raises(ConfigError, match="pip install peft, or merge"):
            ours(cross_encoder, texts)

    def test_weights_that_are_none(self, cross_encoder: str, texts):
        """A pointer of Git LFS, a damaged file, a pickle."""
        weights = Path(cross_encoder, "model.safetensors")
        weights.write_bytes(weights.read_bytes()[:500])
        with pytest.raises(ConfigError, match=r"model\.safetensors' is damaged"):
            ours(cross_encoder, texts)
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(ConfigError, match=r"model\.safetensors' is a pointer of Git LFS"):
            ours(cross_encoder, texts)
        weights.rename(weights.with_name("pytorch_model.bin"))
        with pytest.raises(ConfigError, match=r"pytorch_model\.bin' holds pickled weights"):
            ours(cross_encoder, texts)

    def test_a_copied_folder_of_the_hubs_cache(self, cross_encoder: str, tmp_path: Path, texts):
        """The checkpoint is further down."""
        snapshots = tmp_path / "models--org--name" / "snapshots"
        shutil.copytree(cross_encoder, snapshots / "0123")
        with pytest.raises(ConfigError, match="is a folder of the hub's cache"):
            ours(str(snapshots.parent), texts)
        assert len(ours(str(snapshots / "0123"), texts)) == 12
