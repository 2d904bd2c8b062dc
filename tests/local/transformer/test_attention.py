"""Attention over segments of a row against the same thing written out, in float64; and how the CUDA kernel is asked."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rag_rerank.local.transformer import attention as module
from rag_rerank.local.transformer.attention import Layout, Segment, attention, available

TOLERANCE = 1e-5
SIZE = 16


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Row:
    """Queries, keys and values of a row, what is in it, and how it is to be attended to."""

    query: Tensor = field(repr=False)
    key: Tensor = field(repr=False)
    value: Tensor = field(repr=False)
    segments: Sequence[Segment]
    causal: bool
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None

    def attend(self, layout: Layout | None = None) -> Tensor:
        """What a transformer's layer gets."""
        states, weights = attention(
            torch.nn.Module(),
            self.query,
            self.key,
            self.value,
            None,
            self.scale,
            layout=layout or Layout.of(self.segments, torch.device("cpu")),
            sliding_window=self.window,
            softcap=self.softcap,
            is_causal=self.causal,
        )
        assert weights is None
        return states

    def expected(self) -> Tensor:
        """The same, without padding: one dot product of a token with each that it may see."""
        rows = [
            naive(self, list(range(*segment.own)), [*range(*segment.prefix), *range(*segment.own)])
            for segment in self.segments
        ]
        return torch.cat(rows, dim=2).transpose(1, 2)


def naive(row: Row, asks: list[int], sees: list[int]) -> Tensor:
    """float64 ``[1, heads, asks, size]``; the asking tokens are the last of those that are seen."""
    groups = row.query.shape[1] // row.key.shape[1]
    keys, values = (states.double()[:, :, sees].repeat_interleave(groups, dim=1) for states in (row.key, row.value))
    scores = row.query.double()[:, :, asks] @ keys.transpose(2, 3) * (row.scale or SIZE**-0.5)
    if row.softcap is not None:
        scores = row.softcap * torch.tanh(scores / row.softcap)
    places = torch.arange(len(sees))
    distances = places[-len(asks) :].unsqueeze(1) - places
    hidden = distances < (0 if row.causal else -len(sees))
    if row.window is not None:
        hidden |= distances.abs() >= row.window
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1) @ values


@st.composite
def segments(draw: st.DrawFn, longest: int = 40) -> list[Segment]:
    """Sequences alone, and prefixes, each with some sequences behind it."""
    made: list[Segment] = []
    end = 0
    for _ in range(draw(st.integers(1, 3))):
        prefix = (0, 0)
        for place in range(draw(st.integers(1, 3))):
            stop = end + draw(st.integers(1, longest))
            made.append(Segment(end, stop, prefix))
            if place == 0 and draw(st.booleans()):
                prefix = (end, stop)
            end = stop
    return made


