"""Measures the tools server: frames a second and latencies through the wire, in turns with the same model in this process.

The server draws what it finds and sends the drawn clip back, the rival only finds: what the wire costs is all that the policy
waits for. The rival is timed only when it finds the same people. Clips that nobody has seen differ from the last ones in one
pixel a frame, so that the work is the same and no cache knows them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from vstar_jax.benchmark.common import check_repeats, in_turns, machine, percentiles, ratios, spread, table
from vstar_jax.data.stick_motion import motions, render
from vstar_jax.errors import UserError
from vstar_jax.tools.client import ClientAnswer, ToolsClient, clip_digest
from vstar_jax.tools.protocol import People, Request

FRAMES = 16
DEADLINE = 120.0
PIXELS = 0.05  # between two paths to one model, whose batches may be cut otherwise: float32 sums of another order
CACHED_TARGET_MS = 5.0
"""p99 of a cached call for a clip of 16 frames."""
COLD_TARGET = 0.85
"""Frames/s through the wire over those in this process."""


class Rival(Protocol):
    """The same pose model, called in this process."""

    name: str

    def find(self, frames: np.ndarray) -> People:
        """The people in frames uint8 [T, H, W, 3] in RGB."""
        ...


def clips(count: int, seed: int = 0) -> list[np.ndarray]:
    """Clips of StickMotion, uint8 [16, 112, 112, 3]."""
    rng = np.random.default_rng(seed)
    actions = [motions.ACTIONS[int(n)] for n in rng.integers(0, len(motions.ACTIONS), count)]
    return [render.render(motions.keypoints(a.sub_motions, FRAMES, rng), rng, "cluttered") for a in actions]


def unseen(frames: Sequence[np.ndarray], number: int) -> list[np.ndarray]:
    """The clips with another colour in the first pixel of every frame; number below 2**24."""
    fresh = [f.copy() for f in frames]
    for clip in fresh:
        clip[:, 0, 0] = number >> 16, number >> 8 & 255, number & 255
    return fresh


def asked(frames: Sequence[np.ndarray]) -> tuple[list[Request], dict[str, np.ndarray]]:
    """The requests for poses in all clips as a rollout makes them, and the clips by their ids; hashing is a part of it."""
    named = {clip_digest(f): f for f in frames}
    return [Request(episode=str(n), turn=1, tools=("pose_estimation",), clip=name) for n, name in enumerate(named)], named


def ask(client: ToolsClient, requests: Sequence[Request], named: Mapping[str, np.ndarray]) -> list[ClientAnswer]:
    """All answers by one call; UserError when one is not answered."""
    answers = client.call(requests, named, DEADLINE)
    for given in answers:
        if given.answer.status != "ok":
            raise UserError(
                f"the tools server answered {given.answer.status} ({'; '.join(given.answer.problems.values())}), so there is "
                "nothing to measure: look at its log."
            )
    return answers


def measure_tools(
    client: ToolsClient, repeats: int, count: int, calls: int, threads: int, model: str, rival: Rival | None = None
) -> dict[str, Any]:
    """Times `repeats` calls for `count` clips, cold and cached, then `calls` cached calls for one clip, by one thread and by
    `threads` at once.

    model: the name of the server's pose weights. Returns what `report` takes. Raises UserError for too few repeats, when the
    server fails, and when the rival finds other people.
    """
    check_repeats(repeats)
    given = clips(count)
    difference = 0.0
    if rival is not None:
        answers = ask(client, *asked(given))
        pairs = zip(answers, given, strict=True)
        difference = max(check_agreement(rival.name, a.answer.poses or (), rival.find(f)) for a, f in pairs)
    ask(client, *asked(given))
    turns = iter(range(1, 2**24))
    current = given

    def cold() -> None:
        nonlocal current
        current = unseen(given, next(turns))
        ask(client, *asked(current))

    parts: dict[str, Callable[[], Any]] = {"wire, cold": cold, "wire, cached": lambda: ask(client, *asked(current))}
    if rival is not None:
        parts[rival.name] = lambda: [rival.find(frames) for frames in current]
    seconds = in_turns(parts, repeats)
    one = asked(given[:1])
    alone = latencies(lambda: ask(client, *one), calls, 1)
    started = time.perf_counter()
    together = latencies(lambda: ask(client, *one), calls, threads)
    under_load = calls / (time.perf_counter() - started)
    frames = count * FRAMES
    return {
        "what": "tools",
        "model": model,
        "clips": count,
        "frames": frames,
        "machine": machine(),
        "calls": calls,
        "threads": threads,
        "difference_pixels": difference,
        "contenders": {
            name: {"seconds": taken, "frames_per_s": frames / float(np.median(taken))} for name, taken in seconds.items()
        },
        "ratios": {
            name: ratios(seconds[name], seconds[rival.name]) for name in ("wire, cold", "wire, cached") if rival is not None
        },
        "cached_ms": percentiles(alone),
        "load_ms": percentiles(together),
        "load_calls_per_s": under_load,
    }


def latencies(call: Callable[[], Any], calls: int, threads: int) -> list[float]:
    """Seconds of each of `calls` calls, made by `threads` threads that each begin the next one at once."""

    def timed(_: int) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(timed, range(calls)))


def check_agreement(name: str, served: People, found: People) -> float:
    """The largest difference in pixels between boxes and keypoints of both; UserError above `PIXELS` or for other people."""
    counts = [[len(frame) for frame in people] for people in (served, found)]
    largest = float("inf")
    if counts[0] == counts[1]:
        pairs = [(a, b) for x, y in zip(served, found, strict=True) for a, b in zip(x, y, strict=True)]
        both = [(np.asarray(a.box), np.asarray(b.box)) for a, b in pairs]
        both += [(np.asarray(a.keypoints)[:, :2], np.asarray(b.keypoints)[:, :2]) for a, b in pairs]
        largest = max((float(np.abs(a - b).max()) for a, b in both), default=0.0)
    if not largest <= PIXELS:
        raise UserError(
            f"the tools server and {name} find other people ({largest:.2f} pixels apart), so they do not do the same work and "
            "their speed is not compared: give both the same weights, confidence and image size."
        )
    return largest


def report(result: Mapping[str, Any]) -> str:
    """The result of a measurement as Markdown."""
    contenders = result["contenders"]
    rows = {
        f"seconds for {result['clips']} clips": [spread(c["seconds"], ".3f") for c in contenders.values()],
        "frames/s": [f"{c['frames_per_s']:,.0f}" for c in contenders.values()],
    }
    for name, values in result["ratios"].items():
        rows[f"{name} over in process"] = [spread(values, ".2f") if name == column else "" for column in contenders]
    latency = {
        "one caller": [f"{v:.2f}" for v in result["cached_ms"].values()],
        f"{result['threads']} threads": [f"{v:.2f}" for v in result["load_ms"].values()],
    }
    text = (
        f"Poses in clips of {FRAMES} frames of StickMotion by {result['model']} ({result['machine']}); median (min to max) of "
        f"{len(next(iter(contenders.values()))['seconds'])} repeats. The targets are {COLD_TARGET} of in process when cold, "
        f"and p99 below {CACHED_TARGET_MS:g} ms for one caller when cached.\n\n"
    )
    text += table(list(contenders), rows)
    if result["ratios"]:
        text += f"\nBoth find the same people, {result['difference_pixels']:.1e} pixels apart at most.\n"
    text += f"\nMilliseconds of a cached call for one clip, {result['calls']} calls "
    text += f"({result['load_calls_per_s']:,.0f} calls/s from {result['threads']} threads):\n\n"
    return text + table(list(result["cached_ms"]), latency)
