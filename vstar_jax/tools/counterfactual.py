"""Tools whose results are made useless, for the question whether a policy uses what they say or only that they were called."""

import re
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from vstar_jax.dialogue import ToolResult
from vstar_jax.tools.host import Call, Outcome, Tools

Kind = Literal["blank", "shuffled", "other"]


class Counterfactual:
    """`tools.host.Tools` that calls others and changes what they return; statuses and sentences on failures stay.

    blank: black clips and empty texts. shuffled: frames in another order, explanations dealt to other labels, the words of a
    description mixed. other: what another clip's call returned, blank where the calls that came together have no other clip.
    """

    def __init__(self, tools: Tools, kind: Kind):
        self.tools, self.kind = tools, kind

    def __call__(self, calls: Sequence[Call], deadline: float) -> list[Outcome]:
        """See `tools.host.Tools`."""
        outcomes = list(self.tools(calls, deadline))
        return [replace(outcome, result=self._changed(n, calls, outcomes)) for n, outcome in enumerate(outcomes)]

    def _changed(self, number: int, calls: Sequence[Call], outcomes: Sequence[Outcome]) -> ToolResult:
        call, result = calls[number], outcomes[number].result
        if self.kind == "shuffled":
            return _shuffled(result, np.random.default_rng(zlib.crc32(call.episode.frames.tobytes())))
        if self.kind == "other":
            following = [(number + n) % len(calls) for n in range(1, len(calls))]
            others = (outcomes[n].result for n in following if calls[n].episode.frames is not call.episode.frames)
            if other := next((o for o in others if _replaces(o, result)), None):
                return replace(other, failures=result.failures)
        return _blank(result)


def _blank(result: ToolResult) -> ToolResult:
    return replace(
        result,
        frames=None if result.frames is None else np.zeros_like(result.frames),
        explanation=None if result.explanation is None else "",
        description=None if result.description is None else "",
    )


def _shuffled(result: ToolResult, rng: np.random.Generator) -> ToolResult:
    frames, explanation, description = result.frames, result.explanation, result.description
    if frames is not None:
        frames = frames[rng.permutation(len(frames))]
    if explanation is not None:
        # A line is "- name: what it means"; the meanings move on by at least one place, and call themselves by their new names.
        parted = [line.removeprefix("- ").partition(": ") for line in explanation.splitlines()]
        moved = np.roll(np.arange(len(parted)), rng.integers(1, max(len(parted), 2)))
        lines = (f"- {parted[n][0]}: {_renamed(parted[m][2], parted[m][0], parted[n][0])}" for n, m in enumerate(moved))
        explanation = "\n".join(lines)
    if description is not None:
        description = " ".join(rng.permutation(description.split()).tolist())
    return replace(result, frames=frames, explanation=explanation, description=description)


def _renamed(text: str, old: str, new: str) -> str:
    """A text in which a name, where it stands as words of its own, is another."""
    return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, text)


def _replaces(other: ToolResult, result: ToolResult) -> bool:
    """Whether a result has the same parts as another, its clip of the same shape."""

    def parts(r: ToolResult) -> tuple[object, ...]:
        return (None if r.frames is None else r.frames.shape, r.explanation is None, r.description is None)

    return parts(other) == parts(result)
