"""Frames to what the model sees: resized as Qwen2.5-VL's processors do and cut into patches.

Frames come from `video` or are drawn; `chat` places the result in a dialogue. Values stay uint8: the vision tower normalises
on the device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vstar_jax.config import VideoConfig
from vstar_jax.data.bicubic import resize
from vstar_jax.data.patches import MERGE_SIDE, PATCH, TEMPORAL_PATCH, Grid, patchify, window_order

FACTOR = PATCH * MERGE_SIDE
MAX_ASPECT = 200


@dataclass(frozen=True)
class ProcessedClip:
    """A clip or image for the model: patches uint8 [P, 1176] in window order (`patches.window_order`), their grid (t, h, w).

    second_per_grid: seconds that one temporal patch counts in the positions; an image has none.
    """

    patches: np.ndarray
    grid: Grid
    second_per_grid: float
    is_video: bool = True


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int, factor: int = FACTOR) -> tuple[int, int]:
    """Height and width in pixels as multiples of `factor` with about the same aspect and min_pixels to max_pixels in all.

    Sides are rounded, half to even; with too many pixels scaled and floored, with too few scaled and ceiled. ValueError when
    one side is more than 200 times the other. Source: `smart_resize` of Qwen2-VL's image processor.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"a picture of {height} x {width} pixels is too narrow: one side may be at most 200 times the other.")
    sides = round(height / factor) * factor, round(width / factor) * factor
    if sides[0] * sides[1] > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        return _multiple(height / scale / factor, math.floor, factor), _multiple(width / scale / factor, math.floor, factor)
    if sides[0] * sides[1] < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        return _multiple(height * scale / factor, math.ceil, factor), _multiple(width * scale / factor, math.ceil, factor)
    return sides


def _multiple(units: float, rounding: Callable[[float], int], factor: int) -> int:
    return max(1, rounding(units)) * factor


def process(frames: np.ndarray, fps: float, config: VideoConfig) -> ProcessedClip:
    """A clip for the model; frames uint8 [T, H, W, 3] at `fps` frames a second, T at least 1 (an odd T repeats the last)."""
    patches, grid = _patches(resize(frames, *_size(frames, config)))
    return ProcessedClip(patches, grid, config.second_per_grid or TEMPORAL_PATCH / fps)


def process_image(image: np.ndarray, config: VideoConfig) -> ProcessedClip:
    """A still picture uint8 [H, W, 3] for the model, as one temporal patch.

    Resized by Pillow, to the bit as the reference's processor of pictures does it; a clip may differ from that by a grey level.
    """
    height, width = _size(image[None], config)
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    return ProcessedClip(*_patches(resized[None]), 0.0, is_video=False)


def _patches(frames: np.ndarray) -> tuple[np.ndarray, Grid]:
    patches, grid = patchify(frames)
    return patches[window_order(grid).order], grid


def _size(frames: np.ndarray, config: VideoConfig) -> tuple[int, int]:
    return smart_resize(frames.shape[1], frames.shape[2], config.min_pixels, config.max_pixels)
