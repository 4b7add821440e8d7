"""Measures a whole GRPO step (generate, reward, reference, one update), alone or in turns with another implementation.

Alone, every prompt has a clip. Against a rival there are none, for what TRL takes is text: the tower is as small as can be and
never runs. A rival gets the same weights, prompts, reward and settings. It is timed only when we, learning from what it wrote,
find the gradients that it found: of two steps, so that the second one has gone through clipping, AdamW and the divergence from
the reference.
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
from vstar_jax.batch import Example, collate, joined, sampled
from vstar_jax.benchmark import common
from vstar_jax.benchmark.operations import TRAINING, rollout_operations, row_operations
from vstar_jax.benchmark.rates import matrix_rate
from vstar_jax.benchmark.rollout import Workload, check_written, no_host
from vstar_jax.benchmark.size import Size, parameters
from vstar_jax.config import Config, GrpoConfig, RolloutConfig
from vstar_jax.dialogue import Decision, parse_reply
from vstar_jax.errors import UserError
from vstar_jax.models import hf
from vstar_jax.models.config import VisionArchitecture
from vstar_jax.models.qwen2_5_vl import Qwen25VL
from vstar_jax.objectives.grpo import token_log_probs
from vstar_jax.rewards import Reward
from vstar_jax.rollout.episode import Rollout, episode_keys
from vstar_jax.rollout.player import Played
from vstar_jax.rollout.weights import rollout_weights
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

    def device_peak(self) -> float | None:
        """See `common.device_peak`."""
        ...


class RivalContender(Contender, Protocol):
    """A rival, which may look for its fastest settings after it was checked."""

    def tune(self) -> None:
        """Takes some steps and keeps what made them fast."""
        ...


Rival = Callable[[Path, Sequence[str], Config], RivalContender]
"""Makes a contender from a model directory in Hugging Face format (with its tokenizer), prompts, and the run's settings."""


def reward(tokens: Sequence[int]) -> float:
    """What a reply is paid: the mean of its tokens' last bytes, so fine that members of a group are hardly paid the same."""
    return sum(token % 256 for token in tokens) / (255 * len(tokens))


class Ours:
    """What `training.grpo` runs in a step: the jitted rollout, advantages, the reference's program and the update's."""

    name = "vstar_jax"

    def __init__(self, model: Qwen25VL, prompts: Sequence[Example], config: Config):
        self.prompts, self.config, self.mesh = prompts, config, sharding.make_mesh("1x1")
        grpo, optimizer = config.grpo, make_grpo_optimizer(config)
        self.graphdef, self.state = create_state(model, optimizer, config.policy.lora, self.mesh, config.seed)
        first = jax.tree.map(jnp.copy, self.state.params) if grpo.beta else None
        self.learner = Learner(self.graphdef, optimizer, config, self.mesh, self.state, first)
        self.batch = self._batch(prompts)
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
        state, dtype = nnx.merge_state(self.state.params, self.state.frozen), self.config.policy.dtype
        weights = jax.block_until_ready(rollout_weights(state, dtype, self.mesh))
        copied = time.perf_counter()
        (written,) = jax.device_get(self.rollout(weights, self.batch, self.starts, keys, order))
        del weights, state
        rolled = time.perf_counter()
        taken = self._learned(written.tokens, written.log_probs)
        ended = time.perf_counter()
        played = {phase: seconds for phase, seconds in self.rollout.seconds.items() if phase != "tools"}
        self.seconds.append({"weights": copied - started, **played, "reward, reference and update": ended - rolled})
        return taken

    def device_peak(self) -> float | None:
        """See `Contender`."""
        return common.device_peak()

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
        step = Step((), paid, len(rows[0].tokens), len(rows[0].patches), Counts(), {})
        self.state, measured = self.learner.learn(self.state, step)
        jax.block_until_ready(self.state)
        if "grpo/grad_norm" not in measured:
            raise UserError("all members of every group were paid the same, so nothing was learned: take longer replies.")
        return Taken(tokens, measured["grpo/grad_norm"])

    def _log_probs(self, tokens: np.ndarray) -> np.ndarray:
        """The policy's, float32 [B, M]."""
        batch = self._batch(self._rows(tokens))
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

    def _batch(self, rows: Sequence[Example]) -> Any:
        return sharding.put_batch(collate([[r] for r in rows], (len(rows[0].tokens),), (len(rows[0].patches),)), self.mesh)


