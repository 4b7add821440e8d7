"""Describes clips: an LLM that is shown the key frames, or, offline, sentences made of the joints' measured movements.

The offline sentences say nothing that was not measured: which part moved, which way, how far, in which order, and who and what
else is in the picture. Left and right are the person's own, and the picture's where it says so.
"""

import asyncio
import base64
import io
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from tools_server import motion, prompts
from tools_server.llm_proxy import LlmProxy
from tools_server.motion import Movement
from vstar_jax.tools.protocol import People

SENTENCES, CHARS = 3, 600
MOST_MOVEMENTS = 6
"""Movements that are told; the largest ones."""
PICTURE_SIDE = 768
"""Longer side in pixels of the pictures that an LLM is shown."""
DARK, BRIGHT = 70, 180
"""Mean grey levels below and above which a picture is called so."""
BUSY = 6.5
"""Mean step between neighbouring pixels, in levels of a colour, from which on a picture is busy: StickMotion's videos have
3.2 to 5.0 on a plain background, and 8.9 to 10.5 in clutter.
"""

_PHRASES = {
    "leg:up": "{who} lifts off the ground {beside}",
    "hand:out": "{who} moves outwards",
    "hand:in": "{who} moves inwards",
    "hands:together": "the hands come together in front of the body",
    "hands:apart": "the hands part",
    "knees:bent": "the knees bend, the body sinks",
    "knees:straight": "the knees straighten, the body rises",
    "body:up": "the whole body goes up with both feet off the ground",
    "body:down": "the feet come down to the ground",
    "torso:down": "the upper body bows down",
    "torso:up": "the upper body straightens up",
    "torso:upright": "the upper body straightens up",
    "torso:left": "the upper body leans to its left",
    "torso:right": "the upper body leans to its right",
    "place:picture left": "the person moves towards the picture's left",
    "place:picture right": "the person moves towards the picture's right",
}


class Describer(Protocol):
    """Something that puts a clip into words."""

    backend: str
    """Who speaks, for people."""
    digest: str
    """Changes when the same clip would be described in another way."""

    async def describe(self, frames: np.ndarray, people: People, seconds: float) -> str:
        """At most three sentences on frames uint8 [T, H, W, 3] and the people in them; raises ToolFailure."""
        ...


class OfflineDescriber:
    """Sentences from measurements."""

    backend = digest = "offline"

    async def describe(self, frames: np.ndarray, people: People, seconds: float) -> str:
        """See `Describer`; never fails."""
        return await asyncio.to_thread(sentences, frames, people)


class LlmDescriber:
    """An LLM that sees `pictures` key frames."""

    def __init__(self, llm: LlmProxy, pictures: int):
        self._llm, self._pictures = llm, pictures
        self._prompt = prompts.load("describe")
        self.backend = llm.model
        self.digest = f"{llm.model} {pictures} {self._prompt.template}"

    async def describe(self, frames: np.ndarray, people: People, seconds: float) -> str:
        """See `Describer`."""
        chosen = motion.salient(people, self._pictures)
        addresses = await asyncio.to_thread(lambda: [_picture(frames[t]) for t in chosen])
        pictures = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
        text = self._prompt.substitute(count=len(chosen))
        return await self._llm.ask(
            [*pictures, {"type": "text", "text": text}], lambda reply: prompts.sentences(reply, SENTENCES, CHARS), seconds
        )


def _picture(frame: np.ndarray) -> str:
    """A frame uint8 [H, W, 3] as the address of a JPEG file that holds itself."""
    image, buffer = Image.fromarray(frame), io.BytesIO()
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def sentences(frames: np.ndarray, people: People) -> str:
    """What was measured, in at most three sentences; see `Describer`."""
    points = motion.track(people)
    if points is None:
        return f"{_changes(frames)} {_surroundings(frames, people)}"
    found = sorted(sorted(motion.movements(points), key=lambda m: -m.size)[:MOST_MOVEMENTS], key=lambda m: m.middle)
    told = _phrases(found, points)
    if not told:
        return f"The person hardly moves. {_surroundings(frames, people)}"
    cut = (len(told) + 1) // 2 if len(told) > 3 else len(told)
    ordered = [f"First {', then '.join(told[:cut])}." if len(told) > 1 else f"{told[0][:1].upper()}{told[0][1:]}."]
    if told[cut:]:
        ordered.append(f"After that {', then '.join(told[cut:])}.")
    return " ".join([*ordered, _surroundings(frames, people)])


def _phrases(found: Sequence[Movement], points: np.ndarray) -> list[str]:
    """The movements in words, those of left and right together where they are the same at the same time."""
    told: list[str] = []
    rest = list(found)
    while rest:
        movement = rest.pop(0)
        side = movement.what.partition(" ")[0]
        twin = next((other for other in rest if _twins(movement, other)), None) if side in ("left", "right") else None
        if twin:
            rest.remove(twin)
        told.append(_phrase(movement, points, both=twin is not None))
    return told


