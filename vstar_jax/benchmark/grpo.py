"""Measures a whole GRPO step on text (generate, reward, reference, one update), alone or in turns with another implementation.

There are no clips, for what TRL takes is text: the tower is as small as can be and never runs. A rival gets the same weights,
prompts, reward and settings. It is timed only when we, learning from what it wrote, find the gradients that it found: of two
steps, so that the second one has gone through clipping, AdamW and the divergence from the reference.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vstar_jax import sharding
from vstar_jax.batch import PATCH_VALUES, Example, collate, joined, sampled
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
from vstar_jax.benchmark.rollout import Workload, check_written, no_host
from vstar_jax.config import Config, GrpoConfig, PolicyConfig, RolloutConfig
from vstar_jax.dialogue import Decision, parse_reply
from vstar_jax.errors import UserError
from vstar_jax.models import hf
from vstar_jax.models.config import Architecture, VisionArchitecture
from vstar_jax.models.qwen2_5_vl import Qwen25VL, create
from vstar_jax.objectives.grpo import token_log_probs
from vstar_jax.rewards import Reward
from vstar_jax.rollout.episode import Rollout, episode_keys
from vstar_jax.rollout.player import Played
from vstar_jax.tools.host import Counts
from vstar_jax.training.collect import Paid, Step, sampling_of
from vstar_jax.training.grpo import Learner, make_grpo_optimizer
from vstar_jax.training.state import create_state

TOLERANCE = 1e-3  # relative, of the gradient's norm; float32 sums in another order differ by some 1e-6, another loss by more
CHECKED_STEPS = 2
PROMPT_TOKENS = 64
CHUNK = 64  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Taken:
    """What a step did: the replies int [prompts * group, tokens] in the order of the prompts, and the gradient's norm before
    clipping.
    """

    tokens: np.ndarray
    grad_norm: float


class Contender(Protocol):
    """An implementation of the GRPO step, with its own weights, reference, optimizer state and copy of the prompts."""

    name: str
    compile_seconds: float

    def step(self) -> Taken:
        """One whole step, finished when it returns."""
        ...


class RivalContender(Contender, Protocol):
    """A rival, which may look for its fastest settings after it was checked."""

    def tune(self) -> None:
        """Takes some steps and keeps what made them fast."""
        ...


Rival = Callable[[Path, Sequence[str], Config], RivalContender]
"""Makes a contender from a model directory in Hugging Face format (with its tokenizer), prompts, and the run's settings."""


def reward(tokens: Sequence[int]) -> float:
    """What a reply is paid: the share of its even tokens, which differs between the members of a group."""
    return sum(token % 2 == 0 for token in tokens) / len(tokens)


