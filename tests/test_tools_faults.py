"""What the server withstands: each fault is played against the running server, over a real socket."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tool_servers import ROOT, RunningServer, clip

from vstar_jax.tools.client import ToolsClient, clip_digest
from vstar_jax.tools.protocol import SHAPE_HEADER, Request

LATE = 0.25
"""Seconds that an answer may come late, on a machine whose cores are busy with the server itself."""
REJECTED = 0.25
"""Seconds in which most calls that are not accepted are told so; 0.05 on a quiet machine."""
CALLS = 20
"""That are in progress when the server is told to stop."""
GROWTH = 100 * 2**20
"""Bytes by which memory may grow in a test of something that is refused."""
STRICT = {
    "limits.body_bytes": 4_000_000,
    "limits.frames": 64,
    "limits.pixels": 100_000,
    "limits.labels": 10,
    "limits.body_seconds": 1,
    "limits.queue": 256,
    "limits.calls": 64,
    "yolo.batch": 8,
}
TOKEN = "canary-token-77"


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("strict")
    running = RunningServer(folder, *(f"--{name}={value}" for name, value in STRICT.items()))
    yield running
    running.close()
    assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = RunningServer(tmp_path_factory.mktemp("guarded"), env={"TOOLS_TOKEN": TOKEN})
    yield running
    running.close()


def noise(seed: int, frames: int = 16) -> np.ndarray:
    """A clip that no other test has asked about."""
    return np.random.default_rng([9, seed]).integers(0, 256, (frames, 64, 64, 3), np.uint8)


def ask(client: ToolsClient, clips: Sequence[np.ndarray], seconds: float = 30.0) -> list:
    """The people in clips, as answers."""
    named = {clip_digest(frames): frames for frames in clips}
    asked = [Request(episode=name[:9], turn=0, tools=("pose_estimation",), clip=name) for name in named]
    return client.call(asked, named, seconds)


def put(server: RunningServer, frames: np.ndarray) -> str:
    name = clip_digest(frames)
    headers = {SHAPE_HEADER: ",".join(map(str, frames.shape)), "content-type": "application/octet-stream"}
    assert server.http("PUT", f"/v1/clips/{name}", frames.tobytes(), headers)[0] == 201
    return name


def batch(names: Sequence[str], timeout: float = 30.0) -> bytes:
    rows = [{"episode": name[:9], "turn": 0, "tools": ["pose_estimation"], "clip": name} for name in names]
    return json.dumps({"requests": rows, "timeout": timeout}).encode()


def raw(server: RunningServer, head: str, body: bytes = b"", wait: float = 10.0) -> bytes:
    """What the server answers to these octets."""
    with socket.create_connection((server.host, server.port), timeout=wait) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + body)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
            if b"\r\n\r\n" in answer and b'"message"' in answer:
                break
        return answer


def head(path: str, method: str = "POST", **headers: object) -> str:
    lines = [f"{method} {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json"]
    return "\n".join([*lines, *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()), "", ""])


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (head("/v1/batch", content_length=4_000_001), 413),
        (head("/v1/batch", content_length=10**12), 413),
        (head(f"/v1/clips/{'0' * 64}", "PUT", content_length=10**12, x_clip_shape="64,1,1,3"), 413),
        (head("/v1/batch", transfer_encoding="chunked"), 411),
        (head("/v1/batch", content_length=10, content_encoding="gzip"), 415),
        (head("/v1/batch", content_length=10).replace("host: 127.0.0.1", "host: evil.example"), 403),
        (head("/mcp", content_length=10).replace("host: 127.0.0.1", "host: evil.example:8765"), 403),
        (head(f"/v1/clips/{'0' * 64}", "PUT", content_length=3, x_clip_shape="65,1,1,3"), 422),
        (head(f"/v1/clips/{'0' * 64}", "PUT", content_length=3, x_clip_shape="1,400,400,3"), 422),
        (head(f"/v1/clips/{'0' * 64}", "PUT", content_length=3, x_clip_shape="1,1,2,3"), 422),
        (head("/v1/clips/..%2f..%2fetc%2fpasswd", "PUT", content_length=3, x_clip_shape="1,1,1,3"), 404),
        (head("/v1/clips/file:etc", "PUT", content_length=3, x_clip_shape="1,1,1,3"), 422),
    ],
)
def test_what_is_too_much_or_wrong_is_refused_before_its_body_is_read(strict: RunningServer, sent: str, status: int) -> None:
    begin, memory = time.monotonic(), strict.memory()
    assert raw(strict, sent).startswith(f"HTTP/1.1 {status} ".encode())
    assert time.monotonic() - begin < 1.0
    assert strict.memory() - memory < GROWTH


def test_a_body_that_comes_slowly_is_given_up(strict: RunningServer) -> None:
    begin = time.monotonic()
    answer = raw(strict, head("/v1/batch", content_length=1000), b"{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - begin < STRICT["limits.body_seconds"] + 1


def test_pictures_are_octets_and_no_bomb_goes_off(strict: RunningServer) -> None:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    memory = strict.memory()
    for octets in (buffer.getvalue(), zlib.compress(b"\0" * 10**8)):
        for shape in ("1,20000,20000,3", f"1,1,{len(octets) // 3},3"):
            headers = {SHAPE_HEADER: shape, "content-type": "image/png"}
            assert strict.http("PUT", f"/v1/clips/{'0' * 64}", octets, headers)[0] == 422
    assert strict.memory() - memory < GROWTH


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"requests": ' + b"[" * 50_000,
        b'{"requests": [], "timeout": NaN}',
        b'{"requests": [], "timeout": 1e999}',
        b'{"requests": [], "timeout": -1}',
        b'{"requests": [], "path": "/etc/passwd"}',
        b'{"requests": [{"episode": "a", "turn": 0, "tools": ["pose_estimation"], "clip": "http://127.0.0.1/x"}]}',
        b'{"requests": [{"episode": "a", "turn": 0, "tools": ["pose_estimation"], "clip": "/etc/passwd"}]}',
        b'{"requests": [{"episode": "a", "turn": 0, "tools": ["rm"]}]}',
        b'{"requests": [{"episode": "\\ud800", "turn": 0, "tools": []}]}',
        b'{"requests": [{"episode": "a", "turn": 99999999999999999999, "tools": []}]}',
        b'{"requests": [{"episode": "a", "turn": 0, "tools": [], "frames": [-1]}]}',
        b"\xff\xfe",
        b"9" * 10_000,
    ],
)
def test_a_body_that_is_no_batch_is_refused_without_being_repeated(strict: RunningServer, content: bytes) -> None:
    status, _, answer = strict.http("POST", "/v1/batch", content, {"content-type": "application/json"})
    assert status in (400, 422)
    assert set(json.loads(answer)) == {"version", "error", "message", "missing"}
    assert len(answer) < 500


def test_one_bad_row_and_too_many_labels_cost_that_row_only(strict: RunningServer) -> None:
    rows = [
        {"episode": str(n), "turn": 0, "tools": ["action_explanation"], "labels": ["clap"] * count}
        for n, count in enumerate((10, 11))
    ]
    status, answer = strict.json("POST", "/v1/batch", {"requests": rows})
    assert status == 200
    assert [a["status"] for a in answer["answers"]] == ["unavailable", "error"]


def test_a_deadline_is_kept_while_the_models_are_busy_and_its_work_is_taken_back(strict: RunningServer) -> None:
    busy = [put(strict, noise(n, 64)) for n in range(2)]
    late = put(strict, noise(50, 64))
    with ThreadPoolExecutor(2) as threads:
        running = [
            threads.submit(strict.http, "POST", "/v1/batch", batch([name]), {"content-type": "application/json"})
            for name in busy
        ]
        time.sleep(0.05)
        begin = time.monotonic()
        status, answer = strict.json("POST", "/v1/batch", json.loads(batch([late], 0.05)))
        assert time.monotonic() - begin < 0.05 + LATE
        assert (status, answer["answers"][0]["status"]) == (200, "timeout")
        assert all(json.loads(r.result()[2])["answers"][0]["status"] == "ok" for r in running)
    assert strict.metric("tools_waiting_frames") == 0
    status, answer = strict.json("POST", "/v1/batch", json.loads(batch([late])))
    assert answer["answers"][0]["status"] == "ok"


def test_an_overload_is_refused_at_once_with_a_time_to_come_back_and_all_else_is_right(strict: RunningServer) -> None:
    clips = [noise(n) for n in range(100, 148)]
    names = [put(strict, frames) for frames in clips]

    def call(name: str) -> tuple[int, float, bytes, str | None]:
        begin = time.monotonic()
        status, headers, body = strict.http("POST", "/v1/batch", batch([name]), {"content-type": "application/json"})
        return status, time.monotonic() - begin, body, headers.get("retry-after")

    with ThreadPoolExecutor(48) as threads:
        answers = list(threads.map(call, names))
    refused = [(seconds, again) for status, seconds, _, again in answers if status == 503]
    assert {status for status, *_ in answers} == {200, 503}
    assert all(again for _, again in refused)
    assert np.median([seconds for seconds, _ in refused]) < REJECTED
    client = strict.client()
    expected = {given.answer.episode: given.answer.poses for given in ask(client, clips)}
    assert all(poses is not None for poses in expected.values())
    for status, _, body, _ in answers:
        if status == 200:
            (answer,) = json.loads(body)["answers"]
            again = strict.json("POST", "/v1/batch", json.loads(batch([n for n in names if n.startswith(answer["episode"])])))
            assert again[1]["answers"] == [answer]
    client.close()


def test_the_client_waits_out_an_overload(strict: RunningServer) -> None:
    client = strict.client()
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda n: ask(client, [noise(n)])[0].answer.status, range(200, 232)))
    assert answers == ["ok"] * 32
    client.close()


def test_callers_that_leave_do_no_harm_to_those_that_stay(strict: RunningServer) -> None:
    names = [put(strict, noise(n)) for n in range(300, 330)]
    body = batch(names[:1])

    def leave(name: str) -> None:
        body = batch([name])
        with socket.create_connection((strict.host, strict.port)) as connection:
            connection.sendall(head("/v1/batch", content_length=len(body)).replace("\n", "\r\n").encode() + body)
            time.sleep(0.02)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(leave, names[6:]))
    assert (
        json.loads(strict.http("POST", "/v1/batch", body, {"content-type": "application/json"})[2])["answers"][0]["status"]
        == "ok"
    )
    client = strict.client()
    answers = ask(client, [noise(n) for n in range(300, 308)])
    assert [given.answer.status for given in answers] == ["ok"] * 8
    client.close()
    assert strict.metric("tools_waiting_frames") == 0


def test_every_route_but_health_needs_the_token(guarded: RunningServer) -> None:
    routes = [
        ("GET", "/v1/tools"),
        ("POST", "/v1/batch"),
        ("PUT", f"/v1/clips/{'0' * 64}"),
        ("GET", f"/v1/clips/{'0' * 64}"),
        ("POST", "/v1/tools/pose_estimation"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("POST", "/mcp"),
        ("GET", "/nothing"),
        ("GET", "/live/"),
        ("GET", "//live"),
    ]
    for method, path in routes:
        for wrong in ({}, {"authorization": "Bearer nope"}, {"authorization": TOKEN}, {"authorization": f"Basic {TOKEN}"}):
            status, headers, body = guarded.http(method, path, headers=wrong)
            assert (status, headers["www-authenticate"]) == (401, "Bearer"), (method, path)
            assert TOKEN.encode() not in body
        assert guarded.http(method, path, headers={"authorization": f"Bearer {TOKEN}"})[0] != 401
    assert guarded.http("GET", "/ready")[0] == guarded.http("GET", "/live")[0] == 200
    client = guarded.client(token=TOKEN)
    assert ask(client, [noise(0)])[0].answer.status == "ok"
    client.close()
    stranger = guarded.client()
    assert ask(stranger, [noise(0)])[0].answer.status == "error"
    stranger.close()
    assert TOKEN not in guarded.log.read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host=0.0.0.0"], "TOOLS_TOKEN"),
        (["--yolo.pose=none.pt"], "no weights at none.pt"),
        (["--yolo.detect=bad.pt"], "bad.pt cannot be read"),
        (["--yolo.device=cuda:99"], "cannot be used"),
        (["--glossary=none.json"], "no glossary"),
        (["--describer=llm"], "DASHSCOPE_API_KEY"),
        (["--port=99999"], "--port is '99999'"),
        (["--host=203.0.113.1"], "cannot be listened on"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_sentence(tmp_path: Path, flags: list[str], words: str) -> None:
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    secret = {"TOOLS_TOKEN": "x"} if "203" in flags[0] else {}
    done = subprocess.run(
        [sys.executable, "-m", "tools_server", "--port=0", "--cache.path=", *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **secret},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_server_that_is_told_to_stop_finishes_what_it_accepted(tmp_path: Path) -> None:
    server = RunningServer(tmp_path, "--yolo.batch=4")
    try:
        names = [put(server, noise(n, 24)) for n in range(CALLS)]
        with ThreadPoolExecutor(CALLS) as threads:
            calls = [
                threads.submit(server.http, "POST", "/v1/batch", batch([name]), {"content-type": "application/json"})
                for name in names
            ]
            until = time.monotonic() + 10
            while server.metric("tools_calls") <= CALLS and time.monotonic() < until:  # the look itself is a call, too
                time.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            answers = [json.loads(call.result()[2])["answers"][0]["status"] for call in calls]
        assert answers == ["ok"] * CALLS
        assert server.process.wait(10) in (0, -signal.SIGTERM)
        with pytest.raises(ConnectionRefusedError):
            server.http("GET", "/live")
    finally:
        server.close()


def test_a_batch_survives_a_restart_of_the_server(tmp_path: Path) -> None:
    clips = [clip(n)[0] for n in range(40, 52)]
    first = RunningServer(tmp_path)
    client = first.client()
    statuses: list[str] = []
    with ThreadPoolExecutor(1) as threads:
        done = threading.Event()

        def work() -> None:
            while not done.is_set():
                statuses.extend(given.answer.status for given in ask(client, clips, 60.0))

        running = threads.submit(work)
        time.sleep(0.2)
        first.process.kill()
        first.close()
        second = RunningServer(tmp_path, f"--port={first.port}")
        done.set()
        running.result()
    assert statuses
    assert set(statuses) == {"ok"}
    client.close()
    second.close()


def test_no_server_outlives_a_program_that_was_killed(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, time\n"
        "server = subprocess.Popen([sys.executable, '-m', 'tools_server', '--port=0', '--cache.path=', '--exit-with-parent'],"
        " stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)\n"
        "print(server.pid, server.stdout.readline(), flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, _, greeting = parent.stdout.readline().partition(" ")
    assert "ready" in greeting
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    parent.stdout.close()