def _played(row: Example, log_probs: np.ndarray) -> Played:
    return Played((row,), log_probs, ("",), (int(row.loss_mask.sum()),), Decision(), {}, parse_reply(""))


def _paid(total: float) -> Reward:
    return Reward(total, 0.0, 0.0, 0.0, total)


def settings(work: Workload, size: Size) -> Config:
    """The run's settings: the paper's loss, one update on all rows, a learning rate that stays."""
    grpo = GrpoConfig(
        steps=1_000_000,  # so long a cosine that the rate is constant
        prompts=work.prompts,
        group=work.group,
        accumulate=size.accumulate,
        learning_rate=1e-5,
        warmup=0,
        max_grad_norm=1.0,
        temperature=work.temperature,
        top_p=work.top_p,
        chunk=CHUNK,
    )
    return Config(policy=size.policy, grpo=grpo, rollout=RolloutConfig(turns=1, max_new_tokens=(work.tokens,)))


def text_only(size: Size) -> Size:
    """The language model of a size, and a tower that is as small as can be."""
    tower = VisionArchitecture(
        hidden=32, intermediate=32, layers=1, heads=1, full_attention_layers=(0,), out_hidden=size.architecture.text.hidden
    )
    return replace(size, architecture=replace(size.architecture, vision=tower), prompt=(PROMPT_TOKENS,))


def prompts(tokenizer: Any, count: int, size: Size) -> tuple[list[str], list[Example]]:
    """Texts of `PROMPT_TOKENS` tokens of the vocabulary, and their tokens. size: of `text_only`."""
    rng = np.random.default_rng(0)
    words = [tokenizer.decode([n]) for n in range(min(len(tokenizer), size.architecture.text.vocab))]
    words = [word for word in words if word.startswith(" ") and word.strip().isalpha()]
    texts = ["".join(rng.choice(words, PROMPT_TOKENS)) for _ in range(count)]
    ids = [tokenizer.encode(text)[:PROMPT_TOKENS] for text in texts]
    texts = [tokenizer.decode(i) for i in ids]
    if any(tokenizer.encode(text) != i or len(i) != PROMPT_TOKENS for text, i in zip(texts, ids, strict=True)):
        raise UserError("the tokenizer does not give back the tokens of its own text: use one whose words are whole tokens.")
    return texts, [replace(size.example(rng, size.prompt), tokens=np.asarray(i, np.int32)) for i in ids]


