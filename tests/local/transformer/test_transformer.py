"""Sequences without padding and with: every architecture of ours against plain transformers, one sequence at a time."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AttentionInterface, LlamaModel, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rag_rerank.local.transformer import transformer
from rag_rerank.local.transformer.batching import Batching, TokenSequence
from rag_rerank.local.transformer.transformer import (
    DECODERS,
    ENCODERS,
    LEAST_SHARED,
    Padded,
    States,
    Unpadded,
    make_transformer,
)
from tests.causal_models import random_decoder
from tests.encoder_models import random_encoder

TOLERANCE = 1e-5
BUDGET = Batching(4096)
LENGTHS = (5, 60, 33, 17, 130, 48, 1, 200, 64)
# Beside each type's own config: others that its checkpoints have.
WINDOWED = {
    "phi3": {"sliding_window": 24},
    "qwen3": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
}
UNWINDOWED = {"mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}}
CASES = [*((kind, {}) for kind in sorted(ENCODERS | DECODERS)), *WINDOWED.items(), *UNWINDOWED.items()]


pytestmark = pytest.mark.usefixtures("one_thread")


def make(kind: str, **options: object) -> PreTrainedModel:
    """A random model of one of our types; KeyError for a type that these tests have no config for."""
    return random_decoder(kind, **options) if kind in DECODERS else random_encoder(kind, **options)


def tokens(count: int, seed: int = 0) -> list[int]:
    """Ordinary tokens."""
    return torch.randint(10, 190, (count,), generator=torch.Generator().manual_seed(1000 * seed + count)).tolist()


def prompts() -> list[TokenSequence]:
    """Two queries with prefixes of their own, in turns, and one sequence without a query."""
    first, second = tokens(40, 1), tokens(70, 2)
    sequences = [TokenSequence(first + tokens(length), group="q") for length in LENGTHS]
    for place, length in enumerate((1, 90, 12)):
        sequences.insert(place * 3, TokenSequence(second + tokens(length), group="r"))
    return [*sequences, TokenSequence(first + tokens(20))]


@torch.inference_mode()
def alone(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> list[Tensor]:
    """What plain transformers gives for one sequence at a time: ``[length, size]`` each."""
    types = [{} if each.types is None else {"token_type_ids": torch.tensor([each.types])} for each in sequences]
    return [
        model(input_ids=torch.tensor([each.ids]), **kinds).last_hidden_state[0]
        for each, kinds in zip(sequences, types, strict=True)
    ]


@torch.inference_mode()
def run(runner: transformer.Transformer, sequences: Sequence[TokenSequence]) -> States:
    return runner.states(sequences)


def difference(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()


def check_last(states: States, expected: Sequence[Tensor]) -> None:
    assert difference(states.last(), torch.stack([rows[-1] for rows in expected])) <= TOLERANCE


def check_all(states: States, expected: Sequence[Tensor]) -> None:
    """Each token's, first, last and between, and where they end."""
    check_last(states, expected)
    assert difference(states.first(), torch.stack([rows[0] for rows in expected])) <= TOLERANCE
    tokens, owners, _ = states.flat()
    assert owners.bincount().tolist() == [len(rows) for rows in expected]
    assert difference(tokens, torch.cat(list(expected))) <= TOLERANCE
    assert difference(states.mean(), torch.stack([rows.mean(0) for rows in expected])) <= TOLERANCE


@dataclass
class Case:
    """A model nobody has touched, sequences, and what they come to one at a time."""

    model: PreTrainedModel
    sequences: list[TokenSequence]
    expected: list[Tensor]

    def make(self, *, unpadded: bool = True) -> transformer.Transformer:
        model = copy.deepcopy(self.model)  # its layers may be replaced
        return make_transformer(model, model.config.pad_token_id, BUDGET, unpadded=unpadded)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: " ".join([case[0], *case[1]]))
def case(request: pytest.FixtureRequest) -> Case:
    kind, options = request.param
    model = make(kind, **options)
    sequences = prompts() if kind in DECODERS else [TokenSequence(tokens(length)) for length in LENGTHS]
    return Case(model, sequences, alone(model, sequences))


