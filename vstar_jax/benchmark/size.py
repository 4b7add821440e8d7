"""What the benchmarks run at each size of model: the shapes of the input, how it is computed, and how much fits a device.

The miniatures take StickMotion's clips; 3b and 7b take the paper's, of 16 frames of at most 128 * 28 * 28 pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx

from vstar_jax.batch import MERGE, PATCH_VALUES, Example
from vstar_jax.config import DType, PolicyConfig
from vstar_jax.data.patches import PATCH, TEMPORAL_PATCH, Grid, window_order
from vstar_jax.data.positions import positions
from vstar_jax.data.processor import FACTOR, smart_resize
from vstar_jax.errors import UserError
from vstar_jax.models.config import Architecture
from vstar_jax.models.qwen2_5_vl import Qwen25VL, abstract, create

CLIP = (480, 640)
"""Height and width in pixels of a clip before it is resized."""
WORDS = (8, 500)
"""Token ids that random text is drawn from: none is special in any preset."""


@dataclass(frozen=True)
class Size:
    """A model and its work.

    policy: types and remat; grid: of every clip; dialogue: tokens of text before, between and after the clips of an SFT row,
    of which the last are learned; prompt: before and after the clip of a rollout's prompt; rows: of an SFT step; tokens: of a
    reply; accumulate: micro-batches of a GRPO update.
    """

    model: str
    architecture: Architecture
    policy: PolicyConfig
    grid: Grid = (8, 4, 4)  # 16 frames of 56 x 56
    dialogue: tuple[int, ...] = (120, 38, 160)
    prompt: tuple[int, ...] = (4, 27)
    rows: int = 8
    tokens: int = 64
    accumulate: int = 1

    @classmethod
    def of(
        cls,
        model: str,
        dtype: DType | None = None,
        param_dtype: DType | None = None,
        remat: Any = None,
        frames: int | None = None,
        pixels: int | None = None,
    ) -> "Size":
        """The size of a preset of `Architecture`; what is not given is chosen by model and platform.

        dtype: of activations, float32 on a CPU and bfloat16 elsewhere; param_dtype: of parameters and moments, float32 but for
        7b, which fills a device of 141 GB in bfloat16 already; frames, pixels: another clip, of so many frames of at most so
        many pixels. UserError for a clip that has no patches.
        """
        architecture, large = Architecture.preset(model), model in ("3b", "7b")
        kept = param_dtype or ("bfloat16" if model == "7b" else "float32")
        policy = PolicyConfig(
            path="",
            dtype=dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
            param_dtype=kept,
            moment_dtype=kept,
            remat=remat or ("full" if large else "dots"),
        )
        size = cls(model, architecture, policy)
        if large:
            clip = clip_grid(16, 128 * FACTOR**2)
            size = replace(size, grid=clip, dialogue=(512,) * 3, prompt=(16, 112), rows=4, tokens=256, accumulate=4)
        if frames is None and pixels is None:
            return size
        return replace(size, grid=clip_grid(frames or 16, pixels or size.pixels))

    @property
    def pixels(self) -> int:
        """Of a frame."""
        return self.grid[1] * self.grid[2] * PATCH**2

    @property
    def patches(self) -> int:
        """Of a clip."""
        return int(np.prod(self.grid))

    def random_policy(self, policy: PolicyConfig | None = None) -> Qwen25VL:
        """The model with random weights, drawn where they will lie: one program, which keeps no wider copy of any of them."""
        policy = policy or self.policy
        graphdef, _ = nnx.split(abstract(self.architecture, policy))
        state = jax.jit(lambda: nnx.state(create(self.architecture, policy, seed=0)))()
        return nnx.merge(graphdef, state)

    def example(self, rng: np.random.Generator, texts: Sequence[int], learned: int = 0) -> Example:
        """Random text, so many tokens before, between and after clips of noise; the last `learned` are learned."""
        architecture, layout, clips = self.architecture, window_order(self.grid), len(texts) - 1
        picture = [architecture.vision_start, *[architecture.video_pad] * len(layout.inverse)]
        pieces = [piece for length in texts for piece in (rng.integers(*WORDS, length), picture)][:-1]
        tokens = np.concatenate(pieces).astype(np.int32)
        visual_index = np.full(len(tokens), -1, np.int32)
        firsts = np.arange(clips)[:, None] * len(layout.inverse)
        visual_index[tokens == architecture.video_pad] = (firsts + layout.inverse).reshape(-1)
        each = np.arange(clips, dtype=np.int32)[:, None]
        return Example(
            tokens=tokens,
            positions=positions(
                tokens, [self.grid] * clips, [1.0] * clips, architecture.tokens_per_second, -1, architecture.video_pad
            ),
            loss_mask=np.arange(len(tokens)) >= len(tokens) - learned,
            visual_index=visual_index,
            patches=rng.integers(0, 256, (clips * len(layout.inverse) * MERGE, PATCH_VALUES), dtype=np.uint8),
            patch_hw=np.tile(layout.patch_hw, (clips, 1)),
            window_id=(each * (layout.window_id.max() + 1) + layout.window_id).reshape(-1).astype(np.int32),
            frame_id=(each * self.grid[0] + layout.frame_id).reshape(-1).astype(np.int32),
        )

    def told(self) -> dict[str, Any]:
        """What a result says of the size."""
        policy = self.policy
        return {
            "model": self.model,
            "dtype": policy.dtype,
            "param_dtype": policy.param_dtype,
            "remat": policy.remat,
            "grid": list(self.grid),
        }


def clip_grid(frames: int, pixels: int) -> Grid:
    """The grid of a clip of `CLIP` with at most so many pixels a frame; UserError when nothing is left of it."""
    if frames < TEMPORAL_PATCH or frames % TEMPORAL_PATCH or pixels < FACTOR**2:
        raise UserError(
            f"a clip of {frames} frames of {pixels} pixels has no patches: give an even number of frames and at least "
            f"{FACTOR**2} pixels."
        )
    height, width = smart_resize(*CLIP, FACTOR**2, pixels)
    return frames // TEMPORAL_PATCH, height // PATCH, width // PATCH


def parameters(policy: Qwen25VL) -> int:
    """How many numbers the weights are."""
    return sum(x.size for x in jax.tree.leaves(nnx.state(policy)))
