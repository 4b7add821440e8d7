"""Several processes as one program: how they start, and how they agree on what each of them knows only in part.

Every process runs the same script. What is computed under jit is one program over all devices; what is done on the host, each
process does for its own rows (`sharding.local_rows`), and files are written by the first one. All must reach the same calls of
this module in the same order, from their main thread.
"""

import math
import pickle
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from vstar_jax.config import DistributedConfig
from vstar_jax.errors import UserError

AUTO = "auto"
SMALLEST = 1 << 10
"""Bytes of a message are filled up to this or a power of two above it, so that few shapes are compiled."""

Value = TypeVar("Value")


def start(config: DistributedConfig) -> None:
    """Joins the processes of a run; nothing to do for a run of one. Call it before JAX starts its backends.

    When one of them dies, JAX ends the others with its own message, at the latest `config.deadline` seconds after it was last
    heard of. Raises UserError when the processes do not find each other.
    """
    if not config.coordinator:
        return
    # Its handler of SIGTERM would keep that signal from ours, by which a run saves before it stops.
    jax.config.update("jax_enable_preemption_service", False)
    place: dict[str, Any] = {}
    if config.coordinator != AUTO:
        place = {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.process,
        }
        if config.process:
            _wait_for(config)
    timeouts = ("initialization_timeout", "heartbeat_timeout_seconds", "shutdown_timeout_seconds")
    place |= dict.fromkeys(timeouts, math.ceil(config.deadline))
    try:
        jax.distributed.initialize(**place)
    except ValueError as error:
        raise UserError(
            f"JAX cannot find the processes of this run by itself ({str(error).rstrip('.')}): set distributed.coordinator to "
            "the HOST:PORT of the first, distributed.processes, and for each its distributed.process."
        ) from None


def _wait_for(config: DistributedConfig) -> None:
    """Returns when the first process listens: JAX would end the program with a stack trace when it does not."""
    host, _, port = config.coordinator.rpartition(":")
    until = time.monotonic() + config.deadline
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
            return
        except OSError as error:
            reason = error
        if time.monotonic() > until:
            raise UserError(
                f"the first process of this run was not found at {config.coordinator} in {config.deadline:g} seconds "
                f"({reason}): start it with distributed.process=0, and give all of them its address."
            )
        time.sleep(0.2)


def first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def gather(value: Value) -> list[Value]:
    """What every process has given here, in the order of the processes; anything that pickle takes."""
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = multihost_utils.process_allgather(np.int64(len(content))).reshape(-1)
    room = max(SMALLEST, 1 << int(lengths.max() - 1).bit_length())
    every = multihost_utils.process_allgather(np.pad(content, (0, room - len(content))))
    return [pickle.loads(row[:length].tobytes()) for row, length in zip(every, lengths, strict=True)]


def told(value: Value) -> Value:
    """What the first process has given here."""
    return gather(value if first() else None)[0]  # type: ignore[return-value]


def largest(values: Sequence[int]) -> list[int]:
    """The largest of each number over all processes."""
    return [max(column) for column in zip(*gather(list(values)), strict=True)]


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process does what follows before the others begin it, and they find it done."""
    if not first():
        gather(None)
    yield
    if first():
        gather(None)
