"""The tables of docs/scaling.md: every cell is a run of scripts/compile.py in a process of its own.

What a cell came to is recorded beside the page, small enough to be kept with the sources. A cell that is recorded is not
compiled again, so that interrupted tables go on where they were, on another machine too.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Lock

from tqdm import tqdm

from vstar_jax.errors import UserError
from vstar_jax.pages import write_json, write_part
from vstar_jax.scaling.chips import CHIPS, GIB, size
from vstar_jax.scaling.compiler import compilable
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
    "h200": (("h200:1", "1x1"), ("h200:2", "2x1"), ("h200:4", "4x1"), ("h200:8", "8x1")),
}
"""Chip -> slices with their meshes from the smallest on; eight dialogues split over at most eight devices."""
MODELS = ("qwen2.5-vl-3b", "qwen2.5-vl-7b")
PHASES = {"SFT": ("sft",), "GRPO": ("rollout", "grpo")}
ROWS_A_STEP = {"sft": 8, "grpo": 32}
"""Of the paper's settings: dialogues, and episodes of eight groups of four."""
WEAK = (("v5p:2x2x1", "4x1"), ("v5p:2x2x4", "16x1"), ("v5p:4x4x4", "4x16x1"), ("v5p:4x8x8", "16x16x1"))
"""Slices and meshes of weak scaling: parameters are split over at most 16 chips, and repeated beyond."""
WEAK_ROWS = 2
"""Dialogues of each chip under weak scaling, or prompts, of four episodes each."""
WEAK_MODELS: Mapping[str, Sequence[str]] = {"sft": MODELS, "rollout": MODELS[1:], "grpo": MODELS[1:]}
"""What is compiled for weak scaling -> the models for which it is."""
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
        ("--rollout.history=replace", "--sft.steps=0"),  # SFT would learn dialogues as a whole
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

    @property
    def name(self) -> str:
        return " ".join((self.model, self.topology, self.mesh, self.what, *self.flags))


Found = dict[str, list[Record]]
"""Name of a cell -> what its programs are; of a cell that has not run there is nothing."""


def weak(model: str, topology: str, mesh: str, what: str, extra: tuple[str, ...] = ()) -> Cell:
    """A program with `WEAK_ROWS` dialogues or prompts a chip."""
    rows = size(topology) * WEAK_ROWS
    flags = (f"--sft.batch_size={rows}",) if what == "sft" else (f"--grpo.prompts={rows}",)
    return Cell(model, topology, mesh, what, (*(() if rows == 8 else flags), *extra))


