"""What a dataset offers to training and evaluation: examples to learn from and episodes to be tried on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vstar_jax.batch import Example
from vstar_jax.data.clips import ClipRecord
from vstar_jax.dialogue import Decision, Prompts, ToolResult


@dataclass(frozen=True)
class Episode:
    """One clip to be named. Only frames, labels and what the tools return may reach a prompt.

    name: the clip's name, for logs and result files; group: the set of classes it is scored in, such as base or novel;
    frames uint8 [T, H, W, 3] at fps frames a second; labels: the allowed names in the order of the prompt; answer: the right
    one; tools: what the tools return for a decision; explanation: what the right answer means, for the reward, or None.
    """

    name: str
    group: str
    frames: np.ndarray
    fps: float
    labels: tuple[str, ...]
    answer: str
    tools: Callable[[Decision], ToolResult]
    explanation: str | None = None


class Task(Protocol):
    """A dataset under a protocol."""

    prompts: Prompts
    groups: tuple[str, ...]

    def train_records(self) -> Sequence[Any]:
        """Random access to the training records."""
        ...

    def test_records(self, group: str) -> Sequence[Any]:
        """The held-out records of a group, in a fixed order; each has a `name`, for result files, and a `label`."""
        ...

    def label_count(self, group: str) -> int:
        """How many labels an episode of a group offers."""
        ...

    def train_clips(self) -> Sequence[ClipRecord]:
        """All clips that were trained on, for the guard against leakage; empty where they cannot be known."""
        ...

    def test_clips(self, group: str) -> Sequence[ClipRecord]:
        """All clips that may be evaluated in a group, for the guard; empty where they cannot have been trained on."""
        ...

    def audit(self) -> Mapping[str, tuple[int, int]]:
        """Fault, or "none" -> how many training dialogues the data assessment dropped, and how many there were; empty where
        faults are not known.
        """
        ...

    def example(self, record: Any, rng: np.random.Generator) -> Example | None:
        """A training dialogue, drawn afresh with `rng`; None when the clip cannot be read."""
        ...

    def episode(self, record: Any, rng: np.random.Generator, *, training: bool = False) -> Episode | None:
        """An episode to be tried on, or with `training` one to learn from by reward; None when the clip cannot be read."""
        ...
