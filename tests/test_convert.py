"""Converted rerankers score as the causal models that they were made from, in transformers and on a vLLM server."""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Dense
from sentence_transformers.base.modules import Transformer as BaseTransformer
from sentence_transformers.cross_encoder.modules import LogitScore
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rag_rerank import LocalScorer
from rag_rerank.convert import convert
from rag_rerank.errors import ConfigError
from tests import vllm_server
from tests.causal_models import make_causal_lm, make_decoder_classifier
from tests.conftest import require_server
from tests.encoder_models import modular_modules, scoring
from tests.pairs import largest_difference, pairs

TOLERANCE = 1e-5
ANSWERS: dict[str, dict[str, Any]] = {
    "qwen3": {"tokens": ("no", "yes")},  # tied embeddings
    "qwen2": {"tokens": ("0", "1")},  # an output matrix of its own
    "gemma": {"tokens": ("Yes",)},
    "llama": {"tokens": ("yes",)},
}
YES_NO = ANSWERS["qwen3"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEMPLATE = (
    '<|im_start|>user\n{{ (messages | selectattr("role", "eq", "query") | first).content }}\n'
    '{{ (messages | selectattr("role", "eq", "document") | first).content }}<|im_end|>\n<|im_start|>assistant\n'
)


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny causal models, each made once; no test may change one."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, max_shard_size: str = "1GB") -> Path:
        key = (kind, max_shard_size)
        if key not in made:
            made[key] = make_causal_lm(tmp_path_factory.mktemp(kind) / "source", kind, max_shard_size=max_shard_size)
        return made[key]

    return make


@pytest.fixture
def copied(causal: Callable[..., Path], tmp_path: Path) -> Path:
    """A causal model of the test's own, to be spoilt."""
    return shutil.copytree(causal("qwen3"), tmp_path / "copied")


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return [f"Query: {query}\nDocument: {document}\nAnswer: " for query, document in short_pairs(50)]


def short_pairs(count: int) -> list[tuple[str, str]]:
    return [
        (query[:200], document[:300]) for query, document in zip(*pairs(), strict=True) if "\ud800" not in document
    ][:count]


def causal_scores(folder: Path, prompts: list[str], *, tokens: tuple[str, ...]) -> list[float]:
    """What the language model says: the logit of the last token, or the difference of two."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    scores = []
    for prompt in prompts:
        with torch.inference_mode():
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1, ids].tolist()
        scores.append(logits[1] - logits[0] if len(tokens) == 2 else logits[0])
    return scores


def classifier_scores(folder: Path, prompts: list[str], batch: int = 1) -> list[float]:
    """What a *ForSequenceClassification says that finds all of its weights."""
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores: list[float] = []
    for start in range(0, len(prompts), batch):
        with torch.inference_mode():
            inputs = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True)
            scores += model(**inputs).logits[:, 0].tolist()
    return scores


def edit(file: Path, **changes: object) -> None:
    """Change entries of a JSON file; None removes one."""
    entries = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_declared_answers_need_no_tokens(causal: Callable[..., Path], prompts: list[str], tmp_path: Path) -> None:
    """sentence-transformers' LogitScore names them."""
    ids = AutoTokenizer.from_pretrained(causal("qwen3")).convert_tokens_to_ids(["yes", "no"])
    modules = [BaseTransformer(str(causal("qwen3")), transformer_task="text-generation"), LogitScore(*ids)]
    CrossEncoder(modules=modules, device="cpu").save_pretrained(str(tmp_path / "source"))
    out = convert(tmp_path / "source", tmp_path / "out")
    expected = causal_scores(causal("qwen3"), prompts[:10], **YES_NO)
    assert largest_difference(classifier_scores(out, prompts[:10]), expected) <= TOLERANCE


def test_what_is_declared_for_the_prompt_is_not_dropped(causal: Callable[..., Path], tmp_path: Path) -> None:
    """A default instruction and variables of the chat template: the caller writes them into a template."""
    ids = AutoTokenizer.from_pretrained(causal("qwen3")).convert_tokens_to_ids(["yes", "no"])
    modules = [BaseTransformer(str(causal("qwen3")), transformer_task="text-generation"), LogitScore(*ids)]
    source = CrossEncoder(modules=modules, device="cpu", prompts={"task": "Find it"}, default_prompt_name="task")
    source.save_pretrained(str(tmp_path / "source"))
    with pytest.raises(ConfigError, match="'Find it'.* pass template="):
        convert(tmp_path / "source", tmp_path / "out")
    assert convert(tmp_path / "source", tmp_path / "out", template=TEMPLATE).is_dir()


class TestScores:
    @pytest.mark.parametrize("max_shard_size", ["1GB", "100KB"], ids=["one file", "sharded"])
    @pytest.mark.parametrize("kind", ANSWERS)
    def test_equal_those_of_the_causal_model(
        self, kind: str, max_shard_size: str, causal: Callable[..., Path], prompts: list[str], tmp_path: Path
    ) -> None:
        """A prompt's score is the logit (difference) of the causal model, whatever the family and the shards."""
        source = causal(kind, max_shard_size)
        expected = causal_scores(source, prompts, **ANSWERS[kind])
        out = convert(source, tmp_path / "out", **ANSWERS[kind])
        assert len(prompts) == 50
        assert max(expected) - min(expected) > 5  # scores that are all alike would show nothing
        assert largest_difference(classifier_scores(out, prompts), expected) <= TOLERANCE

    def test_of_a_token_that_begins_a_word(
        self, causal: Callable[..., Path], prompts: list[str], tmp_path: Path
    ) -> None:
        """A vocabulary entry may be named as it is written there, with its sign for a space."""
        out = convert(causal("llama"), tmp_path / "out", tokens=("Ġthe",))
        expected = causal_scores(causal("llama"), prompts[:10], tokens=("Ġthe",))
        assert largest_difference(classifier_scores(out, prompts[:10]), expected) <= TOLERANCE

    def test_in_padded_batches_are_the_same(
        self, causal: Callable[..., Path], prompts: list[str], tmp_path: Path
    ) -> None:
        """The padding token is in the config, so the last token of a shorter prompt is found."""
        out = convert(causal("llama"), tmp_path / "out", **ANSWERS["llama"])
        assert largest_difference(classifier_scores(out, prompts, batch=16), classifier_scores(out, prompts)) <= 1e-4


class TestModular:
    """A transformer, a pooling and a head of modules, as sentence-transformers saves them (Ettin's layout)."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Callable[..., Path]:
        """Saves a cross-encoder, of which a test may change a module."""

        def save(kind: str, modules: dict[int, Any] | None = None, **options: Any) -> Path:
            torch.manual_seed(3)
            made = modular_modules(tmp_path / "transformer", kind)
            for place, module in (modules or {}).items():
                made[place] = module
            CrossEncoder(modules=made, device="cpu", **options).save_pretrained(str(tmp_path / "source"))
            return tmp_path / "source"

        return save

    def scores(self, folder: Path, **options: Any) -> list[float]:
        queries, documents = zip(*short_pairs(30), strict=True)
        with LocalScorer(folder, dtype="float32", **options) as scorer:
            return scorer.score(queries, documents)

    def assert_equal(self, source: Path, tmp_path: Path) -> Path:
        """In the default scores, in logits, and in those of transformers."""
        out = convert(source, tmp_path / "out")
        assert largest_difference(self.scores(source), self.scores(out)) <= TOLERANCE
        logits = self.scores(source, use_activation=False)
        assert max(logits) - min(logits) > 0.5
        assert largest_difference(logits, self.scores(out, use_activation=False)) <= TOLERANCE
        theirs = CrossEncoder(str(out), device="cpu").predict(short_pairs(30), batch_size=1)
        assert largest_difference(theirs.tolist(), self.scores(out)) <= TOLERANCE
        return out

    @pytest.mark.parametrize("kind", ["modernbert", "bert", "xlm-roberta", "qwen3"])
    def test_scores_are_equal(self, kind: str, source: Callable[..., Path], tmp_path: Path) -> None:
        """Of each head that there is a classifier for."""
        out = self.assert_equal(source(kind), tmp_path)
        assert classifier_scores(out, ["one text"]) != [0.0]  # and finds all of its weights

    @pytest.mark.parametrize("pooling", ["cls", "mean"])
    def test_a_modernbert_may_have_biases(self, pooling: str, source: Callable[..., Path], tmp_path: Path) -> None:
        """In its Dense, and in its LayerNorm, though its own norms have none; or pool the mean."""
        norm = LayerNorm(64)
        torch.nn.init.normal_(norm.norm.bias)
        dense = Dense(64, 64, activation_function=torch.nn.GELU())
        self.assert_equal(source("modernbert", {1: Pooling(64, pooling), 2: dense, 3: norm}), tmp_path)

    def test_activation_limit_and_options_come_along(self, source: Callable[..., Path], tmp_path: Path) -> None:
        """Where vLLM and transformers read them."""
        folder = source("modernbert", activation_fn=torch.nn.Identity())
        limits = {"text": {"max_length": 24}}
        options = {"truncation_side": "left"}
        edit(folder / "sentence_bert_config.json", processing_kwargs=limits, processor_kwargs=options)
        out = self.assert_equal(folder, tmp_path)
        config = json.loads((out / "config.json").read_text())
        assert config["sentence_transformers"] == {"activation_fn": "torch.nn.modules.linear.Identity"}
        assert AutoTokenizer.from_pretrained(out).model_max_length == 24

    def test_a_transformer_saved_with_another_head(self, source: Callable[..., Path], tmp_path: Path) -> None:
        """That head is not taken for the modules."""
        folder = source("modernbert")
        before = self.scores(folder)
        weights = load_file(folder / WEIGHTS)
        named = {f"model.{name}": weight for name, weight in weights.items()}
        save_file(named | {"head.dense.weight": torch.ones(64, 64)}, folder / WEIGHTS, metadata={"format": "pt"})
        assert largest_difference(self.scores(convert(folder, tmp_path / "out")), before) <= TOLERANCE

    @pytest.mark.parametrize(
        ("kind", "modules", "options", "message"),
        [
            (
                "modernbert",
                {1: Pooling(64, "max")},
                {},
                "it pools max, ModernBertForSequenceClassification cls or mean",
            ),
            ("modernbert", {2: Dense(64, 64)}, {}, "its head is Tanh, LayerNorm, Identity, that of a Modern"),
            (
                "modernbert",
                {2: Dense(64, 48, activation_function=torch.nn.GELU()), 3: LayerNorm(48), 4: scoring(48)},
                {},
                r"its head\.dense is \(48, 64\)",
            ),
            ("modernbert", {}, {"prompts": {"q": "query: "}, "default_prompt_name": "q"}, "it declares a prompt"),
            ("qwen3", {2: scoring(64, bias=True)}, {}, "its Dense has a bias"),
            ("electra", {}, {}, "no classifier is known for a cross-encoder of the type electra"),
        ],
    )
    def test_what_no_classifier_can_follow_is_refused(
        self,
        kind: str,
        modules: dict[int, Any],
        options: dict[str, Any],
        message: str,
        source: Callable[..., Path],
        tmp_path: Path,
    ) -> None:
        """By name; nothing is written."""
        with pytest.raises(ConfigError, match=message):
            convert(source(kind, modules, **options), tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestWeights:
    @pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
    def test_stay_in_their_shards(self, kind: str, causal: Callable[..., Path], tmp_path: Path) -> None:
        """A shard of the source is a shard of the result, so no more than one was ever needed in memory."""
        source = causal(kind, "100KB")
        out = convert(source, tmp_path / "out", **ANSWERS[kind])
        shards = sorted(path.name for path in source.glob("*.safetensors"))
        assert len(shards) >= 3
        assert sorted(path.name for path in out.glob("*.safetensors")) == shards
        listed = json.loads((out / INDEX).read_text())
        stored = {name: shard for shard in shards for name in load_file(out / shard)}
        assert listed["weight_map"] == stored
        assert set(stored.values()) == set(shards)  # none is empty
        assert listed["metadata"]["total_size"] == sum(
            tensor.nbytes for shard in shards for tensor in load_file(out / shard).values()
        )

    def test_are_copied_bit_for_bit_but_for_the_output_matrix(self, tmp_path: Path) -> None:
        """In a bfloat16 checkpoint only the classifier is float32: the exact difference of the two rows."""
        source = make_causal_lm(tmp_path / "source", "qwen2", dtype=torch.bfloat16)
        out = convert(source, tmp_path / "out", **ANSWERS["qwen2"])
        before, after = load_file(source / WEIGHTS), load_file(out / WEIGHTS)
        head, score = before.pop("lm_head.weight").float(), after.pop("score.weight")
        false, true = AutoTokenizer.from_pretrained(source).convert_tokens_to_ids(["0", "1"])
        assert score.dtype == torch.float32
        assert torch.equal(score, head[[true]] - head[[false]])
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)

    def test_can_be_stored_in_another_dtype(self, causal: Callable[..., Path], tmp_path: Path) -> None:
        """`dtype` casts all but the classifier, and the config says so."""
        out = convert(causal("gemma"), tmp_path / "out", dtype="float16", **ANSWERS["gemma"])
        weights = load_file(out / WEIGHTS)
        assert weights.pop("score.weight").dtype == torch.float32
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
        assert AutoModelForSequenceClassification.from_pretrained(out).dtype == torch.float16

    @pytest.mark.parametrize("sign", [1, -1])
    def test_of_both_matrices_are_dropped(self, sign: int, copied: Path, prompts: list[str], tmp_path: Path) -> None:
        """A model with tied embeddings that stores the output matrix too, equal to them or not, loses it."""
        weights = load_file(copied / WEIGHTS)
        save_file(
            {**weights, "lm_head.weight": weights["model.embed_tokens.weight"] * sign},
            copied / WEIGHTS,
            metadata={"format": "pt"},
        )
        out = convert(copied, tmp_path / "out", **YES_NO)
        expected = causal_scores(copied, prompts[:4], **YES_NO)
        assert largest_difference(classifier_scores(out, prompts[:4]), expected) <= TOLERANCE
        with safe_open(out / WEIGHTS, framework="pt") as file:
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - it is not a dict
            assert file.metadata() == {"format": "pt"}

    def test_may_be_read_by_whom_the_source_may_be_read(self, copied: Path, tmp_path: Path) -> None:
        """A server under another account can read the result if it could read the source."""
        (copied / WEIGHTS).chmod(0o644)
        out = convert(copied, tmp_path / "out", **YES_NO)
        assert (out / WEIGHTS).stat().st_mode & 0o777 == 0o644


class TestConfig:
    def test_is_that_of_a_classifier_with_one_label(self, causal: Callable[..., Path], tmp_path: Path) -> None:
        """Only what makes it a classifier differs from the source's config."""
        source = causal("qwen3")
        out = convert(source, tmp_path / "out", **YES_NO)
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
        assert after == {
            **before,
            "architectures": ["Qwen3ForSequenceClassification"],
            "id2label": {"0": "LABEL_0"},
            "label2id": {"LABEL_0": 0},
        }
        assert AutoConfig.from_pretrained(out).num_labels == 1
        assert not (out / "generation_config.json").exists()

    def test_loses_what_would_mislead_a_reader(self, copied: Path, tmp_path: Path) -> None:
        """Entries of generation, of vLLM's own conversion and of code that stays behind are dropped."""
        stale = {"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax", "temperature": 0.6}
        stale |= {"is_original_qwen3_reranker": True, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
        edit(copied / "config.json", **stale, problem_type="regression", dtype=None, torch_dtype="bfloat16")
        config = json.loads((convert(copied, tmp_path / "out", **YES_NO) / "config.json").read_text())
        assert not stale.keys() & config.keys()
        assert config["problem_type"] == "regression"
        assert config["torch_dtype"] == "bfloat16"  # older readers know no other name
        assert "dtype" not in config

    def test_names_the_dtype_where_the_source_does_not(self, copied: Path, tmp_path: Path) -> None:
        """Without an entry, a reader could take the classifier's dtype for that of all weights."""
        edit(copied / "config.json", dtype=None)
        config = json.loads((convert(copied, tmp_path / "out", **YES_NO) / "config.json").read_text())
        assert config["dtype"] == "float32"

    def test_takes_the_padding_token_of_the_tokenizer(self, copied: Path, tmp_path: Path) -> None:
        """A language model's config often has none; a classifier's must."""
        edit(copied / "config.json", pad_token_id=None)
        out = convert(copied, tmp_path / "out", **YES_NO)
        assert AutoConfig.from_pretrained(out).pad_token_id == AutoTokenizer.from_pretrained(out).pad_token_id == 0


class TestTokenizer:
    @pytest.mark.parametrize("kind", ANSWERS)
    def test_is_copied(self, kind: str, causal: Callable[..., Path], tmp_path: Path) -> None:
        """Every tokenizer file is the source's, so every text gets the same ids."""
        source = causal(kind)
        out = convert(source, tmp_path / "out", **ANSWERS[kind])
        files = {file: digest for file, digest in contents(source).items() if file.startswith("tokenizer")}
        assert files.items() <= contents(out).items()

    def test_carries_the_template(self, copied: Path, tmp_path: Path) -> None:
        """The template is chat_template.jinja byte for byte, and no older one is left in the settings."""
        edit(copied / "tokenizer_config.json", chat_template="{{ 'chat' }}")
        out = convert(copied, tmp_path / "out", template=TEMPLATE + "\n", **YES_NO)
        assert (out / "chat_template.jinja").read_bytes() == (TEMPLATE + "\n").encode()
        assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
        assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE + "\n"

    def test_keeps_its_own_template_without_another(self, copied: Path, tmp_path: Path) -> None:
        """Without `template` the tokenizer stays as it was."""
        (copied / "chat_template.jinja").write_text("{{ 'chat' }}")
        out = convert(copied, tmp_path / "out", **YES_NO)
        assert (out / "chat_template.jinja").read_text() == "{{ 'chat' }}"


class TestOut:
    def test_is_returned_and_may_be_an_empty_folder(self, causal: Callable[..., Path], tmp_path: Path) -> None:
        """An empty folder needs no `overwrite`; missing parents are made; nothing else appears."""
        empty = tmp_path / "deep" / "empty"
        empty.mkdir(parents=True)
        assert convert(causal("qwen3"), str(empty), **YES_NO) == empty
        assert convert(causal("qwen3"), tmp_path / "new" / "out", **YES_NO) == tmp_path / "new" / "out"
        assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["deep", "empty", "new", "out"]

    def test_is_replaced_only_when_asked(self, causal: Callable[..., Path], tmp_path: Path) -> None:
        """A model that is there already stays, unless `overwrite` is given; then nothing of it is left."""
        out = convert(causal("qwen3"), tmp_path / "out", template=TEMPLATE, **YES_NO)
        before = contents(out)
        with pytest.raises(ConfigError, match="not empty.*overwrite=True"):
            convert(causal("gemma"), out, **ANSWERS["gemma"])
        assert contents(out) == before
        convert(causal("gemma"), out, overwrite=True, **ANSWERS["gemma"])
        assert AutoConfig.from_pretrained(out).architectures == ["GemmaForSequenceClassification"]
        assert not (out / "chat_template.jinja").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_is_never_something_else_than_a_model(self, causal: Callable[..., Path], tmp_path: Path) -> None:
        """`overwrite` replaces models, not whatever folder or file was named by mistake."""
        (tmp_path / "home").mkdir()
        for path in (tmp_path / "home" / "thesis.tex", tmp_path / "file"):
            path.write_text("precious")
        for name, message in (("home", "something else than a model"), ("file", "is a file")):
            with pytest.raises(ConfigError, match=message):
                convert(causal("qwen3"), tmp_path / name, overwrite=True, **YES_NO)
        assert (tmp_path / "home" / "thesis.tex").read_text() == "precious"

    def test_is_never_the_model_itself(self, copied: Path) -> None:
        """A model is not converted onto itself, nor onto a folder that holds it."""
        edit(copied / "config.json")
        before = contents(copied)
        with pytest.raises(ConfigError, match="holds the model itself"):
            convert(copied, copied.parent / "x" / ".." / copied.name, overwrite=True, **YES_NO)
        assert contents(copied) == before

    @pytest.mark.parametrize("there", [False, True], ids=["new", "overwrite"])
    def test_is_all_or_nothing(self, there: bool, causal: Callable[..., Path], tmp_path: Path) -> None:
        """A conversion that is broken off leaves nothing behind, and the model that it was to replace."""
        out = tmp_path / "out"
        if there:
            convert(causal("gemma"), out, **ANSWERS["gemma"])
        before = contents(tmp_path)

        def interrupt(done: int, total: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(causal("qwen2", "100KB"), out, overwrite=there, progress=interrupt, **ANSWERS["qwen2"])
        assert contents(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"] * there

    def test_leaves_the_source_alone(self, causal: Callable[..., Path], tmp_path: Path) -> None:
        """Nothing in the source's folder changes."""
        source = causal("qwen2", "100KB")
        before = contents(source)
        convert(source, tmp_path / "out", template=TEMPLATE, dtype="bfloat16", **ANSWERS["qwen2"])
        assert contents(source) == before

    def test_reports_progress(self, causal: Callable[..., Path], tmp_path: Path) -> None:
        """`progress` hears of every shard, in order, and of how many there are."""
        source = causal("qwen2", "100KB")
        heard: list[tuple[int, int]] = []
        convert(source, tmp_path / "out", progress=lambda *at: heard.append(at), **ANSWERS["qwen2"])
        total = len(list(source.glob("*.safetensors")))
        assert heard == [(done, total) for done in range(1, total + 1)]


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tokens": "no"}, "tokens must be .true,. or .false, true., got 'no'"),
            ({"tokens": ("no", "maybe", "yes")}, "must be .true,. or .false, true.; got .'no', 'maybe', 'yes'."),
            ({"tokens": ("yes", "yes")}, "must be .true,. or .false, true.; got .'yes', 'yes'."),
            ({"tokens": ("absolutely",)}, "'absolutely' is not one entry of the vocabulary"),
            ({"tokens": ("",)}, "'' is not one entry of the vocabulary"),
            ({"tokens": ("<missing>",)}, "'<missing>' is not one entry"),
            ({"tokens": ("Ã",)}, "'Ã' is not one entry"),  # half of a character
            ({**YES_NO, "dtype": "float8"}, "dtype must be None or one of"),
        ],
    )
    def test_of_arguments(
        self, options: dict[str, Any], message: str, causal: Callable[..., Path], tmp_path: Path
    ) -> None:
        """A wrong argument is a ConfigError that says what is right, and writes nothing."""
        with pytest.raises(ConfigError, match=message):
            convert(causal("gemma"), tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())

    def test_of_a_classifier(self, tmp_path: Path) -> None:
        """What is a classifier already needs no conversion."""
        source = make_decoder_classifier(tmp_path / "source", "qwen3")
        with pytest.raises(ConfigError, match="Qwen3ForSequenceClassification.*need no conversion"):
            convert(source, tmp_path / "out", **YES_NO)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"architectures": ["Qwen3Model"]}, "is a Qwen3Model. Pass a [*]ForCausalLM"),
            ({"architectures": None}, r"is a \(none\)"),
            ({"architectures": ["MyForCausalLM"]}, "transformers has no MyForSequenceClassification"),
            ({"model_type": "granite", "architectures": ["GraniteForCausalLM"]}, "no GraniteForSequenceClassification"),
            ({"model_type": "made-up", "auto_map": {"AutoConfig": "c.C"}}, "can't be loaded"),
            ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
            ({"logits_scaling": 8.0}, "logits_scaling"),
            ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized"),
            ({"tie_word_embeddings": False}, "no lm_head.weight"),
        ],
    )
    def test_of_models_that_a_classifier_can_not_follow(
        self, changes: dict[str, Any], message: str, copied: Path, tmp_path: Path
    ) -> None:
        """A model whose score is not one row times the last state is refused, not converted into another model."""
        edit(copied / "config.json", **changes)
        with pytest.raises(ConfigError, match=message):
            convert(copied, tmp_path / "out", **YES_NO)
        assert not (tmp_path / "out").exists()

    def test_of_pickle_weights(self, copied: Path, tmp_path: Path) -> None:
        """Pickle weights are never opened."""
        torch.save(load_file(copied / WEIGHTS), copied / "pytorch_model.bin")
        (copied / WEIGHTS).unlink()
        with pytest.raises(ConfigError, match=r"no model\.safetensors: .*pickle weights can run code.*save_pretrained"):
            convert(copied, tmp_path / "out", **YES_NO)

    @pytest.mark.parametrize(
        "shard", ["model-00002-of-00002.safetensors", "../copied/model-00001-of-00002.safetensors"]
    )
    def test_of_shards_that_are_missing_or_elsewhere(self, shard: str, copied: Path, tmp_path: Path) -> None:
        """Every shard of the index must be a file of the folder: its name is also where it would be written."""
        (copied / WEIGHTS).rename(copied / "model-00001-of-00002.safetensors")
        weight_map = {"model.norm.weight": "model-00001-of-00002.safetensors", "lm_head.weight": shard}
        (copied / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ConfigError, match=f"has no {shard}"):
            convert(copied, tmp_path / "out", **YES_NO)

    @pytest.mark.parametrize("file", [WEIGHTS, INDEX])
    def test_of_broken_files(self, file: str, copied: Path, tmp_path: Path) -> None:
        """A file that was cut off is named as such, before anything is written."""
        (copied / WEIGHTS).unlink()
        (copied / file).write_bytes(b"{")
        with pytest.raises(ConfigError, match="can't be loaded"):
            convert(copied, tmp_path / "out", **YES_NO)

    def test_of_an_output_matrix_with_a_bias(self, copied: Path, tmp_path: Path) -> None:
        """A classifier has no bias, so a model with one would score otherwise."""
        weights = load_file(copied / WEIGHTS)
        save_file({**weights, "lm_head.bias": torch.ones(8)}, copied / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ConfigError, match="an lm_head.bias"):
            convert(copied, tmp_path / "out", **YES_NO)

    def test_of_a_tokenizer_without_padding(self, copied: Path, tmp_path: Path) -> None:
        """Without a padding token a classifier scores no batches."""
        edit(copied / "tokenizer_config.json", pad_token=None)
        with pytest.raises(ConfigError, match="no pad_token"):
            convert(copied, tmp_path / "out", **YES_NO)

    @pytest.mark.parametrize("name", ["org/reranker", "./nowhere", "/nowhere/at/all"])
    def test_of_a_model_that_is_not_there(self, name: str, tmp_path: Path) -> None:
        """Neither on the hub nor on disk: a ConfigError that names it."""
        with pytest.raises(ConfigError, match=name):
            convert(name, tmp_path / "out", local_files_only=True, **YES_NO)