class TestStates:
    """Every architecture that is run without padding: to 1e-5 what transformers gives for each sequence alone."""

    def test_unpadded(self, case: Case, monkeypatch: pytest.MonkeyPatch):
        """First, last and all states, where nothing is shared."""
        monkeypatch.setattr(transformer, "LEAST_SHARED", 10**9)
        runner = case.make()
        assert isinstance(runner, Unpadded)
        check_all(run(runner, case.sequences), case.expected)

    def test_padded(self, case: Case):
        """The same, if it is asked for."""
        runner = case.make(unpadded=False)
        assert isinstance(runner, Padded)
        check_all(run(runner, case.sequences), case.expected)

    def test_with_shared_prefixes(self, case: Case):
        """A decoder's last states do not depend on what else was in the row; an encoder shares nothing."""
        runner = case.make()
        states = run(runner, case.sequences)
        check_last(states, case.expected)
        if case.model.config.model_type in ENCODERS:
            check_all(states, case.expected)

    def test_attention_matters_here(self, case: Case):
        """Else the tests above would pass without any: another first token is another last state."""
        ids = case.sequences[4].ids[:30]
        other, same = alone(case.model, [TokenSequence([ids[0] + 1, *ids[1:]]), TokenSequence(ids)])
        assert difference(other[-1], same[-1]) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", ["modernbert", "gemma2", "gemma3_text", "mistral", "qwen2", *WINDOWED])
def test_windows_matter_here(kind: str):
    """Else the tests above would pass without any: with wide ones the states are others."""
    wide = {"local_attention": 400} if kind == "modernbert" else {"sliding_window": 400}
    sequences = [TokenSequence(tokens(100))]
    [narrow], [plain] = (
        alone(make(kind, **{**WINDOWED.get(kind, {}), **options}), sequences) for options in ({}, wide)
    )
    assert difference(narrow[-1], plain[-1]) > 100 * TOLERANCE


def test_a_soft_cap_matters_here():
    """As windows do."""
    sequences = [TokenSequence(tokens(100))]
    [capped], [plain] = (alone(make("gemma2", attn_logit_softcapping=cap), sequences) for cap in (5.0, None))
    assert difference(capped[-1], plain[-1]) > 100 * TOLERANCE


