"""A trace of a few steps, for TensorBoard's profile plugin and for Perfetto (ui.perfetto.dev)."""

from pathlib import Path

import jax

SKIPPED, TRACED = 2, 3
"""Steps that compile and warm up, and steps that are traced after them."""


class Profile:
    """Traces steps of a loop into `folder` when it is wanted; a context manager, which ends a trace that is under way."""

    def __init__(self, wanted: bool, folder: Path, done: int):
        """done: steps that were done before the loop, which goes on from there."""
        self.folder = folder
        self.steps = range(done + 1 + SKIPPED, done + 1 + SKIPPED + TRACED) if wanted else range(0)
        self.running = False

    def reached(self, step: int) -> None:
        """The loop is about to do `step`."""
        if step in self.steps and not self.running:
            self.folder.mkdir(parents=True, exist_ok=True)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python would hide, and slow down, what the devices do
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True, profiler_options=options)
            self.running = True
        elif self.running and step not in self.steps:
            self.__exit__()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
