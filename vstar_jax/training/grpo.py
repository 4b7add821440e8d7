"""The GRPO loop: groups of episodes are played with the tools, paid, and the policy is updated (paper, Eq. 3-6)."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from vstar_jax import sharding
from vstar_jax.batch import Batch, collate
from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.task import Task
from vstar_jax.distributed import first, gather, largest
from vstar_jax.errors import Interrupted, UserError
from vstar_jax.models.lora import without
from vstar_jax.models.qwen2_5_vl import Qwen25VL
from vstar_jax.objectives.grpo import Totals, advantages, grpo_loss, token_log_probs
from vstar_jax.rollout.player import Played
from vstar_jax.sharding import put, put_batch
from vstar_jax.tools.host import Tools, failed_share
from vstar_jax.tools.protocol import STATUSES
from vstar_jax.training.collect import Collector, Step, as_record, sampling_of
from vstar_jax.training.interrupts import asked_to_stop, stop_requests
from vstar_jax.training.metrics import MetricsWriter
from vstar_jax.training.profile import Profile
from vstar_jax.training.state import TrainState, create_state, make_optimizer, zeros_like_float32

FOLDER = "grpo"
"""Of a run directory: this phase's checkpoints, and the rollouts of every step."""
SHARED = ("learning_rate", "warmup", "weight_decay", "max_grad_norm")
"""Settings of the optimizer that both phases have."""


@partial(jax.tree_util.register_dataclass, data_fields=["batch", "old", "reference", "advantages"], meta_fields=[])
@dataclass(frozen=True)
class Experience:
    """Episodes to learn from: batch, in which loss_mask marks what the policy wrote; old and reference float32 [B, S], the
    log-probabilities of the policy that sampled and of the reference; advantages float32 [B].
    """

    batch: Batch
    old: Any
    reference: Any
    advantages: Any


@dataclass(frozen=True)
class GrpoRun:
    """A finished run: the graph definition, the trained state, and how often its programs were compiled."""

    graphdef: Any
    state: TrainState
    compilations: Mapping[str, int]


def experience(
    played: Sequence[Played], values: np.ndarray, useful: np.ndarray, tokens: int, patches: int, accumulate: int
) -> Experience:
    """Episodes in static shapes.

    values float32 [B], advantages; useful bool [B], the rows to learn from: they fill the first micro-batches, and the others
    count nothing. Row i * accumulate + m is the i-th of micro-batch m (`micro_batch`). The reference's log-probabilities are
    still zeros.
    """
    rows = len(played) // accumulate
    order = np.argsort(~useful, kind="stable").reshape(accumulate, rows).T.reshape(-1).tolist()
    batch = collate([played[n].parts for n in order], (tokens,), (patches,) if patches else (), largest)
    batch = replace(batch, loss_mask=batch.loss_mask & useful[order][:, None])
    old = np.zeros(batch.tokens.shape, np.float32)
    for row, n in zip(old, order, strict=True):
        row[: len(played[n].log_probs)] = played[n].log_probs
    return Experience(batch, old, np.zeros_like(old), values[order])


