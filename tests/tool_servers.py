"""Servers for the tests of the tools: the real one as a process of its own, and endpoints that play an LLM, well or badly."""

import http.client
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vstar_jax.data.stick_motion import motions, render
from vstar_jax.tools.client import ToolsClient

ROOT = Path(__file__).parent.parent
SECRETS = ("DASHSCOPE_API_KEY", "OPENAI_API_KEY", "TOOLS_TOKEN")


def clip(number: int, frames: int = 16, look: render.Look = "cluttered") -> tuple[np.ndarray, np.ndarray]:
    """A clip of a StickMotion action uint8 [T, 112, 112, 3], and its joints float [T, 17, 3] in pixels."""
    rng = np.random.default_rng(number)
    keypoints = motions.keypoints(motions.ACTIONS[number % len(motions.ACTIONS)].sub_motions, frames, rng)
    return render.render(keypoints, rng, look), keypoints * np.array([render.SIZE, render.SIZE, 1])


class RunningServer:
    """`python -m tools_server` on a free port, from the moment it says that it is ready until `stop`."""

    def __init__(self, folder: Path, *flags: str, env: Mapping[str, str] | None = None):
        self.log = folder / "server.log"
        environment = {name: value for name, value in os.environ.items() if name not in SECRETS} | dict(env or {})
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tools_server", "--port=0", f"--cache.path={folder / 'cache.sqlite'}", *flags]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        self.greeting = self.process.stdout.readline()
        found = re.search(r"http://[^ ]+", self.greeting)
        assert found, f"the server did not start: {self.log.read_text()}"
        self.url = found[0]
        self.host, _, port = self.url.removeprefix("http://").rpartition(":")
        self.port = int(port)

    def client(self, **settings: Any) -> ToolsClient:
        """A client of this server."""
        return ToolsClient(self.url, **settings)

    def http(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of one call on a connection of its own."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, content: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a call with a JSON body."""
        body = b"" if content is None else json.dumps(content).encode()
        status, _, answer = self.http(method, path, body, {"content-type": "application/json", **headers})
        return status, json.loads(answer)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's values over the labels that are not given."""
        total = 0.0
        for line in self.http("GET", "/metrics")[2].decode().splitlines():
            found = re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line)
            if found and all(f'{label}="{value}"' in (found[1] or "") for label, value in labels.items()):
                total += float(found[2])
        return total

    def memory(self) -> int:
        """Bytes of memory that the server holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Sends a signal and returns the exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        finally:
            self.close()

    def close(self) -> None:
        """Ends the process, if it has not ended yet."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


Behaviour = Callable[[http.server.BaseHTTPRequestHandler, dict[str, Any]], None]


class Endpoint:
    """An LLM's endpoint on this machine; `behave` answers each request, `requests` are those that came."""

    def __init__(self, behave: Behaviour):
        self.behave = behave
        self.requests: list[dict[str, Any]] = []
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                endpoint.requests.append({"path": self.path, "key": self.headers["authorization"], **body})
                endpoint.behave(self, body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def endpoint(behave: Behaviour) -> Iterator[Endpoint]:
    """An endpoint for the time of a test."""
    found = Endpoint(behave)
    try:
        yield found
    finally:
        found.close()


def send(
    handler: http.server.BaseHTTPRequestHandler, body: bytes, status: int = 200, kind: str = "application/json", **headers: str
) -> None:
    """Answers with these octets."""
    handler.send_response(status)
    for name, value in {"content-type": kind, "content-length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def completion(text: Any, reason: str = "stop") -> bytes:
    """A chat completion as an endpoint gives it."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    return json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}).encode()


def says(text: str | Callable[[dict[str, Any]], str]) -> Behaviour:
    """An endpoint that answers with a text, or with what a function makes of the request."""
    return lambda handler, body: send(handler, completion(text if isinstance(text, str) else text(body)))


def fails(status: int, **headers: str) -> Behaviour:
    """An endpoint that answers with an error which repeats the key, as some do."""
    return lambda handler, body: send(handler, (handler.headers["authorization"] or "").encode(), status, **headers)


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """An endpoint that behaves in these ways one after another, and then as in the last."""
    left = list(behaviours)
    return lambda handler, body: (left.pop(0) if len(left) > 1 else left[0])(handler, body)
