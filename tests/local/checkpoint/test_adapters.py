"""A checkpoint with an adapter scores as `peft.PeftModel` does, in float32; one that can't be merged is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rag_rerank import LocalScorer
from rag_rerank.errors import ConfigError
from tests.causal_models import make_causal_lm, make_decoder_classifier
from tests.encoder_models import make_bi_encoder, make_encoder_cross_encoder
from tests.models import make_bert_cross_encoder
from tests.pairs import pairs

TOLERANCE = 1e-5
TEMPLATE = "{{ messages[0].content }} {{ messages[1].content }}"
LORA = {"r": 4, "lora_alpha": 4, "init_lora_weights": False}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str]]:
    queries, documents = (side[:43:6] for side in pairs())
    return [query[:100] for query in queries], [document[:150] for document in documents]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


def train(adapter: Path, model: Any, config: Any) -> Any:
    """Save an adapter with random weights as PEFT does, a trained head among them; returns the model with it."""
    torch.manual_seed(7)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * (0.3 if "modules_to_save" in name else 0.02))
    wrapped.save_pretrained(adapter)
    return wrapped.eval()


def logits(model: Any, base: Path, texts: tuple[list[str], list[str]]) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        return [
            model(**tokenizer(*pair, truncation="longest_first", max_length=96, return_tensors="pt")).logits.item()
            for pair in zip(*texts, strict=True)
        ]


def ours(folder: Path, texts: tuple[list[str], list[str]], **options: Any) -> list[float]:
    options = {"dtype": "float32", "use_activation": False, "max_length": 96, **options}
    with LocalScorer(folder, **options) as scorer:
        return scorer.score(*texts)


def assert_applied(ours: list[float], expected: list[float], without: list[float]) -> None:
    assert_equal(ours, expected)
    assert max(abs(a - b) for a, b in zip(without, expected, strict=True)) > 0.01  # else nothing would be shown


def assert_equal(ours: list[float], expected: list[float]) -> None:
    assert max(abs(a - b) / max(1, abs(b)) for a, b in zip(ours, expected, strict=True)) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("bert", peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], **LORA)),
        ("modernbert", peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", use_dora=True, **LORA)),
        ("xlm-roberta", peft.LoHaConfig(task_type="SEQ_CLS", target_modules=["key"], modules_to_save=["classifier"])),
        ("roberta", peft.IA3Config(task_type="SEQ_CLS", target_modules=["key"], feedforward_modules=[])),
        ("bert", peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], bias="all", **LORA)),
        (
            "qwen3",
            peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], use_rslora=True, **LORA),
        ),
    ],
)
def test_of_a_cross_encoder(kind: str, config: Any, adapter: Path, tmp_path: Path, texts):
    """LoRA and its kin, with the head that was trained along."""
    if kind == "qwen3":
        base, options = make_decoder_classifier(tmp_path / "base", kind), {"template": None}
    else:
        base, options = make_encoder_cross_encoder(tmp_path / "base", kind), {}
    model = train(adapter, AutoModelForSequenceClassification.from_pretrained(base), config)
    assert_applied(ours(adapter, texts, **options), logits(model, base, texts), ours(base, texts, **options))


def test_of_a_causal_model(adapter: Path, tmp_path: Path, texts):
    """Whose answer is the score, as it is for its base."""
    base = make_causal_lm(tmp_path / "base", "llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **LORA)
    model = train(adapter, AutoModelForCausalLM.from_pretrained(base), config)
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer.convert_tokens_to_ids(["no", "yes"])
    model.double()  # float32 rounds beside its base in other places than when it is merged with it: 1.3e-5 on some CPUs
    with torch.inference_mode():
        answers = [
            model(**tokenizer(f"{query} {document}", return_tensors="pt")).logits[0, -1, ids]
            for query, document in zip(*texts, strict=True)
        ]
    expected = [(yes - no).item() for no, yes in answers]
    options = {"template": TEMPLATE, "classifier_tokens": ("no", "yes"), "max_length": 512}
    assert_applied(ours(adapter, texts, **options), expected, ours(base, texts, **options))


@pytest.mark.parametrize(("own", "labels"), [(0, 1), (0, 2), (3, 1), (1, 2)])
def test_the_head_may_be_the_adapters_alone(own: int, labels: int, adapter: Path, tmp_path: Path, texts):
    """Its model has none, or one for `own` labels: what was trained says how many there are."""
    if own:
        base = make_bert_cross_encoder(tmp_path / "base", num_labels=own)
    else:
        base = make_bi_encoder(tmp_path / "base", "cls_token")
        (base / "modules.json").unlink()
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], **LORA)
    load = AutoModelForSequenceClassification.from_pretrained
    model = load(base, num_labels=labels, ignore_mismatched_sizes=True)
    wrapped = train(adapter, model, config)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        rows = [
            wrapped(**tokenizer(*pair, truncation="longest_first", max_length=96, return_tensors="pt")).logits[0]
            for pair in zip(*texts, strict=True)
        ]
    expected = [(row[-1] - row[0] if labels == 2 else row[0]).item() for row in rows]
    assert_equal(ours(adapter, texts), expected)


@pytest.mark.parametrize("saved", [[], ["word_embeddings"]])
def test_of_a_tokenizer_with_more_words(saved: list[str], adapter: Path, tmp_path: Path, texts):
    """PEFT saves the whole embeddings, and the user the tokenizer."""
    base = make_encoder_cross_encoder(tmp_path / "base", "bert")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["the file", "python"])
    model.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=saved, **LORA)
    wrapped = train(adapter, model, config)
    tokenizer.save_pretrained(adapter)
    assert_applied(ours(adapter, texts), logits(wrapped, adapter, texts), ours(base, texts))


class TestPlaces:
    """Where the adapter, its model and its tokenizer lie."""

    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        return make_encoder_cross_encoder(tmp_path / "base", "bert")

    @pytest.fixture
    def expected(self, base: Path, adapter: Path, texts) -> list[float]:
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], **LORA)
        return logits(train(adapter, AutoModelForSequenceClassification.from_pretrained(base), config), base, texts)

    def test_beside_its_model(self, base: Path, adapter: Path, expected: list[float], texts):
        """Then it is for that one, whatever it names."""
        without = ours(base, texts)
        edit(adapter, base_model_name_or_path="no-such-org/no-such-model")
        shutil.copytree(adapter, base, dirs_exist_ok=True)
        assert_applied(ours(base, texts), expected, without)

    def test_a_tokenizer_of_its_own_goes_first(self, base: Path, adapter: Path, expected: list[float], texts):
        """PEFT saves none; training scripts do."""
        before = ours(adapter, texts, max_length=12)
        assert before != ours(adapter, texts, max_length=None)
        AutoTokenizer.from_pretrained(base, model_max_length=12).save_pretrained(adapter)
        assert before == ours(adapter, texts, max_length=None)

    def test_both_from_the_hub(self, base: Path, adapter: Path, expected: list[float], tmp_path: Path, texts):
        """Here from its cache, without a request."""
        edit(adapter, base_model_name_or_path="org/base")
        for name, folder in {"adapter": adapter, "base": base}.items():
            cached = tmp_path / "hub" / f"models--org--{name}"
            shutil.copytree(folder, cached / "snapshots" / "c0ffee")
            (cached / "refs").mkdir()
            (cached / "refs" / "main").write_text("c0ffee")
        options = {"cache_dir": tmp_path / "hub", "local_files_only": True}
        assert_equal(ours("org/adapter", texts, **options), expected)

    def test_other_weights_are_another_scorer(self, base: Path, adapter: Path, expected: list[float]):
        """The adapter's and its model's."""
        identities = []
        for folder in (None, base, adapter):
            if folder is not None:
                (path,) = folder.glob("*.safetensors")
                path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
            with LocalScorer(adapter) as scorer:
                identities.append(scorer.identity().facts["weights"])
        assert len(set(identities)) == 3

    def test_as_sentence_transformers_saves_it(self, base: Path, tmp_path: Path, texts, monkeypatch):
        """A cross-encoder and a bi-encoder, with modules.json beside the adapter."""
        # transformers saves adapters with a PEFT only that is not out yet
        monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.20")
        torch.manual_seed(8)
        cross = CrossEncoder(str(base), device="cpu")
        cross.add_adapter(peft.LoraConfig(target_modules=["query"], **LORA))
        cross.save_pretrained(str(tmp_path / "cross"))
        expected = cross.predict(list(zip(*texts, strict=True)), batch_size=1, activation_fn=torch.nn.Identity())
        assert_applied(ours(tmp_path / "cross", texts), expected.tolist(), ours(base, texts))
        plain = make_bi_encoder(tmp_path / "plain", "cls_token")
        bi = SentenceTransformer(modules=[Transformer(str(plain)), Pooling(64, "cls")], device="cpu")
        bi.add_adapter(peft.LoraConfig(target_modules=["value"], **LORA))
        bi.save_pretrained(str(tmp_path / "bi"))
        cosines = bi.similarity_pairwise(*map(bi.encode, texts)).tolist()
        ours_, without = (ours(folder, texts, max_length=None) for folder in (tmp_path / "bi", plain))
        assert_applied(ours_, cosines, without)


class TestRefusals:
    """Never the scores of the model without it."""

    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        return make_encoder_cross_encoder(tmp_path / "base", "bert")

    def adapter(self, base: Path, adapter: Path, config: Any = None) -> Path:
        config = config or peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], **LORA)
        train(adapter, AutoModelForSequenceClassification.from_pretrained(base), config)
        return adapter

    def test_prompts_that_were_trained(self, base: Path, adapter: Path, texts):
        """They are no weights of the model."""
        self.adapter(base, adapter, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
        with pytest.raises(ConfigError, match=r"the adapter \(PROMPT_TUNING\) of .* can't be merged"):
            ours(adapter, texts)

    def test_an_adapter_of_another_model(self, base: Path, adapter: Path, tmp_path: Path, texts):
        """With other layers, or other sizes."""
        self.adapter(base, adapter)
        other = make_encoder_cross_encoder(tmp_path / "other", "roberta")
        edit(adapter, base_model_name_or_path=str(other))
        with pytest.raises(ConfigError, match="has no place|can't be merged"):
            ours(adapter, texts)

    def test_weights_that_two_layers_share(self, adapter: Path, tmp_path: Path, texts):
        """One of them was trained."""
        base = make_causal_lm(tmp_path / "base", "qwen3")
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], **LORA)
        train(adapter, AutoModelForCausalLM.from_pretrained(base), config)
        with pytest.raises(ConfigError, match="can't be merged: outputs would be .* off"):
            ours(adapter, texts, template=TEMPLATE, classifier_tokens=("no", "yes"))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"task_type": "TOKEN_CLS"}, "task_type is 'TOKEN_CLS'; supported are SEQ_CLS"),
            ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
            ({"base_model_name_or_path": "/no/such"}, "the model for the adapter .*: there is no folder '/no/such'"),
            ({"peft_type": "NEW"}, r"the adapter \(NEW\) of .* can't be merged"),
        ],
    )
    def test_by_field(self, fields: dict[str, Any], message: str, base: Path, adapter: Path, texts):
        """Of adapter_config.json."""
        edit(self.adapter(base, adapter), **fields)
        with pytest.raises(ConfigError, match=message):
            ours(adapter, texts)

    def test_missing_and_pickled_weights(self, base: Path, adapter: Path, texts):
        """Pickles can run code."""
        weights = self.adapter(base, adapter) / "adapter_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors"):
            ours(adapter, texts)

    def test_an_adapter_for_an_adapter(self, base: Path, adapter: Path, texts):
        """Both would have to be applied."""
        shutil.copyfile(self.adapter(base, adapter) / "adapter_config.json", base / "adapter_config.json")
        with pytest.raises(ConfigError, match="has an adapter itself"):
            ours(adapter, texts)


def edit(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