def measure_grpo(
    size: Size, work: Workload, repeats: int, rival: Rival | None = None, tokenizer: Path | None = None
) -> dict[str, Any]:
    """Times `repeats` whole steps on one device, in turns with the rival's when there is one.

    tokenizer: a model directory, for the texts that a rival is given. Returns what `report` takes. Raises UserError for too few
    repeats, when the episodes do not split into `size.accumulate` micro-batches, and when the two do not do the same work.
    """
    common.check_repeats(repeats)
    if work.prompts * work.group % size.accumulate:
        raise UserError(
            f"{work.prompts} prompts of {work.group} replies do not split into {size.accumulate} micro-batches: choose "
            f"--prompts and --group whose product is a multiple of {size.accumulate}."
        )
    size = text_only(size) if rival is not None else size
    config, rng = settings(work, size), np.random.default_rng(0)
    with common.Compilations() as compiled:
        rate, policy = matrix_rate(size.policy.dtype), size.random_policy()
        count = parameters(policy)
        differences: list[float] = []
        contenders: list[Contender] = []
        if rival is None or tokenizer is None:
            ours = Ours(policy, [size.example(rng, size.prompt) for _ in range(work.prompts)], config)
        else:
            from transformers import AutoTokenizer

            words = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
            texts, examples = prompts(words, work.prompts, size)
            with tempfile.TemporaryDirectory() as folder:
                hf.save(policy, Path(folder) / "model")
                words.save_pretrained(Path(folder) / "model")
                other = rival(Path(folder) / "model", texts, config)
            ours = Ours(policy, examples, config)
            for step in range(1, CHECKED_STEPS + 1):
                taken = other.step()
                check_written({other.name: taken.tokens}, work)
                followed = ours.follow(taken.tokens)
                differences.append(check_agreement(step, {ours.name: followed.grad_norm, other.name: taken.grad_norm}))
            other.tune()
            contenders.append(other)
        del policy
        contenders.insert(0, ours)
        started = time.perf_counter()
        first = ours.step()
        ours.compile_seconds = time.perf_counter() - started
        check_written({ours.name: first.tokens}, work)
        memory = {c.name: common.peak_memory(c.step, c.device_peak) for c in contenders}
    ours.seconds.clear()
    with common.Compilations() as recompiled:
        seconds = common.in_turns({c.name: c.step for c in contenders}, repeats)
    example = ours.prompts[0]
    operations = step_operations(size, work, len(example.tokens), with_reference=config.grpo.beta > 0)
    return {
        "what": "grpo",
        **size.told(),
        "parameters": count,
        "prompts": work.prompts,
        "group": work.group,
        "prompt_tokens": len(example.tokens),
        "patches": len(example.patches),
        "new_tokens": work.tokens,
        "machine": common.machine(),
        "operations": operations,
        "matrix_rate": rate,
        "grad_norm_difference": max(differences, default=None),
        "compilations": compiled.told(recompiled),
        "phases": {phase: [s[phase] for s in ours.seconds] for phase in ours.seconds[0]},
        "contenders": {
            c.name: {
                "compile_seconds": c.compile_seconds,
                "peak_memory_mib": memory[c.name],
                "seconds": seconds[c.name],
                "tokens_per_s": work.written / float(np.median(seconds[c.name])),
                **common.efficiency(operations, rate, seconds[c.name]),
            }
            for c in contenders
        },
        "ratios": [ratio for c in contenders[1:] for ratio in common.ratios(seconds[ours.name], seconds[c.name])],
    }


def step_operations(size: Size, work: Workload, prompt: int, with_reference: bool) -> float:
    """The rollout, then the update and the reference on whole rows, each of which has its own clip and prompt of `prompt`
    tokens again.
    """
    clips = len(size.prompt) - 1
    passes = TRAINING + with_reference
    learned = passes * work.prompts * work.group * row_operations(size, clips, prompt + work.tokens, work.tokens)
    return learned + rollout_operations(size, clips, work.prompts, prompt, work.group, work.tokens)


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
    rows = common.contender_rows(contenders, "a step", "new tokens", "first step, s")
    clip = f"with a clip of {result['patches']} patches" if result["patches"] else "of text alone"
    text = (
        f"GRPO step of {result['model']} ({result['parameters']:,} parameters) in {result['dtype']} (parameters in "
        f"{result['param_dtype']}, remat {result['remat']}): {result['prompts']} prompts of {result['prompt_tokens']} tokens "
        f"{clip}, {result['group']} replies of {result['new_tokens']} tokens each, one update "
        f"({result['machine']}); median (min to max) of {len(next(iter(contenders.values()))['seconds'])} repeats.\n\n"
    )
    text += common.table(list(contenders), rows)
    text += common.by_phase(result["phases"])
    text += common.efficiency_told(result, "A step")
    if result["ratios"]:
        ours, theirs = contenders
        text += (
            f"\n{ours} is {common.spread(result['ratios'], '.2f')} times as fast as {theirs}, repeat by repeat; the norms of "
        )
        text += f"their gradients differ by {result['grad_norm_difference']:.1e} (relative).\n"
    return text
