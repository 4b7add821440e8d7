"""The GRPO loop: groups of episodes are played with the tools, paid, and the policy is updated (paper, Eq. 3-6)."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from vstar_jax import sharding
from vstar_jax.batch import Batch, Example, collate, joined, sampled
from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.task import Episode, Task
from vstar_jax.dialogue import Decision, first_messages, parse_reply
from vstar_jax.errors import Interrupted, UserError
from vstar_jax.models.lora import without
from vstar_jax.models.qwen2_5_vl import Qwen25VL
from vstar_jax.objectives.grpo import Totals, advantages, grpo_loss, token_log_probs
from vstar_jax.rewards import Reward, length_bonus, score
from vstar_jax.rollout.episode import Rollout, Sampling, episode_keys
from vstar_jax.sharding import put_batch
from vstar_jax.tools.host import Host, Layout, Tools
from vstar_jax.tools.protocol import STATUSES
from vstar_jax.training.checkpoint import Checkpointer
from vstar_jax.training.metrics import MetricsWriter
from vstar_jax.training.sft import stop_requests
from vstar_jax.training.state import TrainState, create_state, make_optimizer

PROMPT_STREAM = 0x6790
"""Keeps the draws of RL (clips, labels, names) apart from those of SFT and evaluation under the same seed."""


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
class Played:
    """An episode that was played: its pieces as one example, the sampler's log-probabilities [S], its reward and its record."""

    example: Example
    log_probs: np.ndarray
    reward: Reward
    record: Mapping[str, Any]


@dataclass(frozen=True)
class GrpoRun:
    """A finished run: the graph definition and the trained state."""

    graphdef: Any
    state: TrainState


