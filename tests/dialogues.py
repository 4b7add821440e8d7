"""Small dialogues with pictures, made of numpy alone: the model tests' inputs, without files, tokenizer or processor.

Windows and positions follow their definitions (Qwen2.5-VL, 112-pixel windows; transformers 4.51 for M-RoPE) and not the
project's data side, so that model and data are tested apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vstar_jax.batch import PATCH_VALUES, Example
from vstar_jax.models.config import Architecture, TextArchitecture, VisionArchitecture

VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = 3, 4, 5, 6
FIRST_TEXT, VOCAB = 8, 256
TOKENS_PER_SECOND = 2
WINDOW = 8  # patches along a window's side

ARCHITECTURE = Architecture(
    text=TextArchitecture(
        vocab=VOCAB,
        hidden=64,
        intermediate=96,
        layers=2,
        heads=8,
        kv_heads=2,
        head_dim=8,
        rope_theta=1e4,
        mrope_section=(1, 1, 2),
    ),
    vision=VisionArchitecture(hidden=64, intermediate=80, layers=2, heads=8, full_attention_layers=(1,), out_hidden=64),
    image_pad=IMAGE_PAD,
    video_pad=VIDEO_PAD,
    vision_start=VISION_START,
)
"""As small as eight devices on the model axis allow; its two KV heads are fewer than they."""


@dataclass(frozen=True)
class Clip:
    """Patches uint8 [P, 1176] of a grid (t, h, w) in the order of the reference processor: 2 x 2 blocks, row by row."""

    kind: Literal["image", "video"]
    grid: tuple[int, int, int]
    patches: np.ndarray

    def coordinates(self) -> np.ndarray:
        """int [P, 3]: frame, row and column of each patch."""
        t, h, w = self.grid
        grid = np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij"), -1)
        return grid.reshape(t, h // 2, 2, w // 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3)


@dataclass(frozen=True)
class Dialogue:
    """The same dialogue for the model (`example`) and for the reference (its clips, in the processor's patch order)."""

    example: Example
    clips: tuple[Clip, ...]


def clip(rng: np.random.Generator, kind: Literal["image", "video"], t: int, h: int, w: int) -> Clip:
    """A clip of noise."""
    return Clip(kind, (t, h, w), rng.integers(0, 256, (t * h * w, PATCH_VALUES), dtype=np.uint8))


def dialogue(rng: np.random.Generator, *parts: int | Clip) -> Dialogue:
    """Joins runs of random text (given by their length) and clips; the last run is the target."""
    clips = tuple(part for part in parts if isinstance(part, Clip))
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    visual: list[np.ndarray] = []
    patches, patch_hw, window_id, frame_id = [np.zeros((0, PATCH_VALUES), np.uint8)], [np.zeros((0, 2), int)], [], []
    start = placed = windows = frames = 0

    def text(ids: Sequence[int] | np.ndarray) -> None:
        nonlocal start
        tokens.append(np.asarray(ids))
        positions.append(np.repeat(start + np.arange(len(ids))[:, None], 3, 1))
        visual.append(np.full(len(ids), -1))
        start += len(ids)

    for part in parts:
        if isinstance(part, int):
            text(rng.integers(FIRST_TEXT, VOCAB, part))
            continue
        where = part.coordinates()
        window = np.unique(where // (1, WINDOW, WINDOW), axis=0, return_inverse=True)[1].reshape(-1)
        order = np.argsort(window, kind="stable")
        patches.append(part.patches[order])
        patch_hw.append(where[order, 1:])
        window_id.append(windows + window[order])
        frame_id.append(frames + where[order, 0])
        text([VISION_START])
        tokens.append(np.full(len(where) // 4, IMAGE_PAD if part.kind == "image" else VIDEO_PAD))
        positions.append(start + where[::4] // (1, 2, 2) * (TOKENS_PER_SECOND, 1, 1))
        visual.append(placed + np.argsort(order[::4] // 4))
        start = int(positions[-1].max()) + 1
        placed, windows, frames = placed + len(where) // 4, windows + window.max() + 1, frames + part.grid[0]
        text([VISION_END])

    length = sum(map(len, tokens))
    target = parts[-1] if isinstance(parts[-1], int) else 0
    example = Example(
        tokens=np.concatenate(tokens).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        loss_mask=np.arange(length) >= max(length - target, 1),
        visual_index=np.concatenate(visual).astype(np.int32),
        patches=np.concatenate(patches),
        patch_hw=np.concatenate(patch_hw).astype(np.int32),
        window_id=np.concatenate([np.zeros(0, int), *window_id]).astype(np.int32),
        frame_id=np.concatenate([np.zeros(0, int), *frame_id]).astype(np.int32),
    )
    return Dialogue(example, clips)
