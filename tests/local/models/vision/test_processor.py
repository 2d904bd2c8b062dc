"""Pictures as the vision tower gets them: sizes and patches are those of transformers' image processor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from rag_rerank import ConfigError, ContentError
from rag_rerank.inputs.images import read_image
from rag_rerank.local.models.vision.processor import ImageProcessor
from tests.vision_models import picture

OPTIONS = {
    "size": {"shortest_edge": 4096, "longest_edge": 200_000},
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.25, 0.2],
}
STEP = 1 / 255 / 0.2  # the least that two pixels differ by, at most


class Checkpoint:
    """Files of a checkpoint."""

    name = "some-model"

    def __init__(self, **files: object) -> None:
        self.files = {f"{name}.json": content for name, content in files.items()}

    def json(self, path: str) -> object:
        return self.files.get(path)


@pytest.fixture(scope="module")
def processor() -> ImageProcessor:
    return ImageProcessor.of(Checkpoint(preprocessor_config=OPTIONS))


class TestSize:
    """The size that a picture is scaled to."""

    @given(width=st.integers(1, 5000), height=st.integers(1, 5000))
    def test_is_that_of_transformers(self, processor: ImageProcessor, width: int, height: int):
        """Whole tokens, within the limits; what transformers refuses, too."""
        if max(width, height) > 200 * min(width, height):
            with pytest.raises(ContentError, match="200 times as long as it is wide"):
                processor.size(width, height)
            return
        high, wide = smart_resize(height, width, factor=32, min_pixels=4096, max_pixels=200_000)
        assert processor.size(width, height) == (wide, high)
        assert processor.tokens(width, height) == processor.tokens(height, width) == wide * high // 32**2


class TestPatches:
    """What the tower reads."""

    @pytest.mark.parametrize("size", [(64, 64), (320, 96), (300, 200), (1000, 700), (33, 1000), (17, 5)])
    def test_are_those_of_transformers(self, processor: ImageProcessor, size: tuple[int, int]):
        """Equal where nothing is scaled; else Pillow, which transformers scales with here, rounds some differently."""
        image = picture(*size)
        ours, (rows, columns) = processor.patches(read_image(image))
        theirs = Qwen2VLImageProcessorPil(**OPTIONS)(images=[image], return_tensors="pt")
        assert theirs["image_grid_thw"].tolist() == [[1, rows, columns]]
        difference = (ours - theirs["pixel_values"]).abs()
        assert difference.max().item() <= (1e-5 if processor.size(*size) == size else 2.1 * STEP)
        assert (difference > 1e-5).float().mean().item() < 0.02
        assert ours.dtype == torch.float32


class TestSettings:
    """What a checkpoint says."""

    def test_may_be_in_either_file(self, processor: ImageProcessor):
        """Newer transformers writes one file for all; older ones wrote limits by other names."""
        assert ImageProcessor.of(Checkpoint(processor_config={"image_processor": OPTIONS})) == processor
        limits = {"size": None, "min_pixels": 4096, "max_pixels": 200_000}
        assert ImageProcessor.of(Checkpoint(preprocessor_config=OPTIONS | limits)) == processor

    def test_what_is_not_said_is_as_in_transformers(self):
        """The defaults of its class."""
        theirs = Qwen2VLImageProcessorPil()
        ours = ImageProcessor.of(Checkpoint(preprocessor_config={"patch_size": 14}))
        assert (ours.min_pixels, ours.max_pixels) == (theirs.size["shortest_edge"], theirs.size["longest_edge"])
        assert (ours.patch, ours.merge, ours.frames) == (14, theirs.merge_size, theirs.temporal_patch_size)
        assert (ours.mean, ours.std) == (tuple(theirs.image_mean), tuple(theirs.image_std))
        assert ours.scale == theirs.rescale_factor

    @pytest.mark.parametrize("option", [{"do_resize": False}, {"do_normalize": False}, {"resample": 2}])
    def test_other_steps_are_refused(self, option: dict[str, object]):
        """Rather than left out."""
        with pytest.raises(ConfigError, match=f"asks for {next(iter(option))}="):
            ImageProcessor.of(Checkpoint(preprocessor_config=OPTIONS | option))

    def test_must_be_there(self):
        """They are not guessed."""
        with pytest.raises(ConfigError, match=r"'some-model' has no preprocessor_config\.json"):
            ImageProcessor.of(Checkpoint())
