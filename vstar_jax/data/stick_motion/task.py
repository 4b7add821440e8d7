"""StickMotion as a task: training dialogues and held-out episodes, with ground truth in the place of the tools."""

import logging
from collections.abc import Sequence
from functools import partial

import numpy as np

from vstar_jax.batch import Example
from vstar_jax.config import Config, resolve
from vstar_jax.data.assessment import Item, Rules, Verdict, assess
from vstar_jax.data.builders.stick_motion import Record, Records, prepare
from vstar_jax.data.chat import Chat
from vstar_jax.data.clips import ClipRecord
from vstar_jax.data.stick_motion.dialogues import Cast, draw_cast, first_reply, second_reply, tool_result
from vstar_jax.data.stick_motion.faults import FAULTS, Draft, audit, fault_of
from vstar_jax.data.stick_motion.motions import SUB_MOTIONS, explanation
from vstar_jax.data.task import Episode
from vstar_jax.data.video import Clip, ReadCounts, VideoError, read
from vstar_jax.dialogue import Decision, Prompts, ToolResult, assistant, first_messages, parse_decision, second_messages

log = logging.getLogger(__name__)


class StickMotion:
    """Base actions to train on, base and novel ones to be tried on; clips are rendered when they are missing.

    counts: how the training and evaluation clips were read, and how many could not be.
    """

    groups: tuple[str, ...] = ("base", "novel")

    def __init__(self, config: Config, chat: Chat):
        self.config, self.chat, self.counts = config, chat, ReadCounts()
        self.prompts = Prompts.load(resolve(config.data.prompts))
        self.builder = prepare(config.data.dir, config.data.difficulty, config.data.clips_per_action, config.seed)

    def train_records(self) -> Sequence[Record]:
        """The clips of base actions that training sees."""
        return Records(self.builder, "train")

    def test_records(self, group: str) -> Sequence[Record]:
        """Held-out clips of a group; the first `evaluation.clips_per_action` of each action."""
        records = Records(self.builder, f"{group}_test")
        limit = self.config.evaluation.clips_per_action
        taken: dict[int, int] = {}
        chosen = []
        for record in records:
            taken[record.action.number] = taken.get(record.action.number, 0) + 1
            if not limit or taken[record.action.number] <= limit:
                chosen.append(record)
        return chosen

    def label_count(self, group: str) -> int:
        """How many names an episode offers."""
        return self.config.data.labels

    def train_clips(self) -> tuple[ClipRecord, ...]:
        """Nothing to compare: every clip is rendered from a seed of its own, and the novel actions are never trained on."""
        return ()

    def test_clips(self, group: str) -> tuple[ClipRecord, ...]:
        """Nothing to compare, as for `train_clips`."""
        return ()

    def example(self, record: Record, rng: np.random.Generator) -> Example | None:
        """A whole dialogue with fresh names from the training pool, or None when the assessment drops it or the clip cannot be
        read.
        """
        cast, first, second = self._written(record, rng)
        if self.config.data.assess and not self._assessed(record, cast, first, second).kept:
            return None
        clip = self._read(record)
        if clip is None:
            return None
        dialect = self.config.data.dialect
        result = self._tools(record, clip.frames, cast.explanations, parse_decision(first, dialect))
        messages = [
            *first_messages(self.prompts, dialect),
            assistant(first),
            *second_messages(self.prompts, result, cast.names, dialect),
            assistant(second),
        ]
        shown = [clip.frames] if result.frames is None else [clip.frames, result.frames]
        return self.chat.encode(messages, [self.chat.clip(frames, clip.fps) for frames in shown], target=self.config.sft.target)

    def episode(self, record: Record, rng: np.random.Generator, *, training: bool = False) -> Episode | None:
        """An episode with fresh names from the pool of its purpose, or None when the clip cannot be read."""
        clip = self._read(record)
        if clip is None:
            return None
        cast = draw_cast(record.action, self.config.data.labels, "train" if training else "eval", rng)
        return Episode(
            name=record.name,
            group=record.action.group,
            frames=clip.frames,
            fps=clip.fps,
            labels=cast.names,
            answer=cast.names[cast.shown],
            tools=partial(self._tools, record, clip.frames, cast.explanations),
            explanation=explanation(record.action.sub_motions),
        )

    def audit(self) -> dict[str, tuple[int, int]]:
        """What the assessment makes of the training dialogues, in one pass over them, as `faults.audit` tells it."""
        rng = np.random.default_rng(self.config.seed)
        return audit((self._fault(r), self._assessed(r, *self._written(r, rng))) for r in self.train_records())

    def _written(self, record: Record, rng: np.random.Generator) -> tuple[Cast, str, str]:
        """Who plays in a record's dialogue, and its two replies."""
        data, offered = self.config.data, self.config.tools.offered
        cast = draw_cast(record.action, data.labels, "train", rng)
        first = first_reply(record.cluttered, offered, data.dialect)
        second = second_reply(cast, rng, data.sub_motions)
        if fault := self._fault(record):
            first, second = FAULTS[fault](Draft(first, second, cast, record.cluttered, offered, data.dialect), rng)
        return cast, first, second

    def _fault(self, record: Record) -> str | None:
        return fault_of(record.name, self.config.data.faulty, self.config.seed)

    def _assessed(self, record: Record, cast: Cast, first: str, second: str) -> Verdict:
        item = Item(record.name, first, second, label=cast.names[cast.shown], labels=cast.names)
        return assess(item, Rules(self.config.data.dialect, SUB_MOTIONS))

    def _read(self, record: Record) -> Clip | None:
        frames = self.config.video.frames
        try:
            return read(record.video, frames, exact=min(frames, len(record.keypoints)), counts=self.counts)
        except VideoError as error:
            log.warning("clip %s is left out: %s", record.name, error)
            return None

    def _tools(self, record: Record, frames: np.ndarray, explanations: str, asked: Decision) -> ToolResult:
        places = np.round(np.linspace(0, len(record.keypoints) - 1, len(frames))).astype(int)
        return tool_result(asked, frames, record.keypoints[places], record.boxes[places], explanations)
