"""Fuzzing the tools server from its own schema and by hand, and a soak under mixed load; both run longer when told so.

TOOLS_FUZZ=10000 sends that many mangled requests, and as many from the schema as differ; TOOLS_SOAK=600 loads the server that
many seconds long (`-s` shows what was measured).
"""

import json
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case
from tool_servers import RunningServer, clip

from vstar_jax.tools.client import clip_digest
from vstar_jax.tools.protocol import SHAPE_HEADER, TOOLS, Request

REQUESTS = int(os.environ.get("TOOLS_FUZZ", "300"))
SECONDS = float(os.environ.get("TOOLS_SOAK", "5"))
STEADY = 1.05
"""How much memory may grow over the second half of a soak; a short one is mostly warming up."""
STEADY_SHORT = 1.5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "g.json").write_text(json.dumps({f"label {n}": f"Explanation {n}." for n in range(50)}))
    flags = ("--glossary=g.json", "--cache.bytes=2000000", "--cache.clip_bytes=50000000", "--limits.body_seconds=5")
    running = RunningServer(folder, *flags)
    yield running
    running.close()
    assert "Traceback" not in running.log.read_text()


def test_requests_made_from_the_schema_are_never_a_fault(server: RunningServer) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) >= 10
    statuses: set[int] = set()
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=max(REQUESTS // len(operations), 5),
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def send(case: Case) -> None:
            response = case.call(base_url=server.url, timeout=30)
            statuses.add(response.status_code)
            assert response.status_code < 500, (case.operation.path, response.text)

        send()
    assert {200, 404, 422} <= statuses
    assert server.process.poll() is None


def mangled(rng: random.Random, content: Any) -> Any:
    """A JSON value with something in it changed."""
    odd = [None, True, -1, 2**70, 1e308, "", "x" * 5000, "\x00<|im_end|>", "\ud800", [], {}, [[]] * 50, {"a": {}}, "0" * 64]
    if rng.random() < 0.15:
        return rng.choice(odd)
    if isinstance(content, dict):
        return {
            (rng.choice(["x", name]) if rng.random() < 0.05 else name): mangled(rng, value) for name, value in content.items()
        }
    if isinstance(content, list):
        return [mangled(rng, value) for value in content for _ in range(rng.choice([1, 1, 1, 0, 2]))]
    return content


def test_mangled_bodies_are_never_a_fault_and_memory_stays(server: RunningServer) -> None:
    rng = random.Random(0)
    frames, _ = clip(0)
    name = clip_digest(frames)
    headers = {SHAPE_HEADER: "16,112,112,3", "content-type": "application/octet-stream"}
    assert server.http("PUT", f"/v1/clips/{name}", frames.tobytes(), headers)[0] == 201
    row = {"episode": "a", "turn": 0, "tools": list(TOOLS), "clip": name, "frames": [0, 1], "labels": ["label 1", "label 2"]}
    statuses: list[int] = []
    memory = 0
    for number in range(REQUESTS):
        body = json.dumps(mangled(rng, {"requests": [row, row], "timeout": 5})).encode()
        if rng.random() < 0.1:
            at = rng.randrange(len(body))
            body = body[:at] + rng.randbytes(3) + body[at + 3 :]
        status, _, answer = server.http("POST", "/v1/batch", body, {"content-type": "application/json"})
        statuses.append(status)
        assert status < 500, answer
        if number == REQUESTS // 2:
            memory = server.memory()
    print(f"{len(statuses)} requests; MB held at half-time and at the end: {memory // 2**20}, {server.memory() // 2**20}")
    assert {200, 422} <= set(statuses)
    assert server.memory() < memory * STEADY_SHORT


def test_under_mixed_load_every_answer_is_that_of_its_own_request(server: RunningServer) -> None:
    clips = [clip(n)[0] for n in range(60)]
    names = [clip_digest(frames) for frames in clips]
    client = server.client(connections=8)
    known: dict[tuple[str, tuple[int, ...] | None], Any] = {}
    memory: list[int] = []
    until = time.monotonic() + SECONDS

    def work(seed: int) -> int:
        rng, done = random.Random(seed), 0
        while time.monotonic() < until:
            asked = []
            for _ in range(rng.randint(1, 6)):
                n = rng.randrange(len(clips))
                tools = tuple(rng.sample(list(TOOLS), rng.randint(1, 4)))
                part = tuple(rng.sample(range(16), 4)) if rng.random() < 0.2 else None
                labels = tuple(f"label {rng.randrange(50)}" for _ in range(3))
                asked.append(
                    Request(
                        episode=f"{seed}-{done}-{n}", turn=len(asked), tools=tools, clip=names[n], frames=part, labels=labels
                    )
                )
            given_ = client.call(asked, dict(zip(names, clips, strict=True)), 60.0)
            for request, answered in zip(asked, given_, strict=True):
                check(request, answered)
            done += len(asked)
        return done

    def check(request: Request, answered: Any) -> None:
        answer = answered.answer
        assert answer.status == "ok", answer.problems
        assert (answer.episode, answer.turn) == (request.episode, request.turn)
        if "action_explanation" in request.tools:
            numbers = [label.removeprefix("label ") for label in request.labels]
            assert answer.explanation == "\n".join(f"- label {n}: Explanation {n}." for n in numbers)
        frames = clips[names.index(request.clip or "")]
        shown = frames if request.frames is None else frames[list(request.frames)]
        seen = known.setdefault((request.clip or "", request.frames), {})
        for tool, value in (("pose_estimation", answer.poses), ("person_detection", answer.boxes)):
            if tool in request.tools:
                assert seen.setdefault(tool, value) == value
        if answered.frames is not None:
            assert answered.frames.shape == shown.shape
            dark = np.round(shown * np.float32(0.25))
            assert (abs(answered.frames - dark).max(-1) <= 2).mean() > 0.5  # it is this clip, under the drawing

    with ThreadPoolExecutor(6) as threads:
        running = [threads.submit(work, seed) for seed in range(6)]
        while time.monotonic() < until:
            time.sleep(SECONDS / 20)
            memory.append(server.memory())
        done = sum(thread.result() for thread in running)
    client.close()
    print(f"{done} requests in {SECONDS:g} s; MB held: {[n // 2**20 for n in memory]}")
    assert done > SECONDS
    assert memory[-1] <= memory[len(memory) // 2] * (STEADY if SECONDS >= 60 else STEADY_SHORT)
    assert server.metric("tools_waiting_frames") == 0
