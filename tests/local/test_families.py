"""Encoder families other than BERT, other poolings, and ColBERTs: against plain transformers, one pair at a time."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from rag_rerank import ConfigError, LocalScorer
from rag_rerank.local.checkpoint.declaration import Layer, read_declaration
from rag_rerank.local.checkpoint.files import Files
from rag_rerank.local.models.layers import read_layers
from tests.encoder_models import (
    KINDS,
    VECTOR_SIZE,
    load_late_interaction,
    make_bi_encoder,
    make_colbert,
    make_encoder_cross_encoder,
    make_pylate_colbert,
)
from tests.models import MAX_LENGTH
from tests.pairs import largest_difference, pairs
from tests.scorers import WordOverlap

TOLERANCE = 1e-5
QUERY = "How do I copy a file?"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def texts() -> tuple[list[str], list[str]]:
    """60 pairs, over-long, empty and odd ones among them, as a scorer hands them to its back end."""
    scorer = WordOverlap()
    scorer.score(*pairs())
    queries, documents, *_ = scorer.calls[0]
    return queries, documents


def one_by_one(folder: Path, auto: type, *texts: list[str], max_length: int = MAX_LENGTH):
    """What transformers itself gives for one text, or pair of texts, at a time: nothing padded, nothing batched."""
    model, tokenizer = auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return [
            model(**tokenizer(*together, truncation="longest_first", max_length=max_length, return_tensors="pt"))
            for together in zip(*texts, strict=True)
        ]


class TestCrossEncoders:
    """One label; BERT, RoBERTa and XLM-RoBERTa (positions from 2 on), ModernBERT (local and global attention)."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_logits_are_those_of_transformers(self, kind: str, tmp_path: Path, texts):
        """To 1e-5, though ours ran in padded batches; over-long pairs are cut alike."""
        folder = make_encoder_cross_encoder(tmp_path / kind, kind)
        with LocalScorer(folder, dtype="float32", use_activation=False) as scorer:
            ours = scorer.score(*texts)
        expected = [output.logits.item() for output in one_by_one(folder, AutoModelForSequenceClassification, *texts)]
        assert largest_difference(ours, expected) <= TOLERANCE
        assert max(expected) - min(expected) > 1


class TestBiEncoders:
    """Poolings other than MiniLM's mean."""

    @pytest.mark.parametrize(("pooling", "position"), [("cls_token", 0), ("lasttoken", -1)])
    def test_scores_are_cosines_of_one_state_each(self, pooling: str, position: int, tmp_path: Path, texts):
        """Of the first or the last token, [SEP]; cut at the folder's own 64 tokens."""
        folder = make_bi_encoder(tmp_path / pooling, pooling)
        with LocalScorer(folder, dtype="float32") as scorer:
            ours = scorer.score(*texts)
        queries, documents = (
            torch.cat(
                [output.last_hidden_state[:, position] for output in one_by_one(folder, AutoModel, side, max_length=64)]
            )
            for side in texts
        )
        expected = torch.nn.functional.cosine_similarity(queries, documents).tolist()
        assert largest_difference(ours, expected) <= TOLERANCE
        assert max(expected) - min(expected) > 0.2


def max_sim(folder: Path, queries: list[str], documents: list[str], *, normalize: bool) -> list[float]:
    """The score of late interaction, written out."""
    dense = Layer("Dense", "1_Dense" if (folder / "1_Dense").exists() else "")
    [projection] = read_layers(Files(str(folder)), [dense]).parameters()

    def vectors(texts: list[str]) -> list[torch.Tensor]:
        projected = [output.last_hidden_state[0] @ projection.T for output in one_by_one(folder, AutoModel, texts)]
        return [rows / rows.norm(dim=1, keepdim=True) for rows in projected] if normalize else projected

    return [
        sum((document @ token).max().item() for token in query)
        for query, document in zip(vectors(queries), vectors(documents), strict=True)
    ]


