"""Packed linear layers: the numbers of plain ones."""

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from rag_rerank.local.transformer import linear
from rag_rerank.local.transformer.batching import Batching, TokenSequence
from rag_rerank.local.transformer.linear import PackedLinear, pack
from rag_rerank.local.transformer.transformer import make_transformer
from tests.encoder_models import random_encoder

pytestmark = pytest.mark.skipif(
    not linear._works(torch.float32), reason="this torch has no packed layers for this processor"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads wait for each other on matrices this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Step(torch.nn.Module):
    """A layer, and perhaps what BERT calls the activation behind it."""

    def __init__(self, layer: torch.nn.Linear, activation: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.dense = layer
        if activation is not None:
            self.intermediate_act_fn = activation

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self.dense(inputs)
        return self.intermediate_act_fn(outputs) if hasattr(self, "intermediate_act_fn") else outputs


def packed(model: torch.nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@torch.inference_mode()
def states(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.arange(10, 110).reshape(2, 50)).last_hidden_state


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first.float() - second.float()).abs().max().item()


class TestLayer:
    """One layer."""

    @settings(max_examples=30)
    @given(st.integers(0, 300), st.integers(64, 200), st.integers(64, 200), st.booleans(), st.booleans())
    def test_computes_what_the_plain_one_does(self, rows: int, inputs: int, outputs: int, bias: bool, fused: bool):
        """Of any size, for any number of rows, with or without a bias, and a GELU."""
        plain = torch.nn.Linear(inputs, outputs, bias=bias)
        numbers = torch.randn(1, rows, inputs)
        with torch.inference_mode():
            got = PackedLinear(plain, 256, "gelu" if fused else "none")(numbers)
            expected = torch.nn.functional.gelu(plain(numbers)) if fused else plain(numbers)
        assert got.shape == expected.shape
        assert torch.allclose(got, expected, atol=1e-5)


class TestModels:
    """All layers of a model that are worth it."""

    @pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "eurobert", "gte"])
    def test_states_are_those_of_the_plain_model(self, kind: str):
        """To 1e-5 in float32; that is the numerics of the plain one."""
        model = random_encoder(kind)
        expected = states(model)
        pack(model, 256)
        assert packed(model)
        assert difference(states(model), expected) <= 1e-5

    def test_bfloat16_is_close(self):
        """As close as another order of additions is."""
        if not linear._works(torch.bfloat16):
            pytest.skip("no packed bfloat16 layers here")
        model = random_encoder("bert").bfloat16()
        expected = states(model)
        pack(model, 256)
        assert packed(model)
        assert difference(states(model), expected) <= 0.1
        assert states(model).dtype == torch.bfloat16

    def test_other_types_stay_plain(self):
        """float16 has no such kernel on a CPU."""
        model = random_encoder("bert").half()
        pack(model, 256)
        assert not packed(model)

    @pytest.mark.parametrize(("activation", "fused"), [("gelu", 3), ("gelu_new", 0), ("relu", 0), ("silu", 0)])
    def test_a_gelu_is_fused_where_it_is_exact(self, activation: str, fused: int):
        """Another is computed as before; the states are the same either way."""
        model = random_encoder("bert", hidden_act=activation)
        expected = states(model)
        pack(model, 256)
        assert [layer._activation for layer in packed(model)].count("gelu") == fused
        identities = [
            isinstance(layer.intermediate.intermediate_act_fn, torch.nn.Identity) for layer in model.encoder.layer
        ]
        assert identities == [bool(fused)] * 3
        assert difference(states(model), expected) <= 1e-5

    @pytest.mark.parametrize("activations", [(None, None), ("gelu", "gelu"), ("gelu", None), (None, "gelu")])
    def test_a_layer_in_several_places(self, activations: tuple[str | None, ...]):
        """Behind a GELU in one, and in another not."""
        layer, numbers = torch.nn.Linear(64, 64), torch.randn(9, 64)
        model = torch.nn.Sequential(*(Step(layer, torch.nn.GELU() if name else None) for name in activations))
        with torch.inference_mode():
            expected = model(numbers)
            pack(model, 256)
            assert packed(model)
            assert torch.allclose(model(numbers), expected, atol=1e-5)

    @pytest.mark.parametrize("apart", [True, False])
    def test_a_layer_in_several_places_stays_one(self, apart: bool):
        """Its weights are in memory once, as in ALBERT; also where it is twice in one list."""
        layer = torch.nn.Linear(64, 64)
        model = torch.nn.Sequential(*([Step(layer), Step(layer)] if apart else [layer, layer]))
        pack(model, 256)
        assert len(packed(model)) == 1
        assert not any(isinstance(module, torch.nn.Linear) for module in model.modules())

    def test_a_copy_that_shares_weights_is_packed_once(self):
        """As that of the proof at load; a page of new memory costs as much as its numbers."""
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
        pack(model, 256)
        pack(twin, 256)
        assert twin[0] is model[0]

    def test_a_block_in_several_places_is_packed_once(self):
        """ALBERT again."""
        step, numbers = Step(torch.nn.Linear(64, 64), torch.nn.GELU()), torch.randn(9, 64)
        model = torch.nn.Sequential(torch.nn.Sequential(step), torch.nn.Sequential(step))
        with torch.inference_mode():
            expected = model(numbers)
            pack(model, 256)
            assert len(packed(model)) == 1
            assert torch.allclose(model(numbers), expected, atol=1e-5)

    def test_a_small_layer_stays_plain(self):
        """It gains nothing."""
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 1))
        pack(model, 256)
        assert [type(layer) for layer in model] == [PackedLinear, torch.nn.Linear]

    def test_a_kind_of_linear_layer_stays_what_it_is(self):
        """It may compute something else: a quantised one, or an adapter's."""

        class Doubled(torch.nn.Linear):
            def forward(self, inputs: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(inputs)

        model = torch.nn.Sequential(Doubled(64, 64), torch.nn.Linear(64, 64))
        pack(model, 256)
        assert [type(layer) for layer in model] == [Doubled, PackedLinear]


class TestWithoutIt:
    """The operator is private to torch: it may be gone, or wrong, tomorrow."""

    def test_nothing_changes(self, monkeypatch: pytest.MonkeyPatch):
        """The model is left as it is, and scores as before."""
        monkeypatch.setattr(linear, "_works", lambda _: False)
        model = random_encoder("bert")
        plain = copy.deepcopy(model)
        sequences = [TokenSequence(list(range(10, 10 + length))) for length in (5, 90, 33)]
        runner = make_transformer(model, 0, Batching(4096))
        assert not packed(model)
        assert all(isinstance(layer.intermediate.intermediate_act_fn, torch.nn.Module) for layer in model.encoder.layer)
        with torch.inference_mode():
            for state, sequence in zip(runner.states(sequences).last(), sequences, strict=True):
                expected = plain(input_ids=torch.tensor([sequence.ids])).last_hidden_state[0, -1]
                assert difference(state, expected) <= 1e-5

    @pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
    def test_an_operator_that_fails_is_not_used(self, error: type[Exception], monkeypatch: pytest.MonkeyPatch):
        """Gone, refusing, or asked in an old way."""

        def gone(*_: object) -> torch.Tensor:
            raise error("no such operator")

        monkeypatch.setattr(linear, "PackedLinear", gone)
        assert not linear._works.__wrapped__(torch.float32)

    def test_an_operator_that_computes_something_else_is_not_used(self, monkeypatch: pytest.MonkeyPatch):
        """Its numbers are compared first."""

        class Wrong(PackedLinear):
            def forward(self, inputs: torch.Tensor) -> torch.Tensor:
                return super().forward(inputs) + 0.01

        monkeypatch.setattr(linear, "PackedLinear", Wrong)
        assert not linear._works.__wrapped__(torch.float32)


def test_the_callers_random_numbers_stay_as_they_were():
    """Loading a model is no throw of the dice."""
    model = random_encoder("bert")
    linear._works.cache_clear()
    before = torch.random.get_rng_state()
    pack(model, 256)
    assert packed(model)
    assert torch.equal(torch.random.get_rng_state(), before)
