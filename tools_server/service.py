"""The tools themselves: requests in, answers and annotated clips out, with neither HTTP nor MCP in it.

Each row of a batch is answered on its own. Whatever is asked twice, at once or later, is computed once: by the cache for
results, by the clip store for drawings, and by `Flights` for work in progress. A deadline gives up waiting, and work for which
nobody waits any more is taken out of the models' queues.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from tools_server import annotate, cache, yolo
from tools_server.clips import ClipStore, clip_id
from tools_server.describe import Describer
from tools_server.failure import Busy, ToolFailure
from tools_server.flights import Flights
from tools_server.glossary import Explainer
from tools_server.metrics import Metrics
from tools_server.settings import LimitSettings
from vstar_jax.tools.protocol import SENTENCES, STATUSES, Answer, People, Person, Request, Status, Tool

log = logging.getLogger(__name__)

VISUAL: dict[Tool, yolo.Task] = {"pose_estimation": "pose", "person_detection": "detect"}
RETRY_SECONDS = 0.5
DRAWN_MOST = 100_000
"""Drawings whose ids are remembered."""
PEOPLE: TypeAdapter[People] = TypeAdapter(People)


class Missing(Exception):
    """Clips that were not uploaded, or not lately."""

    def __init__(self, clips: Sequence[str]):
        super().__init__("some clips are not here: upload them and call again.")
        self.clips = tuple(clips)


@dataclass(frozen=True)
class Reply:
    """The answers to a batch, and the annotated clips that they name, uint8 [T, H, W, 3]."""

    answers: tuple[Answer, ...]
    clips: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class View:
    """The frames of a clip that a request is about."""

    clip: str
    frames: tuple[int, ...]
    pixels: np.ndarray

    def key(self, *parts: Any) -> str:
        """The content address of what is made of these frames by something that `parts` describe."""
        return cache.key(self.clip, self.frames, *parts)

    def take(self) -> np.ndarray:
        """The frames, uint8 [T, H, W, 3]."""
        return self.pixels if self.frames == tuple(range(len(self.pixels))) else self.pixels[list(self.frames)]


@dataclass(frozen=True)
class _Outcome:
    """How a tool went, and what it gave."""

    status: Status
    value: Any = None
    problem: str = ""


class Service:
    """All tools over the same models, cache and clips. For one event loop."""

    def __init__(
        self,
        models: Mapping[yolo.Task, yolo.Yolo],
        explainer: Explainer,
        describer: Describer,
        results: cache.Cache,
        flights: Flights,
        clips: ClipStore,
        style: annotate.Style,
        limits: LimitSettings,
        metrics: Metrics,
    ):
        self.models, self.explainer, self.describer, self.clips, self.limits = models, explainer, describer, clips, limits
        self._cache, self._flights, self._style, self._metrics = results, flights, style, metrics
        self._drawn: dict[str, str] = {}

    async def answer(self, requests: Sequence[Request], timeout: float) -> Reply:
        """Answers each request, within `timeout` seconds.

        Raises Missing when clips must be uploaded first, and Busy when too much work waits; nothing was begun then.
        """
        until = asyncio.get_running_loop().time() + min(timeout, self.limits.seconds)
        rows = [_Row(self, request, until) for request in requests]
        if missing := {row.missing for row in rows if row.missing}:
            raise Missing(sorted(missing))
        looks = {view.key(task): (view, task) for row in rows for view, task in row.looks()}
        people = self._find(looks)
        try:
            answers = await asyncio.gather(*(row.answer(people) for row in rows))
        finally:
            for found in people.values():
                found.cancel()
        for answer in answers:
            for tool, status in answer.statuses.items():
                self._metrics.tools.labels(tool, status).inc()
        return Reply(tuple(answers), {row.drawn[0]: row.drawn[1] for row in rows if row.drawn})

    def _find(self, looks: Mapping[str, tuple[View, yolo.Task]]) -> dict[str, asyncio.Future[People]]:
        """The people in the views, from the cache or soon from the models; Busy when that is too much work."""
        addresses = {name: view.key("people", self.models[task].digest) for name, (view, task) in looks.items()}
        known = {name: self._cached(addresses[name], task) for name, (_, task) in looks.items()}
        begun = sum(
            len(view.frames)
            for name, (view, _) in looks.items()
            if known[name] is None and addresses[name] not in self._flights
        )
        if begun and self._flights.load and self._flights.load + begun > self.limits.queue:
            raise Busy(RETRY_SECONDS)
        return {name: self._soon(view, task, addresses[name], known[name]) for name, (view, task) in looks.items()}

    def _soon(self, view: View, task: yolo.Task, address: str, known: People | None) -> asyncio.Future[People]:
        if known is None:
            return self._flights.join(address, lambda: self._look(view, task, address), len(view.frames))
        future: asyncio.Future[People] = asyncio.get_running_loop().create_future()
        future.set_result(known)
        return future

    def _cached(self, address: str, task: yolo.Task) -> People | None:
        kept = self._cache.get(address)
        self._metrics.lookups.labels(task, "no" if kept is None else "yes").inc()
        try:
            return None if kept is None else PEOPLE.validate_json(kept)
        except ValidationError:
            return None

    async def _look(self, view: View, task: yolo.Task, address: str) -> People:
        try:
            future = self.models[task].submit(view.take(), time.monotonic() + self.limits.seconds)
            people = _on_the_wire(await asyncio.wrap_future(future))
        except yolo.YoloError as error:
            log.warning("the %s model failed: %s", task, error)
            raise ToolFailure("error", "the model failed on these frames.") from error
        await asyncio.to_thread(lambda: self._cache.put(address, PEOPLE.dump_json(people)))
        return people

    async def draw(self, view: View, found: Mapping[Tool, People]) -> tuple[str, np.ndarray]:
        """The id and the frames of the view with what was found drawn on them."""
        digests = [self.models[VISUAL[tool]].digest for tool in found]
        address = view.key("drawn", digests, repr(self._style))
        drawn = self.clips.get(self._drawn.get(address, ""))
        if drawn is not None:
            return self._drawn[address], drawn

        async def work() -> tuple[str, np.ndarray]:
            name, frames = await asyncio.to_thread(self._draw, view, found)
            self.clips.put(name, frames)
            if len(self._drawn) >= DRAWN_MOST:
                del self._drawn[next(iter(self._drawn))]
            self._drawn[address] = name
            return name, frames

        return await self._flights.join(address, work)

    def _draw(self, view: View, found: Mapping[Tool, People]) -> tuple[str, np.ndarray]:
        poses, boxes = (_as_found(found.get(tool)) for tool in VISUAL)
        frames = annotate.draw(view.take(), poses, boxes, self._style)
        frames.flags.writeable = False
        return clip_id(frames), frames

    async def describe(self, view: View, people: People) -> str:
        """What happens in the view, in words."""
        address = view.key("described", self.models["pose"].digest, self.describer.digest)
        kept = self._cache.get(address)
        self._metrics.lookups.labels("describe", "no" if kept is None else "yes").inc()
        if kept is not None:
            return kept.decode()

        async def work() -> str:
            text = await self.describer.describe(view.take(), people, self.limits.seconds)
            await asyncio.to_thread(self._cache.put, address, text.encode())
            return text

        return await self._flights.join(address, work)


class _Row:
    """One request on its way to its answer, which is due at `until` on the loop's clock."""

    def __init__(self, service: Service, request: Request, until: float):
        self._service, self._request, self._until = service, request, until
        self.drawn: tuple[str, np.ndarray] | None = None
        self._outcomes: dict[Tool, _Outcome] = {}
        for tool in request.tools:
            if tool == "action_explanation" and (wrong := self._wrong_labels()):
                self._outcomes[tool] = _Outcome("error", problem=wrong)
        self._view: View | None = None
        self.missing: str | None = None
        """A clip that must be uploaded before anything can be said."""
        lookers = [tool for tool in request.tools if tool != "action_explanation"]
        pixels = service.clips.get(request.clip) if lookers and request.clip else None
        if lookers and request.clip and pixels is None:
            self.missing = request.clip
        elif wrong := self._wrong_frames(pixels):
            self._outcomes.update({tool: _Outcome("error", problem=wrong) for tool in lookers})
        elif pixels is not None and request.clip:
            frames = tuple(range(len(pixels))) if request.frames is None else request.frames
            self._view = View(request.clip, frames, pixels)

    def _wrong_labels(self) -> str:
        labels, limits = self._request.labels, self._service.limits
        if not labels or len(labels) > limits.labels:
            return f"{len(labels)} labels were given: give 1 to {limits.labels}."
        if any(not label.strip() or len(label) > limits.label_chars for label in labels):
            return f"a label is empty or longer than {limits.label_chars} characters: correct it."
        return ""

    def _wrong_frames(self, pixels: np.ndarray | None) -> str:
        if pixels is None:
            return "no clip was given to look at: give the id of one."
        frames, limit = self._request.frames, self._service.limits.frames
        if frames is not None and not 0 < len(frames) <= limit:
            return f"{len(frames)} frames were asked for: ask for 1 to {limit}."
        if frames is not None and max(frames) >= len(pixels):
            return f"frame {max(frames)} was asked for, but the clip has {len(pixels)}, counted from 0."
        return ""

    def looks(self) -> list[tuple[View, yolo.Task]]:
        """What must be found, and where."""
        wanted = {VISUAL.get(tool, "pose") for tool in self._request.tools if tool != "action_explanation"}
        return [(self._view, task) for task in sorted(wanted)] if self._view else []

    async def answer(self, people: Mapping[str, asyncio.Future[People]]) -> Answer:
        """The answer; `people` by the keys of the looks. Never fails, and is never late."""
        found = {task: people[view.key(task)] for view, task in self.looks()}
        await asyncio.gather(self._see(found), self._describe(found), self._explain())
        statuses = {tool: self._outcomes[tool].status for tool in self._request.tools}
        worst: Status = max(statuses.values(), key=STATUSES.index, default="ok")
        values = {tool: outcome.value for tool, outcome in self._outcomes.items() if outcome.status == "ok"}
        explanation, speaker = values.get("action_explanation") or (None, "")
        backends: dict[Tool, str] = {
            **{tool: self._service.models[VISUAL[tool]].name for tool in VISUAL},
            "action_explanation": speaker,
            "video_description": self._service.describer.backend,
        }
        return Answer(
            episode=self._request.episode,
            turn=self._request.turn,
            status=worst,
            message=SENTENCES.get(worst, ""),
            statuses=statuses,
            problems={tool: self._outcomes[tool].problem for tool in statuses if self._outcomes[tool].problem},
            backends={tool: backends[tool] for tool in statuses if tool in values},
            explanation=explanation,
            description=values.get("video_description"),
            poses=values.get("pose_estimation"),
            boxes=values.get("person_detection"),
            annotated=self.drawn[0] if self.drawn else None,
        )

    async def _tool(self, tool: Tool, work: Awaitable[Any]) -> _Outcome:
        """How `work` ends; its failure is the tool's and no other's."""
        try:
            async with asyncio.timeout_at(self._until):
                outcome = _Outcome("ok", await work)
        except TimeoutError:
            outcome = _Outcome("timeout", problem="the time was up before the result was there.")
        except ToolFailure as error:
            outcome = _Outcome(error.status, problem=error.reason)
        except Exception:
            log.exception("%s failed", tool)
            outcome = _Outcome("error", problem="the tool failed; the server's log says why.")
        self._outcomes[tool] = outcome
        return outcome

    async def _see(self, found: Mapping[yolo.Task, asyncio.Future[People]]) -> None:
        """Finds what was asked for and draws it; a drawing that fails takes what it was to show with it."""
        if self._view is None:
            return
        seen: dict[Tool, People] = {}
        for tool in VISUAL:
            if tool in self._request.tools:
                outcome = await self._tool(tool, asyncio.shield(found[VISUAL[tool]]))
                if outcome.status == "ok":
                    seen[tool] = outcome.value
        for first in list(seen)[:1]:
            drawing = await self._tool(first, self._service.draw(self._view, seen))
            if drawing.status == "ok":
                self.drawn = drawing.value
            self._outcomes.update({t: _Outcome("ok", p) if self.drawn else drawing for t, p in seen.items()})

    async def _describe(self, found: Mapping[yolo.Task, asyncio.Future[People]]) -> None:
        if (view := self._view) and "video_description" in self._request.tools:

            async def work() -> str:
                return await self._service.describe(view, await asyncio.shield(found["pose"]))

            await self._tool("video_description", work())

    async def _explain(self) -> None:
        tool: Tool = "action_explanation"
        if tool in self._request.tools and tool not in self._outcomes:
            await self._tool(tool, self._service.explainer.explain(self._request.labels))


def _on_the_wire(found: list[list[yolo.Person]]) -> People:
    """The models' people as the wire has them, to a hundredth of a pixel; whoever draws or caches them uses these."""
    return tuple(tuple(_person(person) for person in frame) for frame in found)


def _person(person: yolo.Person) -> Person:
    joints = None if person.keypoints is None else tuple(map(tuple, np.round(person.keypoints.astype(float), 2).tolist()))
    box = tuple(round(side, 2) for side in person.box)
    return Person(box=box, confidence=round(person.confidence, 4), keypoints=joints)  # type: ignore[arg-type]


def _as_found(people: People | None) -> list[list[yolo.Person]] | None:
    """The wire's people as the models give them."""
    if people is None:
        return None
    return [
        [yolo.Person(p.box, p.confidence, None if p.keypoints is None else np.asarray(p.keypoints, np.float32)) for p in frame]
        for frame in people
    ]
