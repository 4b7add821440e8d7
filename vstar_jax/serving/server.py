"""Starts the service of a checkpoint and ends it: loads while it listens already, says where, drains when told to stop."""

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from vstar_jax.errors import UserError
from vstar_jax.serving.engine import Sizes

TOKEN = "SERVE_TOKEN"
"""Environment variable with the bearer token that clients must show."""


@dataclass(frozen=True)
class Address:
    """Where to listen; drain: seconds that replies being written have when the server is told to stop."""

    host: str = "127.0.0.1"
    port: int = 8766
    drain: float = 30.0


@dataclass(frozen=True)
class Batching:
    """Requests that decode together, tokens decoded between two looks at them, most tokens of a reply, how many may wait."""

    rows: int = 4
    chunk: int = 16
    new_tokens: int = 512
    queue: int = 32


def serve(checkpoint: str, settings: Sequence[str], mesh: str | None, address: Address, batching: Batching) -> None:
    """Serves until SIGTERM or SIGINT. Raises UserError when the checkpoint or the address cannot be used."""
    token = os.environ.get(TOKEN) or None
    if not token and not _is_loopback(address.host):
        raise UserError(
            f"--host {address.host} can be reached from other machines: put a token into the environment variable {TOKEN}, "
            "or use 127.0.0.1."
        )
    from vstar_jax import sharding
    from vstar_jax.evaluation.checkpoint import config_of

    config = config_of(checkpoint, mesh, settings)
    simulated = sharding.simulate_devices(config.mesh)
    import uvicorn

    from vstar_jax.config import resolve
    from vstar_jax.data.chat import Chat
    from vstar_jax.evaluation.checkpoint import restore
    from vstar_jax.models.config import Architecture
    from vstar_jax.serving import app
    from vstar_jax.serving.engine import Engine

    if sharding.mesh_shape(config.mesh)[:2] != (1, 1):
        raise UserError(
            f"a server has no use for mesh {config.mesh}, since prompts come one by one: use 1xM, or several servers."
        )
    path = resolve(config.policy.path)
    chat, devices = Chat(path, config.video), sharding.make_mesh(config.mesh)
    sharding.announce(devices, simulated)
    sizes = Sizes(**vars(batching), tokens=config.data.tokens, patches=config.data.patches)
    engine = Engine(
        lambda: restore(checkpoint, config, devices),
        Architecture.from_hf(path),
        config.policy.dtype,
        chat.stop_ids,
        sizes,
        devices,
    )
    limits = app.Limits(calls=batching.rows + batching.queue)
    failures: list[Exception] = []
    with _bound(address) as listener:
        application = app.create(app.Service(Path(checkpoint).resolve().name, chat, engine, limits), token)
        server = uvicorn.Server(
            uvicorn.Config(
                application,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(address.drain),
                ws="none",
            )
        )

        def fail(error: Exception) -> None:
            failures.append(error)
            server.should_exit = True

        host = f"[{address.host}]" if ":" in address.host else address.host
        engine.start(fail)
        print(f"serving {checkpoint} on http://{host}:{listener.getsockname()[1]}/v1", flush=True)
        try:
            server.run([listener])
        finally:
            engine.close()
    if failures:
        raise failures[0]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _bound(address: Address) -> socket.socket:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    listener = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(
            f"{address.host}:{address.port} cannot be listened on ({error.strerror}): choose another --port."
        ) from None
    return listener
