"""Predictions to numbers: top-1 of each group, harmonic mean, and the table that a person reads."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vstar_jax.dialogue import same_label


@dataclass(frozen=True)
class Prediction:
    """One held-out clip: its group, the right name, the answer that was read (empty when there was none), and both turns."""

    clip: str
    group: str
    label: str
    answer: str
    well_formed: bool
    tools: tuple[str, ...]
    turns: tuple[str, ...]
    labels: int
    readable: bool = True

    @property
    def correct(self) -> bool:
        """Whether the answer is the label, by the released scorer's rule; a clip that cannot be read is never right."""
        return self.readable and same_label(self.answer, self.label)


def summarise(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Fractions in [0, 1]: for each group `<group>_top1`, `<group>_chance`, `<group>_answered` and its count of clips;
    `harmonic_mean` of base and novel from unrounded means where both are there (OVAR.md); tool rates over all clips.
    """
    result: dict[str, float] = {}
    for group in dict.fromkeys(p.group for p in predictions):
        members = [p for p in predictions if p.group == group]
        result[f"{group}_top1"] = _mean([p.correct for p in members])
        result[f"{group}_chance"] = _mean([1 / p.labels for p in members])
        result[f"{group}_answered"] = _mean([bool(p.answer) for p in members])
        result[f"{group}_clips"] = len(members)
        result[f"{group}_unreadable"] = sum(not p.readable for p in members)
    base, novel = result.get("base_top1"), result.get("novel_top1")
    if base is not None and novel is not None:
        result["harmonic_mean"] = 2 * base * novel / (base + novel) if base + novel else 0.0
    for tool in sorted({t for p in predictions for t in p.tools}):
        result[f"tool_{tool}"] = _mean([tool in p.tools for p in predictions])
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def print_table(rows: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Prints a row for each named summary, with chance beneath."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in ("model", "base top-1", "novel top-1", "harmonic mean", "answered", "clips"):
        table.add_column(column, justify="left" if column == "model" else "right")
    summary: Mapping[str, float] = {}
    for name, summary in rows.items():
        answered = [f"{100 * summary[f'{g}_answered']:.0f} %" for g in ("base", "novel")]
        clips = [str(int(summary[f"{g}_clips"])) for g in ("base", "novel")]
        values = [_percent(summary[k]) for k in ("base_top1", "novel_top1", "harmonic_mean")]
        table.add_row(name, *values, " / ".join(answered), " / ".join(clips))
    table.add_row("chance", _percent(summary["base_chance"]), _percent(summary["novel_chance"]), "", "", "")
    Console().print(table)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON in one piece: a reader never sees half of it."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def write_predictions(path: str | Path, predictions: Sequence[Prediction]) -> None:
    """One JSON line a clip, with both turns and the verdict."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        for prediction in predictions:
            file.write(json.dumps({**asdict(prediction), "correct": prediction.correct}) + "\n")
    os.replace(temporary, path)
