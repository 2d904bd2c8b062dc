"""Attention over sequences that lie end to end in one row, for models as transformers wrote them.

Padding a batch costs as many tokens as its lengths differ. Instead its sequences become one row, and this function,
registered with transformers' ``AttentionInterface`` (https://huggingface.co/docs/transformers/attention_interface),
lets each token attend to its own sequence only and, in a decoder, to the prefix that this shares with others.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "rag_rerank"

# The CPU kernel's softmax runs 16 numbers at a time, the rest one by one: 127 keys take twice as long as 128 (bfloat16,
# AVX-512). So up to 15 following tokens are keys, too, and masked: 1.4 times faster over real lengths, 1.15 in float32.
_LANES = 16
_ANY = 1 << 40  # a window without end
_BLOCK = 128  # queries at a time under a sliding window, of sequences of twice that and more


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens ``[start, stop)`` of a row, which attend to each other and to the prefix before them, if any."""

    start: int
    stop: int
    prefix: tuple[int, int] = (0, 0)  # start and stop, elsewhere in the row

    @property
    def own(self) -> tuple[int, int]:
        """``(start, stop)``."""
        return self.start, self.stop

    @property
    def length(self) -> int:
        """Tokens, the prefix included."""
        return self.prefix[1] - self.prefix[0] + self.stop - self.start


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the segments of a row are, in order and without gaps. Behind the last may be padding, on a CPU only."""

    segments: tuple[Segment, ...]
    # Only for CUDA, arguments of the varlen kernel: where segments begin, of queries and keys, and the most in one.
    offsets: tuple[Tensor, Tensor, int, int] | None = None
    rows: Tensor | None = None  # the tokens that are keys, segment by segment; None: each once, in order

    @classmethod
    def of(cls, segments: Sequence[Segment], device: torch.device) -> "Layout":
        """Lay a row out on a device."""
        if device.type != "cuda":
            return cls(tuple(segments))
        owns = [segment.stop - segment.start for segment in segments]
        totals = [segment.length for segment in segments]
        keys = [token for segment in segments for part in (segment.prefix, segment.own) for token in range(*part)]
        begins = [to_device([0, *itertools.accumulate(each)], device, torch.int32) for each in (owns, totals)]
        rows = to_device(keys, device) if owns != totals else None
        return cls(tuple(segments), (begins[0], begins[1], max(owns), max(totals)), rows)


def to_device(numbers: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Make a tensor on the device; on CUDA the copy goes on while the processor prepares what comes next."""
    tensor = torch.tensor(numbers, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    layout: Layout,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attend, each segment to itself and its prefix; transformers calls this in each layer.

    `query` is ``[1, heads, tokens, size]``; `key` and `value` may have fewer heads. `layout`, not a mask, says what
    attends to what: under a `sliding_window`, at distances below it. tanh brings scores into the range of `softcap`
    (Gemma 2). None for `scaling` is one over the root of `size`, for `is_causal` what the layer is. Returns
    ``[1, tokens, heads, size]``, and None for the weights. ValueError for a layer that wants something else, which may
    be seen only in texts longer than those of the proof (MiniMax M3's blocks of 2,048 keys).
    """
    if attention_mask is not None and sliding_window is None:
        raise ValueError("only its mask has a window")
    if unknown := [name for name, value in more.items() if isinstance(value, Tensor) and name != "position_ids"]:
        raise ValueError(f"it passes {unknown}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    kernel = _varlen if query.is_cuda else _one_by_one
    return kernel(query, key, value, layout, _Options(causal, sliding_window, softcap, scaling)), None


@dataclass(frozen=True, slots=True)
class _Options:
    causal: bool
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, layout: Layout, options: _Options) -> Tensor:
    heads, groups = key.shape[1], query.shape[1] // key.shape[1]
    if groups > 1:
        # Heads that share keys as a batch each: repeating the keys for each instead would take twice as long.
        query = query.reshape(heads, groups, *query.shape[2:])
        key, value = key.transpose(0, 1), value.transpose(0, 1)
    out = query.new_empty(query.shape[2], *query.shape[:2], value.shape[3])
    for segment in layout.segments:
        out[segment.start : segment.stop] = _segment(query, key, value, segment, options).permute(2, 0, 1, 3)
    out[layout.segments[-1].stop :] = 0  # padding must stay finite: 0 times infinity is not 0
    return out.flatten(1, 2).unsqueeze(0)


def _segment(query: Tensor, key: Tensor, value: Tensor, segment: Segment, options: _Options) -> Tensor:
    """Attention of one segment: ``[batch, heads, its tokens, size]``, keys with as many heads or one."""
    own = segment.stop - segment.start
    windowed = options.window is not None and segment.length > options.window
    # Behind its keys come others, as many as make their number round; the row may end before.
    reach = segment.stop + -segment.length % _LANES
    if reach > key.shape[2]:
        reach = segment.stop
    queries = query[:, :, segment.start : segment.stop]
    keys, values = key[:, :, segment.start : reach], value[:, :, segment.start : reach]
    if own < segment.length:
        prefix = slice(*segment.prefix)
        keys, values = torch.cat((key[:, :, prefix], keys), 2), torch.cat((value[:, :, prefix], values), 2)
        # Causal attention of all tokens takes half a square; of these tokens alone, with a mask, a whole rectangle.
        if windowed or (options.causal and own * 1.15 > segment.length / 2):
            queries = torch.cat((query[:, :, prefix], queries), 2)
    if windowed:
        return _banded(queries, keys, values, options)[:, :, -own:]
    if options.causal and queries.shape[2] == segment.length:
        return _kernel(queries, keys, values, options, causal=True)[:, :, -own:]  # none attends to later ones anyway
    count, mask = keys.shape[2], None
    if options.causal:
        mask = _lower_right(own, count, query.dtype, segment.length)
    elif count > segment.length:
        mask = _band(1, count, query.dtype, 0, segment.length, _ANY, causal=False).expand(1, 1, own, count)
    return _kernel(queries, keys, values, options, mask)


def _banded(query: Tensor, key: Tensor, value: Tensor, options: _Options) -> Tensor:
    """Attention under a sliding window: in blocks, where much of the square is masked."""
    length, window = query.shape[2], options.window or 0
    block = length if length <= 2 * _BLOCK else _BLOCK
    out = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first, last = max(0, start - window + 1), stop if options.causal else min(length, stop + window - 1)
        reach = min(key.shape[2], last + -(last - first) % _LANES)
        mask = _band(stop - start, reach - first, query.dtype, start - first, last - first, window, options.causal)
        visible = slice(first, reach)
        out.append(_kernel(query[:, :, start:stop], key[:, :, visible], value[:, :, visible], options, mask))
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def _cached(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cache small masks, 64 MB at most: they come again in every layer, and many in the next batch."""
    kept = functools.lru_cache(maxsize=128)(make)

    @functools.wraps(make)
    def mask(queries: int, keys: int, *rest: Any, **more: Any) -> Tensor:
        return (kept if queries * keys <= 128 * 1024 else make)(queries, keys, *rest, **more)

    return mask


@_cached
def _band(queries: int, keys: int, dtype: torch.dtype, shift: int, count: int, window: int, causal: bool) -> Tensor:
    """Let query i attend to the keys at distances below `window` from key i + `shift`, of the first `count`."""
    ahead = torch.arange(keys) - torch.arange(queries).unsqueeze(1) - shift
    hidden = (ahead <= -window) | (ahead > 0 if causal else ahead >= window) | (torch.arange(keys) >= count)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[None, None]


@_cached
def _lower_right(queries: int, keys: int, dtype: torch.dtype, count: int) -> Tensor:
    """Let the last of the queries attend to `count` keys, the one before it to one less, and so on."""
    return torch.full((queries, keys), -torch.inf, dtype=dtype).triu_(count - queries + 1)[None, None]


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, options: _Options, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    if options.softcap is None:
        key, value = key.expand(-1, query.shape[1], -1, -1), value.expand(-1, query.shape[1], -1, -1)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=options.scale)
    if causal:
        mask = _lower_right(query.shape[2], key.shape[2], query.dtype, query.shape[2])
    scale = query.shape[3] ** -0.5 if options.scale is None else options.scale
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / options.softcap)) * options.softcap
    scores = scores if mask is None else scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, options: _Options) -> Tensor:
    """All segments at once on a CUDA device, by the flash attention that torch brings."""
    if layout.offsets is None:
        raise ValueError("the layout was made for another device")
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if layout.rows is not None:
        keys, values = keys[layout.rows], values[layout.rows]
    reach = -1 if options.window is None else options.window - 1
    window = reach, 0 if options.causal else reach  # causal is aligned to the last key, as in FlashAttention 2.1
    shared = queries.shape[1] != keys.shape[1]
    out = _varlen_attention()(
        queries, keys, values, *layout.offsets, scale=options.scale, window_size=window, enable_gqa=shared
    )
    return out.unsqueeze(0)


