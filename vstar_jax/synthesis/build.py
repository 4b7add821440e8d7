"""Makes a training dialogue for each clip and its label: a teacher is asked twice, and the tools are called in between.

The teacher is any model behind OpenAI's chat protocol (`endpoint`). In the style json it answers in JSON, which is written as
our dialogue; in the style dialogue it is a policy of ours, which writes dialogues itself. Source: the paper's section 3.2.
"""

import asyncio
import base64
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from vstar_jax.config import Config
from vstar_jax.data.assessment import Item
from vstar_jax.data.task import Episode, Task
from vstar_jax.dialogue import Decision, ToolResult, assistant, first_messages, parse_decision, second_messages
from vstar_jax.synthesis import replies
from vstar_jax.synthesis.endpoint import Endpoint
from vstar_jax.synthesis.prompts import TeacherPrompts
from vstar_jax.synthesis.records import Judgement
from vstar_jax.synthesis.replies import ReplyError
from vstar_jax.synthesis.tools import call_tools
from vstar_jax.tools.host import Call, Tools

JPEG_QUALITY = 92
JUDGED = ("grounded", "consistent", "tools")


@dataclass(frozen=True)
class Style:
    """reply: what the teacher writes; pictures: how a clip is sent, as one part of frames or as an image each; hint: tell the
    teacher the label in the second turn (json alone).
    """

    reply: Literal["json", "dialogue"] = "json"
    pictures: Literal["video", "images"] = "video"
    hint: bool = True


class Unreadable(Exception):
    """A clip that cannot be read."""


