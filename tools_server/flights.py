"""Work in progress that several callers wait for together: the same work asked again joins it instead of starting anew."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass
class _Flight:
    task: asyncio.Task[Any]
    weight: int
    waiters: int = 0


class Flights:
    """Work by key. A caller that gives up leaves the others undisturbed; work that nobody waits for any more is cancelled.

    For one event loop.
    """

    def __init__(self) -> None:
        self._flights: dict[str, _Flight] = {}
        self._load = 0

    def __contains__(self, key: str) -> bool:
        return key in self._flights

    @property
    def load(self) -> int:
        """The weights of all work in progress together."""
        return self._load

    def join(self, key: str, work: Callable[[], Coroutine[Any, Any, Result]], weight: int = 0) -> asyncio.Future[Result]:
        """The result, or the failure, of the work under `key`: what is in progress, else `work()`. Cancel it to give up."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.create_task(work()), weight)
            self._load += weight
            flight.task.add_done_callback(lambda _: self._forget(key, flight))
        flight.waiters += 1
        waiter = asyncio.shield(flight.task)
        waiter.add_done_callback(lambda _: self._leave(key, flight, waiter))
        return waiter

    def _leave(self, key: str, flight: _Flight, waiter: asyncio.Future[Any]) -> None:
        if not waiter.cancelled():
            waiter.exception()  # marks it as seen, for a caller that never looks
        flight.waiters -= 1
        if not flight.waiters and not flight.task.done():
            flight.task.cancel()
            self._forget(key, flight)  # who comes now must not join work that is being cancelled

    def _forget(self, key: str, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
            self._load -= flight.weight