def run(report: Path, script: Path, flags: Sequence[str], workers: int = 1) -> None:
    """Compiles every cell that is not recorded yet, and writes the tables into `report` after each.

    flags: settings on top of the paper's, for all cells; workers: cells at a time, each of which keeps a core busy. UserError
    when a cell ends in anything but a page, and for no worker.
    """
    if workers < 1:
        raise UserError(f"there cannot be {workers} workers: choose one or more, each needs a core and some 3 GiB.")
    record, extra = report.with_suffix(".json"), tuple(flags)
    found, writing, stopped = read(record), Lock(), Event()

    def follow(chain: Iterator[Cell]) -> None:
        for cell in chain:
            if cell.name in found:
                continue
            if stopped.is_set():
                return
            tqdm.write(cell.name)
            try:
                records = _compiled(cell, script)
            except BaseException:
                stopped.set()
                raise
            with writing:
                found[cell.name] = records
                _record(record, found)
                write(report, found, extra)

    write(report, found, extra)
    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(follow, chain) for chain in _chains(found, extra)]
        for future in tqdm(as_completed(futures), desc="tables", unit="part", total=len(futures)):
            future.result()
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _compiled(cell: Cell, script: Path) -> list[Record]:
    with TemporaryDirectory() as folder:
        result = Path(folder) / "cell.json"
        command = [
            *(sys.executable, str(script), f"--model={cell.model}", f"--topology={cell.topology}", f"--mesh={cell.mesh}"),
            *(f"--what={cell.what}", f"--json={result}", *cell.flags),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if not result.exists():
            alone = " ".join(command[1:6] + list(cell.flags))
            said = done.stderr.strip()[-300:]
            raise UserError(f"a cell of the tables ended without a result ({said}): run python {alone} alone.")
        return [Record.from_json(raw) for raw in json.loads(result.read_text())]


def read(record: Path) -> Found:
    """What is recorded in a file, nothing when it is not there."""
    cells = json.loads(record.read_text())["cells"] if record.exists() else {}
    return {name: [Record.from_json(raw) for raw in records] for name, records in cells.items()}


def _record(path: Path, found: Found) -> None:
    """Writes the record; the settings of each program follow from the name of its cell."""

    def kept(record: Record) -> dict[str, object]:
        identity = {key: value for key, value in record.identity.items() if key != "settings"}
        return {**record.as_json(), "identity": identity}

    write_json(path, {"cells": {name: [kept(r) for r in records] for name, records in sorted(found.items())}})


def _chains(found: Found, extra: tuple[str, ...]) -> list[Iterator[Cell]]:
    """The cells of all tables, in parts that do not depend on each other."""
    ladders = [_climbed(_ladder(model, chip, phase, extra), found) for chip in LADDER for model in MODELS for phase in PHASES]
    alone = [Cell(*COMPARED, what, (*change, *extra)) for what, changes in SETTINGS.items() for change in changes]
    alone += [weak(model, *place, what, extra) for what, models in WEAK_MODELS.items() for model in models for place in WEAK]
    return [*ladders, *(iter([cell]) for cell in alone)]


def _climbed(ladder: Sequence[Sequence[Cell]], found: Found) -> Iterator[Cell]:
    """The cells of a ladder up to the first slice that holds every program; each is found before the next is asked for."""
    for cells in ladder:
        for cell in cells:
            yield cell
            if not _fits([cell], found):
                break
        if _fits(cells, found):
            return


def _ladder(model: str, chip: str, phase: str, extra: tuple[str, ...]) -> list[list[Cell]]:
    whats = [what for what in PHASES[phase] if what in compilable(CHIPS[chip])]
    return [[Cell(model, *place, what, (*_micro_batches(what, place[1]), *extra)) for what in whats] for place in LADDER[chip]]


def _micro_batches(what: str, mesh: str) -> tuple[str, ...]:
    """The setting by which a device has one row at a time, which needs the least memory."""
    replicas, data, _ = mesh_shape(mesh)
    rows = ROWS_A_STEP.get(what, 0) // (replicas * data)
    return (f"--{what}.accumulate={rows}",) if rows else ()


def _fits(cells: Sequence[Cell], found: Found) -> bool:
    return all(cell.name in found and all(r.fits for r in found[cell.name]) for cell in cells)


def write(report: Path, found: Found, extra: tuple[str, ...] = ()) -> None:
    """Brings the tables of a page up to date with what was found."""
    for name, table in TABLES.items():
        write_part(report, name, table(found, extra))


def smallest(found: Found, extra: tuple[str, ...] = ()) -> str:
    """For each model, phase and chip the slices that were tried, with the peak of the program that needs most."""
    lines = _head("model", "phase", *LADDER)
    for model in MODELS:
        for phase in PHASES:
            tried = [_tried(_ladder(model, chip, phase, extra), found) for chip in LADDER]
            lines.append(_row(model, phase, *tried))
    return "\n".join(lines)


def _tried(ladder: Sequence[Sequence[Cell]], found: Found) -> str:
    told = []
    for cells in ladder:
        records = [record for cell in cells for record in found.get(cell.name, [])]
        if not records:
            continue
        most = max(records, key=lambda r: r.peak / r.limit)
        place = f"{cells[0].topology} ({cells[0].mesh})"
        need = f"{most.peak / GIB:.1f} of {most.limit / GIB:.1f} GiB ({most.identity['program']})"
        told.append(
            f"**{place}: {need}**"
            if _fits(cells, found)
            else f"{place}: no, {need}"
            if not most.fits
            else f"{place}: {need}, in part"
        )
    return "<br>".join(told) or "not run"


def weak_scaling(found: Found, extra: tuple[str, ...] = ()) -> str:
    """Programs with `WEAK_ROWS` dialogues or prompts a chip on ever larger slices, per chip."""
    axes = ("data", "replica")
    sent = [f"sent along {axis}, GB" for axis in axes]
    lines = _head("program", "model", "slice", "chips", "TFLOP", "peak, GiB", "read and written, GB", *sent)
    for what, models in WEAK_MODELS.items():
        for model in models:
            for topology, mesh in WEAK:
                for r in found.get(weak(model, topology, mesh, what, extra).name, []):
                    along = [f"{sum(r.sent.get(axis, {}).values()) / 1e9:.1f}" for axis in axes]
                    sizes = f"{r.flops / 1e12:.1f}", f"{r.peak / GIB:.1f}", f"{r.moved / 1e9:.0f}"
                    place = f"{topology} ({mesh})", str(size(topology))
                    lines.append(_row(r.identity["program"], model, *place, *sizes, *along))
    return "\n".join(lines)


def settings(found: Found, extra: tuple[str, ...] = ()) -> str:
    """What each setting does to the memory of a device, in GiB."""
    parts = "parameters", "optimizer", "reference", "KV cache", "activations", "peak"
    lines = _head("program", "setting", *parts)
    for what, changes in SETTINGS.items():
        for change in changes:
            for r in found.get(Cell(*COMPARED, what, (*change, *extra)).name, []):
                weights = r.parts.get("parameters", 0) + r.parts.get("weights", 0)
                sizes = (weights, r.parts.get("optimizer", 0), r.parts.get("reference", 0), r.cache, r.activations)
                changed = " ".join(f"`{flag}`" for flag in change) or "none"
                peak = f"{r.peak / GIB:.1f}" + ("" if r.fits else ", does not fit")
                lines.append(_row(what, changed, *(f"{s / GIB:.1f}" for s in sizes), peak))
    return "\n".join(lines)


def seconds(found: Found, extra: tuple[str, ...] = ()) -> str:
    """The processor's seconds for the programs that take most; by the clock they depend on what else the machine does."""
    lines = _head("program", "cell", "processor, s")
    told = [(r, name) for name, records in found.items() for r in records if r.seconds["compile"]]
    for r, name in sorted(told, key=lambda item: -item[0].seconds["processor"])[:SLOWEST]:
        lines.append(_row(r.identity["program"], name, f"{r.seconds['processor']:.0f}"))
    return "\n".join(lines)


TABLES: Mapping[str, Callable[[Found, tuple[str, ...]], str]] = {
    "smallest slice": smallest,
    "weak scaling": weak_scaling,
    "settings": settings,
    "seconds": seconds,
}
"""Name of its marks in the page -> table."""
SLOWEST = 8
"""Programs whose seconds are told."""


def _head(*columns: str) -> list[str]:
    return [_row(*columns), "|" + " --- |" * len(columns)]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
