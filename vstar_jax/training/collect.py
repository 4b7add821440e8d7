"""What a step of GRPO learns from: groups of episodes, played with the tools and paid (paper, Eq. 6).

What is drawn for a step follows from the seed and the step's number alone, so that a run which resumes plays what it would
have played.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.task import Episode, Task
from vstar_jax.dialogue import Decision, ToolResult
from vstar_jax.errors import UserError
from vstar_jax.rewards import Reward, length_bonus, score, temporal_bonus
from vstar_jax.rollout.episode import Sampling
from vstar_jax.rollout.player import Played, Player
from vstar_jax.sharding import local_rows
from vstar_jax.tools.host import Counts, Tools

PROMPT_STREAM = 0x6790
"""Keeps the draws of RL (clips, labels, names) apart from those of SFT and evaluation under the same seed."""
SHUFFLED = 1 << 30
"""Added to the number of a prompt whose frames are shuffled, so that its group samples on its own."""


@dataclass(frozen=True)
class Paid:
    """An episode that was played, and what it earned."""

    played: Played
    reward: Reward


@dataclass(frozen=True)
class Step:
    """The episodes of a step that this process has played, those of a group side by side.

    episodes: one a group; tokens, patches: the static shape that holds every row; counts: of the tools' calls; seconds: by
    phase, data (reading clips), encode, prefill, decode, tools and reward.
    """

    episodes: Sequence[Episode]
    paid: Sequence[Paid]
    tokens: int
    patches: int
    counts: Counts
    seconds: Mapping[str, float]


def sampling_of(config: Config) -> Sampling:
    """How a run's episodes are sampled in GRPO."""
    grpo, rollout = config.grpo, config.rollout
    return Sampling(rollout.max_new_tokens, grpo.temperature, grpo.top_p, rollout.turns)


class Collector:
    """Plays the steps of a run."""

    def __init__(self, graphdef: Any, task: Task, chat: Chat, tools: Tools, config: Config, mesh: Mesh):
        self.task, self.config = task, config
        grpo = config.grpo
        self.own = local_rows(mesh, grpo.prompts).tolist()
        self.player = Player(graphdef, chat, task.prompts, tools, config, mesh, sampling_of(config), grpo.prompts, grpo.group)

    def collect(self, state: Any, step: int) -> Step:
        """The step's episodes, paid; a function of the seed, the step and the policy.

        UserError when too few clips can be read, or when a prompt or a turn does not fit its settings.
        """
        grpo, player = self.config.grpo, self.player
        player.seconds = dict.fromkeys(player.seconds, 0.0)
        state = player.weights(state)
        started = time.perf_counter()
        episodes = self._drawn(step)
        numbers = [step * grpo.prompts + n for n in self.own]
        drawing, paying = time.perf_counter() - started, 0.0
        mixed: list[Paid] = []
        if self.config.reward.temporal:
            shuffled = [
                _shuffled(episode, np.random.default_rng((self.config.seed, SHUFFLED, number)))
                for episode, number in zip(episodes, numbers, strict=True)
            ]
            mixed = self._paid(episodes, player.play(state, shuffled, [SHUFFLED + n for n in numbers]))
        played = player.play(state, episodes, numbers)
        started = time.perf_counter()
        paid = self._paid(episodes, played)
        if mixed:
            paid = self._with_temporal_bonus(paid, mixed)
        paying = time.perf_counter() - started
        seconds = {**player.seconds, "data": player.seconds["data"] + drawing, "reward": paying}
        return Step(episodes, paid, *player.shape, player.host.counts, seconds)

    def _drawn(self, step: int) -> list[Episode]:
        """One episode for each prompt of this process. A clip that cannot be read is passed over (the task counts it): the
        next one for its prompt comes from behind those of all prompts, so that no prompt needs to know of another.
        """
        records, prompts, seed = self.task.train_records(), self.config.grpo.prompts, (self.config.seed, PROMPT_STREAM, step)
        order = np.random.default_rng(seed).permutation(len(records))

        def drawn(prompt: int) -> Episode:
            for index in order[prompt::prompts].tolist():
                episode = self.task.episode(records[index], np.random.default_rng((*seed, index)), training=True)
                if episode is not None:
                    return episode
            raise UserError(
                f"grpo.prompts is {prompts}, but too few of the {len(records)} training clips can be read: lower it or check "
                "data.dir."
            )

        return [drawn(prompt) for prompt in self.own]

    def _paid(self, episodes: Sequence[Episode], played: Sequence[Played]) -> list[Paid]:
        config, paid = self.config.reward, list[Paid]()
        for n, p in enumerate(played):
            episode = episodes[n // self.config.grpo.group]
            reward = score(config, p.decision, p.statuses, p.reply, episode.answer, episode.explanation)
            bonus = length_bonus(reward, p.lengths[-1], config)
            paid.append(Paid(p, replace(reward, total=reward.total + bonus)))
        return paid

    def _with_temporal_bonus(self, paid: Sequence[Paid], shuffled: Sequence[Paid]) -> list[Paid]:
        members, with_bonus = self.config.grpo.group, list[Paid]()
        for at in range(0, len(paid), members):
            ordered, mixed = ([p.reward for p in side[at : at + members]] for side in (paid, shuffled))
            for p, bonus in zip(paid[at : at + members], temporal_bonus(ordered, mixed, self.config.reward), strict=True):
                with_bonus.append(replace(p, reward=replace(p.reward, total=p.reward.total + bonus)))
        return with_bonus


def _shuffled(episode: Episode, rng: np.random.Generator) -> Episode:
    """The episode with its frames, and those that its tools return, in another order."""
    order = rng.permutation(len(episode.frames))

    def tools(asked: Decision) -> ToolResult:
        result = episode.tools(asked)
        return result if result.frames is None else replace(result, frames=result.frames[order])

    return replace(episode, frames=episode.frames[order], tools=tools)


def as_record(step: Step, group: int, members: int) -> dict[str, Any]:
    """What is kept of a group for people: the clip, its label, and each of its `members` episodes with its rewards."""
    episode = step.episodes[group]
    rows = step.paid[group * members : (group + 1) * members]
    return {"clip": episode.name, "label": episode.answer, "labels": episode.labels, "episodes": [_record(p) for p in rows]}


def _record(paid: Paid) -> dict[str, Any]:
    played = paid.played
    return {
        "turns": played.turns,
        "answer": played.reply.answer,
        "asked": played.decision.chosen(),
        "statuses": played.statuses,
        "reward": {k: round(v, 6) for k, v in asdict(paid.reward).items()},
    }
