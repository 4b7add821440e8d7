"""Tools as the construction calls them: their results, and the numbers of people and joints behind what they drew."""

from dataclasses import dataclass
from typing import Any, cast

from vstar_jax.dialogue import Decision, ToolResult
from vstar_jax.tools.client import ToolsClient
from vstar_jax.tools.host import Call, Outcome, Tools
from vstar_jax.tools.protocol import People
from vstar_jax.tools.served import ServedTools


@dataclass(frozen=True)
class Facts:
    """What the visual tools counted: fewest and most people in a frame, and the joints of a person; None where none looked."""

    persons: tuple[int, int] | None = None
    joints: int | None = None


class _Listening:
    """A client of the tools server that keeps the answers which it gives."""

    def __init__(self, client: ToolsClient):
        self._client, self.answers = client, list[Any]()

    def call(self, *arguments: Any) -> list[Any]:
        """See `ToolsClient.call`."""
        self.answers = self._client.call(*arguments)
        return self.answers


def call_tools(tools: Tools, call: Call, record: Any, deadline: float) -> tuple[Outcome, Facts]:
    """One call's outcome and facts. record: of the dataset, whose own annotations are the facts where no server answers."""
    if not call.decision.chosen():
        return Outcome(ToolResult(), {}), Facts()
    if isinstance(tools, ServedTools):
        listening = _Listening(tools.client)
        outcome = ServedTools(cast(ToolsClient, listening))([call], deadline)[0]
        answer = listening.answers[0].answer
        return outcome, _counted(answer.poses, answer.boxes)
    outcome = tools([call], deadline)[0]
    return outcome, _annotated(record, call.decision)


def _counted(poses: People | None, boxes: People | None) -> Facts:
    seen = boxes if boxes is not None else poses
    if seen is None:
        return Facts()
    joints = [len(person.keypoints) for people in poses or () for person in people if person.keypoints]
    counts = [len(people) for people in seen]
    return Facts((min(counts), max(counts)) if counts else None, max(joints, default=None))


def _annotated(record: Any, asked: Decision) -> Facts:
    boxes, keypoints = getattr(record, "boxes", None), getattr(record, "keypoints", None)
    if boxes is None or keypoints is None or not (asked.pose_estimation or asked.person_detection):
        return Facts()
    return Facts((boxes.shape[1], boxes.shape[1]), keypoints.shape[1] if asked.pose_estimation else None)
