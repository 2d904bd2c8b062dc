"""Vision towers: from pictures to vectors, once for each picture however many sequences hold it."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rag_rerank.local.models.vision.processor import ImageProcessor
from rag_rerank.local.transformer.attention import to_device
from rag_rerank.local.transformer.batching import by_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rag_rerank.inputs.images import ImageFile


@dataclass(slots=True, eq=False, weakref_slot=True)
class SeenPicture:
    """A picture that some sequences hold. As long as one of them is about, the same picture is this object again.

    Attributes:
        number: Below 0; what stands for its tokens.
        tokens: How many there are.
        uses: How many sequences have yet to be run with it.
        features: What the vision tower makes of it, from when it is asked for until the last use.
    """

    picture: "ImageFile"
    number: int
    tokens: int
    uses: int = 0
    features: "Future[Features] | None" = None


@dataclass(frozen=True, slots=True)
class Features:
    """What the vision tower makes of a picture.

    Attributes:
        states: ``[1 + levels, tokens, size]``: what takes the place of the tokens' embeddings, then what is added to
            their states behind the first layers (DeepStack, https://arxiv.org/abs/2406.04334).
        grid: How many tokens it has from top to bottom and from left to right.
    """

    states: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision tower.

    Attributes:
        model: transformers' ``Qwen3VLVisionModel``.
        processor: Makes its input.
        budget: Most patches that go through it at a time; a larger picture goes alone.
    """

    model: "PreTrainedModel"
    processor: ImageProcessor
    budget: int
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def expect(self, seen: Sequence[SeenPicture]) -> None:
        """Say that there will be a sequence with these pictures."""
        with self._lock:
            for picture in seen:
                picture.uses += 1

    def features(self, seen: Sequence[SeenPicture]) -> list[Features]:
        """What it makes of pictures. What another thread is at work on is waited for, not done twice."""
        with self._lock:
            mine = [picture for picture in dict.fromkeys(seen) if picture.features is None]
            for picture in mine:
                picture.features = Future()
            works = {picture: picture.features for picture in seen}
        try:
            for batch in by_tokens([picture.tokens * self.processor.merge**2 for picture in mine], self.budget):
                group = [mine[position] for position in batch]
                for picture, features in zip(group, self._run(group), strict=True):
                    _work(works[picture]).set_result(features)
        except BaseException as error:
            with self._lock:
                for picture in mine:
                    if not _work(works[picture]).done():
                        _work(works[picture]).set_exception(error)
                        picture.features = None  # whoever tries again starts anew
            raise
        return [_work(works[picture]).result() for picture in seen]

    def release(self, seen: Sequence[SeenPicture]) -> None:
        """Say that sequences with these pictures were run; features that no other one needs are given up."""
        with self._lock:
            for picture in seen:
                picture.uses -= 1
                if picture.uses <= 0:
                    picture.features = None

    def _run(self, seen: Sequence[SeenPicture]) -> list[Features]:
        patches, grids = zip(*(self.processor.patches(picture.picture) for picture in seen), strict=True)
        pixels = torch.cat(patches).to(self.model.device, self.model.dtype)
        out = self.model(
            pixels, grid_thw=to_device([(1, *grid) for grid in grids], self.model.device), return_dict=True
        )
        states = torch.stack([out.pooler_output, *out.deepstack_features])
        parts = torch.split(states, [picture.tokens for picture in seen], dim=1)
        merge = self.processor.merge
        return [
            # A view would keep those of all pictures alive.
            Features(part if len(seen) == 1 else part.clone(), (rows // merge, columns // merge))
            for part, (rows, columns) in zip(parts, grids, strict=True)
        ]


def _work(work: "Future[Features] | None") -> "Future[Features]":
    assert work is not None  # noqa: S101 - set when it was claimed
    return work
