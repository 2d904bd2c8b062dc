"""The proof at load: the way a model is run, and what it falls back to, on checkpoints as transformers saves them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rag_rerank import ConfigError, LocalScorer
from rag_rerank.local.transformer.attention import NAME, attention
from rag_rerank.local.transformer.batching import Batching, TokenSequence
from rag_rerank.local.transformer.proof import Parts, Proof, Unproven, prove
from rag_rerank.local.transformer.transformer import Head, Padded, States, rope_limit
from rag_rerank.local.transformer.transformer import Path as Way
from tests.causal_models import make_causal_lm, random_decoder
from tests.encoder_models import make_bi_encoder, make_random_cross_encoder, random_encoder
from tests.models import MAX_LENGTH, make_bert_cross_encoder, widen, word_piece_tokenizer
from tests.pairs import largest_difference, pairs

pytestmark = pytest.mark.usefixtures("one_thread")

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
QUERY, DOCUMENTS = "which city", ["a small one", "the city of one million people " * 20]


def make_convbert(folder: Path) -> Path:
    """A model whose convolutions see the padding beside a text."""
    tokenizer = word_piece_tokenizer()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    sizes |= {"embedding_size": 64, "max_position_embeddings": MAX_LENGTH, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(CONFIG_MAPPING["convbert"](**sizes, num_labels=1))
    widen(model, 8.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_mpnet(folder: Path) -> Path:
    return make_random_cross_encoder(folder, "mpnet")


def make_phi3(folder: Path, rope: dict[str, object]) -> Path:
    """A decoder with a head."""
    tokenizer = word_piece_tokenizer(token_types=False)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_LENGTH, "num_labels": 1}
    sizes["original_max_position_embeddings"] = 40
    auto = AutoModelForSequenceClassification
    random_decoder("phi3", auto, rope_parameters=rope, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def alone(folder: Path) -> list[float]:
    """Logits of plain transformers, one pair at a time."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    options = {"truncation": "longest_first", "max_length": MAX_LENGTH, "return_tensors": "pt"}
    with torch.inference_mode():
        return [model.eval()(**tokenizer(QUERY, document, **options)).logits.item() for document in DOCUMENTS]


