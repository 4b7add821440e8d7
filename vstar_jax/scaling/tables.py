"""The tables of docs/scaling.md: every cell is a run of scripts/compile.py in a process of its own, kept as JSON.

A cell that is in the folder is not compiled again, so that an interrupted table goes on where it was.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vstar_jax.errors import UserError
from vstar_jax.scaling.chips import GIB, size
from vstar_jax.scaling.report import Record
from vstar_jax.sharding import mesh_shape

LADDER: Mapping[str, Sequence[tuple[str, str]]] = {
    "v5e": (
        ("v5e:1x1", "1x1"),
        ("v5e:2x2", "4x1"),
        ("v5e:2x4", "8x1"),
        ("v5e:2x4", "4x2"),
        ("v5e:4x4", "8x2"),
        ("v5e:4x8", "8x4"),
    ),
    "v5p": (("v5p:1x1x1", "1x1"), ("v5p:2x2x1", "4x1"), ("v5p:2x2x2", "8x1"), ("v5p:2x2x4", "8x2")),
    "v6e": (("v6e:1x1", "1x1"), ("v6e:2x2", "4x1"), ("v6e:2x4", "8x1"), ("v6e:2x4", "4x2"), ("v6e:4x4", "8x2")),
}
"""Chip -> slices with their meshes from the smallest on; eight dialogues split over at most eight devices."""
MODELS = ("qwen2.5-vl-3b", "qwen2.5-vl-7b")
PHASES = {"SFT": ("sft",), "GRPO": ("rollout", "grpo")}
ROWS_A_STEP = {"sft": 8, "grpo": 32}
"""Of the paper's settings: dialogues, and episodes of eight groups of four."""
WEAK = (("v5p:2x2x1", "4x1"), ("v5p:2x2x4", "16x1"), ("v5p:4x4x4", "4x16x1"), ("v5p:4x8x8", "16x16x1"))
"""Parameters are split over at most 16 chips, and repeated beyond."""
ROWS = 2
"""Dialogues of each chip under weak scaling."""
COMPARED = (MODELS[0], *WEAK[0])
"""Model, slice and mesh on which settings are compared."""
SETTINGS: Mapping[str, Sequence[tuple[str, ...]]] = {
    "sft": (
        (),
        ("--sft.accumulate=2",),
        ("--policy.remat=dots",),
        ("--policy.remat=none",),
        ("--policy.param_dtype=bfloat16",),
        ("--policy.moment_dtype=bfloat16",),
        ("--policy.lora.rank=16",),
    ),
    "rollout": (
        (),
        ("--rollout.weights=split",),
        ("--rollout.cache=float8_e4m3fn",),
        ("--rollout.history=replace",),
        ("--policy.lora.rank=16", "--grpo.reference=adapters_off"),
    ),
}
"""What is compiled -> the changes to the paper's settings that are compared, none of them first."""


@dataclass(frozen=True)
class Cell:
    """A run of scripts/compile.py."""

    model: str
    topology: str
    mesh: str
    what: str
    flags: tuple[str, ...] = ()

    def path(self, folder: Path) -> Path:
        named = "".join(flag.replace("--", "_").replace("=", "-") for flag in self.flags)
        return folder / f"{self.model}_{self.topology.replace(':', '-')}_{self.mesh}_{self.what}{named}.json"

    def records(self, folder: Path) -> list[Record]:
        """What the cell's run found; empty before it has run."""
        path = self.path(folder)
        return [Record.from_json(raw) for raw in json.loads(path.read_text())] if path.exists() else []


def weak(model: str, topology: str, mesh: str, extra: tuple[str, ...]) -> Cell:
    """A step of SFT with `ROWS` dialogues a chip."""
    rows = size(topology) * ROWS
    return Cell(model, topology, mesh, "sft", (*(() if rows == 8 else (f"--sft.batch_size={rows}",)), *extra))


