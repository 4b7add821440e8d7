"""Measures the SFT step: seconds, tokens a second and memory, alone or in turns with another implementation.

A rival gets the same weights (a model directory), the same dialogues and the same settings. It is timed only when its loss
agrees with ours before and after the first update, so that both are known to do the same work.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from vstar_jax import sharding
from vstar_jax.batch import MERGE, PATCH_VALUES, Example, collate
from vstar_jax.benchmark.common import (
    check_repeats,
    contender_rows,
    in_turns,
    machine,
    peak_memory,
    ratios,
    spread,
    table,
)
from vstar_jax.config import PolicyConfig, SftConfig
from vstar_jax.data.patches import window_order
from vstar_jax.data.positions import positions
from vstar_jax.errors import UserError
from vstar_jax.models import hf
from vstar_jax.models.config import Architecture
from vstar_jax.models.qwen2_5_vl import Qwen25VL, create
from vstar_jax.training.state import create_state, make_optimizer, make_train_step

TOLERANCE = 1e-3  # relative; sums of float32 in another order differ by some 1e-6, another computation by more
CHECKED_STEPS = 2  # the loss of the second one has gone through gradients, clipping and AdamW
SFT = SftConfig(learning_rate=1e-4, warmup=0, steps=1_000_000)  # so long a cosine that the rate is constant
GRID = (8, 4, 4)  # a clip of 16 frames of 56 x 56; each frame is one window, so that patches keep the reference order
RUNS = (120, 38, 160)  # tokens of text before, between and after the clips; the last run is learned


class Contender(Protocol):
    """An implementation of the SFT step, with its own weights, optimizer state and copy of the batch."""

    name: str
    compile_seconds: float

    def step(self) -> float:
        """One full step (forward, backward, clipping, AdamW), finished when it returns; gives the loss before the update."""
        ...


Rival = Callable[[Path, Sequence[Example], SftConfig], Contender]
"""Makes a contender from a model directory in Hugging Face format, dialogues of one length, and settings."""


class Ours:
    """The step that training runs, compiled ahead of time, on one device."""

    name = "vstar_jax"

    def __init__(self, model: Qwen25VL, dialogues: Sequence[Example], config: SftConfig):
        mesh, optimizer = sharding.make_mesh("1x1"), make_optimizer(config)
        graphdef, self.state = create_state(model, optimizer, PolicyConfig().lora, mesh, seed=0)
        batch = collate([[d] for d in dialogues], (len(dialogues[0].tokens),), (len(dialogues[0].patches),))
        self.batch = sharding.put_batch(batch, mesh)
        step: Any = make_train_step(graphdef, optimizer, config, False, self.state)
        start = time.perf_counter()
        self.compiled = step.lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start

    def step(self) -> float:
        """One step; the loss before the update."""
        self.state, metrics = self.compiled(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["sft/loss"])


def dialogue(rng: np.random.Generator, architecture: Architecture) -> Example:
    """Random text around two clips of noise, in the shape of a StickMotion dialogue: the raw clip and the annotated one."""
    layout, clips, video = window_order(GRID), len(RUNS) - 1, architecture.video_pad
    picture = [architecture.vision_start, *[video] * len(layout.inverse)]
    pieces = [piece for length in RUNS for piece in (rng.integers(8, 1000, length), picture)][:-1]
    tokens = np.concatenate(pieces).astype(np.int32)
    is_visual = tokens == video
    each = np.repeat(np.arange(clips, dtype=np.int32), len(layout.frame_id)) * GRID[0]
    return Example(
        tokens=tokens,
        positions=positions(tokens, [GRID] * clips, [1.0] * clips, architecture.tokens_per_second, -1, video),
        loss_mask=np.arange(len(tokens)) >= len(tokens) - RUNS[-1],
        visual_index=np.where(is_visual, np.cumsum(is_visual) - 1, -1).astype(np.int32),
        patches=rng.integers(0, 256, (clips * len(layout.inverse) * MERGE, PATCH_VALUES), dtype=np.uint8),
        patch_hw=np.tile(layout.patch_hw, (clips, 1)),
        window_id=np.tile(layout.window_id, clips) + each,
        frame_id=np.tile(layout.frame_id, clips) + each,
    )


def measure_sft(model: str, batch_size: int, repeats: int, rival: Rival | None = None) -> dict[str, Any]:
    """Times `repeats` full SFT steps in float32 on one device, in turns with the rival's when there is one.

    model: a preset of `Architecture`, with random weights. Returns what `report` takes. Raises UserError for too few repeats,
    and when the losses of the first steps disagree: then the two do not do the same work and no speed is worth a report.
    """
    check_repeats(repeats)
    architecture = Architecture.preset(model)
    policy = create(architecture, PolicyConfig(), seed=0)
    size = sum(x.size for x in jax.tree.leaves(nnx.state(policy)))
    rng = np.random.default_rng(0)
    dialogues = [dialogue(rng, architecture) for _ in range(batch_size)]
    contenders: list[Contender] = []
    if rival is not None:
        with tempfile.TemporaryDirectory() as folder:
            hf.save(policy, Path(folder) / "model")
            contenders.append(rival(Path(folder) / "model", dialogues, SFT))
    contenders.insert(0, Ours(policy, dialogues, SFT))

    losses = {c.name: [c.step() for _ in range(CHECKED_STEPS)] for c in contenders}
    difference = check_agreement(losses)
    memory = {c.name: peak_memory(c.step) for c in contenders}
    seconds = in_turns({c.name: c.step for c in contenders}, repeats)
    tokens = batch_size * len(dialogues[0].tokens)
    ours, *others = (seconds[c.name] for c in contenders)
    return {
        "what": "sft",
        "model": model,
        "parameters": size,
        "dialogues": batch_size,
        "tokens": tokens,
        "patches": batch_size * len(dialogues[0].patches),
        "machine": machine(),
        "loss_difference": difference,
        "contenders": {
            c.name: {
                "losses": losses[c.name],
                "compile_seconds": c.compile_seconds,
                "peak_memory_mib": memory[c.name],
                "seconds": seconds[c.name],
                "tokens_per_s": tokens / float(np.median(seconds[c.name])),
            }
            for c in contenders
        },
        "ratios": [ratio for theirs in others for ratio in ratios(ours, theirs)],
    }


def check_agreement(losses: Mapping[str, Sequence[float]]) -> float:
    """The largest relative difference between the losses of the first contender and of the others, over the first steps.

    Raises UserError when it is above `TOLERANCE` or not a number.
    """
    (ours, expected), *others = losses.items()
    largest = 0.0
    for name, values in others:
        for step, (a, b) in enumerate(zip(expected, values, strict=True), start=1):
            difference = abs(a - b) / abs(b)
            if not difference <= TOLERANCE:
                raise UserError(
                    f"{ours} and {name} disagree on the loss of step {step} ({a:.6f} and {b:.6f}), so they do not do the same "
                    "work and their speed is not compared: find the cause with tests/test_parity.py first."
                )
            largest = max(largest, difference)
    return largest


def report(result: Mapping[str, Any]) -> str:
    """The result of a measurement as a Markdown table with a sentence on what was measured."""
    contenders = result["contenders"]
    rows = {
        **contender_rows(contenders, "a step", "tokens", "compile time, s"),
        "loss of the first steps": [", ".join(f"{x:.6f}" for x in c["losses"]) for c in contenders.values()],
    }
    text = (
        f"SFT step of {result['model']} ({result['parameters']:,} parameters) in float32 on {result['dialogues']} dialogues, "
        f"{result['tokens']:,} tokens and {result['patches']:,} patches ({result['machine']}); median (min to max) of "
        f"{len(next(iter(contenders.values()))['seconds'])} repeats.\n\n"
    )
    text += table(list(contenders), rows)
    if result["ratios"]:
        ours, theirs = contenders
        text += f"\n{ours} is {spread(result['ratios'], '.2f')} times as fast as {theirs}, repeat by repeat; "
        text += f"their losses differ by {result['loss_difference']:.1e} (relative).\n"
    return text
