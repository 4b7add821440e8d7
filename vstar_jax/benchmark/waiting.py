"""Measures the share of a rollout that waits for tools, cold (clips that the server has never seen) and warm (the same again).

Episodes of two turns are played with StickMotion's base model, its dialogues and a tools server.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

from vstar_jax import config as config_module
from vstar_jax import sharding
from vstar_jax.batch import Batch, Turn, collate
from vstar_jax.benchmark import tools as served
from vstar_jax.benchmark.common import check_repeats, machine, spread, table
from vstar_jax.benchmark.rollout import Workload
from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.stick_motion.names import glossary
from vstar_jax.data.task import Episode
from vstar_jax.dialogue import Decision, Prompts, ToolResult, first_messages
from vstar_jax.errors import UserError
from vstar_jax.models import hf
from vstar_jax.rollout.episode import Rollout, episode_keys
from vstar_jax.tools.client import ToolsClient
from vstar_jax.tools.host import Host as ToolsHost
from vstar_jax.tools.host import Layout
from vstar_jax.tools.served import ServedTools
from vstar_jax.training.collect import sampling_of

DECISION = Decision(pose_estimation=True, noun_explanation=True)
FIRST = 1 << 23
"""Number of the first clips, so that they are others than those of the benchmark of tools."""
WARM_TARGET = 0.05
"""Share of a rollout that waits for tools whose answers are cached."""


class Asking:
    """The tools' host, which reads in place of every reply one that asks for tools: an untrained policy asks for none."""

    def __init__(self, host: ToolsHost, chat: Chat):
        self.host = host
        self.reply = np.asarray(chat.tokenizer.encode(f"<think></think>{DECISION.tags()}", add_special_tokens=False), np.int32)

    def __call__(self, turn: int, episodes: np.ndarray, tokens: Any, lengths: Any, positions: np.ndarray) -> Turn:
        """See `rollout.episode.Host`."""
        rows = len(episodes)
        return self.host(turn, episodes, np.tile(self.reply, (rows, 1)), np.full(rows, len(self.reply), np.int32), positions)


class Waiting:
    """Rollouts of two turns of StickMotion with a tools server; the replies have the default lengths and never stop early."""

    def __init__(self, client: ToolsClient, work: Workload):
        self.config, self.work, self.mesh = Config(), work, sharding.make_mesh("1x1")
        path = config_module.resolve(self.config.policy.path)
        self.chat = Chat(path, self.config.video)
        self.prompts = Prompts.load(config_module.resolve(self.config.data.prompts))
        self.graphdef, self.state = nnx.split(hf.load(path, self.config.policy, self.mesh))
        limits = self.config.rollout
        self.host = ToolsHost(self.chat, self.prompts, self.config.data.dialect, False, ServedTools(client), limits.deadline)
        self.rollout = Rollout(
            self.graphdef,
            Asking(self.host, self.chat),
            limits.turn_tokens,
            np.zeros(0, np.int32),
            sampling_of(self.config),
            self.mesh,
            "callback",
        )

    def play(self, clips: Sequence[np.ndarray]) -> dict[str, float]:
        """Seconds of each phase of a rollout on the clips; UserError when a tool failed."""
        episodes = [self._episode(frames) for frames in clips]
        prompts = [self._prompt(e) for e in episodes]
        data = self.config.data
        batch: Batch = collate([[p] for p in prompts], data.tokens, data.patches)
        members = self.work.group
        numbered = {n * members + g: e for n, e in enumerate(episodes) for g in range(members)}
        self.host.begin(numbered, Layout(self.config.rollout.turn_tokens, batch.vision))
        starts = np.asarray([p.positions.max() + 1 for p in prompts], np.int32)
        keys = episode_keys(0, range(len(prompts)), members)
        numbers = np.arange(len(numbered), dtype=np.int32)
        self.rollout(self.state, sharding.put_batch(batch, self.mesh), starts, keys, numbers)
        statuses = self.host.counts.statuses
        if statuses["ok"] != statuses.total() or not statuses:
            raise UserError(f"the tools answered {dict(statuses)}, so there is nothing to measure: look at the server's log.")
        return dict(self.rollout.seconds)

    def _episode(self, frames: np.ndarray) -> Episode:
        labels = tuple(glossary())[: self.config.data.labels]
        return Episode("clip", "base", frames, 8.0, labels, labels[0], lambda _: ToolResult())

    def _prompt(self, episode: Episode) -> Any:
        messages = first_messages(self.prompts, self.config.data.dialect)
        return self.chat.encode(messages, [self.chat.clip(episode.frames, episode.fps)], add_generation_prompt=True)


def measure_waiting(client: ToolsClient, work: Workload, repeats: int) -> dict[str, Any]:
    """The share of `repeats` rollouts that waited for tools, cold and warm in turns, with the seconds of each phase."""
    check_repeats(repeats)
    waiting, given = Waiting(client, work), served.clips(work.prompts)
    waiting.play(given)
    measured: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for number in range(1, repeats + 1):
        fresh = served.unseen(given, FIRST + number)
        for name in measured:
            measured[name].append(waiting.play(fresh))
    return {
        "limits": waiting.config.rollout.max_new_tokens,
        **{
            name: {
                "shares": [s["tools"] / sum(s.values()) for s in taken],
                "phases": {phase: [s[phase] for s in taken] for phase in taken[0]},
            }
            for name, taken in measured.items()
        },
    }


def report(result: Mapping[str, Any]) -> str:
    """What `measure_waiting` gave, as Markdown."""
    names = ("cold", "warm")
    rows = {f"{phase}, s": [spread(result[n]["phases"][phase], ".3f") for n in names] for phase in result["cold"]["phases"]}
    rows["share that waits for tools"] = [spread(result[n]["shares"], ".1%") for n in names]
    text = (
        f"StickMotion's base model with a tools server that finds poses and explains labels, replies of "
        f"{' and '.join(map(str, result['limits']))} tokens ({machine()}); the target is {WARM_TARGET:.0%} when warm, of a "
        "step, which has the update on top of this rollout.\n\n"
    )
    return text + table(names, rows)
