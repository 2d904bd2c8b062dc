"""Vision towers: from images to vectors, once for each image however many sequences hold it."""

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rag_rerank.local.models.vision.processor import ImageProcessor
from rag_rerank.local.transformer.attention import to_device
from rag_rerank.local.transformer.batching import by_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rag_rerank.inputs.images import ImageFile


@dataclass(slots=True, eq=False, weakref_slot=True)
class SharedImage:
    """An image that some sequences hold. As long as one of them is about, the same image is this object again."""

    image: "ImageFile"
    number: int  # below 0; what stands for its tokens
    tokens: int  # how many there are
    uses: int = 0  # how many sequences have yet to be run with it
    features: "Future[Features] | None" = None  # from when they are asked for until the last use


@dataclass(frozen=True, slots=True)
class Features:
    """What the vision tower makes of an image."""

    # [1 + levels, tokens, size]: what takes the place of the tokens' embeddings, then what is added to their states
    # behind the first layers (DeepStack, https://arxiv.org/abs/2406.04334).
    states: Tensor
    grid: tuple[int, int]  # how many tokens it has from top to bottom and from left to right


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision tower."""

    model: "PreTrainedModel"  # transformers' Qwen3VLVisionModel and the like
    processor: ImageProcessor
    budget: int  # most patches that go through it at a time; a larger image goes alone
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _shared: "WeakValueDictionary[ImageFile, SharedImage]" = field(repr=False, default_factory=WeakValueDictionary)
    _numbers: "itertools.count[int]" = field(repr=False, default_factory=lambda: itertools.count(-1, -1))

    def share(self, image: "ImageFile") -> SharedImage:
        """Find an image among those that sequences hold, or begin to share it; only one thread does."""
        shared = self._shared.get(image)
        if shared is None:
            tokens = self.processor.tokens(image.width, image.height)
            shared = self._shared[image] = SharedImage(image, next(self._numbers), tokens)
        return shared

    def expect(self, images: Sequence[SharedImage]) -> None:
        """Say that there will be a sequence with these images."""
        with self._lock:
            for image in images:
                image.uses += 1

    def features(self, images: Sequence[SharedImage]) -> list[Features]:
        """Compute what it makes of images. What another thread computes is waited for, not done twice."""
        with self._lock:
            own = [image for image in dict.fromkeys(images) if image.features is None]
            for image in own:
                image.features = Future()
            futures = {image: cast("Future[Features]", image.features) for image in images}
        try:
            for batch in by_tokens([image.tokens * self.processor.merge**2 for image in own], self.budget):
                group = [own[position] for position in batch]
                for image, features in zip(group, self._run(group), strict=True):
                    futures[image].set_result(features)
        except BaseException as error:
            with self._lock:
                for image in own:
                    if not futures[image].done():
                        futures[image].set_exception(error)
                        image.features = None  # whoever tries again starts anew
            raise
        return [futures[image].result() for image in images]

    def release(self, images: Sequence[SharedImage]) -> None:
        """Say that sequences with these images were run; features that no other one needs are given up."""
        with self._lock:
            for image in images:
                image.uses -= 1
                if image.uses <= 0:
                    image.features = None

    def _run(self, images: Sequence[SharedImage]) -> list[Features]:
        patches, grids = zip(*(self.processor.patches(image.image) for image in images), strict=True)
        pixels = torch.cat(patches).to(self.model.device, self.model.dtype)
        sizes = to_device([(1, *grid) for grid in grids], self.model.device)
        out = self.model(pixels, grid_thw=sizes, return_dict=True)
        states = torch.stack([out.pooler_output, *getattr(out, "deepstack_features", ())])
        parts = torch.split(states, [image.tokens for image in images], dim=1)
        merge = self.processor.merge
        return [
            # A view would keep those of all images alive.
            Features(part if len(images) == 1 else part.clone(), (rows // merge, columns // merge))
            for part, (rows, columns) in zip(parts, grids, strict=True)
        ]
