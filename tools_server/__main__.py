"""python -m tools_server: loads the models, listens, says so in one line, and drains when it is asked to stop."""

import logging
import os
import socket
import sys
import threading
import time

import uvicorn

from tools_server import app, settings, yolo
from tools_server.service import Service
from tools_server.settings import KEY_VARIABLES, TOKEN_VARIABLE, Settings, SettingsError

LAST_SECONDS = 5.0
"""After a drain that had its time, until the process ends whatever happens."""


class Server(uvicorn.Server):
    """Says in one line on standard output that it listens, for whoever started it."""

    def __init__(self, config: uvicorn.Config, greeting: str):
        super().__init__(config)
        self._greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server."""
        await super().startup(sockets)
        if self.started:
            print(self._greeting, flush=True)


def bind(s: Settings) -> socket.socket:
    """A socket on the settings' address, not yet listening: who connects before the models are there is refused."""
    listener = socket.socket(socket.AF_INET6 if ":" in s.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((s.host, s.port))
    except OSError as error:
        raise SettingsError(f"{s.host}:{s.port} cannot be listened on ({error.strerror}): choose another --port.") from None
    return listener


def greeting(s: Settings, port: int, service: Service) -> str:
    """What is served where, in one line."""
    models = service.models
    host = f"[{s.host}]" if ":" in s.host else s.host
    facts = {
        "device": models["pose"].device,
        "detect": models["detect"].name.removesuffix(".pt"),
        "pose": models["pose"].name.removesuffix(".pt"),
        "explanations": service.explainer.backend,
        "descriptions": service.describer.backend,
    }
    return f"tools server ready at http://{host}:{port} ({', '.join(f'{name} {fact}' for name, fact in facts.items())})"


def stop_with_parent(server: Server, seconds: float) -> None:
    """Stops the server when standard input ends, at the latest `seconds` later."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        server.should_exit = True
        time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def serve(argv: list[str]) -> None:
    """Runs the server until it is told to stop. Raises SettingsError or YoloError when it cannot start."""
    s = settings.parse(argv)
    token = os.environ.pop(TOKEN_VARIABLE, None)
    keys = [os.environ.pop(name, None) for name in KEY_VARIABLES]
    if not s.loopback and not token:
        raise SettingsError(
            f"--host={s.host} can be reached from other machines: put a token into the environment variable {TOKEN_VARIABLE}, "
            "or use 127.0.0.1."
        )
    with bind(s) as listener:
        gate, service = app.create(s, token, next(filter(None, keys), None))
        config = uvicorn.Config(
            gate,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=s.limits.drain_seconds,
            ws="none",
            lifespan="on",
        )
        server = Server(config, greeting(s, listener.getsockname()[1], service))
        if s.exit_with_parent:
            stop_with_parent(server, s.limits.drain_seconds + LAST_SECONDS)
        server.run([listener])


def main() -> None:
    """See the module."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        serve(sys.argv[1:])
    except (SettingsError, yolo.YoloError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