def micro_batches(useful: int, rows: int, accumulate: int) -> np.int32:
    """How many of the micro-batches hold all `useful` ones of `rows` rows, which are a process's; the most of any process's
    counts.
    """
    return np.int32(-(-useful * accumulate // rows))


def micro_batch(batch: Experience, accumulate: int, number: jax.Array) -> Experience:
    """Micro-batch `number` of `accumulate`: strided, so that each lies over all devices."""

    def take(x: jax.Array) -> jax.Array:
        parts = x.reshape(-1, accumulate, *x.shape[1:])
        part = jax.lax.dynamic_index_in_dim(parts, number, axis=1, keepdims=False)
        return sharding.constrain(part, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(take, batch)


def make_reference(graphdef: Any, config: Config) -> Callable[..., Experience]:
    """The jitted function (params, frozen, experience, used) -> the experience with the reference's log-probabilities."""
    grpo, packed = config.grpo, config.rollout.history == "replace"

    @jax.jit
    def reference(params: Any, frozen: Any, batch: Experience, used: jax.Array) -> Experience:
        policy = nnx.merge(graphdef, params, frozen)
        policy = without(policy) if grpo.reference == "adapters_off" else policy

        def micro(number: jax.Array, found: jax.Array) -> jax.Array:
            part = micro_batch(batch, grpo.accumulate, number)
            log_probs = token_log_probs(policy, part.batch, chunk=grpo.chunk, temperature=grpo.temperature, packed=packed)
            return found.at[:, number].set(log_probs)

        shape = batch.reference.shape
        found = jnp.zeros((shape[0] // grpo.accumulate, grpo.accumulate, shape[1]), jnp.float32)
        return replace(batch, reference=jax.lax.fori_loop(0, used, micro, found).reshape(shape))

    return reference


def make_grpo_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with GRPO's own schedule over all updates of the run."""
    schedule = {name: getattr(config.grpo, name) for name in SHARED}
    steps = config.grpo.steps * config.grpo.updates
    return make_optimizer(replace(config.sft, **schedule, optimizer="adamw", steps=steps), config.policy.moment_dtype)


def make_grpo_step(graphdef: Any, optimizer: Any, config: Config, state: TrainState) -> Any:
    """The jitted update (state, experience, used) -> (state, metrics); the state is donated and keeps its shardings.

    The first `used` micro-batches are summed, and the others not even looked at.
    """
    grpo, limit = config.grpo, sampling_of(config).tokens
    packed = config.rollout.history == "replace"  # then a row holds the turns of an episode as sequences of their own

    def loss(params: Any, frozen: Any, part: Experience) -> tuple[jax.Array, Totals]:
        model = nnx.merge(graphdef, params, frozen)
        log_probs = token_log_probs(model, part.batch, chunk=grpo.chunk, temperature=grpo.temperature, packed=packed)
        reference = part.reference if grpo.beta else None
        totals = grpo_loss(log_probs, part.old, reference, part.advantages, jnp.asarray(part.batch.loss_mask), grpo, limit)
        return totals.loss, totals

    def update(state: TrainState, batch: Experience, used: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        def micro(number: jax.Array, total: Any) -> Any:
            part = micro_batch(batch, grpo.accumulate, number)
            (_, totals), grads = jax.value_and_grad(loss, has_aux=True)(state.params, state.frozen, part)
            return jax.tree.map(jnp.add, total, (totals, grads))

        start = (Totals.zero(), zeros_like_float32(state.params))
        totals, grads = jax.lax.fori_loop(0, used, micro, start)
        count, tokens = jnp.maximum(totals.count, 1.0), jnp.maximum(totals.tokens, 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "grpo/loss": totals.loss / count,
            "grpo/kl": totals.kl / tokens,
            "grpo/clipped": totals.clipped / tokens,
            "grpo/ratio": totals.ratio / tokens,
            "grpo/entropy": totals.entropy / tokens,
            "grpo/grad_norm": optax.tree.norm(grads),
            "policy/sampler_trainer_kl": totals.sampler_kl / tokens,
        }
        return TrainState(state.step + 1, state.key, params, state.frozen, opt_state), metrics

    return jax.jit(update, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))


def train_grpo(model: Qwen25VL, task: Task, chat: Chat, tools: Tools, config: Config, mesh: Mesh, run_dir: Path) -> GrpoRun:
    """Trains for `config.grpo.steps` steps, going on from the last checkpoint under run_dir/grpo if there is one.

    Raises Interrupted after saving when the process is asked to stop. Raises UserError when rows do not split over the mesh,
    when too many tool calls of a step failed (after saving; the run goes on with that step), when the loss is no longer a
    number, and when the disk is full.
    """
    from vstar_jax.training.checkpoint import Checkpointer  # orbax, which the benchmark of a step does without

    _check_rows(config, mesh)
    grpo, offset = config.grpo, config.sft.steps
    optimizer = make_grpo_optimizer(config)
    folder = run_dir / FOLDER
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(mesh):
        graphdef, state = create_state(model, optimizer, config.policy.lora, mesh, config.seed)
        frozen = jax.tree.map(jnp.copy, state.params) if grpo.beta and grpo.reference == "frozen" else None
        collector = Collector(graphdef, task, chat, tools, config, mesh)
        learner = Learner(graphdef, optimizer, config, mesh, state, frozen)
        checkpointer = Checkpointer(folder / "checkpoints", grpo.keep)
        if checkpointer.latest() is not None:
            state, _ = checkpointer.restore(state)
        done = int(state.step) // grpo.updates
        bar = tqdm(total=grpo.steps, initial=done, desc="GRPO", unit="step", disable=not first())
        profile = Profile(config.profile, run_dir / "profile" / "grpo", done)
        with stop_requests() as stops, bar, MetricsWriter(run_dir, resume_step=offset + done) as metrics, profile:
            for number in range(done + 1, grpo.steps + 1):
                profile.reached(number)
                started = time.perf_counter()
                step = collector.collect(nnx.merge_state(state.params, state.frozen), number)
                summary = Summary.of(step, grpo.group)
                measured = summary.metrics()
                failing = failed_share(summary.statuses) > config.tools.failures
                if not failing:
                    state, learned = learner.learn(state, step)
                    measured |= learned
                measured["time/step"] = time.perf_counter() - started
                if first():
                    _write_rollouts(folder / "rollouts" / f"{number:06d}.jsonl", summary.records)
                metrics.write(offset + number, measured)
                if failing:
                    checkpointer.save(state, {})
                    checkpointer.close()
                    raise UserError(_broken_tools(number, summary.statuses))
                bar.set_postfix_str(
                    f"reward {measured['reward/total']:.3f}, accuracy {measured['reward/accuracy']:.2f}, "
                    f"tools {measured['reward/tool']:.2f}, {measured['rollout/tokens_per_s']:.0f} tokens/s"
                )
                bar.update()
                if not np.isfinite(measured.get("grpo/loss", 0.0)):
                    raise UserError(
                        f"the loss is not a number at step {number}: lower grpo.learning_rate or grpo.max_grad_norm and start "
                        f"again from the checkpoint of step {(checkpointer.latest() or 0) // grpo.updates}."
                    )
                stopped = asked_to_stop(stops)
                if number % grpo.save_every == 0 or number == grpo.steps or stopped:
                    checkpointer.save(state, {})
                if stopped:
                    checkpointer.close()
                    raise Interrupted(number, stopped)
        checkpointer.close()
    return GrpoRun(graphdef, state, {"rollout": collector.player.rollout.compilations(), **learner.compilations()})


def _check_rows(config: Config, mesh: Mesh) -> None:
    grpo, devices = config.grpo, sharding.row_devices(mesh)
    rows = {
        f"grpo.prompts is {grpo.prompts}": grpo.prompts,
        f"grpo.accumulate is {grpo.accumulate}, which makes micro-batches of {grpo.prompts * grpo.group // grpo.accumulate} "
        "rows": grpo.prompts * grpo.group // grpo.accumulate,
    }
    for what, count in rows.items():
        if count % devices:
            raise UserError(
                f"{what}, but the mesh {config.mesh} splits rows over {devices} devices: choose rows that {devices} divides, "
                "or another mesh."
            )


class Learner:
    """Turns a step's episodes into updates of the policy."""

    def __init__(self, graphdef: Any, optimizer: Any, config: Config, mesh: Mesh, state: TrainState, frozen: Any):
        """frozen: the parameters of the frozen reference, None where it is not needed."""
        self.config, self.mesh, self.frozen = config, mesh, frozen
        self.reference = make_reference(graphdef, config)
        self.update = make_grpo_step(graphdef, optimizer, config, state)

    def learn(self, state: TrainState, step: Step) -> tuple[TrainState, dict[str, float]]:
        """The state after `grpo.updates` updates on the groups whose rewards differ, and what was measured.

        A step without such a group leaves the parameters as they are and only counts.
        """
        grpo, started = self.config.grpo, time.perf_counter()
        rewards = np.asarray([p.reward.total for p in step.paid]).reshape(-1, grpo.group)
        values, differs = advantages(rewards, grpo.normalise)
        counts = gather((int((~differs).sum()), int(differs.sum())))
        measured = {"grpo/groups_without_variance": float(sum(same for same, _ in counts))}
        if useful_groups := max(different for _, different in counts):
            content = experience(
                [p.played for p in step.paid],
                values.reshape(-1),
                np.repeat(differs, grpo.group),
                step.tokens,
                step.patches,
                grpo.accumulate,
            )
            used = micro_batches(useful_groups * grpo.group, len(step.paid), grpo.accumulate)
            batch = put_batch(content, self.mesh)
            if grpo.beta:
                batch = self.reference(state.params if self.frozen is None else self.frozen, state.frozen, batch, used)
            for number in range(grpo.updates):
                state, updated = self.update(state, batch, used)
                updated = {k: float(v) for k, v in jax.device_get(updated).items()}
                if number:  # only before the first update is this the arithmetic's error alone
                    del updated["policy/sampler_trainer_kl"]
                measured |= updated
        else:
            state = replace(state, step=put(np.asarray(state.step) + grpo.updates, state.step.sharding))
        measured["time/update"] = time.perf_counter() - started
        return state, measured

    def compilations(self) -> dict[str, int]:
        """How often each program was compiled."""
        return {"reference": self.reference._cache_size(), "update": self.update._cache_size()}  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Summary:
    """What a step's episodes were like, those of all processes.

    rewards: part -> of each episode; statuses: of the tools' calls; tokens: that the policy wrote; seconds: phase -> the
    longest of a process; records: JSON of each group, for people.
    """

    rewards: Mapping[str, Sequence[float]]
    statuses: Counter[str]
    tokens: int
    seconds: Mapping[str, float]
    records: Sequence[str]

    @classmethod
    def of(cls, step: Step, members: int) -> "Summary":
        """The same in every process."""
        parts = ("accuracy", "format", "tool", "sub_motion", "total")
        own = cls(
            rewards={part: [getattr(p.reward, part) for p in step.paid] for part in parts},
            statuses=step.counts.statuses,
            tokens=sum(sum(p.played.lengths) for p in step.paid),
            seconds=step.seconds,
            records=[json.dumps(as_record(step, n, members), separators=(",", ":")) for n in range(len(step.episodes))],
        )
        every = gather(own)
        return cls(
            rewards={part: [reward for one in every for reward in one.rewards[part]] for part in parts},
            statuses=sum((one.statuses for one in every), Counter()),
            tokens=sum(one.tokens for one in every),
            seconds={phase: max(one.seconds[phase] for one in every) for phase in own.seconds},
            records=[record for one in every for record in one.records],
        )

    def metrics(self) -> dict[str, float]:
        """The numbers, by the names under which metrics.jsonl has them."""
        told = {f"reward/{part}": float(np.mean(rewards)) for part, rewards in self.rewards.items()}
        told |= {f"tool/{status}": float(self.statuses[status]) for status in STATUSES}
        told["rollout/tokens"] = float(self.tokens)
        rolling = sum(self.seconds[phase] for phase in ("encode", "prefill", "decode", "tools"))
        told["rollout/tokens_per_s"] = self.tokens / rolling
        told["rollout/tools_share"] = self.seconds["tools"] / rolling
        return told | {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}


def _broken_tools(number: int, statuses: Counter[str]) -> str:
    failures = {status: n for status, n in statuses.items() if status != "ok"}
    listed = ", ".join(f"{n} {status}" for status, n in failures.items())
    return (
        f"{sum(failures.values())} of the {statuses.total()} tool calls of step {number} failed ({listed}), so "
        "nothing was learned from it: look at the tools server and its log, then run the same command again, it goes on with "
        "this step; tools.failures sets how many may fail."
    )


def _write_rollouts(path: Path, records: Sequence[str]) -> None:
    """One JSON line a group; a reader sees all of it or nothing."""
    partial_path = path.with_suffix(".partial")
    partial_path.write_text("".join(f"{record}\n" for record in records))
    os.replace(partial_path, path)
