"""Resizing and patch rows are those of transformers' own processors of Qwen2-VL."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pillow
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from vstar_jax.config import VideoConfig
from vstar_jax.data.bicubic import resize
from vstar_jax.data.patches import window_order
from vstar_jax.data.processor import ProcessedClip, process, process_image, smart_resize
from vstar_jax.models.vision import normalise

PIXELS = dict(min_pixels=56 * 56, max_pixels=200 * 200)
CONFIG = VideoConfig(**PIXELS, second_per_grid=0)
SIZES = [(120, 160), (57, 43), (300, 260), (28, 500)]
# The reference scales and normalises in float32 in another order.
ROUNDING = 1e-5
# torchvision's bicubic on uint8 rounds its weights: some values are one level apart.
GREY_LEVELS = 1


def picture(height: int, width: int, frames: int = 1) -> np.ndarray:
    """Smooth colours and noise, uint8 [T, H, W, 3]."""
    rng = np.random.default_rng(height)
    waves = np.sin(np.indices((frames, height, width, 3)).sum(0) / 7) * 60 + 128
    return (waves + rng.integers(-40, 40, waves.shape)).clip(0, 255).astype(np.uint8)


def rows(clip: ProcessedClip) -> np.ndarray:
    """Normalised, in the reference's order."""
    found = np.empty_like(clip.patches)
    found[window_order(clip.grid).order] = clip.patches
    return np.asarray(normalise(found))


@pytest.mark.parametrize("size", SIZES)
def test_image_rows_equal_the_reference_processors(size: tuple[int, int]):
    image = picture(*size)[0]
    clip = process_image(image, CONFIG)
    reference = pillow.Qwen2VLImageProcessorPil(**PIXELS)(images=[image], return_tensors="np")
    assert clip.grid == tuple(reference["image_grid_thw"][0])
    assert not clip.is_video
    np.testing.assert_allclose(rows(clip), reference["pixel_values"], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("frames", [4, 5])
@pytest.mark.parametrize("size", SIZES)
def test_video_rows_equal_the_reference_processors(size: tuple[int, int], frames: int):
    clip = process(picture(*size, frames), 2.0, CONFIG)
    # The reference bounds the pixels of the whole clip: without resizing, only its rows are compared.
    frames_resized = resize(picture(*size, frames), clip.grid[1] * 14, clip.grid[2] * 14)
    reference = Qwen2VLVideoProcessor()(
        videos=[torch.from_numpy(frames_resized).permute(0, 3, 1, 2)],
        do_resize=False,
        do_sample_frames=False,
        return_tensors="np",
    )
    assert clip.grid == tuple(reference["video_grid_thw"][0])
    np.testing.assert_allclose(rows(clip), reference["pixel_values_videos"], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_resizing_is_bicubic_with_antialias_as_torchvision_does_it(size: tuple[int, int]):
    from torchvision.transforms.v2 import functional

    frames = picture(*size, 2)
    height, width = smart_resize(*size, **PIXELS)
    reference = functional.resize(
        torch.from_numpy(frames).permute(0, 3, 1, 2), [height, width], functional.InterpolationMode.BICUBIC, antialias=True
    )
    apart = np.abs(resize(frames, height, width).astype(int) - reference.permute(0, 2, 3, 1).numpy())
    assert apart.max() <= GREY_LEVELS


@settings(deadline=None)
@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 40), st.integers(1, 40))
def test_sizes_are_the_references(height: int, width: int, least: int, more: int):
    bounds = dict(min_pixels=least * 784, max_pixels=(least + more) * 784)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="too narrow"):
            smart_resize(height, width, **bounds)
    else:
        assert smart_resize(height, width, **bounds) == pillow.smart_resize(height, width, **bounds)


def test_seconds_come_from_the_frame_rate_unless_the_config_sets_them():
    frames = picture(56, 56, 4)
    assert process(frames, 4.0, CONFIG).second_per_grid == 0.5
    assert process(frames, 4.0, VideoConfig(**PIXELS, second_per_grid=1.0)).second_per_grid == 1.0


def test_patches_stay_uint8_so_that_the_device_normalises():
    assert process(picture(60, 60, 2), 2.0, CONFIG).patches.dtype == np.uint8