def test_a_hub_id_is_found_in_the_cache(causal: Callable[..., Path], tmp_path: Path) -> None:
    """A hub id is converted from the hub's files, here those in a cache."""
    cached = tmp_path / "hub" / "models--org--reranker"
    shutil.copytree(causal("qwen3"), cached / "snapshots" / "c0ffee")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("c0ffee")
    out = convert("org/reranker", tmp_path / "out", cache_dir=str(tmp_path / "hub"), local_files_only=True, **YES_NO)
    assert contents(out) == contents(convert(causal("qwen3"), tmp_path / "direct", **YES_NO))


@pytest.fixture(scope="module")
def vllm_converted(causal: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """Logits of 20 pairs from two real vLLM servers: the converted model, and the original with overrides."""
    require_server()
    out = convert(causal("qwen3"), tmp_path_factory.mktemp("served") / "converted", template=TEMPLATE, **YES_NO)
    overrides = {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    }
    template = ("--chat-template", str(out / "chat_template.jinja"))
    servers: list[AbstractContextManager[vllm_server.VLLMServer]] = [
        vllm_server.serving(out, *template),
        vllm_server.serving(causal("qwen3"), *template, "--hf-overrides", json.dumps(overrides)),
    ]
    queries, documents = zip(*short_pairs(20), strict=True)
    request = {"text_1": queries, "text_2": documents, "use_activation": False}
    logits = []
    for starting in servers:  # one after the other: each takes 2 GB
        with starting as server:
            answer = httpx.post(f"{server.base_url}/score", json=request, timeout=120)
            logits.append([entry["score"] for entry in answer.raise_for_status().json()["data"]])
    # What the causal model says to the same prompts, rendered with the template that the converted folder carries.
    tokenizer = AutoTokenizer.from_pretrained(out)
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "query", "content": query}, {"role": "document", "content": document}], tokenize=False
        )
        for query, document in short_pairs(20)
    ]
    logits.append(causal_scores(causal("qwen3"), rendered, **YES_NO))
    return logits


def test_vllm_serves_it_without_overrides(vllm_converted: list[list[float]]) -> None:
    """On vLLM the converted model scores as the original with overrides, and as the original in transformers."""
    converted, original, reference = vllm_converted
    assert max(reference) - min(reference) > 5
    assert largest_difference(converted, original) <= 1e-4
    assert largest_difference(converted, reference) <= 1e-4
