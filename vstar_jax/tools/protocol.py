"""The wire format between the tools server and its clients: JSON models, and how clips are named and travel.

A clip is uint8 [T, H, W, 3] in RGB. Its id is a SHA-256 over its shape and its octets (`clip_hash`), so the same frames have
the same id everywhere. A batch call carries one request a row and answers each on its own; the answer may be followed by the
annotated clips as raw octets (`BINARY`). The server and the client import this module; it needs neither JAX nor numpy.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints

VERSION = "1"
"""Of this protocol; it changes when an older client could misread a newer server."""

Status = Literal["ok", "timeout", "error", "malformed", "unavailable"]
STATUSES: tuple[Status, ...] = ("ok", "timeout", "error", "malformed", "unavailable")
SENTENCES: dict[Status, str] = {
    "timeout": "The tools took too long and gave nothing.",
    "error": "The tools failed and gave nothing.",
    "malformed": "The tools gave something that cannot be used.",
    "unavailable": "The tools cannot be reached.",
}
"""What a policy reads in the place of a result, by status."""

Tool = Literal["pose_estimation", "person_detection", "action_explanation", "video_description"]
TOOLS: dict[Tool, str] = {
    "pose_estimation": "Finds the 17 COCO keypoints of every person in the frames of a clip and draws their skeletons.",
    "person_detection": "Finds every person in the frames of a clip and draws a box around each.",
    "action_explanation": "Explains each action of a list by the body movements that make it up, in their order.",
    "video_description": "Describes in at most three sentences how the people of a clip move.",
}
"""What each tool does, in words for whoever may call it."""
TAGS: dict[str, Tool] = {
    "pose_estimation": "pose_estimation",
    "person_detection": "person_detection",
    "noun_explanation": "action_explanation",
    "video_explanation": "video_description",
}
"""The tag by which a policy asks for a tool -> the tool."""

JSON = "application/json"
BINARY = "application/vnd.vstar.batch"
"""A batch's answer with its clips: the JSON of BatchResponse in one line, then the octets of `clips`, one after another."""
OCTETS = "application/octet-stream"
SHAPE_HEADER = "x-clip-shape"
"""The header of a clip that travels alone: T,H,W,3."""
VERSION_HEADER = "x-tools-version"

_CONTROL = re.compile(r"<\|[^<>|]*\|>|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")
_TAG = re.compile(
    r"<\s*/?\s*(?:think|answer|tools?|tool_calls?|tool_responses?|video_explanation|noun_explanation|vision_start|vision_end|"
    rf"{'|'.join(TOOLS)})\b[^<>]*>",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """`text` without chat control tokens, our tags and invisible characters, whatever they were hidden in."""
    while (stripped := _TAG.sub("", _CONTROL.sub("", text))) != text:
        text = stripped
    return text.replace("<|", "< ").replace("|>", " >").strip()


def clip_hash(shape: Sequence[int]) -> "hashlib._Hash":
    """The hash that names a clip of `shape`, ready to be updated with the clip's octets."""
    return hashlib.sha256(f"{','.join(map(str, shape))}\n".encode())


class _Sent(BaseModel):
    """What a client writes: a field that the server does not know is a mistake."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Given(BaseModel):
    """What the server writes: a newer one may say more."""

    model_config = ConfigDict(frozen=True)


ClipId = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Text = Annotated[str, AfterValidator(clean)]
"""Words that a policy will read: they are clean wherever such a model exists, on the server and in the client."""


class Person(_Given):
    """One person in one frame.

    box: left, top, right, bottom in pixels. keypoints: 17 of x, y in pixels and confidence, in COCO order; None from the
    detector.
    """

    box: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    confidence: FiniteFloat
    keypoints: tuple[tuple[FiniteFloat, FiniteFloat, FiniteFloat], ...] | None = None


People = tuple[tuple[Person, ...], ...]
"""The people in each frame."""


class ClipArguments(_Sent):
    """A clip that was uploaded before, and which of its frames to look at (all of them when left out)."""

    clip: ClipId
    frames: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] | None = None


class LabelArguments(_Sent):
    """The names of actions."""

    labels: tuple[str, ...]


ARGUMENTS: dict[Tool, type[ClipArguments] | type[LabelArguments]] = {
    "pose_estimation": ClipArguments,
    "person_detection": ClipArguments,
    "action_explanation": LabelArguments,
    "video_description": ClipArguments,
}
"""What each tool takes when it is called alone."""


class Request(_Sent):
    """One row's work. The same episode and turn asked again gets the same answer, and nothing is computed twice.

    clip, frames: as in ClipArguments, for every tool but action_explanation, which takes `labels`.
    """

    episode: Annotated[str, Field(max_length=200)]
    turn: Annotated[int, Field(ge=0, lt=2**31)]
    tools: Annotated[tuple[Tool, ...], Field(max_length=len(TOOLS))]
    clip: ClipId | None = None
    frames: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] | None = None
    labels: tuple[str, ...] = ()


class Answer(_Given):
    """What came of a request, which `episode` and `turn` name.

    status: of the row, ok when all its tools are; message: the sentence for the policy when it is not, else empty.
    statuses, problems, backends: by tool, how it went, why it failed (for people, not for the policy), and who answered.
    explanation: a line "- label: explanation" for each label, in the order asked. description: at most three sentences.
    poses, boxes: the people in each frame asked for. annotated: the id of the clip with what was found drawn on it.
    """

    episode: str
    turn: int
    status: Status
    message: str = ""
    statuses: dict[Tool, Status] = {}
    problems: dict[Tool, str] = {}
    backends: dict[Tool, str] = {}
    explanation: Text | None = None
    description: Text | None = None
    poses: People | None = None
    boxes: People | None = None
    annotated: ClipId | None = None


class BatchRequest(_Sent):
    """The rows of a batch; timeout: seconds until an answer is worth nothing any more, counted by the server."""

    requests: Annotated[tuple[Request, ...], Field(max_length=4096)]
    timeout: Annotated[FiniteFloat, Field(gt=0)] = 10.0


class ClipHeader(_Given):
    """A clip in a batch's answer: its id and its shape T, H, W, 3."""

    id: ClipId
    shape: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)], Literal[3]]


class BatchResponse(_Given):
    """The answers, one for each request in the same order; clips: those whose octets follow, each once."""

    version: str = VERSION
    answers: tuple[Answer, ...]
    clips: tuple[ClipHeader, ...] = ()


class Refusal(_Given):
    """Why a call was not answered; missing: the clips to upload before trying again."""

    version: str = VERSION
    error: str
    message: str
    missing: tuple[ClipId, ...] = ()