class Teacher:
    """Makes and judges dialogues of one task. executor: for what blocks, reading clips and calling tools."""

    def __init__(
        self,
        task: Task,
        tools: Tools,
        config: Config,
        endpoint: Endpoint,
        prompts: TeacherPrompts,
        style: Style,
        executor: Executor,
    ):
        self.task, self.tools, self.config, self.style = task, tools, config, style
        self._endpoint, self._prompts, self._executor = endpoint, prompts, executor

    async def make(self, record: Any, number: int) -> Item:
        """The dialogue of a record; number: its place in the list, which the drawing of names follows from.

        Raises Unreadable, `endpoint.EndpointError`, or UserError as `Endpoint.ask` does.
        """
        episode = await self._episode(record, number)
        clip = await self._run(encoded, episode.frames, episode.fps, self.style)
        first = await self._first(clip)
        decision = self._offered(parse_decision(first.text, self.config.data.dialect))
        call = Call(episode, 1, decision)
        outcome, facts = await self._run(call_tools, self.tools, call, record, self.config.rollout.deadline)
        shown = (
            [] if outcome.result.frames is None else await self._run(encoded, outcome.result.frames, episode.fps, self.style)
        )
        second = await self._second(clip, first, outcome.result, shown, episode)
        return Item(
            path=record.name,
            first=first.text,
            second=second,
            explanation=outcome.result.explanation or "",
            description=outcome.result.description or "",
            label=episode.answer,
            labels=tuple(episode.labels),
            structure={"tools": list(decision.chosen()), **replies.structure(second)},
            tools=dict(outcome.statuses),
            **asdict(facts),
        )

    async def judge(self, record: Any, number: int, item: Item) -> Judgement:
        """The verdict of a judge who sees the clip; raises as `make` does."""
        episode = await self._episode(record, number)
        clip = await self._run(encoded, episode.frames, episode.fps, self.style)
        returned = "\n".join(text for text in (item.explanation, item.description) if text) or "no text"
        text = self._prompts.judge.format(label=item.label, first=item.first, tools=returned, second=item.second)
        asked = [{"role": "user", "content": [*clip, {"type": "text", "text": text}]}]
        return await self._endpoint.ask(asked, lambda reply: read_judgement(reply, item.path))

    async def _run(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    async def _episode(self, record: Any, number: int) -> Episode:
        rng = np.random.default_rng([self.config.seed, number])
        episode = await self._run(lambda: self.task.episode(record, rng, training=True))
        if episode is None:
            raise Unreadable(f"{record.name} cannot be read.")
        return episode

    def _offered(self, decision: Decision) -> Decision:
        return Decision(**{name: name in self.config.tools.offered for name in decision.chosen()})

    async def _first(self, clip: Sequence[Mapping[str, Any]]) -> "_Said":
        dialect = self.config.data.dialect
        if self.style.reply == "dialogue":
            asked = _sent(first_messages(self.task.prompts, dialect), [clip])
            said = await self._endpoint.ask(asked, lambda text: replies.own_first(text, dialect))
            return _Said(said, said)

        def read(text: str) -> _Said:
            first = replies.read_first(text)
            first = replies.First(first.thought, self._offered(first.decision))
            return _Said(replies.write_first(first, dialect), text)

        return await self._endpoint.ask([_user(clip, [self._prompts.first.format()])], read)

    async def _second(
        self,
        clip: Sequence[Mapping[str, Any]],
        first: "_Said",
        result: ToolResult,
        shown: Sequence[Mapping[str, Any]],
        episode: Episode,
    ) -> str:
        prompts, dialect = self._prompts, self.config.data.dialect
        if self.style.reply == "dialogue":
            told = second_messages(self.task.prompts, result, episode.labels, dialect)
            dialogue = [*first_messages(self.task.prompts, dialect), assistant(first.text), *told]
            return await self._endpoint.ask(_sent(dialogue, [clip, shown]), replies.own_second)

        def read(text: str) -> str:
            second = replies.read_second(text, episode.labels)
            written = replies.write_second(second)
            replies.check_written(second, written)
            return written

        texts = [prompts.annotated] if shown else []
        texts += [prompts.explanation.format(explanation=result.explanation)] if result.explanation else []
        texts += [prompts.description.format(description=result.description)] if result.description else []
        texts += [*result.failures, prompts.second.format(labels="\n".join(episode.labels))]
        texts += [prompts.hint.format(label=episode.answer)] if self.style.hint else []
        asked = [
            _user(clip, [prompts.first.format()]),
            {"role": "assistant", "content": first.raw},
            _user(shown, texts),
        ]
        return await self._endpoint.ask(asked, read)


@dataclass(frozen=True)
class _Said:
    """A first reply: as our dialogue has it, and as the teacher wrote it."""

    text: str
    raw: str


def encoded(frames: np.ndarray, fps: float, style: Style) -> list[dict[str, Any]]:
    """A clip uint8 [T, H, W, 3] as parts of a message: data URLs, which tell nothing of where it came from."""
    from PIL import Image

    urls = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=JPEG_QUALITY)
        urls.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    if style.pictures == "video":
        return [{"type": "video", "video": urls, "fps": fps}]
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def _user(clip: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> dict[str, Any]:
    return {"role": "user", "content": [*clip, {"type": "text", "text": "\n".join(texts)}]}


def _sent(messages: Sequence[Mapping[str, Any]], clips: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Messages of our dialogue with the clips in the places of their videos."""
    pictures = iter(clips)
    sent = []
    for message in messages:
        parts: list[Any] = []
        for part in message["content"]:
            parts += next(pictures) if part["type"] == "video" else [part]
        sent.append({"role": message["role"], "content": parts})
    return sent


def read_judgement(text: str, path: str) -> Judgement:
    """A judge's JSON {"keep": bool, "scores": {...}, "reasons": [texts]}. ReplyError says what is wrong."""
    item = replies.json_object(text)
    keep, reasons, scores = item.get("keep"), item.get("reasons"), item.get("scores")
    if not isinstance(keep, bool):
        raise ReplyError("`keep` must be true or false")
    if (
        not isinstance(reasons, list)
        or not reasons
        or not all(isinstance(reason, str) and reason.strip() for reason in reasons)
    ):
        raise ReplyError("`reasons` must be a list of texts")
    if not isinstance(scores, dict) or not all(_share(scores.get(name)) for name in JUDGED):
        raise ReplyError(f"`scores` must have {', '.join(JUDGED)}, each from 0 to 1")
    return Judgement(path, keep, tuple(" ".join(r.split()) for r in reasons), {name: float(scores[name]) for name in JUDGED})


def _share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
