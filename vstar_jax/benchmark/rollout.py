"""Measures the rollout: tokens a second of G replies to each prompt with a clip, alone or in turns with another implementation.

A rival gets the same weights (a model directory), the same prompts, sampling and group size. It is timed only when it continues
the prompts greedily by the same tokens as we do. Nothing stops early, so that both write exactly the same number of tokens.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from vstar_jax import sharding
from vstar_jax.batch import MERGE, PATCH_VALUES, Example, Turn, collate
from vstar_jax.benchmark.common import (
    by_phase,
    check_repeats,
    contender_rows,
    in_turns,
    machine,
    peak_memory,
    ratios,
    spread,
    table,
)
from vstar_jax.config import PolicyConfig
from vstar_jax.data.patches import window_order
from vstar_jax.data.positions import positions
from vstar_jax.errors import UserError
from vstar_jax.models import hf
from vstar_jax.models.config import Architecture
from vstar_jax.models.qwen2_5_vl import Qwen25VL, create
from vstar_jax.rollout.episode import PHASES, Rollout, Sampling, episode_keys

GRID = (8, 4, 4)  # a clip of StickMotion: 16 frames of 56 x 56, each one window, so that patches keep the reference order
TEXT = (4, 27)  # tokens before and after the clip, as in StickMotion's first turn: 64 in all
CHECKED_TOKENS = 16  # greedy ones that must agree: so few that two tokens of equal logits are not to be expected among them


@dataclass(frozen=True)
class Workload:
    """prompts, each continued by `group` replies of exactly `tokens` tokens, drawn at `temperature` from the top `top_p`."""

    prompts: int = 8
    group: int = 4
    tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def written(self) -> int:
        """Tokens of all replies."""
        return self.prompts * self.group * self.tokens


class Contender(Protocol):
    """An implementation of generation, with its own weights and copy of the prompts."""

    name: str
    compile_seconds: float

    def sample(self) -> np.ndarray:
        """The replies int [prompts * group, tokens] to all prompts, those of a prompt side by side."""
        ...

    def greedy(self, tokens: int) -> np.ndarray:
        """The most likely replies int [prompts, tokens]."""
        ...


Rival = Callable[[Path, Sequence[Example], Workload], Contender]
"""Makes a contender from a model directory in Hugging Face format, prompts of one length, and what to do with them."""


class Ours:
    """The rollout that training runs, one turn of it, on one device; `seconds` by phase, of every call of `sample`."""

    name = "vstar_jax"

    def __init__(self, model: Qwen25VL, prompts: Sequence[Example], work: Workload):
        self.graphdef, self.state = nnx.split(model)
        self.mesh, self.work = sharding.make_mesh("1x1"), work
        batch = collate([[p] for p in prompts], (len(prompts[0].tokens),), (len(prompts[0].patches),))
        self.batch = sharding.put_batch(batch, self.mesh)
        self.starts = np.asarray([p.positions.max() + 1 for p in prompts], np.int32)
        self.rollout = self._rollout(Sampling((work.tokens,), work.temperature, work.top_p, turns=1))
        self.calls = 0
        start = time.perf_counter()
        self.sample()
        self.compile_seconds = time.perf_counter() - start
        self.seconds: list[dict[str, float]] = []

    def sample(self) -> np.ndarray:
        """See `Contender`; every call draws anew."""
        self.calls += 1
        tokens = self._play(self.rollout, self.work.group, seed=self.calls)
        if self.calls > 1:
            self.seconds.append(dict(self.rollout.seconds))
        return tokens

    def greedy(self, tokens: int) -> np.ndarray:
        """See `Contender`."""
        return self._play(self._rollout(Sampling((tokens,), 0.0, turns=1)), 1, seed=0)

    def _rollout(self, sampling: Sampling) -> Rollout:
        return Rollout(self.graphdef, no_host, 0, np.zeros(0, np.int32), sampling, self.mesh, "callback")

    def _play(self, rollout: Rollout, members: int, seed: int) -> np.ndarray:
        keys = episode_keys(seed, range(self.work.prompts), members)
        numbers = np.arange(self.work.prompts * members, dtype=np.int32)
        (completion,) = rollout(self.state, self.batch, self.starts, keys, numbers)
        return np.asarray(completion.tokens)


def no_host(*_: Any) -> Turn:
    """The host of episodes of one turn, which ask for nothing."""
    raise AssertionError("an episode of one turn asked the host")


def clip_example(rng: np.random.Generator, architecture: Architecture, text: tuple[int, int]) -> Example:
    """Random text before and after a clip of noise, in the shape of a turn of StickMotion."""
    layout, video = window_order(GRID), architecture.video_pad
    before, after = (rng.integers(8, 500, length) for length in text)
    tokens = np.concatenate([before, [architecture.vision_start, *[video] * len(layout.inverse)], after]).astype(np.int32)
    is_visual = tokens == video
    return Example(
        tokens=tokens,
        positions=positions(tokens, [GRID], [1.0], architecture.tokens_per_second, -1, video),
        loss_mask=np.zeros(len(tokens), bool),
        visual_index=np.where(is_visual, np.cumsum(is_visual) - 1, -1).astype(np.int32),
        patches=rng.integers(0, 256, (len(layout.inverse) * MERGE, PATCH_VALUES), dtype=np.uint8),
        patch_hw=layout.patch_hw,
        window_id=layout.window_id,
        frame_id=layout.frame_id,
    )


def measure_rollout(model: str, work: Workload, repeats: int, rival: Rival | None = None) -> dict[str, Any]:
    """Times `repeats` rollouts of one turn in float32 on one device, in turns with the rival's when there is one.

    model: a preset of `Architecture`, with random weights. Returns what `report` takes. Raises UserError for too few repeats,
    and when greedy replies disagree or a contender writes another number of tokens: then no speed is worth a report.
    """
    check_repeats(repeats)
    architecture = Architecture.preset(model)
    policy = create(architecture, PolicyConfig(), seed=0)
    rng = np.random.default_rng(0)
    prompts = [clip_example(rng, architecture, TEXT) for _ in range(work.prompts)]
    contenders: list[Contender] = []
    if rival is not None:
        with tempfile.TemporaryDirectory() as folder:
            hf.save(policy, Path(folder) / "model")
            contenders.append(rival(Path(folder) / "model", prompts, work))
    ours = Ours(policy, prompts, work)
    contenders.insert(0, ours)

    check_agreement({c.name: c.greedy(CHECKED_TOKENS) for c in contenders})
    check_written({c.name: c.sample() for c in contenders}, work)
    memory = {c.name: peak_memory(c.sample) for c in contenders}
    ours.seconds.clear()
    seconds = in_turns({c.name: c.sample for c in contenders}, repeats)
    return {
        "what": "rollout",
        "model": model,
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(policy))),
        "prompts": work.prompts,
        "group": work.group,
        "prompt_tokens": len(prompts[0].tokens),
        "patches": len(prompts[0].patches),
        "new_tokens": work.tokens,
        "temperature": work.temperature,
        "top_p": work.top_p,
        "machine": machine(),
        "phases": {phase: [s[phase] for s in ours.seconds] for phase in PHASES if phase != "tools"},
        "contenders": {
            c.name: {
                "compile_seconds": c.compile_seconds,
                "peak_memory_mib": memory[c.name],
                "seconds": seconds[c.name],
                "tokens_per_s": work.written / float(np.median(seconds[c.name])),
            }
            for c in contenders
        },
        "ratios": [ratio for c in contenders[1:] for ratio in ratios(seconds[ours.name], seconds[c.name])],
    }


def check_agreement(greedy: Mapping[str, np.ndarray]) -> None:
    """Raises UserError when the greedy tokens of the first contender and of another differ."""
    (ours, expected), *others = greedy.items()
    for name, tokens in others:
        if tokens.shape != expected.shape or (tokens != expected).any():
            same = (tokens == expected).mean() if tokens.shape == expected.shape else 0.0
            raise UserError(
                f"{ours} and {name} continue the prompts by other tokens (equal in {same:.0%} of the places), so they do not "
                "do the same work and their speed is not compared: find the cause with tests/test_parity.py first."
            )


def check_written(sampled: Mapping[str, np.ndarray], work: Workload) -> None:
    """Raises UserError when a contender wrote another number of tokens, or the same reply for all members of a group."""
    for name, tokens in sampled.items():
        wanted = (work.prompts * work.group, work.tokens)
        if tokens.shape != wanted:
            raise UserError(f"{name} wrote tokens {list(tokens.shape)} and not {list(wanted)}: its speed is not compared.")
        by_group = tokens.reshape(work.prompts, work.group, -1)
        if work.group > 1 and (by_group == by_group[:, :1]).all():
            raise UserError(
                f"{name} wrote the same reply for all members of a group, so it did not sample: give it a temperature."
            )


def report(result: Mapping[str, Any]) -> str:
    """The result of a measurement as a Markdown table with a sentence on what was measured."""
    contenders = result["contenders"]
    rows = contender_rows(contenders, "a rollout", "new tokens", "first call, s")
    text = (
        f"Rollout of {result['model']} ({result['parameters']:,} parameters) in float32: {result['prompts']} prompts of "
        f"{result['prompt_tokens']} tokens with a clip of {result['patches']} patches, {result['group']} replies of "
        f"{result['new_tokens']} tokens each, temperature {result['temperature']:g}, top-p {result['top_p']:g} "
        f"({result['machine']}); median (min to max) of {len(next(iter(contenders.values()))['seconds'])} repeats.\n\n"
    )
    text += table(list(contenders), rows)
    text += by_phase(result["phases"])
    if result["ratios"]:
        ours, theirs = contenders
        text += f"\n{ours} is {spread(result['ratios'], '.2f')} times as fast as {theirs}, repeat by repeat; "
        text += f"their first {CHECKED_TOKENS} greedy tokens agree.\n"
    return text
