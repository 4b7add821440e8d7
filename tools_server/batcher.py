"""Collects requests of many callers into batches for one worker that only one thread may touch, such as a model.

A request is a list of items and is answered as a whole; its items may travel in several batches, and a batch may hold items of
several requests, as long as they have the same key. A second thread only watches the deadlines, so that they are kept while
the worker works. Whatever ends a request (results, a failure, its deadline, a cancellation) also takes what is left of it
out of the queue.
"""

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Request(Generic[Item, Result]):
    """Items of which the first `taken` have left the queue, and the results that are there."""

    def __init__(self, items: Sequence[Item], key: Hashable, deadline: float):
        self.items, self.key, self.deadline = items, key, deadline
        self.count, self.taken = len(items), 0
        self.results: list[Result] = []
        self.future: Future[list[Result]] = Future()
        self.since = time.monotonic()

    @property
    def waiting(self) -> int:
        return self.count - self.taken

    def take(self, most: int) -> Sequence[Item]:
        items = self.items[self.taken : self.taken + most]
        self.taken += len(items)
        return items


class Batcher(Generic[Item, Result]):
    """Calls `run` from one thread with up to `batch` items of the same key, in the order of their arrival.

    run: items in, as many results out; what it raises fails the requests of that batch and no others.
    batch: most items of a call; wait_ms: how long a batch that is not full waits for more, from its first request on;
    capacity: most items that may wait; name: of the threads; on_batch: told the items and the seconds of each call.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Sequence[Result]],
        *,
        batch: int,
        wait_ms: float,
        capacity: int,
        name: str,
        on_batch: Callable[[int, float], None] | None = None,
    ):
        self._run, self._batch, self._wait, self._capacity, self._on_batch = run, batch, wait_ms / 1000, capacity, on_batch
        lock = threading.Lock()
        self._arrived, self._due = threading.Condition(lock), threading.Condition(lock)
        self._queue: deque[_Request[Item, Result]] = deque()
        self._open: set[_Request[Item, Result]] = set()
        self._waiting = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=work, name=f"{name}-{role}", daemon=True)
            for role, work in (("owner", self._own), ("deadlines", self._watch))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queue_size(self) -> int:
        """Items that wait for the worker."""
        return self._waiting

    def submit(self, items: Sequence[Item], key: Hashable, deadline: float) -> "Future[list[Result]]":
        """The results of `items`, in their order, once they are there.

        The future fails with TimeoutError when `deadline`, a `time.monotonic()` time, passes first, and with what `run`
        raised. Cancelling it spares the items that have not been taken yet. Raises queue.Full when more than `capacity`
        items would wait (an empty queue takes a request of any size), RuntimeError after `close`.
        """
        request = _Request[Item, Result](items, key, deadline)
        with self._arrived:
            if self._closed:
                raise RuntimeError("the batcher is closed and takes no more work.")
            if self._waiting and self._waiting + request.count > self._capacity:
                raise queue.Full(f"{self._waiting} items wait and at most {self._capacity} may: try again later.")
            if request.count:
                if all(deadline < other.deadline for other in self._open):
                    self._due.notify()
                self._open.add(request)
                self._queue.append(request)
                self._waiting += request.count
                self._arrived.notify()
        if not request.count:
            request.future.set_result([])
        request.future.add_done_callback(lambda _: self._forget(request))
        return request.future

    def close(self) -> None:
        """Takes no more work, finishes what was accepted and stops both threads; a second call does nothing."""
        with self._arrived:
            self._closed = True
            self._arrived.notify()
            self._due.notify()
        for thread in self._threads:
            thread.join()

    def _forget(self, request: _Request[Item, Result]) -> None:
        if request.future.cancelled():
            request.future.set_running_or_notify_cancel()  # or `concurrent.futures.wait` would wait for it forever
        with self._arrived:
            self._drop(request)
            self._open.discard(request)
            request.items = ()  # a caller that keeps the future must not keep its frames alive
            if self._closed:
                self._due.notify()

    def _drop(self, request: _Request[Item, Result]) -> None:
        if request.waiting:
            self._queue.remove(request)
            self._waiting -= request.waiting
            request.taken = request.count

    def _own(self) -> None:
        while batch := self._next_batch():
            items = [item for _, share in batch for item in share]
            begin = time.perf_counter()
            try:
                results = self._run(items)
                if len(results) != len(items):
                    raise RuntimeError(f"the worker gave {len(results)} results for {len(items)} items.")
                if self._on_batch:
                    self._on_batch(len(items), time.perf_counter() - begin)
            except Exception as error:  # whatever a batch does, the thread goes on to the next one
                for request, _ in batch:
                    _settle(request.future.set_exception, error)
                continue
            rest = iter(results)
            for request, share in batch:
                request.results += itertools.islice(rest, len(share))
                if len(request.results) == request.count:
                    _settle(request.future.set_result, request.results)

    def _next_batch(self) -> list[tuple[_Request[Item, Result], Sequence[Item]]]:
        """Requests with the items of each to compute now, as soon as there are enough; empty when closed and all is done."""
        with self._arrived:
            while True:
                if self._queue:
                    first = self._queue[0]
                    ready = sum(request.waiting for request in self._queue if request.key == first.key)
                    patience = first.since + self._wait - time.monotonic()
                    if ready < self._batch and patience > 0 and not self._closed:
                        self._arrived.wait(patience)
                    elif batch := self._take(first.key):
                        return batch
                elif self._closed:
                    return []
                else:
                    self._arrived.wait()

    def _take(self, key: Hashable) -> list[tuple[_Request[Item, Result], Sequence[Item]]]:
        batch, room = [], self._batch
        for request in [request for request in self._queue if request.key == key]:
            if request.future.done():
                self._drop(request)
            elif room:
                share = request.take(room)
                batch.append((request, share))
                room -= len(share)
                self._waiting -= len(share)
                if not request.waiting:
                    self._queue.remove(request)
        return batch

    def _watch(self) -> None:
        while True:
            with self._due:
                late = [request for request in self._open if request.deadline <= time.monotonic()]
                self._open.difference_update(late)
                if not late:
                    if self._closed and not self._open:
                        return
                    nearest = min((request.deadline for request in self._open), default=float("inf"))
                    self._due.wait(min(max(nearest - time.monotonic(), 0), threading.TIMEOUT_MAX))
            for request in late:
                _settle(request.future.set_exception, TimeoutError("the deadline passed before the answer was there."))


def _settle(setter: Callable[[Any], None], value: Any) -> None:
    """Sets a future's result or exception, unless its caller or its deadline was first."""
    with suppress(InvalidStateError):
        setter(value)