def _varlen_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - not in every torch

    return cast("Callable[..., Tensor]", varlen_attn)


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether rows can be attended to here; where not, batches are padded.

    On CUDA that needs a varlen kernel with windows that takes the dtype and computes what plain attention does.
    """
    if device.type == "cpu":
        return True
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        if not {"window_size", "enable_gqa"} <= inspect.signature(_varlen_attention()).parameters.keys():
            return False
        layout = Layout.of((Segment(0, 3), Segment(3, 8, (0, 3)), Segment(8, 10, (0, 3))), device)
        query, key, value = torch.randn(3, 1, 4, 10, 64, device=device, dtype=dtype)
        # One head for keys where there are several for queries; causal, so that alignment shows; and both ways.
        for options, heads in ((_Options(causal=True), 2), (_Options(causal=False), 4)):
            got = _varlen(query, key[:, :heads], value[:, :heads], layout, options).cpu()
            expected = _one_by_one(query.cpu(), key[:, :heads].cpu(), value[:, :heads].cpu(), layout, options)
            if not torch.allclose(got.float(), expected.float(), atol=0.05):
                return False
    except (ImportError, RuntimeError, TypeError, ValueError):
        return False
    return True


def _mask(*_: Any, local_size: int | None = None, **__: Any) -> Tensor | None:
    """Give no mask, for the layout says it all but a window, of which layers must be told: it gives an empty one."""
    return None if local_size is None else torch.empty(0)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
