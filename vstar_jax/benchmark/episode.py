"""Measures what the host's part of two-turn episodes costs: the callback against returning to Python, and waiting for tools.

The drivers play the same episodes by random weights, and a host that answers at once. The wait is measured with StickMotion's
base model, its dialogues and a tools server, cold (clips that it has never seen) and warm (the same clips again).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from vstar_jax import config as config_module
from vstar_jax import sharding
from vstar_jax.batch import Batch, Turn, collate
from vstar_jax.benchmark import tools as served
from vstar_jax.benchmark.common import check_repeats, in_turns, machine, ratios, spread, table
from vstar_jax.benchmark.rollout import TEXT, Workload, clip_example
from vstar_jax.config import Config, PolicyConfig
from vstar_jax.data.chat import Chat
from vstar_jax.data.stick_motion.names import glossary
from vstar_jax.data.task import Episode
from vstar_jax.dialogue import Decision, Prompts, ToolResult, first_messages
from vstar_jax.errors import UserError
from vstar_jax.models.config import Architecture
from vstar_jax.models.qwen2_5_vl import create
from vstar_jax.rollout.episode import Mode, Rollout, Sampling, episode_keys
from vstar_jax.tools.client import ToolsClient
from vstar_jax.tools.host import Host as ToolsHost
from vstar_jax.tools.host import Layout
from vstar_jax.tools.served import ServedTools
from vstar_jax.training.collect import sampling_of
from vstar_jax.training.job import load_policy

TURN_TEXT = (6, 153)  # tokens before and after the annotated clip: 192 in all
DECISION = Decision(pose_estimation=True, noun_explanation=True)
WARM_TARGET = 0.05
"""Share of a rollout that waits for tools whose answers are cached."""


class Answering:
    """A host that answers every row at once with the same turn."""

    def __init__(self, rng: np.random.Generator, architecture: Architecture, rows: int):
        example = clip_example(rng, architecture, TURN_TEXT)
        self.tokens, self.next = len(example.tokens), int(example.positions.max()) + 1
        self.batch = collate([[example]] * rows, (self.tokens,), (len(example.patches),))

    def __call__(self, turn: int, episodes: np.ndarray, tokens: Any, lengths: Any, positions: np.ndarray) -> Turn:
        """See `rollout.episode.Host`."""
        rows = jax.tree.map(lambda x: x[: len(episodes)], self.batch)
        batch = replace(rows, positions=rows.positions + positions[:, None, None])
        return Turn(batch, (positions + self.next).astype(np.int32), np.ones(len(episodes), bool))


def measure_drivers(model: str, work: Workload, repeats: int) -> dict[str, Any]:
    """Times `repeats` rollouts of two turns by each driver, in turns; both replies have `work.tokens` tokens.

    model: a preset of `Architecture`, with random weights. UserError for too few repeats, and when the drivers disagree.
    """
    check_repeats(repeats)
    architecture, rng = Architecture.preset(model), np.random.default_rng(0)
    graphdef, state = nnx.split(create(architecture, PolicyConfig(), seed=0))
    prompts = [clip_example(rng, architecture, TEXT) for _ in range(work.prompts)]
    mesh, rows = sharding.make_mesh("1x1"), work.prompts * work.group
    host = Answering(rng, architecture, rows)
    batch = sharding.put_batch(collate([[p] for p in prompts], (len(prompts[0].tokens),), (len(prompts[0].patches),)), mesh)
    starts = np.asarray([p.positions.max() + 1 for p in prompts], np.int32)
    sampling = Sampling((work.tokens,), work.temperature, work.top_p)

    def player(mode: Mode) -> Any:
        rollout = Rollout(graphdef, host, host.tokens, np.zeros(0, np.int32), sampling, mesh, mode)
        keys = episode_keys(0, range(work.prompts), work.group)
        return partial(rollout, state, batch, starts, keys, np.arange(rows, dtype=np.int32))

    modes: tuple[Mode, ...] = ("callback", "segmented")
    players: dict[str, Any] = {mode: player(mode) for mode in modes}
    first, second = ([np.asarray(c.tokens) for c in play()] for play in players.values())
    if any((a != b).any() for a, b in zip(first, second, strict=True)):
        raise UserError(
            "the drivers callback and segmented give other tokens: find the cause with tests/test_rollout.py first."
        )
    seconds = in_turns(players, repeats)
    return {"new_tokens": work.tokens, "seconds": seconds, "ratios": ratios(seconds["callback"], seconds["segmented"])}


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
        self.graphdef, self.state = nnx.split(load_policy(self.config, self.mesh))
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
        fresh = served.unseen(given, number)
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
    """Both measurements, as Markdown. result: {"drivers": of `measure_drivers`, "tools": of `measure_waiting` or None}."""
    drivers, waiting = result["drivers"], result["tools"]
    text = (
        f"Episodes of two turns with two replies of {drivers['new_tokens']} tokens and a host that answers at once: callback "
        f"{spread(drivers['seconds']['callback'], '.3f')} s, segmented {spread(drivers['seconds']['segmented'], '.3f')} s; "
        f"callback is {spread(drivers['ratios'], '.2f')} times as fast, repeat by repeat.\n"
    )
    if waiting is None:
        return text
    names = ("cold", "warm")
    rows = {f"{phase}, s": [spread(waiting[n]["phases"][phase], ".3f") for n in names] for phase in waiting["cold"]["phases"]}
    rows["share that waits for tools"] = [spread(waiting[n]["shares"], ".1%") for n in names]
    text += (
        f"\nStickMotion's base model with a tools server that finds poses and explains labels, replies of "
        f"{' and '.join(map(str, waiting['limits']))} tokens ({machine()}); the target is {WARM_TARGET:.0%} when warm, of a "
        "step, which has the update on top of this rollout.\n\n"
    )
    return text + table(names, rows)
