"""Measures the SFT step: seconds, tokens per second and memory, alone or in turns with another implementation.

A rival gets the same weights (a model directory), the same dialogues and the same settings; it is timed only when its loss
agrees with ours before and after the first update, so that both are known to do the same work.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vstar_jax import sharding
from vstar_jax.batch import MERGE, PATCH_VALUES, Batch, Example, collate
from vstar_jax.config import PolicyConfig, SftConfig
from vstar_jax.errors import UserError
from vstar_jax.models import hf
from vstar_jax.models.config import Architecture
from vstar_jax.models.qwen2_5_vl import Qwen25VL, create
from vstar_jax.training.state import create_state, make_optimizer, make_train_step

TOLERANCE = 1e-3  # relative; float32 sums in another order differ by some 1e-6, another computation by more
CHECKED_STEPS = 2  # the loss of the second one has gone through gradients, clipping and AdamW
SFT = SftConfig(learning_rate=1e-4, warmup=0, steps=1_000_000)  # so long a cosine that the rate is constant
GRID = (8, 4, 4)  # temporal patches, rows and columns of a clip of 16 frames of 56 x 56: one window a frame
RUNS = (120, 38, 160)  # tokens of text before, between and after the clips; the last run is learned


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure.

    Args:
        what: the part that is measured.
        against: the implementation it is compared with, in turns.
        model: size of the model; its weights are random.
        batch_size: dialogues a step.
        repeats: timed steps of each implementation.
        seed: of weights and dialogues.
        out: folder of the result files.
    """

    what: Literal["sft"] = "sft"
    against: Literal["none", "hf"] = "none"
    model: Literal["tiny", "small", "medium", "3b", "7b"] = "small"
    batch_size: int = 8
    repeats: int = 7
    seed: int = 0
    out: str = "runs/benchmark"


class Contender(Protocol):
    """An implementation of the SFT step that holds its weights, its optimizer and its batch."""

    name: str
    threads: int
    compile_seconds: float

    def step(self) -> float:
        """One full step (forward, backward, clipping, AdamW), finished when it returns; the loss before the update."""
        ...


Rival = Callable[[Path, Sequence[Example], SftConfig], Contender]
"""Makes a contender from a model directory in Hugging Face format, dialogues and settings."""


class Ours:
    """The step that training runs, compiled ahead of time."""

    name = "vstar_jax"

    def __init__(self, model: Qwen25VL, batch: Batch, config: SftConfig, mesh: Mesh):
        optimizer = make_optimizer(config)
        graphdef, self.state = create_state(model, optimizer, PolicyConfig().lora, mesh, seed=0)
        self.batch = sharding.put_batch(batch, mesh)
        self.threads = len(os.sched_getaffinity(0))
        start = time.perf_counter()
        self.compiled = make_train_step(graphdef, optimizer, config, packed=False).lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start

    def step(self) -> float:
        """One step; the loss before the update."""
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["sft/loss"])


def dialogue(rng: np.random.Generator, architecture: Architecture) -> Example:
    """Random text around two clips of noise, in the shape of a StickMotion dialogue: the raw clip, then the annotated one."""
    where = np.indices(GRID).reshape(3, GRID[0], GRID[1] // 2, 2, GRID[2] // 2, 2).transpose(1, 2, 4, 3, 5, 0).reshape(-1, 3)
    visual = len(where) // MERGE
    tokens, positions, index = [], [], []
    start = 0

    def text(ids: np.ndarray) -> None:
        nonlocal start
        tokens.append(ids)
        positions.append(np.repeat(start + np.arange(len(ids))[:, None], 3, axis=1))
        index.append(np.full(len(ids), -1))
        start += len(ids)

    clips = len(RUNS) - 1
    for number, length in enumerate(RUNS):
        text(rng.integers(8, 1000, length))
        if number < clips:
            text(np.asarray([architecture.vision_start]))
            tokens.append(np.full(visual, architecture.video_pad))
            positions.append(start + where[::MERGE] // (1, 2, 2) * (architecture.tokens_per_second, 1, 1))
            index.append(number * visual + np.arange(visual))
            start = int(positions[-1].max()) + 1
    length = sum(map(len, tokens))
    frames = np.concatenate([number * GRID[0] + where[:, 0] for number in range(clips)]).astype(np.int32)
    return Example(
        tokens=np.concatenate(tokens).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        loss_mask=np.arange(length) >= length - RUNS[-1],
        visual_index=np.concatenate(index).astype(np.int32),
        patches=rng.integers(0, 256, (clips * len(where), PATCH_VALUES), dtype=np.uint8),
        patch_hw=np.tile(where[:, 1:], (clips, 1)).astype(np.int32),
        window_id=frames,
        frame_id=frames,
    )
