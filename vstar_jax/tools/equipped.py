"""A task whose episodes call the run's tools in the place of the dataset's own annotations, for evaluation."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from vstar_jax.data.task import Episode, Task
from vstar_jax.dialogue import Decision, ToolResult
from vstar_jax.tools.host import Call, Counts, Tools


class EquippedTask:
    """`data.task.Task` like `task`, but for the tools of its episodes; counts: how their calls ended."""

    def __init__(self, task: Task, tools: Tools, deadline: float):
        """deadline: seconds that the tools of an episode may take."""
        self.task, self.tools, self.deadline, self.counts = task, tools, deadline, Counts()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def episode(self, record: Any, rng: np.random.Generator, *, training: bool = False) -> Episode | None:
        """See `data.task.Task`."""
        episode = self.task.episode(record, rng, training=training)
        return episode and replace(episode, tools=partial(self._asked, episode))

    def _asked(self, episode: Episode, decision: Decision) -> ToolResult:
        if not decision.chosen():
            return ToolResult()
        outcome = self.tools([Call(episode, 1, decision)], self.deadline)[0]
        self.counts.statuses.update(outcome.statuses.values())
        return outcome.result