class TestPath:
    """What `LocalScorer.proof` tells."""

    @pytest.mark.parametrize(
        "make",
        [
            make_bert_cross_encoder,
            lambda folder: make_causal_lm(folder / "Qwen3-Reranker-0.6B", "qwen3"),
            lambda folder: make_bi_encoder(folder, "mean_tokens"),
        ],
        ids=["classifier", "causal", "bi-encoder"],
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_tested_architecture_is_not_padded(self, make, dtype: str, tmp_path: Path):
        """It gives what plain transformers give, but for rounding."""
        with LocalScorer(make(tmp_path), dtype=dtype) as scorer:
            proof = scorer.proof()
        assert proof.path == "unpadded"
        assert proof.differences.keys() == {"unpadded"}
        assert proof.differences["unpadded"] < (1e-5 if dtype == "float32" else 0.03)

    def test_another_one_is_padded(self, tmp_path: Path):
        """If that changes nothing."""
        with LocalScorer(make_random_cross_encoder(tmp_path, "deberta-v2"), dtype="float32") as scorer:
            assert scorer.proof().path == "padded"

    def test_one_that_sees_padding_is_run_in_equal_lengths(self, tmp_path: Path):
        """A pair scores beside a longer one as alone."""
        folder = make_convbert(tmp_path)
        with LocalScorer(folder, dtype="float32", use_activation=False) as scorer:
            proof = scorer.proof()
            assert proof.path == "equal lengths"
            assert proof.differences["padded"] > 0.01
            assert largest_difference(scorer.score(QUERY, DOCUMENTS), alone(folder)) <= 1e-5

    def test_a_fast_path_that_goes_wrong_is_not_taken(self, cross_encoder: Path, monkeypatch: pytest.MonkeyPatch):
        """Here each sequence attends to the whole row."""
        try:
            AttentionInterface.register(NAME, sdpa_attention_forward)
            with LocalScorer(cross_encoder, dtype="float32", use_activation=False) as scorer:
                proof = scorer.proof()
                assert proof.path == "padded"
                assert proof.differences["unpadded"] > 0.01
                assert largest_difference(scorer.score(QUERY, DOCUMENTS), alone(cross_encoder)) <= 1e-5
        finally:
            AttentionInterface.register(NAME, attention)

    def test_without_a_proof_only_what_tests_cover_is_trusted(self, cross_encoder: Path, tmp_path: Path):
        """The rest is run in equal lengths."""
        other = make_random_cross_encoder(tmp_path, "deberta-v2")
        for folder, expected in ((cross_encoder, "unpadded"), (other, "equal lengths")):
            with LocalScorer(folder, dtype="float32", verify=False) as scorer:
                assert (scorer.proof().path, scorer.proof().differences) == (expected, {})


class TestLongRope:
    """A rope that turns all positions otherwise once the last is beyond the original window (Phi-3)."""

    ROPE: ClassVar = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    }

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A window of 40 tokens, and factors of two kinds."""
        return make_phi3(tmp_path, self.ROPE)

    def test_each_side_of_the_window_is_run_apart(self, folder: Path):
        """A pair scores beside a longer one as alone, and so does the longer one."""
        options = {"dtype": "float32", "use_activation": False, "template": None}
        with LocalScorer(folder, **options) as scorer:
            assert scorer.proof().path == "unpadded"
            assert largest_difference(scorer.score(QUERY, DOCUMENTS * 3), alone(folder) * 3) <= 1e-5

    def test_the_window_itself_is_within_it(self, folder: Path):
        """40 tokens are not run beside 41, nor two batches at a time: the model keeps the rope of the last."""
        runner = Padded(AutoModel.from_pretrained(folder), 0, Batching(4096, parallel=2), limit=40)
        assert runner.batches([TokenSequence([5] * length) for length in (40, 41)], 4096) == [[0], [1]]
        assert runner.batching.parallel == 1

    def test_only_where_texts_are_that_long(self, folder: Path):
        """Within the window there is one side."""
        model = AutoModel.from_pretrained(folder)
        assert rope_limit(model, MAX_LENGTH) == 40
        assert rope_limit(model, 40) is None
        assert rope_limit(random_decoder("phi3"), MAX_LENGTH) is None

    @torch.inference_mode()
    def test_padding_does_not_reach_beyond_it(self, folder: Path):
        """It has positions, too: a row of 38 tokens becomes one of 40, not of 48."""
        model = AutoModel.from_pretrained(folder).eval()
        sequences = [TokenSequence([*range(10, 10 + length)]) for length in (38, 20)]
        alone = [model(input_ids=torch.tensor([each.ids])).last_hidden_state[0, -1] for each in sequences]
        got = Padded(model, 0, Batching(4096), limit=40).states(sequences).last()
        torch.testing.assert_close(got, torch.stack(alone), rtol=0, atol=1e-5)

    def test_each_kind_of_layer_may_have_a_rope_of_its_own(self):
        """As in Gemma 3."""
        full = {**self.ROPE, "factor": 2.0, "original_max_position_embeddings": 40}
        full |= {name: full[name] * 2 for name in ("short_factor", "long_factor")}
        ropes = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": full}
        assert rope_limit(random_decoder("gemma3_text", rope_parameters=ropes), MAX_LENGTH) == 40

    def test_a_rope_of_each_length_is_refused(self, tmp_path: Path):
        """transformers' own scores depend on what was scored before."""
        model = random_decoder("llama", max_position_embeddings=40, rope_parameters=DYNAMIC)
        with pytest.raises(ConfigError, match="pass max_length=40"):
            rope_limit(model, MAX_LENGTH)

    def test_attention_that_a_shorter_text_ends_is_refused(self):
        """BigBird's: transformers' own scores depend on what was scored before."""
        sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "block_size": 8}
        model = AutoModel.from_config(CONFIG_MAPPING["big_bird"](**sizes, vocab_size=200, intermediate_size=64))
        assert rope_limit(model, 88) is None
        with pytest.raises(ConfigError, match="pass max_length=88"):
            rope_limit(model, MAX_LENGTH)


class TestHead:
    """What is behind the transformer, in a model that computes in bfloat16."""

    def test_it_computes_in_float32(self, cross_encoder: Path):
        """So that documents differ: in bfloat16 there are 256 numbers from 1 to 2."""
        documents = pairs()[1][:60]
        with (
            LocalScorer(cross_encoder, dtype="bfloat16", use_activation=False) as scorer,
            LocalScorer(cross_encoder, dtype="float32", use_activation=False) as precise,
        ):
            scores, expected = (each.score("which one", documents) for each in (scorer, precise))
        assert len(set(scores)) >= len(set(expected))

    @pytest.mark.parametrize("make", [make_bert_cross_encoder, make_mpnet], ids=["by its parts", "as a whole"])
    def test_its_weights_are_those_of_the_file(self, make, tmp_path: Path):
        """Not rounded to bfloat16 on the way: a last bias of 1/3 stays one."""
        folder = make(tmp_path)
        with safe_open(folder / "model.safetensors", "pt") as opened:
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        [bias] = [name for name, weight in weights.items() if name.startswith("classifier") and weight.shape == (1,)]
        [matrix] = [
            name
            for name, weight in weights.items()
            if name.startswith("classifier") and weight.shape[0] == 1 and weight.dim() == 2
        ]
        weights |= {bias: torch.tensor([1 / 3]), matrix: torch.zeros_like(weights[matrix])}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with LocalScorer(folder, dtype="bfloat16", use_activation=False) as scorer:
            assert scorer.score("which one", "a city") == [pytest.approx(1 / 3, rel=1e-6)]


