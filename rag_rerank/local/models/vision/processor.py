"""From an image to the patches that a Qwen vision tower reads: scaled, normalized, cut up.

The same numbers as transformers' ``Qwen2VLImageProcessor`` over torchvision makes, as on a vLLM server. (transformers
without torchvision scales with Pillow, whose rounding differs: up to one number in a hundred by one or two of 255.)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rag_rerank.errors import ConfigError, ContentError

if TYPE_CHECKING:
    from rag_rerank.inputs.images import ImageFile
    from rag_rerank.local.checkpoint.checkpoint import Checkpoint

_MOST_OBLONG = 200  # transformers and vLLM refuse what is longer for its width


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """What the checkpoint says about its images."""

    min_pixels: int  # width times height, which images are scaled up or down to
    max_pixels: int
    patch: int  # side of a patch, in pixels
    frames: int  # how often each image is repeated: the tower was made for videos
    merge: int  # this many patches, squared, become one token
    mean: tuple[float, ...]  # of red, green and blue, from 0 to 1
    std: tuple[float, ...]
    scale: float  # what makes 0 to 1 of the numbers in an image

    @classmethod
    def of(cls, checkpoint: "Checkpoint") -> "ImageProcessor":
        """Read it from ``processor_config.json`` or ``preprocessor_config.json``; ConfigError for unknown steps."""
        options: Mapping[str, Any] | None = (checkpoint.json("processor_config.json") or {}).get("image_processor")
        options = options or checkpoint.json("preprocessor_config.json")
        if options is None:
            missing = "no preprocessor_config.json, which says how images are to be scaled"
            raise ConfigError(f"{checkpoint.name!r} has {missing}")
        usual = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}  # Pillow's bicubic
        for name, value in usual.items():
            if options.get(name, value) != value:
                raise ConfigError(f"{checkpoint.name!r} asks for {name}={options[name]!r}; only {value!r} is supported")
        size = options.get("size") or {}
        # What isn't said is as in transformers' class.
        return cls(
            options.get("min_pixels") or size.get("shortest_edge") or 56 * 56,
            options.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280,
            options.get("patch_size") or 14,
            options.get("temporal_patch_size") or 2,
            options.get("merge_size") or 2,
            tuple(options.get("image_mean") or (0.48145466, 0.4578275, 0.40821073)),
            tuple(options.get("image_std") or (0.26862954, 0.26130258, 0.27577711)),
            options.get("rescale_factor") or 1 / 255,
        )

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Choose width and height to scale an image to: whole tokens, about its own shape, as ``smart_resize`` does."""
        if max(width, height) > _MOST_OBLONG * min(width, height):
            raise ContentError(
                f"holds an image of {width} x {height} pixels; the model reads none that is more than "
                f"{_MOST_OBLONG} times as long as it is wide"
            )
        side = self.patch * self.merge
        wide, high = (round(length / side) * side for length in (width, height))
        if wide * high > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            wide, high = (max(side, math.floor(length / shrink / side) * side) for length in (width, height))
        elif wide * high < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (width * height))
            wide, high = (math.ceil(length * grow / side) * side for length in (width, height))
        return wide, high

    def tokens(self, width: int, height: int) -> int:
        """Count the tokens that an image becomes. Turning it, as EXIF data may say, makes no difference."""
        wide, high = self.size(width, height)
        return wide * high // (self.patch * self.merge) ** 2

    def patches(self, image: "ImageFile") -> tuple[Tensor, tuple[int, int]]:
        """Decode an image and cut it up; about 30 ms for a million pixels.

        Gives float32 ``[patches, numbers]``, and how many patches it has from top to bottom and from left to right.
        """
        decoded = image.decoded()
        numbers = torch.frombuffer(bytearray(decoded.tobytes()), dtype=torch.uint8)
        pixels = numbers.view(1, decoded.height, decoded.width, 3).permute(0, 3, 1, 2)
        wide, high = self.size(decoded.width, decoded.height)
        if (high, wide) != pixels.shape[2:]:
            pixels = torch.nn.functional.interpolate(
                pixels, size=(high, wide), mode="bicubic", align_corners=False, antialias=True
            )
        mean, std = (torch.tensor(three).view(1, 3, 1, 1) * (1 / self.scale) for three in (self.mean, self.std))
        pixels = pixels.float().sub(mean).div_(std)
        rows, columns, merge = high // self.patch, wide // self.patch, self.merge
        cut = pixels.reshape(3, rows // merge, merge, self.patch, columns // merge, merge, self.patch)
        # Tokens in reading order; within a token its patches; within a patch color, frame, row, column.
        cut = cut.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5).expand(-1, -1, -1, -1, -1, self.frames, -1, -1)
        return cut.reshape(rows * columns, -1), (rows, columns)
