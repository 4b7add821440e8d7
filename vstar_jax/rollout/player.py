"""Plays the groups of a GRPO step with the tools and pays them: episodes in, what there is to learn from out.

What is drawn for a step follows from the seed and the step's number alone, so that a run which resumes plays what it would
have played.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vstar_jax.batch import Example, collate, joined, sampled
from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.task import Episode, Task
from vstar_jax.dialogue import Decision, ToolResult, first_messages, parse_reply
from vstar_jax.errors import UserError
from vstar_jax.rewards import Reward, length_bonus, score, temporal_bonus
from vstar_jax.rollout.episode import Rollout, Sampling, episode_keys
from vstar_jax.rollout.sampler import Completion
from vstar_jax.sharding import put_batch
from vstar_jax.tools.host import Counts, Host, Layout, Tools

PROMPT_STREAM = 0x6790
"""Keeps the draws of RL (clips, labels, names) apart from those of SFT and evaluation under the same seed."""
SHUFFLED = 1 << 30
"""Added to the number of a prompt whose frames are shuffled, so that its group samples on its own."""


@dataclass(frozen=True)
class Played:
    """An episode that was played: its pieces as one example, the sampler's log-probabilities float32 [S], its reward, and what
    is kept of it for people: the replies, the answer, the tools asked for and how their calls ended.
    """

    example: Example
    log_probs: np.ndarray
    reward: Reward
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """The episodes of a step, those of a group side by side.

    episodes: one a group; tokens, patches: the static shape that holds every row; counts: of the tools' calls; seconds: by
    phase, data (reading clips), encode, prefill, decode, tools and reward.
    """

    episodes: Sequence[Episode]
    played: Sequence[Played]
    tokens: int
    patches: int
    counts: Counts
    seconds: Mapping[str, float]


class Player:
    """Plays the steps of a run."""

    def __init__(self, graphdef: Any, task: Task, chat: Chat, tools: Tools, config: Config, mesh: Mesh):
        self.task, self.chat, self.config, self.mesh = task, chat, config, mesh
        rollout, grpo = config.rollout, config.grpo
        self.host = Host(chat, task.prompts, config.data.dialect, False, tools, rollout.deadline)
        self.sampling = Sampling(rollout.max_new_tokens, grpo.temperature, grpo.top_p)
        self.rollout = Rollout(graphdef, self.host, rollout.turn_tokens, chat.stop_ids, self.sampling, mesh, rollout.mode)

    def play(self, state: Any, step: int) -> Step:
        """The step's episodes, paid; a function of the seed, the step and the policy.

        UserError when too few clips can be read, or when a prompt or a turn does not fit its settings.
        """
        grpo, seconds = self.config.grpo, dict[str, float]()
        started = time.perf_counter()
        rng = np.random.default_rng((self.config.seed, PROMPT_STREAM, step))
        episodes = self._drawn(rng)
        numbers = [step * grpo.prompts + n for n in range(grpo.prompts)]
        seconds["data"] = time.perf_counter() - started
        shuffled: list[Played] = []
        if self.config.reward.temporal:
            mixed = [_shuffled(episode, rng) for episode in episodes]
            shuffled = self._group(state, mixed, [SHUFFLED + n for n in numbers], seconds)[0]
        played, tokens, patches = self._group(state, episodes, numbers, seconds)
        if shuffled:
            played = self._with_temporal_bonus(played, shuffled)
        return Step(episodes, played, tokens, patches, self.host.counts, seconds)

    def _drawn(self, rng: np.random.Generator) -> list[Episode]:
        """One episode for each prompt; clips that cannot be read are passed over (the task counts them)."""
        records, episodes = self.task.train_records(), list[Episode]()
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

    def _group(
        self, state: Any, episodes: Sequence[Episode], numbers: Sequence[int], seconds: dict[str, float]
    ) -> tuple[list[Played], int, int]:
        """Plays the groups of these episodes; also the tokens and patches that hold any of their rows. Adds to `seconds`."""
        started = time.perf_counter()
        members, data, limits = self.config.grpo.group, self.config.data, self.config.rollout
        prompts = [self._prompt(episode) for episode in episodes]
        try:
            batch = collate([[p] for p in prompts], data.tokens, data.patches)
        except ValueError as error:
            raise UserError(f"a prompt does not fit: {error}.") from None
        rows = {n * members + g: episode for n, episode in enumerate(episodes) for g in range(members)}
        layout = Layout(limits.turn_tokens, batch.vision)
        self.host.begin(rows, layout)
        keys = episode_keys(self.config.seed, numbers, members)
        starts = np.asarray([p.positions.max() + 1 for p in prompts], np.int32)
        seconds["data"] += time.perf_counter() - started
        order = np.asarray(list(rows), np.int32)
        completions = jax.device_get(self.rollout(state, put_batch(batch, self.mesh), starts, keys, order))
        for phase, taken in self.rollout.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + taken
        started = time.perf_counter()
        played = [self._paid(n, episode, prompts[n // members], completions) for n, episode in rows.items()]
        seconds["reward"] = seconds.get("reward", 0.0) + time.perf_counter() - started
        turns = self.sampling.turns
        tokens = batch.tokens.shape[1] + turns * limits.max_new_tokens + (turns - 1) * limits.turn_tokens
        return played, tokens, turns * layout.patches

    def _prompt(self, episode: Episode) -> Example:
        clip = self.chat.clip(episode.frames, episode.fps)
        messages = first_messages(self.task.prompts, self.config.data.dialect)
        return self.chat.encode(messages, [clip], add_generation_prompt=True)

    def _paid(self, number: int, episode: Episode, prompt: Example, completions: Sequence[Completion]) -> Played:
        parts, log_probs, at = [prompt], [np.zeros(len(prompt.tokens), np.float32)], int(prompt.positions.max()) + 1
        texts: list[str] = []
        decision, statuses = Decision(), dict[str, str]()
        for turn, completion in enumerate(completions):
            if turn:
                if (exchange := self.host.exchanges.get((number, turn))) is not None:
                    decision, statuses = exchange.decision, dict(exchange.outcome.statuses)
                shown = self.host.shown(number, turn)
                silent = np.zeros(len(shown.tokens), bool)
                parts.append(replace(shown, positions=shown.positions + np.int32(at), loss_mask=silent))
                log_probs.append(np.zeros(len(shown.tokens), np.float32))
                at = int(parts[-1].positions.max()) + 1
            length = int(completion.lengths[number])
            tokens = np.asarray(completion.tokens[number, :length])
            parts.append(sampled(tokens, at))
            log_probs.append(np.asarray(completion.log_probs[number, :length]))
            texts.append(self.chat.decode(tokens))
            at += length
        reply = parse_reply(texts[-1])
        reward = score(self.config.reward, decision, statuses, reply, episode.answer, episode.explanation)
        bonus = length_bonus(reward, int(completions[-1].lengths[number]), self.config.reward)
        reward = replace(reward, total=reward.total + bonus)
        record = {"turns": texts, "answer": reply.answer, "asked": decision.chosen(), "statuses": statuses}
        return Played(joined(parts), np.concatenate(log_probs), reward, record)

    def _with_temporal_bonus(self, played: Sequence[Played], shuffled: Sequence[Played]) -> list[Played]:
        members, paid = self.config.grpo.group, list[Played]()
        for at in range(0, len(played), members):
            ordered, mixed = ([p.reward for p in side[at : at + members]] for side in (played, shuffled))
            for p, bonus in zip(played[at : at + members], temporal_bonus(ordered, mixed, self.config.reward), strict=True):
                paid.append(replace(p, reward=replace(p.reward, total=p.reward.total + bonus)))
        return paid


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
    rows = step.played[group * members : (group + 1) * members]
    return {
        "clip": episode.name,
        "label": episode.answer,
        "labels": episode.labels,
        "episodes": [{**p.record, "reward": {k: round(v, 6) for k, v in asdict(p.reward).items()}} for p in rows],
    }