class TestProve:
    """What is tried on a copy of a model with few of its layers."""

    SEQUENCES = [TokenSequence([*range(10, 10 + length)]) for length in (5, 40)]  # noqa: RUF012

    def prove(self, model: PreTrainedModel, head: Head = States.mean, paths: Sequence[Way] = ("padded",)) -> Proof:
        plain = Padded(model, 0, Batching(4096))

        def take_apart(copy: PreTrainedModel) -> Parts:
            return Parts(copy, head, replace(plain, model=copy), head, lambda _: torch.ones(1, 64))

        def honest(copy: PreTrainedModel) -> Parts:
            return replace(take_apart(copy), plain_head=States.mean, alone=None)

        return prove(model, honest if head is States.mean else take_apart, self.SEQUENCES, paths)

    @pytest.mark.parametrize(("path", "layers"), [("unpadded", 1), ("padded", 2)])
    def test_few_layers_of_a_kind_are_enough(self, path: Way, layers: int):
        """And the model keeps all. Padding may be hidden from the first layer, other sequences in a row may not."""
        model, ran = random_encoder("bert", num_hidden_layers=6), []
        for layer in model.encoder.layer:
            layer.register_forward_hook(lambda *_: ran.append(1))
        assert self.prove(model, paths=[path]).path == path
        assert len(ran) == layers * (2 + 1)  # each sequence alone, then both
        assert len(model.encoder.layer) == 6

    def test_every_kind_of_layer_takes_part(self):
        """ModernBERT's fourth is the first that sees all and has a norm before its attention."""
        model, kept = random_encoder("modernbert", num_hidden_layers=6), []
        model.register_forward_hook(lambda copy, *_: kept.append(len(copy.layers)))
        self.prove(model)
        assert set(kept) == {4}

    def test_the_model_is_left_as_it_was(self):
        """Its weights keep their format, and none is replaced."""
        model = random_encoder("bert").bfloat16()
        before = {name: (id(weight), weight.dtype) for name, weight in model.named_parameters()}
        assert self.prove(model, paths=["unpadded"]).differences["unpadded"] < 1e-5
        assert {name: (id(weight), weight.dtype) for name, weight in model.named_parameters()} == before

    def test_rounding_hides_no_padding(self):
        """What sees its padding by less than bfloat16 rounds by is found in float32."""
        model = random_encoder("bert").bfloat16()

        def leak(_: object, __: object, outputs: Any) -> Any:
            states = outputs.last_hidden_state
            return replace(outputs, last_hidden_state=states * (1 + 5e-5 * states.shape[1]))

        model.register_forward_hook(leak)
        proof = self.prove(model, paths=["padded", "equal lengths"])
        assert proof.path == "equal lengths"
        assert 1e-4 < proof.differences["padded"] < 0.01

    @pytest.mark.parametrize("kind", ["bert", "gemma2"])
    def test_both_formats_are_tried(self, kind: str):
        """float32, and the model's own; Gemma keeps a number beside its embeddings."""
        model, seen = (random_encoder if kind == "bert" else random_decoder)(kind).bfloat16(), set()
        model.register_forward_hook(lambda copy, *_: seen.add(copy.dtype))
        self.prove(model, paths=["unpadded"])
        assert seen == {torch.float32, torch.bfloat16}

    def test_kernels_that_are_wrong_in_its_own_format_are_found(self):
        """By states that are off by more than it rounds by."""
        model = random_encoder("bert").bfloat16()

        def wrong(copy: PreTrainedModel, _: object, outputs: Any) -> Any:
            off = 1.1 if copy.dtype == torch.bfloat16 else 1.0
            return replace(outputs, last_hidden_state=outputs.last_hidden_state * off)

        model.register_forward_hook(wrong)
        proof = self.prove(model, paths=["unpadded", "padded"])
        assert proof.path == "padded"
        assert proof.differences["unpadded"] == pytest.approx(0.1, abs=0.03)

    @pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
    def test_what_is_no_number_differs(self, wrong: float):
        """By more than any tolerance."""
        with pytest.raises(Unproven, match="padded: inf"):
            self.prove(random_encoder("bert"), lambda states: states.mean() * wrong)

    def test_a_path_that_fails_differs(self):
        """It is none."""
        with pytest.raises(Unproven, match="padded: inf"):
            self.prove(random_encoder("bert"), lambda _: 1 / 0)
