"""The policy's server for tests, as a process of its own: the shipped tiny model on a free port of this machine."""

import base64
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

httpx = pytest.importorskip("httpx", reason="the servers need the extra tools")
pytest.importorskip("fastapi", reason="the servers need the extra tools")

ROOT = Path(__file__).parent.parent
MODEL = "stick-motion-base"
START_SECONDS = 120.0


class PolicyServer:
    """`scripts/serve.py` from the moment it listens until `stop`; flags: more of its own."""

    def __init__(self, folder: Path, *flags: str, token: str = "", wait: bool = True):
        self.log = folder / "serve.log"
        environment = {**os.environ, "SERVE_TOKEN": token, "OMP_NUM_THREADS": "1", "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--port=0", "--mesh=1x1", *flags]
        command += ["--checkpoint", str(ROOT / "vstar_jax" / "assets" / MODEL)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"http://\S+(?=/v1)", line):
                self.url = found[0]
                break
        else:
            raise AssertionError(f"the server did not start: {self.log.read_text()}")
        if wait:
            self.wait_until(lambda: self.health()[0] == 200)

    def health(self) -> tuple[int, dict]:
        """Status and content of GET /health."""
        reply = httpx.get(f"{self.url}/health", timeout=30)
        return reply.status_code, reply.json()

    def wait_until(self, true, seconds: float = START_SECONDS) -> None:
        """Waits for something; AssertionError when it does not come."""
        until = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < until, "it did not come to be in time"
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal and gives the exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(60)
        finally:
            self.close()

    def close(self) -> None:
        """Ends the process, if it has not ended yet."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def png(picture: np.ndarray) -> str:
    """A picture uint8 [H, W, 3] as a data URL."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
