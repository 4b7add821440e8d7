"""What all measurements share: taking turns, spreads and percentiles, peak memory, and the files of a result."""

import ctypes
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import numpy as np
from tqdm import trange

from vstar_jax.errors import UserError

FEWEST_REPEATS = 5
MIB = 1 << 20
COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's own event for a program that was compiled."""


def check_repeats(repeats: int) -> None:
    """Raises UserError for too few repeats to tell a spread."""
    if repeats < FEWEST_REPEATS:
        raise UserError(f"repeats is {repeats}: a spread needs at least {FEWEST_REPEATS}.")


def in_turns(parts: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each of `repeats` calls of every part, A B A B ..., so that a slow moment of the machine hits all alike.

    A part must be finished when it returns, and have run before: the first call is counted like any other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in trange(repeats, desc="repeats", leave=False):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """How many times as fast ours is, repeat by repeat, from the seconds of both."""
    return [b / a for a, b in zip(ours, theirs, strict=True)]


def device_peak() -> float | None:
    """MiB of the device's memory that JAX had in use at most since this process began; None on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / MIB if stats else None


def peak_memory(step: Callable[[], Any], device_peak: Callable[[], float | None] = device_peak) -> float | None:
    """MiB by which the process's resident memory grows at most during `step`; None where the kernel does not count it.

    On an accelerator, the MiB of its memory in use at most as `device_peak` tells after `step`, the weights included.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if jax.default_backend() != "cpu":
        step()
        return device_peak()
    if not os.access(reset, os.W_OK):
        return None

    def read(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    ctypes.CDLL(None).malloc_trim(0)  # an allocator that keeps what it freed would hide what the step asks for
    reset.write_text("5")  # sets the high-water mark back to what is resident now
    before = read("VmRSS")
    step()
    return (read("VmHWM") - before) / 1024


class Compilations:
    """Counts the programs that are compiled (or found in a cache of compiled ones) while it is entered, and their seconds."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            self.count, self.seconds = self.count + 1, self.seconds + duration_secs

    def told(self, repeats: "Compilations") -> dict[str, float]:
        """What a result says; repeats: those of the timed repeats, which should be none."""
        return {"programs": self.count, "seconds": self.seconds, "in_repeats": repeats.count}


def machine() -> str:
    """What was measured on, in words: the system, its processor type, the threads this process may use, JAX's device."""
    device = "cpu" if jax.default_backend() == "cpu" else jax.local_devices()[0].device_kind
    return f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} threads, {device}"


def spread(values: Sequence[float], form: str) -> str:
    """Median (min to max)."""
    return f"{np.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def number(value: float | None, form: str) -> str:
    """The value, or a dash where there is none."""
    return "-" if value is None else f"{value:{form}}"


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 of `seconds`, in milliseconds."""
    return {f"p{q}": float(np.percentile(seconds, q)) * 1e3 for q in (50, 95, 99)}


def table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table with a name before each row."""
    lines = [["", *columns], ["---"] * (len(columns) + 1), *([name, *cells] for name, cells in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def contender_rows(contenders: Mapping[str, Mapping[str, Any]], what: str, tokens: str, first: str) -> dict[str, list[str]]:
    """The rows of a table that every comparison has.

    what: is timed, such as "a step"; tokens: which are counted; first: how the row of the first call is called.
    """
    every = list(contenders.values())
    memory = f"growth of memory in {what}" if jax.default_backend() == "cpu" else "device memory at most"
    return {
        f"seconds {what}": [spread(c["seconds"], ".3f") for c in every],
        f"{tokens}/s": [f"{c['tokens_per_s']:,.0f}" for c in every],
        first: [f"{c['compile_seconds']:.1f}" for c in every],
        f"{memory}, MiB": [number(c["peak_memory_mib"], ".0f") for c in every],
        "model TFLOP/s": [f"{c['flops_per_s'] / 1e12:,.3f}" for c in every],
        "MFU": [f"{c['mfu']:.1%}" for c in every],
    }


def efficiency(operations: float, rate: float, seconds: Sequence[float]) -> dict[str, float]:
    """Operations a second of a contender's median repeat, and their share of the matrix rate (both in operations a second)."""
    reached = operations / float(np.median(seconds))
    return {"flops_per_s": reached, "mfu": reached / rate}


def efficiency_told(result: Mapping[str, Any], what: str) -> str:
    """Sentences on what MFU is of, and on what was compiled."""
    compiled = result["compilations"]
    return (
        f"\n{what} is {result['operations'] / 1e12:,.4g} TFLOP of the model; a product of two large matrices in "
        f"{result['dtype']} ran at {result['matrix_rate'] / 1e12:,.4g} TFLOP/s on the same device, which MFU is a share of. "
        f"{compiled['programs']} programs were compiled in {compiled['seconds']:.1f} s, and {compiled['in_repeats']} in the "
        "timed repeats.\n"
    )


def by_phase(phases: Mapping[str, Sequence[float]]) -> str:
    """A sentence on the seconds of each of our phases."""
    told = ", ".join(f"{phase} {spread(seconds, '.3f')}" for phase, seconds in phases.items())
    return f"\nOurs by phase, in seconds: {told}.\n"


def write(result: Mapping[str, Any], text: str, folder: Path) -> None:
    """Writes the result as JSON and `text` as Markdown, named after what was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{result['what']}-{result['model']}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    stem.with_suffix(".md").write_text(text)
