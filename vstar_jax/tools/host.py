"""The host's side of a rollout's callback: replies in, the next turn's input out, in static shapes and in bounded time.

It reads the decisions of all rows, asks the tools for all of them at once, and lays their results out as the arrays that the
jitted program expects. Whatever goes wrong becomes a sentence that the policy reads and a status that is counted: nothing
here raises, calls JAX, or waits longer than the deadline.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from vstar_jax.batch import Batch, Example, Groups, Turn, Vision, collate, group, sampled
from vstar_jax.data.chat import Chat
from vstar_jax.data.task import Episode
from vstar_jax.dialogue import TOOLS, Decision, Dialect, Prompts, ToolResult, parse_decision, parse_reply, second_messages
from vstar_jax.errors import UserError
from vstar_jax.tools.protocol import SENTENCES, Status

log = logging.getLogger(__name__)

SHARDS = 64
"""Calls that may wait for the tools at once, those that hang among them."""
GRACE = 0.5
"""Seconds beyond the deadline that tools which do not keep it are waited for."""


@dataclass(frozen=True)
class Call:
    """What one row asks for: its episode, the number of the turn, and the decision."""

    episode: Episode
    turn: int
    decision: Decision


@dataclass(frozen=True)
class Outcome:
    """What the tools made of a call: their results, and a status for every tool that was asked for."""

    result: ToolResult
    statuses: Mapping[str, Status]


class Tools(Protocol):
    """Something that answers calls: the server's client, or a dataset's own annotations."""

    def __call__(self, calls: Sequence[Call], deadline: float) -> Sequence[Outcome]:
        """An outcome for each call, within `deadline` seconds."""
        ...


def annotations(calls: Sequence[Call], deadline: float) -> list[Outcome]:
    """Tools that never fail: each episode's own annotations."""
    return [Outcome(c.episode.tools(c.decision), dict.fromkeys(c.decision.chosen(), "ok")) for c in calls]


@dataclass(frozen=True)
class Exchange:
    """What passed between two replies: the first one's text, what it asked for, the outcome, and what the policy reads."""

    reply: str
    decision: Decision
    outcome: Outcome
    example: Example


