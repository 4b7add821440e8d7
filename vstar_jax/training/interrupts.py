"""How a run is asked to stop: between steps, by a signal to any of its processes."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vstar_jax.distributed import largest


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list, so that a step is always finished and saved; a second SIGINT breaks off."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def asked_to_stop(stops: Sequence[int]) -> int:
    """The signal by which any of the processes was asked to stop, 0 for none: all stop after the same step."""
    return largest([stops[0] if stops else 0])[0]