def _twins(one: Movement, other: Movement) -> bool:
    """Whether the two are left and right of one movement."""
    pair = {one.what.partition(" ")[0], other.what.partition(" ")[0]}
    same = one.what.partition(" ")[2] == other.what.partition(" ")[2] and pair == {"left", "right"}
    overlap = min(one.end, other.end) - max(one.start, other.start)
    return same and overlap * 2 >= max(one.end - one.start, other.end - other.start)


def _phrase(movement: Movement, points: np.ndarray, both: bool) -> str:
    side, _, way = movement.what.partition(" ")
    if side not in ("left", "right"):
        text = _PHRASES[movement.what]
    else:
        part = way.partition(":")[0]
        who = f"both {part}s" if both else f"the {side} {part}"
        text = _arm(movement, points, who, both) if part == "arm" else _leg_or_hand(movement, points, who, way, both)
    if movement.times > 1:
        text += {2: " twice"}.get(movement.times, f" {movement.times} times")
    return text + (_RETURNS.get(way if side in ("left", "right") else movement.what, " and back") if movement.back else "")


_RETURNS = {
    "arm:up": " and down again",
    "arm:down": " and up again",
    "leg:up": " and comes down again",
    "body:up": " and comes down again",
    "hands:together": " and part again",
    "knees:bent": " and rises again",
    "torso:down": " and comes up again",
    "torso:left": " and comes back",
    "torso:right": " and comes back",
}


def _arm(movement: Movement, points: np.ndarray, who: str, both: bool) -> str:
    """How high the hand gets, and whether the elbow is bent there."""
    left = movement.what.startswith("left")
    shoulder, elbow, wrist = points[movement.peak, [5, 7, 9] if left else [6, 8, 10]]
    verb = "go" if both else "goes"
    if movement.what.endswith("down"):
        return f"{who} {verb} down"
    head = points[movement.peak, motion.NOSE, 1]
    level = "to the chest"
    if wrist[1] < (head if np.isfinite(head) else shoulder[1] - 0.15) - 0.05:
        level = "above the head"
    elif wrist[1] < shoulder[1] + 0.05:
        level = "to the height of the head" if wrist[1] < shoulder[1] - 0.05 else "to the height of the shoulder"
    upper, fore = elbow - shoulder, wrist - elbow
    lengths = np.linalg.norm(upper) * np.linalg.norm(fore)
    bent = lengths > 0 and float(upper @ fore) < 0.64 * lengths  # the elbow is bent by more than 50 degrees
    return f"{who} {verb} up {level}" + (" with the elbow bent" if bent and not both else "")


def _leg_or_hand(movement: Movement, points: np.ndarray, who: str, way: str, both: bool) -> str:
    if way != "leg:up":
        way_text = {"leg:down": "comes down to the ground"}.get(way) or _PHRASES[way].removeprefix("{who} ")
        return f"{who} {way_text.replace('moves', 'move') if both else way_text}"
    side = 0 if movement.what.startswith("left") else 1
    away = np.abs(points[:, motion.ANKLES[side], 0] - points[:, motion.HIPS[side], 0])
    beside = "to the side" if away[movement.peak] - away[movement.start] > 0.1 else "in front of or behind the body"
    return _PHRASES["leg:up"].format(who=who, beside=beside)


def _surroundings(frames: np.ndarray, people: People) -> str:
    """Who is where, before what."""
    small = frames[:, :: max(frames.shape[1] // 112, 1), :: max(frames.shape[2] // 112, 1)].astype(np.float32)
    light = "dark" if small.mean() < DARK else "bright" if small.mean() > BRIGHT else "half-bright"
    steps = [np.abs(np.diff(small, axis=axis)).mean() for axis in (1, 2) if small.shape[axis] > 1]
    busy = "busy" if steps and np.mean(steps) > BUSY else "plain"
    count = int(np.median([len(frame) for frame in people]))
    who = {0: "No person is clearly seen", 1: "One person is seen"}.get(count, f"{count} people are seen")
    where = ""
    boxes = np.asarray([person.box for person in motion.main_person(people) if person])
    if count and len(boxes):
        at = float(boxes[:, [0, 2]].mean()) / frames.shape[2]
        where = " on the left" if at < 0.4 else " on the right" if at > 0.6 else " in the middle"
    return f"{who}{where} of a {light}, {busy} picture." if where else f"{who} in a {light}, {busy} picture."


def _changes(frames: np.ndarray) -> str:
    """Where the picture changes most, when there are no joints to follow."""
    if len(frames) < 2:
        return "There is a single picture."
    small = frames[:, :: max(frames.shape[1] // 64, 1), :: max(frames.shape[2] // 64, 1)].astype(np.float32).mean(-1)
    change = np.abs(np.diff(small, axis=0))
    if change.max() < 8:
        return "Nothing moves."
    row, column = (
        int(np.average(np.arange(change.shape[axis]), weights=change.sum(tuple({0, 1, 2} - {axis}))) * 3 / change.shape[axis])
        for axis in (1, 2)
    )
    place = f"{('upper', 'middle', 'lower')[row]} {('left', 'centre', 'right')[column]}"
    when = int(change.mean((1, 2)).argmax()) + 1
    return f"Something moves around the {place} of the picture, most before picture {when + 1} of {len(frames)}."
