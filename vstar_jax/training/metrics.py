"""What a run measures: one JSON line a step in metrics.jsonl, the same in TensorBoard, and the curves drawn from the lines.

The loops write `group/name` keys as in `sft/loss`. Only process 0 writes.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vstar_jax.errors import UserError

COLUMNS = 3
FEW = 10  # points below which a curve shows each of them


class MetricsWriter:
    """Appends metrics to a run directory; a context manager.

    Args:
        run_dir: the run directory; it is made when it is missing.
        resume_step: the step that was restored, 0 for a fresh run. Lines of later steps go, and so does what a killed
            process left of a line, so that the file reads like an uninterrupted run.
    """

    def __init__(self, run_dir: str | Path, resume_step: int = 0):
        self._file = self._board = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter

        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(run_dir) if line["step"] <= resume_step]
        self._written = {(line["step"], key) for line in kept if line["step"] == resume_step for key in line}
        partial = _path(run_dir).with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, _path(run_dir))
        self._file = open(_path(run_dir), "a")  # noqa: SIM115  it stays open for the run
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes scalars as one line, at once; a value that is not finite becomes null.

        What the step that was restored has already recorded is not written twice.
        """
        if self._file is None or self._board is None:
            return
        values = {key: float(value) for key, value in metrics.items() if (step, key) not in self._written}
        if not values:
            return
        line = {"step": step} | {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Ends both files; no `write` may follow."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl in order, none when there is no file; a last line cut short is left out."""
    path = _path(Path(run_dir))
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def draw_curves(run_dir: str | Path) -> Path:
    """Draws every metric of a run over its steps, one panel each, into curves.png; UserError when nothing was measured."""
    from matplotlib.figure import Figure  # without pyplot there is no global state, and PNG files need no display

    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in read_metrics(run_dir):
        for key, value in line.items():
            if key != "step" and value is not None:
                points[key].append((line["step"], value))
    if not points:
        raise UserError(f"{run_dir} has no metrics to draw: give the directory of a run that has trained.")
    rows = math.ceil(len(points) / COLUMNS)
    figure = Figure(figsize=(4.2 * COLUMNS, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for panel, (key, series) in zip(panels, points.items(), strict=False):
        panel.plot(*zip(*series, strict=True), linewidth=1.2, marker="o" if len(series) < FEW else None)
        panel.set_title(key)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    for panel in list(figure.axes)[len(points) :]:
        panel.remove()
    path = Path(run_dir) / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def _path(run_dir: Path) -> Path:
    return run_dir / "metrics.jsonl"