class TestInputs:
    """What a model is given beside the tokens."""

    def recorded(self, model: PreTrainedModel) -> list[dict[str, Tensor]]:
        """The options of each forward pass to come."""
        calls: list[dict[str, Tensor]] = []
        model.register_forward_pre_hook(lambda _, __, options: calls.append(options), with_kwargs=True)
        return calls

    def test_token_types_tell_query_and_document_apart(self):
        """In a row as alone."""
        model = make("bert")
        sequences = [
            TokenSequence(tokens(length), [0] * (length // 3) + [1] * (length - length // 3)) for length in LENGTHS
        ]
        expected = alone(model, sequences)
        untyped = alone(model, [TokenSequence(each.ids) for each in sequences])
        assert difference(expected[1], untyped[1]) > 100 * TOLERANCE
        for unpadded in (True, False):
            check_all(run(make_transformer(copy.deepcopy(model), 0, BUDGET, unpadded=unpadded), sequences), expected)

    @pytest.mark.parametrize(("kind", "first"), [("bert", 0), ("roberta", 2), ("xlm-roberta", 2), ("llama", 0)])
    def test_positions_begin_anew_in_each_sequence(self, kind: str, first: int):
        """RoBERTa's at the one behind the padding token's id."""
        model = make(kind)
        calls = self.recorded(model)
        run(
            make_transformer(model, model.config.pad_token_id, BUDGET),
            [TokenSequence(tokens(9)), TokenSequence(tokens(7))],
        )
        positions = calls[0]["position_ids"][0].tolist()
        assert positions[:16] == [*range(first, first + 9), *range(first, first + 7)]

    def test_positions_of_a_shared_prefix_go_on_in_what_follows(self):
        """As if it were there each time."""
        model = make("llama")
        calls = self.recorded(model)
        prefix = tokens(20)
        run(
            make_transformer(model, 0, BUDGET),
            [TokenSequence([*prefix, *tail], group="q") for tail in ([11, 12], [13])],
        )
        assert calls[0]["position_ids"][0, :23].tolist() == [*range(20), 20, 21, 20]


class TestSharing:
    """A prefix that prompts of one query have in common is in the row once."""

    def ran(self, sequences: Sequence[TokenSequence], kind: str = "llama") -> int:
        """How many tokens a forward pass had, padding not counted; the states are checked."""
        model = make(kind)
        expected = alone(model, sequences)
        counts: list[int] = []
        model.register_forward_pre_hook(
            lambda _, __, options: counts.append(int((options["input_ids"] != 0).sum())), with_kwargs=True
        )
        check_last(run(make_transformer(model, 0, BUDGET), sequences), expected)
        [count] = counts
        return count

    def test_once_for_each_query(self):
        """Two queries, each with its own."""
        first, second = tokens(40, 1), tokens(50, 2)
        sequences = [TokenSequence(first + tokens(length, 3), group="q") for length in (5, 6, 7)]
        sequences += [TokenSequence(second + tokens(length, 4), group="r") for length in (8, 9)]
        assert self.ran(sequences) == 40 + 5 + 6 + 7 + 50 + 8 + 9

    def test_not_where_no_query_is_named(self):
        """Nobody looks for what they have in common."""
        assert self.ran([TokenSequence([*tokens(40), token]) for token in (11, 12)]) == 82

    def test_not_for_a_few_tokens(self):
        """From 16 on it is worth it."""
        least = [TokenSequence([*tokens(LEAST_SHARED), token], group="q") for token in (11, 12)]
        fewer = [TokenSequence([*tokens(LEAST_SHARED - 1), token], group="q") for token in (11, 12)]
        assert self.ran(least) == LEAST_SHARED + 2
        assert self.ran(fewer) == 2 * LEAST_SHARED

    def test_not_in_an_encoder(self):
        """There what follows changes what comes before."""
        assert self.ran([TokenSequence([*tokens(40), token], group="q") for token in (11, 12)], "bert") == 82

    def test_a_sequence_alone_is_whole(self):
        """With nobody to share."""
        assert self.ran([TokenSequence(tokens(40), group="q")]) == 40

    def test_the_last_token_of_each_is_its_own(self):
        """Its state is read: also of equal prompts, and of one that another begins with."""
        equal, longer = TokenSequence(tokens(40), group="q"), TokenSequence([*tokens(40), 11, 12], group="q")
        assert self.ran([equal, equal]) == 39 + 1 + 1
        assert self.ran([longer, equal, longer]) == 39 + 3 + 1 + 3


@st.composite
def waiting(draw: st.DrawFn) -> list[TokenSequence]:
    """Prompts of some queries in any order: the query's prefix, then tokens that no other has."""
    prefixes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=4))
    asked = draw(st.lists(st.integers(-1, len(prefixes) - 1), max_size=40))
    sequences = []
    for number, query in enumerate(asked):
        prefix = [query] * (0 if query < 0 else prefixes[query])
        own = [1000 + number] * draw(st.integers(1, 50))
        sequences.append(TokenSequence(prefix + own, group=None if query < 0 else str(query)))
    return sequences


def test_rows_are_of_few_different_lengths():
    """On the CPU each new one costs memory that is never given back; none is longer than the model has positions."""
    padded = Padded(make("bert", max_position_embeddings=230), 0, BUDGET)
    widths = [padded.inputs([TokenSequence([1] * length)])["input_ids"].shape[1] for length in range(1, 231)]
    assert all(length <= width <= 230 for length, width in enumerate(widths, 1))
    assert len({*widths}) <= 18