class Player:
    """Plays the groups of a step and pays them."""

    def __init__(self, graphdef: Any, task: Task, chat: Chat, tools: Tools, config: Config, mesh: Mesh):
        self.task, self.chat, self.config, self.mesh = task, chat, config, mesh
        rollout, grpo = config.rollout, config.grpo
        self.host = Host(chat, task.prompts, config.data.dialect, False, tools, rollout.deadline)
        sampling = Sampling(rollout.max_new_tokens, grpo.temperature, grpo.top_p)
        self.rollout = Rollout(graphdef, self.host, rollout.turn_tokens, chat.stop_ids, sampling, mesh, rollout.mode)

    def play(self, state: Any, step: int) -> list[Played]:
        """The episodes of a step, those of a group side by side; a function of the seed, the step and the policy."""
        grpo = self.config.grpo
        episodes = self._episodes(step)
        prompts = [self._prompt(e) for e in episodes]
        batch = collate([[p] for p in prompts], self.config.data.tokens, self.config.data.patches)
        rows = {n * grpo.group + g: e for n, e in enumerate(episodes) for g in range(grpo.group)}
        self.host.begin(rows, Layout(self.config.rollout.turn_tokens, batch.vision))
        keys = episode_keys(self.config.seed, [step * grpo.prompts + n for n in range(grpo.prompts)], grpo.group)
        starts = np.asarray([p.positions.max() + 1 for p in prompts], np.int32)
        numbers = np.asarray(list(rows), np.int32)
        completions = jax.device_get(self.rollout(state, put_batch(batch, self.mesh), starts, keys, numbers))
        return [self._paid(n, e, prompts[n // grpo.group], completions) for n, e in rows.items()]

    def _episodes(self, step: int) -> list[Episode]:
        """One episode for each prompt of a step; clips that cannot be read are passed over (the task counts them)."""
        records = self.task.train_records()
        rng = np.random.default_rng((self.config.seed, PROMPT_STREAM, step))
        episodes: list[Episode] = []
        for index in rng.permutation(len(records)):
            episode = self.task.episode(records[int(index)], rng, training=True)
            if episode is not None:
                episodes.append(episode)
            if len(episodes) == self.config.grpo.prompts:
                return episodes
        raise UserError(
            f"grpo.prompts is {self.config.grpo.prompts}, but only {len(episodes)} of the {len(records)} training clips can be "
            "read: lower it or check data.dir."
        )

    def _prompt(self, episode: Episode) -> Example:
        clip = self.chat.clip(episode.frames, episode.fps)
        messages = first_messages(self.task.prompts, self.config.data.dialect)
        return self.chat.encode(messages, [clip], add_generation_prompt=True)

    def _paid(self, number: int, episode: Episode, prompt: Example, completions: Sequence[Any]) -> Played:
        parts, log_probs, at = [prompt], [np.zeros(len(prompt.tokens), np.float32)], int(prompt.positions.max()) + 1
        texts: list[str] = []
        decision, statuses = Decision(), dict[str, str]()
        for turn, completion in enumerate(completions):
            if turn and (exchange := self.host.exchanges.get((number, turn))) is not None:
                decision, statuses = exchange.decision, dict(exchange.outcome.statuses)
            if turn:
                shown = self.host.shown(number, turn)
                silent = np.zeros(len(shown.tokens), bool)
                parts.append(replace(shown, positions=shown.positions + np.int32(at), loss_mask=silent))
                log_probs.append(np.zeros(len(shown.tokens), np.float32))
                at = int(parts[-1].positions.max()) + 1
            length = int(completion.lengths[number])
            tokens = completion.tokens[number, :length]
            parts.append(sampled(tokens, at))
            log_probs.append(completion.log_probs[number, :length])
            texts.append(self.chat.decode(tokens))
            at += length
        reply = parse_reply(texts[-1])
        reward = score(self.config.reward, decision, statuses, reply, episode.answer, episode.explanation)
        bonus = length_bonus(reward, int(completions[-1].lengths[number]), self.config.reward)
        reward = replace(reward, total=reward.total + bonus)
        record = {"clip": episode.name, "label": episode.answer, "answer": reply.answer, "turns": texts, "statuses": statuses}
        return Played(joined(parts), np.concatenate(log_probs), reward, {**record, "reward": asdict(reward)})


def experience(played: Sequence[Played], values: np.ndarray, config: Config) -> Experience:
    """Episodes in static shapes; values float32 [B], their advantages. The reference's log-probabilities are still zeros."""
    batch = collate([[p.example] for p in played], config.data.tokens, [2 * n for n in config.data.patches])
    old = np.zeros(batch.tokens.shape, np.float32)
    for row, p in zip(old, played, strict=True):
        row[: len(p.log_probs)] = p.log_probs
    return Experience(batch, old, np.zeros_like(old), values)


def make_grpo_step(graphdef: Any, optimizer: Any, config: Config, state: TrainState) -> Any:
    """The jitted update (state, experience) -> (state, metrics); the state is donated and keeps its shardings."""
    grpo, limit = config.grpo, 2 * config.rollout.max_new_tokens

    def loss(params: Any, frozen: Any, part: Experience):
        model = nnx.merge(graphdef, params, frozen)
        log_probs = token_log_probs(model, part.batch, chunk=grpo.chunk, temperature=grpo.temperature)
        reference = part.reference if grpo.beta else None
        totals = grpo_loss(log_probs, part.old, reference, part.advantages, jnp.asarray(part.batch.loss_mask), grpo, limit)
        return totals.loss, totals

    def split(x: jax.Array) -> jax.Array:
        parts = x.reshape(-1, grpo.accumulate, *x.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(parts, None, "batch", *(None,) * (x.ndim - 1))

    def update(state: TrainState, batch: Experience):
        def micro(total, part: Experience):
            (_, totals), grads = jax.value_and_grad(loss, has_aux=True)(state.params, state.frozen, part)
            return jax.tree.map(jnp.add, total, (totals, grads)), None

        start = (Totals.zero(), jax.tree.map(jnp.zeros_like, state.params))
        (totals, grads), _ = jax.lax.scan(micro, start, jax.tree.map(split, batch))
        count, tokens = jnp.maximum(totals.count, 1.0), jnp.maximum(totals.tokens, 1.0)
        grads = jax.tree.map(lambda g: (g / count).astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), state.params, updates)
        metrics = {
            "grpo/loss": totals.loss / count,
            "grpo/kl": totals.kl / tokens,
            "grpo/clipped": totals.clipped / tokens,
            "grpo/ratio": totals.ratio / tokens,
            "grpo/entropy": totals.entropy / tokens,
            "policy/sampler_trainer_kl": totals.sampler_kl / tokens,
        }
        return TrainState(state.step + 1, state.key, params, state.frozen, opt_state), metrics

    return jax.jit(update, donate_argnums=0, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))


def train_grpo(model: Qwen25VL, task: Task, chat: Chat, tools: Tools, config: Config, mesh: Mesh, run_dir: Path) -> GrpoRun:
    """Trains for `config.grpo.steps` steps, going on from the last checkpoint under run_dir/grpo if there is one.

    Raises Interrupted after saving when the process is asked to stop, and UserError when the disk is full.
    """
    grpo = config.grpo
    optimizer = make_optimizer(replace(config.sft, **{k: getattr(grpo, k) for k in SHARED}, steps=grpo.steps * grpo.updates))
    with jax.set_mesh(mesh):
        graphdef, state = create_state(model, optimizer, config.policy.lora, mesh, config.seed)
        first_params = jax.tree.map(jnp.copy, state.params)
        player = Player(graphdef, task, chat, tools, config, mesh)
        update = make_grpo_step(graphdef, optimizer, config, state)

        @jax.jit
        def reference(params: Any, frozen: Any, batch: Batch) -> jax.Array:
            policy = nnx.merge(graphdef, params, frozen)
            policy = without(policy) if grpo.reference == "adapters_off" else policy
            return token_log_probs(policy, batch, chunk=grpo.chunk, temperature=grpo.temperature)

        folder = run_dir / "grpo"
        (folder / "rollouts").mkdir(parents=True, exist_ok=True)
        checkpointer = Checkpointer(folder / "checkpoints", grpo.keep)
        if checkpointer.latest() is not None:
            state, _ = checkpointer.restore(state)
        done = int(state.step) // grpo.updates
        bar = tqdm(total=grpo.steps, initial=done, desc="GRPO", unit="step", disable=jax.process_index() != 0)
        with stop_requests() as stops, bar, MetricsWriter(run_dir, resume_step=config.sft.steps + done) as metrics:
            for step in range(done + 1, grpo.steps + 1):
                started = time.perf_counter()
                played = player.play(nnx.merge_state(state.params, state.frozen), step)
                rollout_seconds = time.perf_counter() - started
                rewards = np.asarray([p.reward.total for p in played]).reshape(-1, grpo.group)
                values, differs = advantages(rewards, grpo.normalise)
                measured = _told(played, player.host, float(differs.mean()))
                measured["time/rollout"], measured["time/tools"] = rollout_seconds, player.host.counts.seconds
                if differs.any():
                    batch = put_batch(experience(played, values.reshape(-1), config), mesh)
                    if grpo.beta:
                        kept = state.params if grpo.reference == "adapters_off" else first_params
                        batch = replace(batch, reference=reference(kept, state.frozen, batch.batch))
                    for _ in range(grpo.updates):
                        state, updated = update(state, batch)
                        measured |= {k: float(v) for k, v in jax.device_get(updated).items()}
                else:
                    state = replace(state, step=state.step + grpo.updates)
                measured["time/step"] = time.perf_counter() - started
                measured["rollout/tokens_per_s"] = measured["rollout/tokens"] / rollout_seconds
                metrics.write(config.sft.steps + step, measured)
                _write_rollouts(folder / "rollouts" / f"{step:06d}.jsonl", played)
                bar.set_postfix_str(
                    f"reward {measured['reward/total']:.3f}, accuracy {measured['reward/accuracy']:.2f}, "
                    f"tools {measured['reward/tool']:.2f}, {measured['rollout/tokens_per_s']:.0f} tokens/s"
                )
                bar.update()
                if step % grpo.save_every == 0 or step == grpo.steps or stops:
                    checkpointer.save(state, {})
                if stops:
                    checkpointer.close()
                    raise Interrupted(step, stops[0])
        checkpointer.close()
    return GrpoRun(graphdef, state)


SHARED = ("learning_rate", "warmup", "weight_decay", "max_grad_norm")
"""Settings of the optimizer that both phases have."""


def _told(played: Sequence[Played], host: Host, differing: float) -> dict[str, float]:
    """What a step's episodes were like, as metrics."""
    parts = ("accuracy", "format", "tool", "sub_motion", "total")
    told = {f"reward/{part}": float(np.mean([getattr(p.reward, part) for p in played])) for part in parts}
    told |= {f"tool/{status}": float(host.counts.statuses[status]) for status in STATUSES}
    told["rollout/tokens"] = float(sum(p.example.loss_mask.sum() for p in played))
    told["grpo/groups_without_variance"] = 1.0 - differing
    return told


def _write_rollouts(path: Path, played: Sequence[Played]) -> None:
    path.write_text("".join(json.dumps(p.record, default=str) + "\n" for p in played))