class TestLateInteraction:
    """The two kinds of ColBERT folder: HF_ColBERT with a BERT, PyLate's with a ModernBERT."""

    @pytest.fixture(params=[make_colbert, make_pylate_colbert])
    def folder(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        return request.param(tmp_path / request.param.__name__)

    @pytest.mark.parametrize("use_activation", [None, False])
    def test_scores_are_sums_of_the_best_dot_products(self, folder: Path, use_activation: bool | None, texts):
        """Over all tokens of the query, special ones too; relative to their size, which use_activation=False frees."""
        with LocalScorer(folder, dtype="float32", use_activation=use_activation, late_interaction="vllm") as scorer:
            ours = scorer.score(*texts)
        expected = max_sim(folder, *texts, normalize=use_activation is not False)
        assert ours == pytest.approx(expected, rel=1e-6, abs=TOLERANCE)  # they go up to 80
        assert max(expected) - min(expected) > 1

    def test_one_query_for_all_is_the_same_as_one_each(self, folder: Path, texts):
        """And a document scores the same alone."""
        with LocalScorer(folder, dtype="float32") as scorer:
            together = scorer.score(QUERY, texts[1])
            assert largest_difference(together, scorer.score([QUERY] * 60, texts[1])) <= TOLERANCE
            alone = [scorer.score(QUERY, document)[0] for document in texts[1][::6]]
        assert largest_difference(together[::6], alone) <= TOLERANCE


class TestWork:
    """What is run, how often, and what is kept."""

    @pytest.fixture
    def colbert(self, tmp_path: Path) -> Path:
        return make_colbert(tmp_path / "colbert")

    def ran(self, model, queries: list[str], documents: list[str], batch: int = 4) -> tuple[list[int], list[float]]:
        """How many sequences each forward pass had, and the scores, in batches of `batch` documents."""
        passes: list[int] = []
        cls = model.document.tokenizer.cls_token_id
        model.transformer.model.register_forward_pre_hook(
            lambda _, __, options: passes.append(int((options["input_ids"] == cls).sum())), with_kwargs=True
        )
        inputs = model.inputs(queries, documents)
        outputs = [model.run(inputs.sequences[at : at + batch]) for at in range(0, len(inputs.sequences), batch)]
        return passes, inputs.scores(torch.cat(outputs))

    def test_a_query_is_encoded_once(self, colbert: Path):
        """With the first batch of its documents, and not again with the next ones."""
        passes, _ = self.ran(load_late_interaction(colbert), [QUERY], [f"text {number}" for number in range(8)])
        assert passes == [1, 4, 4]

    def test_queries_keep_to_the_token_budget(self, colbert: Path):
        """Ten queries of 3 tokens at 12 tokens a batch are three batches."""
        model = load_late_interaction(colbert, token_budget=12)
        passes, _ = self.ran(model, [str(number) for number in range(10)], ["x"] * 10, batch=10)
        assert passes == [4, 4, 2, 10]

    def test_no_document_vectors_leave_a_batch(self, colbert: Path):
        """A number a document, or 1,000 long ones would take 262 MB."""
        model = load_late_interaction(colbert)
        assert model.run(model.inputs(["q"], ["a", "b c d"]).sequences).shape == (2, 1)

    def test_the_projection_is_float32_whatever_the_encoder_is(self, colbert: Path):
        """As vLLM's: scores of a half-precision encoder are float32 sums."""
        model = load_late_interaction(colbert, dtype=torch.bfloat16)
        outputs = model.run(model.inputs(["q"], ["a", "b c d"]).sequences)
        assert outputs.dtype == torch.float32
        assert outputs.flatten().tolist() == pytest.approx(
            load_late_interaction(colbert).run(model.inputs(["q"], ["a", "b c d"]).sequences).flatten().tolist(),
            rel=0.05,
        )


class TestReading:
    """Which checkpoints are ColBERTs, and where their projection is."""

    @pytest.mark.parametrize(
        ("architecture", "modules", "expected"),
        [
            ("HF_ColBERT", [], True),
            ("ColBERTModernBertModel", [], True),
            ("ModernBertModel", ["Transformer", "Dense"], True),
            ("ModernBertModel", ["Transformer", "Dense", "Dense"], True),
            ("BertModel", ["Transformer", "Pooling", "Dense", "Normalize"], False),
            ("BertModel", ["Transformer", "Pooling"], False),
            ("BertForSequenceClassification", [], False),
        ],
    )
    def test_what_is_late_interaction(self, architecture: str, modules: list[str], expected: bool):
        """Named so, or PyLate's folder: a projection and no pooling."""
        listed = [{"type": f"sentence_transformers.models.{kind}", "path": kind} for kind in modules]
        config = {"architectures": [architecture]}
        pooling = {"Pooling/config.json": {"pooling_mode": "mean"}}
        files = {"modules.json": listed or None, "config.json": config, "Transformer/config.json": config, **pooling}
        assert (read_declaration("x", files.get).kind == "late-interaction") is expected

    @pytest.fixture
    def files(self, tmp_path: Path) -> Files:
        """A folder for modules."""
        (tmp_path / "config.json").write_text("{}", encoding="utf-8")
        return Files(str(tmp_path))

    def test_dense_modules_follow_each_other(self, files: Files, tmp_path: Path):
        """With their biases, where they have them, and their activations."""
        first = {"weight": torch.randn(5, 4), "bias": torch.randn(5)}
        second = {"weight": torch.randn(3, 5)}
        for folder, weights in {"1_Dense": first, "2_Dense": second}.items():
            (tmp_path / folder).mkdir()
            save_file(
                {f"linear.{name}": weight for name, weight in weights.items()}, tmp_path / folder / "model.safetensors"
            )
        states = torch.randn(7, 4)
        layers = [Layer("Dense", "1_Dense", "torch.nn.modules.activation.Tanh"), Layer("Dense", "2_Dense")]
        projected = read_layers(files, layers)(states)
        expected = torch.tanh(states @ first["weight"].T + first["bias"]) @ second["weight"].T
        assert torch.allclose(projected, expected, atol=1e-6)

    @pytest.mark.parametrize("size", [4, 5])
    def test_a_residual_connection_is_added(self, size: int, files: Files, tmp_path: Path):
        """Projected, where the sizes differ."""
        weights = {"linear.weight": torch.randn(size, 4)}
        if size != 4:
            weights["residual.weight"] = torch.randn(size, 4)
        save_file(weights, tmp_path / "model.safetensors")
        states = torch.randn(7, 4)
        made = read_layers(files, [Layer("Dense", residual=True)])(states)
        beside = states @ weights["residual.weight"].T if size != 4 else states
        assert torch.allclose(made, states @ weights["linear.weight"].T + beside, atol=1e-6)

    def test_jinas_name_for_the_projection_is_known(self, files: Files, tmp_path: Path):
        """As in vLLM."""
        save_file({"colbert_linear.weight": torch.randn(VECTOR_SIZE, 8)}, tmp_path / "model.safetensors")
        assert read_layers(files, [Layer("Dense")])(torch.zeros(1, 8)).shape == (1, VECTOR_SIZE)

    def test_a_missing_projection_is_named(self, files: Files, tmp_path: Path):
        """No file, or a file of something else."""
        with pytest.raises(ConfigError, match=r"no 1_Dense/model\.safetensors"):
            read_layers(files, [Layer("Dense", "1_Dense")])
        save_file({"bert.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
        with pytest.raises(ConfigError, match=r"holds no linear\.weight"):
            read_layers(files, [Layer("Dense")])
