"""Results in the layout of the paper's tables 1 and 2, ours under the published rows, each row with its training source.

Ours are fractions as measured, unrounded, of one or several seeds or splits; `published` has the paper's. Tables come as
Markdown to read and as JSON to keep.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vstar_jax.data.splits import SEEDS, STD, Spread, base_to_novel, spread
from vstar_jax.evaluation.published import BASE_TO_NOVEL, CROSS_DATASET, TABLE_1, TABLE_2

TITLES = {"kinetics400": "K-400", "hmdb51": "HMDB-51", "ucf101": "UCF-101", "ssv2": "SSv2", "kinetics600": "K-600"}


@dataclass(frozen=True)
class OwnRow:
    """A policy of ours.

    base_to_novel: dataset -> (base, novel) top-1 of each seed; cross_dataset: `dataset/full` or `dataset/split` -> top-1 of
    each split; notes: what a reader must know, such as shared clips that were allowed.
    """

    method: str
    trained_on: str
    base_to_novel: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    cross_dataset: Mapping[str, Sequence[float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def own_row(
    method: str, trained_on: str, dataset: str, summaries: Sequence[Mapping[str, float]], notes: Sequence[str] = ()
) -> OwnRow:
    """A row from the summaries (`report.summarise`) of an evaluation, or of several that differ in the seed of training."""
    first, notes = summaries[0], tuple(notes)
    if "base_top1" in first:
        seeds = [(summary["base_top1"], summary["novel_top1"]) for summary in summaries]
        return OwnRow(method, trained_on, base_to_novel={dataset: seeds}, notes=notes)
    if "full_top1" in first:
        return OwnRow(method, trained_on, cross_dataset={f"{dataset}/full": [s["full_top1"] for s in summaries]}, notes=notes)
    splits = [statistics.fmean(summary[f"split{k}_top1"] for summary in summaries) for k in SEEDS]
    return OwnRow(method, trained_on, cross_dataset={f"{dataset}/split": splits}, notes=notes)


def table_of(row: OwnRow) -> tuple[str, dict[str, Any]]:
    """The paper's table that a row belongs to, as Markdown and JSON."""
    return base_to_novel_table([row]) if row.base_to_novel else cross_dataset_table([row])


def base_to_novel_table(rows: Sequence[OwnRow]) -> tuple[str, dict[str, Any]]:
    """Table 1 as Markdown and JSON: base, novel and harmonic mean of the unrounded means, in percent."""
    columns = [f"{TITLES[d]} {part}" for d in BASE_TO_NOVEL for part in ("base", "novel", "HM")]
    lines: list[tuple[str, ...]] = []
    content: list[dict[str, Any]] = []
    for published in TABLE_1:
        cells = [f"{x:.1f}" for d in BASE_TO_NOVEL for x in published.results[d]]
        lines.append((f"{published.method} (published)", published.trained_on, *cells))
        content.append({"method": published.method, "trained_on": published.trained_on, "published": True, **published.results})
    for row in rows:
        means = {d: base_to_novel(seeds) for d, seeds in row.base_to_novel.items()}
        cells = [f"{100 * means[d][i]:.1f}" if d in means else "-" for d in BASE_TO_NOVEL for i in range(3)]
        lines.append((row.method, row.trained_on, *cells))
        results = {d: tuple(100 * x for x in values) for d, values in means.items()}
        content.append({"method": row.method, "trained_on": row.trained_on, "published": False, "notes": row.notes, **results})
    return _markdown(columns, lines, rows), {"table": 1, "unit": "percent", "rows": content}


def cross_dataset_table(rows: Sequence[OwnRow]) -> tuple[str, dict[str, Any]]:
    """Table 2 as Markdown and JSON: mean and, over several splits, the sample standard deviation, in percent."""
    columns = [f"{TITLES[name]} {part}" for name, part in (column.split("/") for column in CROSS_DATASET)]
    lines: list[tuple[str, ...]] = []
    content: list[dict[str, Any]] = []
    for published in TABLE_2:
        cells = [published.results[c].text(scale=1) if c in published.results else "-" for c in CROSS_DATASET]
        lines.append((f"{published.method} (published)", published.trained_on, *cells))
        results = {c: _numbers(s, 1) for c, s in published.results.items()}
        content.append({"method": published.method, "trained_on": published.trained_on, "published": True, **results})
    for row in rows:
        spreads = {c: spread(values) for c, values in row.cross_dataset.items()}
        lines.append((row.method, row.trained_on, *(spreads[c].text() if c in spreads else "-" for c in CROSS_DATASET)))
        results = {c: _numbers(s, 100) for c, s in spreads.items()}
        content.append({"method": row.method, "trained_on": row.trained_on, "published": False, "notes": row.notes, **results})
    text = f"{_markdown(columns, lines, rows)}\nOurs: mean ± {STD} over the splits; the paper does not say which it prints.\n"
    return text, {"table": 2, "unit": "percent", "std": STD, "rows": content}


def _numbers(found: Spread, scale: float) -> dict[str, float | None]:
    return {"mean": scale * found.mean, "std": None if found.std is None else scale * found.std}


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]], rows: Sequence[OwnRow]) -> str:
    header = ("method", "trained on", *columns)
    marks = ("---", "---", *["---:"] * len(columns))
    table = "\n".join("| " + " | ".join(line) + " |" for line in (header, marks, *lines))
    notes = "".join(f"\n{row.method}: {note}\n" for row in rows for note in row.notes)
    return f"{table}\n{notes}"
