"""Load on the tools server: memory over many calls, throughput beyond its limit, time to be ready, and the batcher's own cost.

TOOLS_LOAD=1 takes the full sizes and asks for the figures of a good server, on an idle machine; -s prints them.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
from tool_servers import RunningServer, clip

from tools_server.batcher import Batcher
from vstar_jax.tools.client import clip_digest
from vstar_jax.tools.protocol import SHAPE_HEADER

FULL = os.environ.get("TOOLS_LOAD") == "1"
CALLS = 100_000 if FULL else 600
GROWTH = 1.05 if FULL else 1.5  # a short run is mostly warming up
WINDOW = 6.0 if FULL else 1.5
"""Seconds of each measurement of throughput."""
KEPT = 0.9 if FULL else 0.1  # of the peak under overload; on a busy machine the callers starve the server
REJECTED = 0.05 if FULL else 1.0
"""Seconds in which the median refusal comes."""
READY = 10.0 if FULL else 120.0
ADDED = 0.1 if FULL else 1.0
"""Share of the worker's own time that the batcher may add."""
CALLERS, LIMIT = 8, 64
ITEM = 0.001
"""Seconds that an item of the batcher's test takes."""
JSON = {"content-type": "application/json"}


def upload(server: RunningServer, frames: np.ndarray) -> str:
    name = clip_digest(frames)
    headers = {SHAPE_HEADER: ",".join(map(str, frames.shape)), "content-type": "application/octet-stream"}
    assert server.http("PUT", f"/v1/clips/{name}", frames.tobytes(), headers)[0] in (200, 201)
    return name


def body(name: str) -> bytes:
    row = {"episode": name, "turn": 0, "tools": ["pose_estimation"], "clip": name}
    return json.dumps({"requests": [row], "timeout": 20}).encode()


def test_memory_stays_over_many_small_calls(tmp_path: Path) -> None:
    server = RunningServer(tmp_path)
    bodies = [body(upload(server, clip(number)[0])) for number in range(8)]
    numbers, half = count(), threading.Event()
    memory: list[int] = []

    def work(_: int) -> set[int]:
        seen: set[int] = set()
        while (number := next(numbers)) < CALLS:
            seen.add(server.http("POST", "/v1/batch", bodies[number % len(bodies)], JSON)[0])
            if number >= CALLS // 2 and not half.is_set():
                half.set()
                memory.append(server.memory())
        return seen

    begin = time.monotonic()
    with ThreadPoolExecutor(CALLERS) as threads:
        assert set().union(*threads.map(work, range(CALLERS))) == {200}
    seconds = time.monotonic() - begin
    memory.append(server.memory())
    server.close()
    middle, end = (f"{m / 2**20:.0f} MiB" for m in memory)
    print(f"{CALLS} calls in {seconds:.0f} s, memory {middle} at half-time and {end} at the end")
    assert memory[1] < memory[0] * GROWTH


def test_four_times_the_load_costs_little_throughput_and_is_refused_at_once(tmp_path: Path) -> None:
    begin = time.monotonic()
    server = RunningServer(tmp_path, f"--limits.queue={LIMIT}", "--cache.path=")
    ready = time.monotonic() - begin
    frames = clip(0)[0][:4]
    fresh = count()

    def names(number: int) -> list[str]:
        """Clips that the server has never seen."""
        made = []
        for n in (next(fresh) for _ in range(number)):
            other = frames.copy()
            other[0, 0, 0] = n >> 16, n >> 8 & 255, n & 255
            made.append(upload(server, other))
        return made

    def load(bodies: list[bytes], rate: float | None) -> tuple[list[tuple[int, float]], float]:
        """Statuses and seconds of calls that come as fast as CALLERS are answered, or at `rate` a second; and the window."""
        begin, waiting = time.monotonic(), iter(enumerate(bodies))
        lock = threading.Lock()

        def work(_: int) -> list[tuple[int, float]]:
            seen = []
            while True:
                with lock:
                    number, sent = next(waiting, (None, b""))
                if number is None or time.monotonic() - begin > WINDOW:
                    return seen
                if rate is not None:
                    time.sleep(max(begin + number / rate - time.monotonic(), 0))
                at = time.monotonic()
                status = server.http("POST", "/v1/batch", sent, JSON)[0]
                seen.append((status, time.monotonic() - at))

        callers = CALLERS if rate is None else 4 * CALLERS
        with ThreadPoolExecutor(callers) as threads:
            seen = [answer for answers in threads.map(work, range(callers)) for answer in answers]
        return seen, time.monotonic() - begin

    load([body(name) for name in names(16)], None)  # warm
    calm, window = load([body(name) for name in names(int(150 * WINDOW))], None)
    peak = sum(status == 200 for status, _ in calm) / window
    assert {status for status, _ in calm} == {200}
    hard, window = load([body(name) for name in names(int(4 * peak * WINDOW))], 4 * peak)
    accepted = sum(status == 200 for status, _ in hard) / window
    refused = [seconds for status, seconds in hard if status == 503]
    server.close()
    print(f"ready in {ready:.1f} s; {peak:.0f} calls/s at the peak, {accepted:.0f} under four times that", end="")
    print(f", {len(refused)} refused, the median in {1e3 * np.median(refused or [0]):.1f} ms")
    assert {status for status, _ in hard} <= {200, 503}
    assert refused
    assert np.median(refused) < REJECTED
    assert accepted > KEPT * peak
    assert ready < READY


def timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def test_the_batcher_adds_little_to_the_work() -> None:
    def worker(items: list[int]) -> list[int]:
        time.sleep(ITEM * len(items))
        return items

    batcher: Batcher[int, int] = Batcher(worker, batch=16, wait_ms=1.0, capacity=100_000, name="load")

    def together() -> None:
        futures = [batcher.submit([n], None, float("inf")) for n in range(256)]
        assert [f.result() for f in futures] == [[n] for n in range(256)]

    direct = [timed(lambda: [worker(list(range(16))) for _ in range(16)]) for _ in range(5)]
    batched = [timed(together) for _ in range(5)]
    alone = sorted(timed(lambda: batcher.submit([1], None, float("inf")).result()) - ITEM for _ in range(100))
    batcher.close()
    added = min(batched) / min(direct) - 1
    print(f"256 items through the batcher: {100 * added:.1f} % more time; one alone: {1e3 * alone[98]:.1f} ms more at p99")
    assert added < ADDED
    assert alone[98] < (0.015 if FULL else 0.5)