class TestBatches:
    """Every sequence in one batch, batches within the budget."""

    def cost(self, sequences: Sequence[TokenSequence]) -> int:
        """Tokens of a row with each prefix once, where it is worth it."""
        total, seen = 0, set()
        asked = Counter(each.group for each in sequences if each.group is not None)
        for each in sequences:
            prefix = self.prefix(each)
            shared = asked[each.group] > 1 and prefix >= LEAST_SHARED
            total += len(each.ids) - (prefix if shared and each.group in seen else 0)
            seen.add(each.group)
        return total

    def prefix(self, sequence: TokenSequence) -> int:
        return sum(token < 1000 for token in sequence.ids)

    @given(waiting(), st.integers(1, 300))
    def test_of_a_decoder(self, sequences: list[TokenSequence], budget: int):
        """Over the budget is only a sequence that is alone, or a row that begins within a query: by its prefix."""
        batches = Unpadded(None, 0, Batching(1), share=True, first_position=0).batches(sequences, budget)
        assert sorted(position for batch in batches for position in batch) == list(range(len(sequences)))
        for batch in batches:
            row = [sequences[position] for position in batch]
            assert len(batch) == 1 or self.cost(row) <= budget + self.prefix(row[0])

    @given(waiting(), st.integers(1, 300))
    def test_of_an_encoder(self, sequences: list[TokenSequence], budget: int):
        """In the order in which they came: length makes no difference."""
        batches = Unpadded(None, 0, Batching(1), share=False, first_position=0).batches(sequences, budget)
        assert [position for batch in batches for position in batch] == list(range(len(sequences)))
        for batch in batches:
            assert len(batch) == 1 or sum(len(sequences[position].ids) for position in batch) <= budget

    @given(waiting(), st.integers(1, 300))
    def test_of_padded_sequences(self, sequences: list[TokenSequence], budget: int):
        """Each as long as the longest."""
        batches = Padded(None, 0, Batching(1)).batches(sequences, budget)
        assert sorted(position for batch in batches for position in batch) == list(range(len(sequences)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(len(sequences[position].ids) for position in batch) <= budget

    @given(waiting(), st.integers(1, 300))
    def test_of_equal_lengths(self, sequences: list[TokenSequence], budget: int):
        """None is padded."""
        batches = Padded(None, 0, Batching(1), equal=True).batches(sequences, budget)
        assert sorted(position for batch in batches for position in batch) == list(range(len(sequences)))
        for batch in batches:
            [length] = {len(sequences[position].ids) for position in batch}
            assert len(batch) == 1 or len(batch) * length <= budget

    def test_prompts_of_one_query_are_neighbours(self):
        """However they came."""
        sequences = [TokenSequence([1] * 20 + [number], group=query) for number, query in enumerate("qrqrq")]
        assert Unpadded(None, 0, Batching(1), share=True, first_position=0).batches(sequences, 25) == [
            [0, 2, 4],
            [1, 3],
        ]


class OwnCode(LlamaModel):
    """A llama as a checkpoint's own code might have it."""


class TestPadded:
    """What we don't know is padded, and right."""

    @pytest.mark.parametrize("kind", ["deberta-v2", "mpnet"])
    def test_an_unknown_architecture(self, kind: str):
        """As transformers run it."""
        assert kind not in ENCODERS | DECODERS
        model = make(kind)
        sequences = [TokenSequence(tokens(length)) for length in LENGTHS]
        expected = alone(model, sequences)
        runner = make_transformer(copy.deepcopy(model), model.config.pad_token_id, BUDGET)
        assert isinstance(runner, Padded)
        check_all(run(runner, sequences), expected)

    def test_code_of_a_checkpoint(self):
        """It says it is a llama; who knows?"""
        plain = make("llama")
        model = OwnCode(plain.config).eval()
        model.load_state_dict(plain.state_dict())
        runner = make_transformer(model, 0, BUDGET)
        assert isinstance(runner, Padded)
        check_last(run(runner, prompts()), alone(plain, prompts()))

    def test_attention_that_the_caller_chose(self):
        """It stays."""
        asked: list[int] = []

        def counted(*arguments: object, **options: object) -> object:
            asked.append(1)
            return sdpa_attention_forward(*arguments, **options)

        AttentionInterface.register("the_callers", counted)
        AttentionMaskInterface.register("the_callers", sdpa_mask)
        model = make("llama")
        expected = alone(model, prompts())
        model.set_attn_implementation("the_callers")
        runner = make_transformer(model, 0, BUDGET)
        assert isinstance(runner, Padded)
        check_last(run(runner, prompts()), expected)
        assert len(asked) == 3

    def test_a_name_in_the_config_is_enough(self):
        """flash_attention_2 and others, which are chosen when a model is loaded."""
        model = make("llama")
        model.config._attn_implementation = "flex_attention"
        assert isinstance(make_transformer(model, 0, BUDGET), Padded)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_attention_that_transformers_chose(self, implementation: str):
        """It is replaced."""
        model = make("bert")
        model.set_attn_implementation(implementation)
        assert isinstance(make_transformer(model, 0, BUDGET), Unpadded)
