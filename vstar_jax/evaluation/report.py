"""Predictions to numbers: top-1 of each group, harmonic mean or spread, and the table that a person reads."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vstar_jax.config import Config
from vstar_jax.data.datasets import STICK_MOTION
from vstar_jax.data.splits import harmonic_mean, spread
from vstar_jax.dialogue import same_label


@dataclass(frozen=True)
class Prediction:
    """One held-out clip: its group, the right name, the answer that was read (empty when there was none), the tools that were
    asked for and how their calls ended, and the turns.
    """

    clip: str
    group: str
    label: str
    answer: str
    well_formed: bool
    tools: Mapping[str, str]
    turns: tuple[str, ...]
    labels: int
    readable: bool = True

    @property
    def correct(self) -> bool:
        """Whether the answer is the label, by the released scorer's rule; a clip that cannot be read is never right."""
        return self.readable and same_label(self.answer, self.label)

    def line(self) -> str:
        """One JSON line, with the verdict."""
        return json.dumps({**asdict(self), "correct": self.correct}) + "\n"

    @classmethod
    def parse(cls, line: str) -> "Prediction":
        """What `line` wrote."""
        found = json.loads(line)
        values: dict[str, Any] = {f.name: found[f.name] for f in fields(cls)}
        return cls(**{**values, "turns": tuple(values["turns"])})


def summarise(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Fractions in [0, 1]: for each group `<group>_top1`, `<group>_chance`, `<group>_answered`, and its counts of clips, of
    clips that cannot be read and of replies without an answer that can be; `harmonic_mean` of base and novel from unrounded
    means where both are there (OVAR.md); tool rates over all clips.
    """
    result: dict[str, float] = {}
    for group in dict.fromkeys(p.group for p in predictions):
        members = [p for p in predictions if p.group == group]
        result[f"{group}_top1"] = _mean([p.correct for p in members])
        result[f"{group}_chance"] = _mean([1 / p.labels for p in members])
        result[f"{group}_answered"] = _mean([bool(p.answer) for p in members])
        result[f"{group}_clips"] = len(members)
        result[f"{group}_unreadable"] = sum(not p.readable for p in members)
        result[f"{group}_unparsable"] = sum(p.readable and not p.answer for p in members)
    base, novel = result.get("base_top1"), result.get("novel_top1")
    if base is not None and novel is not None:
        result["harmonic_mean"] = harmonic_mean(base, novel)
    for tool in sorted({t for p in predictions for t in p.tools}):
        result[f"tool_{tool}"] = _mean([tool in p.tools for p in predictions])
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def groups_of(summary: Mapping[str, float]) -> list[str]:
    """The groups of a summary, in its order."""
    return [key.removesuffix("_top1") for key in summary if key.endswith("_top1")]


def title(config: Config) -> str:
    """What a table of results is about."""
    data = config.data
    labels = f", {data.labels} labels a clip" if data.dataset == STICK_MOTION else ""
    return f"{data.dataset}, {data.protocol.replace('_', ' ')}, held-out clips{labels}"


def print_table(rows: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Prints a row for each named summary, all of the same groups, with chance beneath."""
    from rich.console import Console
    from rich.table import Table

    summary = next(iter(rows.values()))
    groups = groups_of(summary)
    joined = ["harmonic mean"] if "harmonic_mean" in summary else ["mean ± std"] if len(groups) > 1 else []
    table = Table(title=title)
    for column in ("model", *(f"{group} top-1" for group in groups), *joined, "answered", "clips"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=column == "mean ± std")
    for name, summary in rows.items():
        answered = [f"{100 * summary[f'{g}_answered']:.0f} %" for g in groups]
        clips = [str(int(summary[f"{g}_clips"])) for g in groups]
        top = [summary[f"{g}_top1"] for g in groups]
        last = [_percent(summary["harmonic_mean"])] if "harmonic_mean" in summary else [f"{spread(top).text()} %"]
        values = [*map(_percent, top), *last[: len(joined)], " / ".join(answered), " / ".join(clips)]
        table.add_row(name, *values)
    table.add_row("chance", *(_percent(summary[f"{g}_chance"]) for g in groups), *[""] * (len(joined) + 2))
    Console().print(table)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def write_predictions(path: str | Path, predictions: Sequence[Prediction]) -> None:
    """One JSON line a clip, with both turns and the verdict."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.writelines(prediction.line() for prediction in predictions)
    os.replace(temporary, path)


def read_predictions(path: str | Path) -> list[Prediction]:
    """What `write_predictions` wrote."""
    return [Prediction.parse(line) for line in Path(path).read_text().splitlines()]
