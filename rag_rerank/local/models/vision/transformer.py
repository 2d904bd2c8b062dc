"""Rerankers that see: a vision tower before a decoder, as in Qwen3-VL.

The tower makes vectors of a picture, which take the place of its tokens' embeddings; the decoder reads them like
words, at positions in two dimensions (M-RoPE, https://arxiv.org/abs/2409.12191). It is run as other decoders are:
sequences end to end in one row, prefixes of one query once. A picture that several sequences hold, such as that of a
query, goes through the tower once.

Beside a plain transformers loop on two busy cores, with 8 layers of 512 on both sides in float32: 1.8 times as fast on
24 pictures of 48 tokens, of which most is the tower's work, 5.6 times on 48 of 4 tokens, and 16 times on 24 texts with
a picture of 144 tokens as the query.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rag_rerank.local.models.model import Pace, TokenSequence
from rag_rerank.local.models.vision.processor import ImageProcessor
from rag_rerank.local.models.vision.prompts import VisionSequence
from rag_rerank.local.models.vision.tower import Features, Tower
from rag_rerank.local.transformer.attention import Layout, to_device
from rag_rerank.local.transformer.linear import pack
from rag_rerank.local.transformer.transformer import States, Transformer, Unpadded, lay_out, over, padding_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_TYPES = frozenset({"qwen3_vl"})
"""By transformers' name: what the tests compare with transformers and vLLM."""


@dataclass(frozen=True, slots=True)
class VisionTransformer:
    """A vision tower and a decoder, of Qwen3-VL's kind, without a head.

    Attributes:
        text: The decoder, for sequences without pictures.
        decoder: The same, as transformers wrote it.
    """

    tower: Tower
    text: Transformer
    decoder: "PreTrainedModel"

    @classmethod
    def over(
        cls, model: Any, processor: ImageProcessor, pad_id: int | None, pace: Pace, *, unpadded: bool = True
    ) -> "VisionTransformer":
        """The fastest way to run a ``Qwen3VLModel``; its layers may be replaced by faster ones."""
        pack(model.visual, pace.token_budget)
        # As many patches as tokens: they are a quarter of the tokens, but have wider layers.
        tower = Tower(model.visual, processor, pace.token_budget)
        return cls(tower, over(model.language_model, pad_id, pace, unpadded=unpadded), model.language_model)

    @property
    def device(self) -> torch.device:
        """The decoder's."""
        return self.text.device

    @property
    def pace(self) -> Pace:
        """The decoder's."""
        return self.text.pace

    def batches(self, sequences: Sequence[TokenSequence], token_budget: int) -> list[list[int]]:
        """The decoder's."""
        return self.text.batches(sequences, token_budget)

    def states(self, sequences: Sequence[TokenSequence]) -> States:
        """Run one batch. Only the last states are sure to be those of the sequences, as with `Unpadded`."""
        seen = [picture for each in sequences if isinstance(each, VisionSequence) for picture in each.seen]
        if not seen:
            return self.text.states(sequences)
        views = iter(self.tower.features(seen))
        placed = [
            _Placed.of(each, [next(views) for _ in each.seen] if isinstance(each, VisionSequence) else [])
            for each in sequences
        ]
        states = self._packed(sequences, placed) if isinstance(self.text, Unpadded) else self._padded(placed)
        self.tower.release(seen)
        return states

    def _packed(self, sequences: Sequence[TokenSequence], placed: "Sequence[_Placed]") -> States:
        row = lay_out(sequences, share=True)
        one = _Placed.joined([placed[of].part(start, stop) for of, start, stop in row.pieces])
        one = one.padded(len(one.ids) + padding_of(len(one.ids), self.device))
        states = self._run([one], layout=Layout.of(row.segments, self.device))
        return row.states_of(states[0])

    def _padded(self, placed: "Sequence[_Placed]") -> States:
        lengths = [len(each.ids) for each in placed]
        longest = max(lengths)
        mask = [[1] * length + [0] * (longest - length) for length in lengths]
        states = self._run([each.padded(longest) for each in placed], attention_mask=to_device(mask, self.device))
        firsts = torch.arange(len(placed)) * longest
        lasts = firsts + torch.tensor(lengths) - 1
        return States(states.flatten(0, 1), firsts.to(self.device), lasts.to(self.device), lengths)

    def _run(self, rows: "Sequence[_Placed]", **options: Any) -> Tensor:
        """States ``[rows, tokens, size]``."""
        ids = to_device([row.ids for row in rows], self.device)
        seen = ids < 0
        embeddings: Tensor = self.decoder.get_input_embeddings()(ids.clamp(min=0))
        views = torch.cat([view for row in rows for view in row.views], dim=1)
        embeddings[seen] = views[0].to(embeddings.dtype)
        # First the place in the row, which the mask is made by, then time, height and width.
        order = torch.arange(ids.shape[1]).expand(1, len(rows), -1)
        positions = torch.cat([order, torch.stack([row.positions for row in rows], dim=1)])
        states: Tensor = self.decoder(
            inputs_embeds=embeddings,
            position_ids=positions.to(self.device),
            visual_pos_masks=seen,
            deepstack_visual_embeds=list(views[1:]),
            **options,
        ).last_hidden_state
        return states