@dataclass
class Counts:
    """Calls by status, and seconds that the program waited for the host (the longest of the shards that ran at once)."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def failed_share(statuses: Counter[str]) -> float:
    """The share of the calls that gave nothing, 0 where none was made."""
    return (statuses.total() - statuses["ok"]) / statuses.total() if statuses else 0.0


@dataclass(frozen=True)
class Layout:
    """The static shapes of a turn's input: tokens S, and the prompts' pictures, whose grids the annotated clips have."""

    tokens: int
    vision: Vision | None

    @property
    def patches(self) -> int:
        return 0 if self.vision is None else self.vision.patches.shape[1]


FILLER = sampled(np.zeros(1, np.int32), 0)
"""What a row is shown that only fills up a batch."""


class Host:
    """`rollout.episode.Host` for two-stage dialogues; `begin` tells it which episodes a rollout plays."""

    def __init__(
        self,
        chat: Chat,
        prompts: Prompts,
        dialect: Dialect,
        replace_history: bool,
        tools: Tools,
        deadline: float,
        offered: Sequence[str] = tuple(TOOLS),
    ):
        """deadline: seconds for the tools of a turn. replace_history: a turn's input stands alone, with the annotated clip (or
        the raw one where there is none) in the place of what was shown before, as the released checkpoints were trained.
        offered: a wish for any other tool is not heard.
        """
        self.chat, self.prompts, self.dialect, self.replace_history = chat, prompts, dialect, replace_history
        self.tools, self.deadline, self.offered = tools, deadline, offered
        self.counts = Counts()
        self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(SHARDS, thread_name_prefix="tools")

    def begin(self, episodes: Mapping[int, Episode], layout: Layout) -> None:
        """Forgets the last rollout; `episodes` by their numbers are what the next one plays, other rows are over after a reply.

        Raises UserError when the input of a turn in which every tool failed would not fit `layout`.
        """
        self.episodes, self.layout = dict(episodes), layout
        self.counts, self.exchanges = Counts(), dict[tuple[int, int], Exchange]()
        self._over = set[tuple[int, int]]()
        failed = self._failed(Decision(True, True, True, True), "error").result
        self._plain: dict[int, Example] = {}
        for episode in {id(e): e for e in self.episodes.values()}.values():
            plain = self._example(episode, failed)
            if not self._fits(plain):
                raise UserError(
                    f"the second turn of clip {episode.name} needs {len(plain.tokens)} tokens and {len(plain.patches)} patches "
                    f"without any tool's answer, but rollout.turn_tokens is {layout.tokens} and its clip has {layout.patches} "
                    "patches: raise rollout.turn_tokens or give fewer labels."
                )
            self._plain[id(episode)] = plain

    def shown(self, episode: int, turn: int) -> Example:
        """What the policy was shown after reply number `turn` of an episode, with positions from 0."""
        if exchange := self.exchanges.get((episode, turn)):
            return exchange.example
        return self._plain[id(self.episodes[episode])] if episode in self.episodes else FILLER

    def __call__(self, turn: int, episodes: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, positions: np.ndarray) -> Turn:
        """See `rollout.episode.Host`."""
        started, numbers = time.monotonic(), [int(n) for n in episodes]
        try:
            self._answer(turn, numbers, tokens, lengths)
        except Exception:
            log.exception("the host of turn %d failed: its %d episodes go on without tools", turn, len(numbers))
            with self._lock:
                self.counts.statuses["error"] += sum(n in self.episodes for n in numbers)
                for n in numbers:
                    self.exchanges.pop((n, turn), None)
        examples = [self.shown(n, turn) for n in numbers]
        batch = self._batch(examples)
        starts = np.zeros_like(positions) if self.replace_history else positions
        batch = replace(batch, positions=np.where(batch.segments[..., None] > 0, batch.positions + starts[:, None, None], 0))
        following = starts + np.asarray([e.positions.max() + 1 for e in examples], np.int32)
        active = np.asarray([n in self.episodes and (n, turn) not in self._over for n in numbers])
        with self._lock:
            self.counts.seconds = max(self.counts.seconds, time.monotonic() - started)
        return Turn(batch, following.astype(np.int32), active)

    def _answer(self, turn: int, numbers: Sequence[int], tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Makes the exchanges of the rows that have none yet; members of a group who ask the same are answered once."""
        replies, decisions = dict[int, str](), dict[int, Decision]()
        for row, n in enumerate(numbers):
            if n not in self.episodes or (n, turn) in self.exchanges:
                continue
            reply = self.chat.decode(tokens[row, : lengths[row]])
            if turn > 1 and parse_reply(reply).answer is not None:
                self._over.add((n, turn))
            else:
                replies[n], decisions[n] = reply, self._heard(reply)
        calls = {(id(self.episodes[n]), d): Call(self.episodes[n], turn, d) for n, d in decisions.items()}
        told = {key: self._told(c, o) for (key, c), o in zip(calls.items(), self._asked(list(calls.values())), strict=True)}
        for n, decision in decisions.items():
            outcome, example = told[id(self.episodes[n]), decision]
            with self._lock:
                self.counts.statuses.update(outcome.statuses.values())
                self.exchanges[n, turn] = Exchange(replies[n], decision, outcome, example)

    def _heard(self, reply: str) -> Decision:
        """What a reply asks for, of the tools that are offered."""
        chosen = parse_decision(reply, self.dialect).chosen()
        return Decision(**{name: True for name in chosen if name in self.offered})

    def _told(self, call: Call, outcome: Outcome) -> tuple[Outcome, Example]:
        """The outcome of a call and how the policy reads it; what does not fit its place is malformed."""
        if _like(outcome.result.frames, call.episode.frames):
            example = self._example(call.episode, outcome.result)
            if self._fits(example):
                return outcome, example
        outcome = self._failed(call.decision, "malformed")
        return outcome, self._example(call.episode, outcome.result)

    def _asked(self, calls: Sequence[Call]) -> list[Outcome]:
        """The outcomes of all calls; those without a decision for any tool need no tool."""
        asked = [c for c in calls if c.decision.chosen()]
        answers: list[Outcome] = []
        if asked:
            future: Future[Sequence[Outcome]] = self._pool.submit(self.tools, asked, self.deadline)
            try:
                answers = list(future.result(self.deadline + GRACE))
                if len(answers) != len(asked):
                    raise ValueError(f"{len(answers)} answers to {len(asked)} calls")
            except FutureTimeout:
                answers = [self._failed(c.decision, "timeout") for c in asked]
            except Exception as error:
                log.warning("the tools failed: %s", error)
                answers = [self._failed(c.decision, "error") for c in asked]
        found = iter(answers)
        return [next(found) if c.decision.chosen() else Outcome(ToolResult(), {}) for c in calls]

    def _failed(self, decision: Decision, status: Status) -> Outcome:
        return Outcome(ToolResult(failures=(SENTENCES[status],)), dict.fromkeys(decision.chosen(), status))

    def _example(self, episode: Episode, result: ToolResult) -> Example:
        """The turn's input as an Example whose positions count from 0."""
        messages = second_messages(self.prompts, result, episode.labels, self.dialect)
        frames = result.frames
        if self.replace_history and frames is None:
            frames = episode.frames
            messages[0]["content"].insert(0, {"type": "video"})
        clips = [] if frames is None else [self.chat.clip(frames, episode.fps)]
        if self.replace_history:
            return self.chat.encode(messages, clips, add_generation_prompt=True)
        return self.chat.encode_continuation(messages, clips, 0)

    def _fits(self, example: Example) -> bool:
        return len(example.tokens) <= self.layout.tokens and len(example.patches) <= self.layout.patches

    def _batch(self, examples: Sequence[Example]) -> Batch:
        """The rows in the layout's shapes; a batch without any annotated clip has empty pictures."""
        like = self.layout.vision
        batch = collate([[e] for e in examples], (self.layout.tokens,), (self.layout.patches,))
        if like is None:
            return replace(batch, vision=None)
        rows, patches = len(examples), self.layout.patches
        pixels = np.zeros((rows, *like.patches.shape[1:]), np.uint8) if batch.vision is None else batch.vision.patches
        places = np.zeros((rows, patches, 2), np.int32) if batch.vision is None else batch.vision.patch_hw
        windows = _grouped([e.window_id for e in examples], patches, like.windows)
        frames = _grouped([e.frame_id for e in examples], patches, like.frames)
        return replace(batch, vision=Vision(pixels, places, windows, frames))


def _like(frames: object, raw: np.ndarray) -> bool:
    """Whether annotated frames can stand for the raw ones; a clip that is not there can."""
    return frames is None or (isinstance(frames, np.ndarray) and frames.shape == raw.shape and frames.dtype == raw.dtype)


def _grouped(ids: Sequence[np.ndarray], patches: int, like: Groups) -> Groups:
    """The groups of the rows' patches in the static shape of `like`."""
    if like.index is None:
        return like
    index = np.full((len(ids), *like.index.shape[1:]), patches, np.int32)
    if any(len(i) for i in ids):
        found = group([[i] for i in ids], patches)
        whole = np.arange(patches, dtype=np.int32).reshape(1, -1, found.size) if found.index is None else found.index
        whole = whole[:, : index.shape[1]]  # what is cut off are groups of padding
        index[:, : whole.shape[1], : found.size] = whole
    return Groups(index, like.size)