@st.composite
def rows(draw: st.DrawFn, *, softcaps: Sequence[float | None] = (None, 2.0)) -> Row:
    """Any row."""
    made = draw(segments())
    padding = draw(st.integers(0, 40))
    heads, groups = draw(st.sampled_from([(4, 1), (4, 2), (4, 4), (2, 2)]))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    length = made[-1].stop + padding
    query = 3 * torch.randn(1, heads, length, SIZE, generator=numbers)
    key, value = torch.randn(2, 1, heads // groups, length, SIZE, generator=numbers)
    return Row(
        query,
        key,
        value,
        made,
        draw(st.booleans()),
        draw(st.sampled_from([None, 1, 2, 7, 16, 64])),
        draw(st.sampled_from(softcaps)),
        draw(st.sampled_from([None, 0.1])),
    )


def row(made: Sequence[Segment], padding: int = 0, *, causal: bool, window: int | None = None, heads: int = 4) -> Row:
    """One row of random numbers."""
    query, key, value = torch.randn(
        3, 1, heads, made[-1].stop + padding, SIZE, generator=torch.Generator().manual_seed(0)
    )
    return Row(query, key, value, made, causal, window)


def tensor_bytes() -> int:
    """What all tensors that are alive take."""
    gc.collect()
    storages = (
        each.untyped_storage()
        for each in gc.get_objects()
        if type(each) is Tensor and each.device.type == "cpu" and not each.is_mkldnn  # packed weights show no storage
    )
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def difference(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()


class TestCPU:
    """Segment by segment."""

    @settings(max_examples=150)
    @given(rows())
    def test_each_token_sees_its_own_segment_and_its_prefix(self, row: Row):
        """To 1e-5 of what the words say, for every mixture of lengths, windows, soft caps and heads."""
        assert difference(row.attend()[:, : row.segments[-1].stop], row.expected()) <= TOLERANCE

    @settings(max_examples=50)
    @given(rows(), st.data())
    def test_nothing_leaks_from_others(self, row: Row, data: st.DataObject):
        """Huge numbers in the other segments and the padding change nothing."""
        kept = data.draw(st.sampled_from(row.segments))
        before = row.attend()
        others = torch.ones(row.query.shape[2], dtype=torch.bool)
        for part in (kept.own, kept.prefix):
            others[slice(*part)] = False
        for states in (row.query, row.key, row.value):
            states[:, :, others] = 1e6
        own = slice(*kept.own)
        assert difference(row.attend()[:, own], before[:, own]) <= TOLERANCE

    @settings(max_examples=50)
    @given(rows())
    def test_padding_stays_finite(self, row: Row):
        """What comes out goes into the next layer, where 0 times infinity would not be 0."""
        states = row.attend()
        assert states.shape == (1, row.query.shape[2], row.query.shape[1], SIZE)
        assert states.isfinite().all()

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("window", [None, 3, 20, 64, 128])
    def test_long_segments(self, window: int | None, causal: bool):
        """Of several blocks of a window; with a prefix longer and one shorter than what follows."""
        made = [Segment(0, 300), Segment(300, 310, (0, 300)), Segment(310, 700, (0, 300)), Segment(700, 957)]
        long = row(made, 3, causal=causal, window=window)
        assert difference(long.attend()[:, :957], long.expected()) <= TOLERANCE

    @pytest.mark.parametrize("causal", [True, False])
    def test_causal_is_the_layers_where_it_is_not_given(self, causal: bool):
        """As transformers' own attention has it."""
        both = row([Segment(0, 5), Segment(5, 12)], causal=causal)
        layer = SimpleNamespace(is_causal=causal)
        layout = Layout.of(both.segments, torch.device("cpu"))
        states, _ = attention(layer, both.query, both.key, both.value, None, layout=layout)
        assert torch.equal(states, both.attend())

    @pytest.mark.parametrize("name", ["s_aux", "block_indices"])
    def test_what_it_does_not_know_is_refused(self, name: str):
        """Sinks, and blocks of keys that were chosen: these hide none of so few, and no proof would miss them."""
        one = row([Segment(0, 5)], causal=True)
        layout = Layout.of(one.segments, torch.device("cpu"))
        options = {"position_ids": torch.arange(5), "dropout": 0.0, "layout": layout}
        attention(SimpleNamespace(), one.query, one.key, one.value, None, **options)
        with pytest.raises(ValueError, match=name):
            attention(SimpleNamespace(), one.query, one.key, one.value, None, **options, **{name: torch.zeros(1)})

    @pytest.mark.parametrize("softcap", [None, 50.0])
    @pytest.mark.parametrize("window", [None, 400])
    def test_masks_are_not_kept_without_end(self, window: int | None, softcap: float | None):
        """A square each for 30 lengths around 1,000 would be 120 MB, and there are more lengths than 30."""
        before = tensor_bytes()
        for length in range(980, 1010):
            one = row([Segment(0, length)], 3, causal=True, window=window, heads=1)
            replace(one, softcap=softcap).attend()
        del one
        assert tensor_bytes() - before < 64e6

    def test_half_precision_is_close(self):
        """The masks are in the queries' type."""
        made = [Segment(0, 30), Segment(30, 35, (0, 30)), Segment(35, 90, (0, 30))]
        for window in (None, 8):
            full = row(made, 6, causal=True, window=window)
            half = replace(full, query=full.query.bfloat16(), key=full.key.bfloat16(), value=full.value.bfloat16())
            assert half.attend().dtype == torch.bfloat16
            assert difference(half.attend().float(), full.attend()) <= 0.05


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch documents of ``torch.nn.attention.varlen.varlen_attn``.

    ``[tokens, heads, size]``; offsets of sequences; a token sees ``left`` tokens before it and ``right`` behind it, -1
    for all, where the last query stands at the last key.
    """
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    groups = query.shape[1] // key.shape[1]
    left, right = window_size
    out = []
    for (asks, asked), (first, last) in zip(pairwise(cu_seq_q), pairwise(cu_seq_k), strict=True):
        keys, values = (each[first:last].repeat_interleave(groups, dim=1) for each in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[asks:asked], keys) * (scale or query.shape[2] ** -0.5)
        ahead = torch.arange(last - first) - torch.arange(asked - asks).unsqueeze(1) - (last - first - (asked - asks))
        hidden = torch.zeros(ahead.shape, dtype=torch.bool)
        if left >= 0:
            hidden |= ahead < -left
        if right >= 0:
            hidden |= ahead > right
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(out)


class TestCUDA:
    """All segments at once, by a kernel that takes sequences end to end. Here it is its documentation, written out."""

    @pytest.fixture(autouse=True)
    def _kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tensors stay on the CPU."""
        monkeypatch.setattr(module, "_varlen_attention", lambda: varlen_reference)
        monkeypatch.setattr(
            module, "to_device", lambda numbers, _, dtype=torch.int64: torch.tensor(numbers, dtype=dtype)
        )

    @pytest.fixture
    def on_cuda(self, monkeypatch: pytest.MonkeyPatch) -> torch.device:
        """A device whose tensors are on the CPU."""
        randn = torch.randn
        monkeypatch.setattr(torch, "randn", lambda *sizes, device, dtype: randn(*sizes, dtype=dtype))
        return torch.device("cuda")

    def varlen(self, row: Row) -> Tensor:
        layout = Layout.of(row.segments, torch.device("cuda"))
        options = module._Options(row.causal, row.window, row.softcap, row.scale)
        return module._varlen(row.query, row.key, row.value, layout, options)

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("window", [None, 1, 6, 30])
    @pytest.mark.parametrize("heads", [4, 2, 1])
    def test_is_what_the_cpu_computes(self, heads: int, window: int | None, causal: bool):
        """With and without prefixes, windows, and fewer heads for keys."""
        prefixed = [Segment(0, 20), Segment(20, 29, (0, 20)), Segment(29, 30, (0, 20)), Segment(30, 75, (0, 20))]
        for made in ([Segment(0, 5), Segment(5, 6), Segment(6, 40)], [*prefixed, Segment(75, 80)]):
            plain = row(made, causal=causal, window=window)
            same = replace(plain, key=plain.key[:, :heads], value=plain.value[:, :heads])
            assert difference(self.varlen(same), same.expected()) <= TOLERANCE
            assert difference(self.varlen(same), same.attend()) <= TOLERANCE

    def test_of_any_row(self):
        """Whatever is in it."""

        @settings(max_examples=40)
        @given(rows(softcaps=[None]))
        def check(row: Row) -> None:
            end = row.segments[-1].stop
            query, key, value = (states[:, :, :end] for states in (row.query, row.key, row.value))
            whole = replace(row, query=query, key=key, value=value)
            assert difference(self.varlen(whole), whole.expected()) <= TOLERANCE

        check()

    def test_keys_are_not_gathered_where_each_is_used_once(self):
        """They lie there already, in order."""
        device = torch.device("cuda")
        assert Layout.of([Segment(0, 3), Segment(3, 9)], device).rows is None
        prefixed = Layout.of([Segment(0, 2), Segment(2, 3, (0, 2)), Segment(3, 4, (0, 2))], device)
        assert prefixed.rows.tolist() == [0, 1, 0, 1, 2, 0, 1, 3]

    def test_a_layout_for_the_cpu_is_refused(self):
        """Its lengths are missing."""
        one = row([Segment(0, 5)], causal=True)
        with pytest.raises(ValueError, match="another device"):
            module._varlen(
                one.query, one.key, one.value, Layout.of(one.segments, torch.device("cpu")), module._Options(True)
            )

    def test_it_is_used_where_it_computes_what_the_cpu_does(self, on_cuda: torch.device):
        """A small row with a prefix is tried first."""
        assert available(on_cuda, torch.bfloat16)
        assert available(on_cuda, torch.float16)

    def test_it_is_not_used_where_it_computes_something_else(
        self, on_cuda: torch.device, monkeypatch: pytest.MonkeyPatch
    ):
        """As FlashAttention 2.0 did, which aligned causal attention to the first key."""

        def first_key(
            query: Tensor, key: Tensor, value: Tensor, *lengths: Any, window_size: tuple[int, int], **options: Any
        ) -> Tensor:
            left, right = window_size
            ahead = 0 if right < 0 else -3  # both segments behind the prefix, of 3 tokens, see as many fewer keys
            return varlen_reference(query, key, value, *lengths, window_size=(left, ahead), **options).nan_to_num()

        monkeypatch.setattr(module, "_varlen_attention", lambda: first_key)
        assert not available(on_cuda, torch.bfloat16)

    def test_it_is_not_used_where_it_has_no_windows(self, on_cuda: torch.device, monkeypatch: pytest.MonkeyPatch):
        """The first torch that had it."""
        monkeypatch.setattr(module, "_varlen_attention", lambda: lambda query, key, value, is_causal: query)
        assert not available(on_cuda, torch.bfloat16)

    @pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, ImportError])
    def test_it_is_not_used_where_it_fails(
        self, on_cuda: torch.device, error: type[Exception], monkeypatch: pytest.MonkeyPatch
    ):
        """On an old GPU, or in a torch without it."""

        def failing(*_: Any, window_size: Any, enable_gqa: Any, **__: Any) -> Tensor:
            raise error("not here")

        monkeypatch.setattr(module, "_varlen_attention", lambda: failing)
        assert not available(on_cuda, torch.bfloat16)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cpu", torch.float32, True),
        ("cpu", torch.bfloat16, True),
        ("mps", torch.float16, False),
        ("meta", torch.bfloat16, False),
        ("cuda", torch.float32, False),
    ],
)
def test_where_it_is_available(device: str, dtype: torch.dtype, expected: bool):
    """On the CPU always; else only on CUDA, in half precision, which is all that the kernel takes."""
    assert available(torch.device(device), dtype) is expected