@dataclass(frozen=True, slots=True)
class _Placed:
    """Tokens, where they are, and what the tower made of those that are a picture's.

    Attributes:
        ids: Below 0 for a picture's.
        positions: int64 ``[3, tokens]``: time, height, width.
        views: ``[1 + levels, tokens below 0, size]``, in parts.
    """

    ids: list[int]
    positions: Tensor
    views: list[Tensor]

    @classmethod
    def of(cls, sequence: TokenSequence, features: Sequence[Features]) -> "_Placed":
        """A sequence with its pictures, in order."""
        return cls(sequence.ids, _positions(sequence.ids, features), [each.states for each in features])

    @classmethod
    def joined(cls, parts: "Sequence[_Placed]") -> "_Placed":
        """Parts end to end."""
        return cls(
            [token for part in parts for token in part.ids],
            torch.cat([part.positions for part in parts], dim=1),
            [view for part in parts for view in part.views],
        )

    def part(self, start: int, stop: int) -> "_Placed":
        """The tokens ``[start, stop)``."""
        ids = self.ids[start:stop]
        first = sum(token < 0 for token in self.ids[:start])
        count = sum(token < 0 for token in ids)
        views = [torch.cat(self.views, dim=1)[:, first : first + count]] if count else []
        return _Placed(ids, self.positions[:, start:stop], views)

    def padded(self, length: int) -> "_Placed":
        """With as many tokens behind that mean nothing."""
        missing = length - len(self.ids)
        return _Placed(self.ids + [0] * missing, torch.nn.functional.pad(self.positions, (0, missing)), self.views)


def _positions(ids: Sequence[int], features: Sequence[Features]) -> Tensor:
    """Where tokens are: text one after the other; a picture's in rows and columns, from where the text before it ends.

    What follows a picture is behind its longer side. (``get_rope_index``)
    """
    parts: list[Tensor] = []
    begin = 0
    pictures = iter(features)
    for is_text, group in itertools.groupby(ids, key=lambda token: token >= 0):
        if is_text:
            count = sum(1 for _ in group)
            parts.append(torch.arange(begin, begin + count).expand(3, -1))
            begin += count
        else:
            rows, columns = next(pictures).grid
            place = torch.stack(
                [
                    torch.zeros(rows * columns, dtype=torch.int64),
                    torch.arange(rows).repeat_interleave(columns),
                    torch.arange(columns).repeat(rows),
                ]
            )
            parts.append(place + begin)
            begin += max(rows, columns)
    return torch.cat(parts, dim=1)
