"""Frames as patch rows, and the order in which the vision tower takes them; numpy only.

`processor` cuts rows and puts them in window order, and the tower (`models.vision`) normalises and embeds them. Row layout
and windows are those of Qwen2.5-VL: `Qwen2VLImageProcessor` and `get_window_index` in Hugging Face.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vstar_jax.batch import MERGE, PATCH_VALUES

Grid = tuple[int, int, int]
"""Temporal patches, rows and columns of a clip, in patches."""

PATCH = 14
TEMPORAL_PATCH = 2
MERGE_SIDE = 2
WINDOW_SIDE = 112 // (PATCH * MERGE_SIDE)  # merged tokens along a window's side


@dataclass(frozen=True)
class WindowLayout:
    """The patches of a clip in window order: frame by frame, window by window, and row by row inside a window.

    order int32 [P]: the place in reference order of the patch that stands here; the four patches of a merged token stay
    together. inverse int32 [P / 4]: where the merged tokens of the reference order stand. window_id, frame_id int32 [P]:
    the window and the temporal patch of each patch, non-decreasing. patch_hw int32 [P, 2]: row and column in the frame.
    """

    order: np.ndarray
    inverse: np.ndarray
    window_id: np.ndarray
    frame_id: np.ndarray
    patch_hw: np.ndarray


def patchify(frames: np.ndarray) -> tuple[np.ndarray, Grid]:
    """Cuts frames uint8 [T, H, W, 3] into patch rows uint8 [P, 1176] in reference order; also returns the grid (t, h, w).

    Two frames make a temporal patch, and an odd number of frames repeats the last. Rows run over temporal patches, then over
    2 x 2 blocks of patches, then inside the block; the values of a row run over channel, frame, row, column.
    ValueError when H or W is not a multiple of 28.
    """
    if len(frames) % TEMPORAL_PATCH:
        frames = np.concatenate([frames, frames[-1:]])
    count, height, width, channels = frames.shape
    if height % (PATCH * MERGE_SIDE) or width % (PATCH * MERGE_SIDE):
        raise ValueError(
            f"frames of {height} x {width} pixels do not split into patches: resize both sides to multiples of 28."
        )
    t, h, w = count // TEMPORAL_PATCH, height // PATCH, width // PATCH
    # The pixels of a patch's row travel as one item, for numpy moves items one by one.
    rows = np.ascontiguousarray(frames.transpose(0, 1, 3, 2)).view(f"V{PATCH}")
    blocks = rows.reshape(t, TEMPORAL_PATCH, h // MERGE_SIDE, MERGE_SIDE, PATCH, channels, w // MERGE_SIDE, MERGE_SIDE)
    patches = np.ascontiguousarray(blocks.transpose(0, 2, 6, 3, 7, 5, 1, 4)).view(np.uint8)
    return patches.reshape(t * h * w, PATCH_VALUES), (t, h, w)


@lru_cache(maxsize=256)
def window_order(grid: Grid) -> WindowLayout:
    """The window order of a grid; windows of 112 pixels, smaller ones at the lower and right edges. Arrays are read-only."""
    t, h, w = grid
    rows, columns = h // MERGE_SIDE, w // MERGE_SIDE
    frame, row, column = (a.reshape(-1) for a in np.indices((t, rows, columns)))
    across = -(-columns // WINDOW_SIDE)
    windows = (frame * -(-rows // WINDOW_SIDE) + row // WINDOW_SIDE) * across + column // WINDOW_SIDE
    merged = np.argsort(windows, kind="stable")
    inside = np.stack(np.divmod(np.arange(MERGE), MERGE_SIDE), -1)
    corner = np.stack([row, column], -1)[merged] * MERGE_SIDE
    return WindowLayout(
        order=_frozen(merged[:, None] * MERGE + np.arange(MERGE), -1),
        inverse=_frozen(np.argsort(merged), -1),
        window_id=_frozen(np.repeat(windows[merged], MERGE), -1),
        frame_id=_frozen(np.repeat(frame[merged], MERGE), -1),
        patch_hw=_frozen(corner[:, None] + inside, -1, 2),
    )


def _frozen(array: np.ndarray, *shape: int) -> np.ndarray:
    """int32 in `shape`, safe to share between callers."""
    array = array.reshape(shape).astype(np.int32)
    array.setflags(write=False)
    return array
