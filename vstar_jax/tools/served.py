"""The tools server as a rollout's tools: the calls of all rows in one request, and what came of each as an outcome."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vstar_jax.dialogue import ToolResult
from vstar_jax.tools.client import ClientAnswer, ToolsClient, clip_digest
from vstar_jax.tools.host import Call, Outcome
from vstar_jax.tools.protocol import SENTENCES, TAGS, Request, Status

VISUAL = ("pose_estimation", "person_detection")


class ServedTools:
    """`tools.host.Tools` by a server; what the server or the network does wrong is a status of the outcomes."""

    def __init__(self, client: ToolsClient):
        self.client = client

    def __call__(self, calls: Sequence[Call], deadline: float) -> list[Outcome]:
        """See `tools.host.Tools`. A clip is hashed once, however many rows show it, and none is named to the server."""
        clips: dict[str, np.ndarray] = {}
        digests: dict[int, str] = {}
        requests = []
        for number, call in enumerate(calls):
            frames, asked = call.episode.frames, call.decision.chosen()
            watched = any(tag != "noun_explanation" for tag in asked)
            if watched and id(frames) not in digests:
                digests[id(frames)] = clip_digest(frames)
                clips[digests[id(frames)]] = frames
            requests.append(
                Request(
                    episode=str(number),
                    turn=call.turn,
                    tools=tuple(TAGS[tag] for tag in asked),
                    clip=digests[id(frames)] if watched else None,
                    labels=call.episode.labels,
                )
            )
        answers = self.client.call(requests, clips, deadline)
        return [_outcome(call, answer) for call, answer in zip(calls, answers, strict=True)]


def _outcome(call: Call, given: ClientAnswer) -> Outcome:
    """What the policy sees of an answer: the results of the tools that worked, and a sentence on those that did not.

    A tool that is said to have worked and whose result is not there has given something malformed.
    """
    results = {
        **dict.fromkeys(VISUAL, given.frames),
        "noun_explanation": given.answer.explanation,
        "video_explanation": given.answer.description,
    }
    statuses: dict[str, Status] = {}
    for tag in call.decision.chosen():
        status = given.answer.statuses[TAGS[tag]]
        statuses[tag] = "malformed" if status == "ok" and results[tag] is None else status

    def of(tag: str) -> Any:
        return results[tag] if statuses.get(tag) == "ok" else None

    seen = [frames for tag in VISUAL if (frames := of(tag)) is not None]
    failures = tuple(dict.fromkeys(SENTENCES[status] for status in statuses.values() if status != "ok"))
    result = ToolResult(seen[0] if seen else None, of("noun_explanation"), of("video_explanation"), failures)
    return Outcome(result, statuses)