def run(folder: Path, script: Path, flags: Sequence[str]) -> str:
    """Runs every cell that is not there yet, and returns the tables as Markdown.

    flags: settings on top of the paper's, for all cells. UserError when a cell ends in anything but a page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    extra = tuple(flags)
    for cell in _needed(folder, extra):
        command = [
            *(sys.executable, str(script)),
            *(f"--model={cell.model}", f"--topology={cell.topology}", f"--mesh={cell.mesh}", f"--what={cell.what}"),
            *(f"--json={cell.path(folder)}", *cell.flags),
        ]
        print(" ".join(command[1:]), flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if not cell.path(folder).exists():
            raise UserError(
                f"a cell of the table ended without a result ({done.stderr.strip()[-300:]}): run {' '.join(command[1:])} alone."
            )
    return markdown(folder, extra)


def _needed(folder: Path, extra: tuple[str, ...]) -> Iterator[Cell]:
    """The cells to run, in order: each ladder up to the first slice that holds every program of a phase."""
    for chip in LADDER:
        for model in MODELS:
            for phase in PHASES:
                for cells in _ladder(model, chip, phase, extra):
                    for cell in cells:
                        if not cell.path(folder).exists():
                            yield cell
                        if not _fits([cell], folder):
                            break
                    if _fits(cells, folder):
                        break
    for model in MODELS:
        for topology, mesh in WEAK:
            cell = weak(model, topology, mesh, extra)
            if not cell.path(folder).exists():
                yield cell
    for what, changes in SETTINGS.items():
        for change in changes:
            cell = Cell(*COMPARED, what, (*change, *extra))
            if not cell.path(folder).exists():
                yield cell


def _ladder(model: str, chip: str, phase: str, extra: tuple[str, ...]) -> list[list[Cell]]:
    return [
        [Cell(model, *place, what, (*_micro_batches(what, place[1]), *extra)) for what in PHASES[phase]]
        for place in LADDER[chip]
    ]


def _micro_batches(what: str, mesh: str) -> tuple[str, ...]:
    """The setting by which a device has one row at a time, which needs the least memory."""
    replicas, data, _ = mesh_shape(mesh)
    rows = ROWS_A_STEP.get(what, 0) // (replicas * data)
    return (f"--{what}.accumulate={rows}",) if rows else ()


def _fits(cells: Sequence[Cell], folder: Path) -> bool:
    return all(records and all(r.fits for r in records) for records in (cell.records(folder) for cell in cells))


def markdown(folder: Path, extra: tuple[str, ...] = ()) -> str:
    """The tables of what has run."""
    return f"{smallest(folder, extra)}\n{weak_scaling(folder, extra)}\n{settings(folder, extra)}"


def smallest(folder: Path, extra: tuple[str, ...] = ()) -> str:
    """For each model, phase and chip the slices that were tried, with the peak of the program that needs most."""
    lines = ["| model | phase | " + " | ".join(LADDER) + " |", "| --- | --- |" + " --- |" * len(LADDER)]
    for model in MODELS:
        for phase in PHASES:
            tried = [_tried(_ladder(model, chip, phase, extra), folder) for chip in LADDER]
            lines.append(f"| {model} | {phase} | " + " | ".join(tried) + " |")
    return "\n".join(lines) + "\n"


def _tried(ladder: Sequence[Sequence[Cell]], folder: Path) -> str:
    told = []
    for cells in ladder:
        found = [record for cell in cells for record in cell.records(folder)]
        if not found:
            continue
        peak = max(found, key=lambda r: r.peak / r.limit)
        place = f"{cells[0].topology} ({cells[0].mesh})"
        need = f"{peak.peak / GIB:.1f} of {peak.limit / GIB:.1f} GiB ({peak.identity['program']})"
        told.append(
            f"**{place}: {need}**"
            if _fits(cells, folder)
            else f"{place}: no, {need}"
            if not peak.fits
            else f"{place}: {need}, in part"
        )
    return "<br>".join(told) or "not run"


def weak_scaling(folder: Path, extra: tuple[str, ...] = ()) -> str:
    """A step of SFT with two dialogues a chip on ever larger slices, per chip."""
    axes = ("data", "replica")
    head = ["model", "slice", "chips", "TFLOP", "peak, GiB", "read and written, GB", *(f"sent along {a}, GB" for a in axes)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for model in MODELS:
        for topology, mesh in WEAK:
            for r in weak(model, topology, mesh, extra).records(folder):
                sent = [sum(r.sent.get(axis, {}).values()) / 1e9 for axis in axes]
                cells = [
                    *(model, f"{topology} ({mesh})", str(size(topology)), f"{r.flops / 1e12:.1f}", f"{r.peak / GIB:.1f}"),
                    *(f"{r.moved / 1e9:.0f}", *(f"{s:.1f}" for s in sent)),
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def settings(folder: Path, extra: tuple[str, ...] = ()) -> str:
    """What each setting does to the memory of a device, in GiB."""
    head = ("program", "setting", "parameters", "optimizer", "reference", "KV cache", "activations", "peak")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for what, changes in SETTINGS.items():
        for change in changes:
            for r in Cell(*COMPARED, what, (*change, *extra)).records(folder):
                weights = r.parts.get("parameters", 0) + r.parts.get("weights", 0)
                sizes = (weights, r.parts.get("optimizer", 0), r.parts.get("reference", 0), r.cache, r.activations)
                changed = " ".join(f"`{flag}`" for flag in change) or "none"
                peak = f"{r.peak / GIB:.1f}" if r.fits else f"{r.peak / GIB:.1f}, does not fit"
                lines.append("| " + " | ".join((what, changed, *(f"{s / GIB:.1f}" for s in sizes), peak)) + " |")
    return "\n".join(lines) + "\n"
