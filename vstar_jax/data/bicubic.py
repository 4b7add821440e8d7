"""Clips resized by torchvision's antialiased bicubic filter, in numpy, as products of small matrices.

A few neighbouring outputs depend on a narrow strip of inputs, so that each side of a picture is resized strip by strip with
dense products, in little more than half of Pillow's time. Values are torchvision's but for one in a hundred, by a grey level.
"""

from functools import lru_cache

import numpy as np

SHARPNESS = -0.5
"""The free parameter of Keys' cubic convolution, as torchvision and Pillow have it."""
REACH = 2
"""Inputs on each side of an output that weigh on it, where nothing is made smaller."""
STRIP = 8
"""Outputs of one product: more of them waste work on zeros, fewer leave the processor's vectors empty."""
LARGEST = 1 << 18
"""Multiplications of one product from which OpenBLAS shares it among threads, which costs many times more than it saves."""

Strip = tuple[slice, slice, np.ndarray]
"""Outputs, the inputs on which they depend, and the weights float32 [outputs, inputs]."""


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames uint8 [T, H, W, C] to [T, height, width, C], whose memory is in rows of one channel: [T, height, C, width].

    Widths are resized before heights, and rounded to whole grey levels in between, as torchvision does it.
    """
    count, old_height, old_width, channels = frames.shape
    if (old_height, old_width) == (height, width):
        return frames
    rows = np.empty((old_height, channels, old_width), np.float32)
    wide = np.empty((old_height, channels, width), np.float32)
    done = np.empty((height, channels, width), np.float32)
    resized = np.empty((count, height, channels, width), np.uint8)
    for frame, place in zip(frames, resized, strict=True):
        np.copyto(rows, frame.transpose(0, 2, 1))
        _filter(rows.reshape(-1, old_width).T, wide.reshape(-1, width).T)
        _filter(wide.reshape(old_height, -1), done.reshape(height, -1))
        np.copyto(place, done, casting="unsafe")
    return resized.transpose(0, 1, 3, 2)


def _filter(source: np.ndarray, target: np.ndarray) -> None:
    """Resizes the first axis of `source` to that of `target`, both float32 [N, M], in grey levels 0 to 255."""
    for outputs, inputs, weights in strips(len(source), len(target)):
        step = max(LARGEST // weights.size, 1)
        for start in range(0, source.shape[1], step):
            part = slice(start, start + step)
            np.matmul(weights, source[inputs, part], out=target[outputs, part])
    target += 0.5  # halves go up
    np.floor(target, out=target)
    np.clip(target, 0, 255, out=target)


@lru_cache(maxsize=64)
def strips(old: int, new: int) -> tuple[Strip, ...]:
    """The filter from a side of `old` pixels to one of `new`, by strips of outputs."""
    scale = old / new
    wider = max(scale, 1.0)  # with fewer outputs than inputs the filter widens, so that every input weighs on some output
    centres = (np.arange(new) + 0.5) * scale
    first = np.maximum(centres - REACH * wider + 0.5, 0).astype(int)
    end = np.minimum(centres + REACH * wider + 0.5, old).astype(int)
    made = []
    for start in range(0, new, STRIP):
        outputs = slice(start, min(start + STRIP, new))
        inputs = slice(int(first[start]), int(end[outputs.stop - 1]))
        places = np.arange(inputs.start, inputs.stop)
        reached = (places >= first[outputs, None]) & (places < end[outputs, None])
        weights = _cubic((places + 0.5 - centres[outputs, None]) / wider) * reached
        made.append((outputs, inputs, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)))
    return tuple(made)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel at distances in pixels of the coarser side."""
    x, a = np.abs(distance), SHARPNESS
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < REACH, far, 0.0))
