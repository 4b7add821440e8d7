"""Plays episodes with the tools, for evaluation and for reinforcement learning: episodes in, what was written and seen out."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vstar_jax.batch import Example, collate, joined, sampled
from vstar_jax.config import Config
from vstar_jax.data.chat import Chat
from vstar_jax.data.task import Episode
from vstar_jax.dialogue import Decision, Prompts, Reply, first_messages, parse_reply
from vstar_jax.distributed import largest
from vstar_jax.errors import UserError
from vstar_jax.rollout.episode import PHASES, Rollout, Sampling, episode_keys
from vstar_jax.rollout.sampler import Completion
from vstar_jax.rollout.weights import rollout_weights
from vstar_jax.sharding import fetch_batch, local_rows, put_batch
from vstar_jax.tools.host import Host, Layout, Tools
from vstar_jax.tools.protocol import Status

BLANK = np.zeros((2, 28, 28, 3), np.uint8)
"""Frames [T, H, W, 3] for the rows of a process that never had an episode."""


@dataclass(frozen=True)
class Played:
    """An episode that was played.

    parts: its sequences, in which loss_mask marks what the policy wrote: the whole dialogue, or with `rollout.history=replace`
    each turn on its own; log_probs float32 [S], the sampler's, along all parts; turns: the replies; lengths: their tokens;
    decision: the tools that were asked for in any turn; statuses: how their calls ended; reply: the last one, read.
    """

    parts: tuple[Example, ...]
    log_probs: np.ndarray
    turns: tuple[str, ...]
    lengths: tuple[int, ...]
    decision: Decision
    statuses: Mapping[str, Status]
    reply: Reply


class Player:
    """The policy as a function from episodes to what is played, G members of each, at most `rows` episodes at a time.

    Of several processes each plays those of its own rows. host: has the counts of the last call's tools; seconds: how long each
    phase of all calls took, data (prompts and pictures), weights (their copy) and those of `Rollout`; `shape` tokens and
    patches that hold any row of the last call.
    """

    def __init__(
        self,
        graphdef: Any,
        chat: Chat,
        prompts: Prompts,
        tools: Tools,
        config: Config,
        mesh: Mesh,
        sampling: Sampling,
        rows: int,
        members: int = 1,
    ):
        """graphdef: the policy's; sampling: of the replies; rows: the episodes of a call over all processes, which fewer are
        filled up to.
        """
        self.chat, self.prompts, self.config, self.mesh = chat, prompts, config, mesh
        self.sampling, self.rows, self.members = sampling, len(local_rows(mesh, rows)), members
        rollout = config.rollout
        self.replaces = rollout.history == "replace"
        self.host = Host(
            chat, prompts, config.data.dialect, self.replaces, tools, rollout.deadline, offered=config.tools.offered
        )
        self.rollout = Rollout(
            graphdef,
            self.host,
            rollout.turn_tokens,
            chat.stop_ids,
            sampling,
            mesh,
            rollout.mode,
            rollout.history,
            rollout.cache,
        )
        self.seconds = dict.fromkeys(("data", "weights", *PHASES), 0.0)
        self.shape = (0, 0)
        self._filler: Example | None = None

    def weights(self, state: Any) -> Any:
        """What `play` is best given: the policy's state as `rollout.weights` says, for all plays until the next update."""
        if self.config.rollout.weights == "split":
            return state
        started = time.perf_counter()
        copy = jax.block_until_ready(rollout_weights(state, self.config.policy.dtype, self.mesh))
        self.seconds["weights"] += time.perf_counter() - started
        return copy

    def play(self, state: Any, episodes: Sequence[Episode], numbers: Sequence[int]) -> list[Played]:
        """Plays each episode `members` times, those of an episode side by side.

        state: the policy's; episodes: those of this process, which may have none; numbers: of the episodes in the run, their
        randomness follows from it and the seed alone. UserError when a prompt or a turn does not fit its settings.
        """
        started = time.perf_counter()
        missing, data, limits = self.rows - len(episodes), self.config.data, self.config.rollout
        prompts = [self._prompt(episode.frames, episode.fps) for episode in episodes]
        # A process without an episode takes part with the last prompt it had, whose pictures are like the others'.
        self._filler = prompts[-1] if prompts else self._filler or self._prompt(BLANK, 1.0)
        padded = [*prompts, *[self._filler] * missing]
        numbers = [*numbers, *[0] * missing]
        try:
            batch = collate([[p] for p in padded], data.tokens, data.patches, largest)
        except ValueError as error:
            raise UserError(f"a prompt does not fit: {error}.") from None
        layout = Layout(limits.turn_tokens, batch.vision)
        # Rows that only fill up have numbers that the host does not know: no tool is called for them.
        self.host.begin({n * self.members + g: e for n, e in enumerate(episodes) for g in range(self.members)}, layout)
        keys = episode_keys(self.config.seed, numbers, self.members)
        starts = np.asarray([p.positions.max() + 1 for p in padded], np.int32)
        order = np.arange(self.rows * self.members, dtype=np.int32)
        self.seconds["data"] += time.perf_counter() - started
        completions = fetch_batch(self.rollout(state, put_batch(batch, self.mesh), starts, keys, order), self.mesh)
        for phase, taken in self.rollout.seconds.items():
            self.seconds[phase] += taken
        turns = self.sampling.turns
        tokens = batch.tokens.shape[1] + self.sampling.tokens + (turns - 1) * limits.turn_tokens
        self.shape = tokens, turns * layout.patches
        return [self._played(n, prompts[n // self.members], completions) for n in range(len(prompts) * self.members)]

    def _prompt(self, frames: np.ndarray, fps: float) -> Example:
        clip = self.chat.clip(frames, fps)
        messages = first_messages(self.prompts, self.config.data.dialect)
        return self.chat.encode(messages, [clip], add_generation_prompt=True)

    def _played(self, number: int, prompt: Example, completions: Sequence[Completion]) -> Played:
        pieces, log_probs, at = [[prompt]], [np.zeros(len(prompt.tokens), np.float32)], int(prompt.positions.max()) + 1
        texts, lengths = list[str](), list[int]()
        asked, statuses = set[str](), dict[str, Status]()
        for turn, completion in enumerate(completions):
            length = int(completion.lengths[number])
            if not length:  # the episode was over: who goes on writes at least the token that ends the turn
                break
            if turn:
                shown = self.host.shown(number, turn)
                if self.replaces:
                    pieces.append([])
                    at = 0
                silent = np.zeros(len(shown.tokens), bool)
                pieces[-1].append(replace(shown, positions=shown.positions + np.int32(at), loss_mask=silent))
                log_probs.append(np.zeros(len(shown.tokens), np.float32))
                at = int(pieces[-1][-1].positions.max()) + 1
                if (exchange := self.host.exchanges.get((number, turn))) is not None:
                    asked.update(exchange.decision.chosen())
                    statuses |= exchange.outcome.statuses
            tokens = np.asarray(completion.tokens[number, :length])
            pieces[-1].append(sampled(tokens, at))
            log_probs.append(np.asarray(completion.log_probs[number, :length]))
            texts.append(self.chat.decode(tokens))
            lengths.append(length)
            at += length
        return Played(
            parts=tuple(joined(part) for part in pieces),
            log_probs=np.concatenate(log_probs),
            turns=tuple(texts),
            lengths=tuple(lengths),
            decision=Decision(**dict.fromkeys(asked, True)),
            statuses=statuses,
            reply=parse_reply(texts[-1]),
        )