class Ours:
    """What `training.grpo` runs in a step: the jitted rollout, advantages, the reference's program and the update's."""

    name = "vstar_jax"

    def __init__(self, model: Qwen25VL, prompts: Sequence[Example], config: Config):
        self.prompts, self.config, self.mesh = prompts, config, sharding.make_mesh("1x1")
        grpo, optimizer = config.grpo, make_grpo_optimizer(config)
        self.graphdef, self.state = create_state(model, optimizer, config.policy.lora, self.mesh, config.seed)
        first = jax.tree.map(jnp.copy, self.state.params) if grpo.beta else None
        self.learner = Learner(self.graphdef, optimizer, config, self.mesh, self.state, first)
        self.batch = sharding.put_batch(collate([[p] for p in prompts], (len(prompts[0].tokens),), ()), self.mesh)
        self.starts = np.asarray([p.positions.max() + 1 for p in prompts], np.int32)
        none = np.zeros(0, np.int32)
        self.rollout = Rollout(self.graphdef, no_host, 0, none, sampling_of(config), self.mesh, "callback")
        self.calls, self.compile_seconds = 0, 0.0
        self.seconds: list[dict[str, float]] = []

    def step(self) -> Taken:
        """See `Contender`."""
        grpo, started = self.config.grpo, time.perf_counter()
        self.calls += 1
        numbers = [self.calls * grpo.prompts + n for n in range(grpo.prompts)]
        keys = episode_keys(self.config.seed, numbers, grpo.group)
        order = np.arange(grpo.prompts * grpo.group, dtype=np.int32)
        whole = nnx.merge_state(self.state.params, self.state.frozen)
        (written,) = jax.device_get(self.rollout(whole, self.batch, self.starts, keys, order))
        rolled = time.perf_counter()
        taken = self._learned(written.tokens, written.log_probs)
        self.seconds.append({"rollout": rolled - started, "reward and update": time.perf_counter() - rolled})
        return taken

    def follow(self, tokens: np.ndarray) -> Taken:
        """Learns from replies that somebody else wrote with the same weights."""
        return self._learned(tokens, self._log_probs(tokens))

    def _learned(self, tokens: np.ndarray, log_probs: np.ndarray) -> Taken:
        rows, length = self._rows(tokens), len(self.prompts[0].tokens)
        ahead = np.zeros(length, np.float32)
        paid = [
            Paid(_played(row, np.concatenate([ahead, known])), _paid(reward(reply.tolist())))
            for row, known, reply in zip(rows, log_probs, tokens, strict=True)
        ]
        self.state, measured = self.learner.learn(self.state, Step((), paid, len(rows[0].tokens), 0, Counts(), {}))
        jax.block_until_ready(self.state)
        if "grpo/grad_norm" not in measured:
            raise UserError("all members of every group were paid the same, so nothing was learned: take longer replies.")
        return Taken(tokens, measured["grpo/grad_norm"])

    def _log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """The policy's, float32 [B, M]."""
        batch = sharding.put_batch(collate([[r] for r in self._rows(tokens)], (self._length(tokens),), ()), self.mesh)
        with jax.set_mesh(self.mesh):
            model = nnx.merge(self.graphdef, self.state.params, self.state.frozen)
            found = token_log_probs(model, batch, chunk=CHUNK, temperature=self.config.grpo.temperature)
        return np.asarray(found)[:, -tokens.shape[1] :]

    def _rows(self, tokens: np.ndarray) -> list[Example]:
        members = self.config.grpo.group
        return [
            joined([self.prompts[n // members], sampled(reply, int(self.starts[n // members]))])
            for n, reply in enumerate(tokens)
        ]

    def _length(self, tokens: np.ndarray) -> int:
        return len(self.prompts[0].tokens) + tokens.shape[1]


def _played(row: Example, log_probs: np.ndarray) -> Played:
    return Played((row,), log_probs, ("",), (int(row.loss_mask.sum()),), Decision(), {}, parse_reply(""))


def _paid(total: float) -> Reward:
    return Reward(total, 0.0, 0.0, 0.0, total)


def settings(work: Workload) -> Config:
    """The run's settings: the paper's loss, one update on all rows at once, a learning rate that stays."""
    grpo = GrpoConfig(
        steps=1_000_000,  # so long a cosine that the rate is constant
        prompts=work.prompts,
        group=work.group,
        accumulate=1,
        learning_rate=1e-5,
        warmup=0,
        max_grad_norm=1.0,
        temperature=work.temperature,
        top_p=work.top_p,
        chunk=CHUNK,
    )
    return Config(grpo=grpo, rollout=RolloutConfig(turns=1, max_new_tokens=(work.tokens,)))


def architecture_of(model: str) -> Architecture:
    """The language model of a preset, and a tower that is as small as can be."""
    preset = Architecture.preset(model)
    tower = VisionArchitecture(
        hidden=32, intermediate=32, layers=1, heads=1, full_attention_layers=(0,), out_hidden=preset.text.hidden
    )
    return replace(preset, vision=tower)


def prompts(tokenizer: Any, count: int, vocab: int) -> tuple[list[str], list[Example]]:
    """Texts of `PROMPT_TOKENS` tokens below `vocab`, and their tokens."""
    rng = np.random.default_rng(0)
    words = [tokenizer.decode([n]) for n in range(min(len(tokenizer), vocab))]
    words = [word for word in words if word.startswith(" ") and word.strip().isalpha()]
    texts = ["".join(rng.choice(words, PROMPT_TOKENS)) for _ in range(count)]
    ids = [tokenizer.encode(text)[:PROMPT_TOKENS] for text in texts]
    texts = [tokenizer.decode(i) for i in ids]
    if any(tokenizer.encode(text) != i or len(i) != PROMPT_TOKENS for text, i in zip(texts, ids, strict=True)):
        raise UserError("the tokenizer does not give back the tokens of its own text: use one whose words are whole tokens.")
    return texts, [_text_example(np.asarray(i, np.int32)) for i in ids]


def _text_example(tokens: np.ndarray) -> Example:
    length = len(tokens)
    return Example(
        tokens=tokens,
        positions=np.repeat(np.arange(length, dtype=np.int32)[:, None], 3, axis=1),
        loss_mask=np.zeros(length, bool),
        visual_index=np.full(length, -1, np.int32),
        patches=np.zeros((0, PATCH_VALUES), np.uint8),
        patch_hw=np.zeros((0, 2), np.int32),
        window_id=np.zeros(0, np.int32),
        frame_id=np.zeros(0, np.int32),
    )


def measure_grpo(model: str, tokenizer: Path, work: Workload, repeats: int, rival: Rival | None = None) -> dict[str, Any]:
    """Times `repeats` whole steps in float32 on one device, in turns with the rival's when there is one.

    model: a preset of `Architecture`, with random weights; tokenizer: a model directory, for the prompts. Returns what `report`
    takes. Raises UserError for too few repeats and when the two do not do the same work.
    """
    from transformers import AutoTokenizer

    check_repeats(repeats)
    architecture, config = architecture_of(model), settings(work)
    policy = create(architecture, PolicyConfig(), seed=0)
    words = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
    texts, examples = prompts(words, work.prompts, architecture.text.vocab)
    contenders: list[Contender] = []
    differences: list[float] = []
    ours = Ours(policy, examples, config)
    if rival is not None:
        with tempfile.TemporaryDirectory() as folder:
            hf.save(policy, Path(folder) / "model")
            words.save_pretrained(Path(folder) / "model")
            other = rival(Path(folder) / "model", texts, config)
        for step in range(1, CHECKED_STEPS + 1):
            taken = other.step()
            check_written({other.name: taken.tokens}, work)
            followed = ours.follow(taken.tokens)
            differences.append(check_agreement(step, {ours.name: followed.grad_norm, other.name: taken.grad_norm}))
        other.tune()
        contenders.append(other)
    contenders.insert(0, ours)
    started = time.perf_counter()
    first = ours.step()
    ours.compile_seconds = time.perf_counter() - started
    check_written({ours.name: first.tokens}, work)
    memory = {c.name: peak_memory(c.step) for c in contenders}
    ours.seconds.clear()
    seconds = in_turns({c.name: c.step for c in contenders}, repeats)
    return {
        "what": "grpo",
        "model": model,
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(policy))),
        "prompts": work.prompts,
        "group": work.group,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": work.tokens,
        "machine": machine(),
        "grad_norm_difference": max(differences, default=None),
        "phases": {phase: [s[phase] for s in ours.seconds] for phase in ours.seconds[0]},
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


def check_agreement(step: int, norms: Mapping[str, float]) -> float:
    """The relative difference of two gradients' norms; UserError when it is above `TOLERANCE` or not a number."""
    (ours, a), (name, b) = norms.items()
    difference = abs(a - b) / abs(b) if b else float("nan")
    if not difference <= TOLERANCE:
        raise UserError(
            f"{ours} and {name} disagree on the gradient of step {step} (norms {a:.6f} and {b:.6f}), so they do not do the "
            "same work and their speed is not compared: compare the settings of both."
        )
    return difference


def report(result: Mapping[str, Any]) -> str:
    """The result of a measurement as a Markdown table with a sentence on what was measured."""
    contenders = result["contenders"]
    rows = contender_rows(contenders, "a step", "new tokens", "first step, s")
    text = (
        f"GRPO step on text of {result['model']} ({result['parameters']:,} parameters) in float32: {result['prompts']} prompts "
        f"of {result['prompt_tokens']} tokens, {result['group']} replies of {result['new_tokens']} tokens each, one update "
        f"({result['machine']}); median (min to max) of {len(next(iter(contenders.values()))['seconds'])} repeats.\n\n"
    )
    text += table(list(contenders), rows)
    text += by_phase(result["phases"])
    if result["ratios"]:
        ours, theirs = contenders
        text += f"\n{ours} is {spread(result['ratios'], '.2f')} times as fast as {theirs}, repeat by repeat; the norms of "
        text += f"their gradients differ by {result['grad_norm_difference']:.1e} (relative).\n"
    return text
