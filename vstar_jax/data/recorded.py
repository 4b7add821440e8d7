"""Recorded datasets as a task: HMDB-51, UCF-101, Kinetics-400, Kinetics-600 and SSv2 under the protocols of OVAR.md.

Clips and vocabularies come from what scripts/prepare.py wrote (`builders.videos`), frames from killable decoders. An episode
offers the whole vocabulary of its list. Tools and prompts get frames, labels and texts, never a record, so that no path, file
name, id or label of a clip can reach them.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import numpy as np

from vstar_jax.batch import Example
from vstar_jax.config import Config, resolve
from vstar_jax.data.builders.videos import Record, Records
from vstar_jax.data.chat import Chat
from vstar_jax.data.clips import ClipRecord, label_key
from vstar_jax.data.decoding import Decoder
from vstar_jax.data.task import Episode
from vstar_jax.data.video import Clip, VideoError
from vstar_jax.dialogue import Decision, Prompts, ToolResult, assistant, first_messages, parse_decision, second_messages
from vstar_jax.errors import UserError

log = logging.getLogger(__name__)

Decoded = TypeVar("Decoded")
Toolbox = Callable[[np.ndarray, float, Sequence[str], Decision], ToolResult]
"""Calls tools: frames uint8 [T, H, W, 3], frames a second, the vocabulary and the decision -> what they return."""


@dataclass(frozen=True)
class Dialogue:
    """A training dialogue: the two replies, and what the text tools returned between them (empty where they were not asked).

    path: of the clip, as the list spells it.
    """

    path: str
    first: str
    second: str
    explanation: str = ""
    description: str = ""


@dataclass(frozen=True)
class Source:
    """Which lists of a prepared dataset a run uses.

    dataset: its name; dir: the folder of prepared datasets; groups: group in the results -> list (`protocols.groups`);
    train: lists to learn from, as `Records` takes them; videos: where the dataset's videos are now, if they have moved since
    they were prepared.
    """

    dataset: str
    dir: str
    groups: Mapping[str, str]
    train: tuple[str, ...] = ()
    videos: str | None = None


def explaining(known: Mapping[str, str]) -> Toolbox:
    """A toolbox without a server: explains labels by their keys (`clips.label_key`), and has no other tool."""

    def tools(frames: np.ndarray, fps: float, labels: Sequence[str], asked: Decision) -> ToolResult:
        lines = [f"- {label}: {text}" for label in labels if (text := known.get(label_key(label)))]
        return ToolResult(explanation="\n".join(lines) if asked.noun_explanation and lines else None)

    return tools


class Recorded:
    """A recorded dataset under a protocol.

    dialogues: what to learn from in SFT, by clip; tools: what the policy may call, the lists' own explanations when not given;
    decoder: shared with nobody else unless given.
    """

    def __init__(
        self,
        config: Config,
        chat: Chat,
        source: Source,
        *,
        dialogues: Sequence[Dialogue] = (),
        tools: Toolbox | None = None,
        decoder: Decoder | None = None,
    ):
        self.config, self.chat = config, chat
        self.prompts = Prompts.load(resolve(config.data.prompts))
        self.groups = tuple(source.groups)
        self.decoder = decoder or Decoder(config.data.threads)
        self._lists = {
            name: Records(source.dataset, source.dir, name, source.videos)
            for name in dict.fromkeys((*source.groups.values(), *source.train))
        }
        self._group_lists, self._train = dict(source.groups), source.train
        self._group_of = {name: group for group, name in source.groups.items()}
        self._dialogues = {dialogue.path: dialogue for dialogue in dialogues}
        lists = self._lists.values()
        self._explanations = {label_key(label): text for records in lists for label, text in records.explanations.items()}
        self.tools = tools or explaining(self._explanations)

    def train_records(self) -> Sequence[Record]:
        """The clips of the training lists that can be read; where there are dialogues, those that have one."""
        records = [record for name in self._train for record in self._lists[name] if not record.problem]
        return [record for record in records if record.path in self._dialogues] if self._dialogues else records

    def test_records(self, group: str) -> Sequence[Record]:
        """The clips of a group's list, missing and broken ones too; the first `evaluation.clips_per_action` of each class."""
        records = self._lists[self._group_lists[group]]
        limit = self.config.evaluation.clips_per_action
        if not limit:
            return records
        taken: dict[str, int] = {}
        chosen = []
        for record in records:
            taken[record.label] = taken.get(record.label, 0) + 1
            if taken[record.label] <= limit:
                chosen.append(record)
        return chosen

    def label_count(self, group: str) -> int:
        """The size of the group's vocabulary, which an episode offers as a whole."""
        return len(self._lists[self._group_lists[group]].labels)

    def train_clips(self) -> tuple[ClipRecord, ...]:
        """What the guard against leakage (`leakage.check`) takes for trained on."""
        return tuple(record.clip() for name in self._train for record in self._lists[name])

    def test_clips(self, group: str) -> tuple[ClipRecord, ...]:
        """What the guard takes for evaluated in a group."""
        return tuple(record.clip() for record in self._lists[self._group_lists[group]])

    def audit(self) -> Mapping[str, tuple[int, int]]:
        """Nothing: what a teacher got wrong is not known."""
        return {}

    def example(self, record: Record, rng: np.random.Generator) -> Example | None:
        """The clip's training dialogue, with the visual tools called anew; None when the clip or its dialogue is missing.

        UserError when the task has no dialogues at all.
        """
        if not self._dialogues:
            raise UserError(
                f"the lists {', '.join(self._train) or 'of no name'} have no dialogues to learn from: make them with "
                "scripts/synthesize.py and set data.dialogues to their file."
            )
        dialogue = self._dialogues.get(record.path)
        if dialogue is None:
            return None
        dialect = self.config.data.dialect
        labels = self._lists[record.group].labels
        decision = parse_decision(dialogue.first, dialect)
        shown, clips = None, []
        if not _visual(decision):
            processed = self._decoded(record, lambda video: self.decoder.process(video, self.chat.video))
            clips = [] if processed is None else [processed]
        elif clip := self._read(record):
            shown = self.tools(clip.frames, clip.fps, labels, decision).frames
            clips = [self.chat.clip(frames, clip.fps) for frames in (clip.frames, shown) if frames is not None]
        if not clips:
            return None
        result = ToolResult(shown, dialogue.explanation or None, dialogue.description or None)
        messages = [
            *first_messages(self.prompts, dialect),
            assistant(dialogue.first),
            *second_messages(self.prompts, result, labels, dialect),
            assistant(dialogue.second),
        ]
        return self.chat.encode(messages, clips, target=self.config.sft.target)

    def episode(self, record: Record, rng: np.random.Generator, *, training: bool = False) -> Episode | None:
        """An episode over the whole vocabulary of the record's list; None when the clip cannot be read."""
        clip = self._read(record)
        if clip is None:
            return None
        labels = self._lists[record.group].labels
        frames, fps = clip.frames, clip.fps
        return Episode(
            name=record.name,
            group=self._group_of.get(record.group, record.group),
            frames=frames,
            fps=fps,
            labels=labels,
            answer=record.label,
            tools=lambda asked: self.tools(frames, fps, labels, asked),
            explanation=self._explanations.get(label_key(record.label)),
        )

    def _read(self, record: Record) -> Clip | None:
        return self._decoded(record, lambda video: self.decoder.read(video, self.config.video.frames))

    def _decoded(self, record: Record, decode: Callable[[Path], Decoded]) -> Decoded | None:
        """What `decode` makes of the record's video; None, with a warning, when it is missing or cannot be read."""
        if record.video is None or record.problem:
            log.warning("clip %s is left out: %s", record.name, record.problem)
            return None
        try:
            return decode(record.video)
        except VideoError as error:
            log.warning("clip %s is left out: %s", record.name, error)
            return None


def _visual(decision: Decision) -> bool:
    return decision.pose_estimation or decision.person_detection


def read_dialogues(path: str | Path) -> list[Dialogue]:
    """Training dialogues from JSON Lines with the fields of `Dialogue`; others are left alone. UserError with the line."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8", newline="\n") as file:  # texts may have other ends of lines, such as U+2028
            lines = list(file)
    except (OSError, UnicodeDecodeError):
        raise UserError(f"there is no file of dialogues {path} in UTF-8: give what scripts/synthesize.py wrote.") from None
    names = [field.name for field in fields(Dialogue)]
    dialogues = []
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
            dialogue = Dialogue(**{name: item[name] for name in names if name in item})
        except (ValueError, TypeError):
            dialogue = None
        if dialogue is None or not all(isinstance(getattr(dialogue, name), str) for name in names):
            raise UserError(
                f"{path}, line {number}: expected an object with the texts {', '.join(names[:3])}: correct the line."
            )
        dialogues.append(dialogue)
    return dialogues
