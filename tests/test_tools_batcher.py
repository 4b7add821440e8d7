"""The micro-batcher: who gets which answer, and what deadlines, cancellations, failures and a full queue do to the others."""

import concurrent.futures
import gc
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

import pytest

from tools_server.batcher import Batcher

FOREVER = float("inf")
SOON = 20.0
"""Seconds after which a test that waits has hung."""


class Worker:
    """Doubles numbers; records who called it with what, and can be held inside a call."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.entered, self.gate = threading.Semaphore(0), threading.Event()
        self.gate.set()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.threads.add(threading.get_ident())
        self.entered.release()
        assert self.gate.wait(SOON)
        if 13 in items:
            raise ValueError("thirteen")
        return [2 * item for item in items]

    def hold(self) -> None:
        self.gate.clear()

    def is_held(self) -> bool:
        return self.entered.acquire(timeout=SOON)


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.gate.set()


@pytest.fixture
def start(worker: Worker) -> Iterator[Callable[..., Batcher[int, int]]]:
    made: list[Batcher[int, int]] = []

    def make(batch: int = 4, wait_ms: float = 1.0, capacity: int = 100_000, **more) -> Batcher[int, int]:
        made.append(Batcher(worker, batch=batch, wait_ms=wait_ms, capacity=capacity, name="test", **more))
        return made[-1]

    yield make
    worker.gate.set()
    for batcher in made:
        batcher.close()


def occupied(batcher: Batcher[int, int], worker: Worker) -> "concurrent.futures.Future[list[int]]":
    """Keeps the worker inside a call, so that what comes next waits in the queue."""
    worker.hold()
    first = batcher.submit([0], "a", FOREVER)
    assert worker.is_held()
    return first


def test_everybody_gets_the_answers_to_their_own_items(start, worker) -> None:
    batcher = start(batch=5)

    def ask(seed: int) -> bool:
        rng = random.Random(seed)
        asked = [[rng.randrange(100, 10**6) for _ in range(rng.randrange(12))] for _ in range(30)]
        futures = [batcher.submit(items, rng.choice("abc"), FOREVER) for items in asked]
        return all(f.result(SOON) == [2 * i for i in items] for f, items in zip(futures, asked, strict=True))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(16)))
    assert max(len(batch) for batch in worker.batches) <= 5
    assert len(worker.threads) == 1
    assert batcher.queue_size == 0


def test_requests_share_a_batch_and_large_ones_take_several(start, worker) -> None:
    batcher = start(batch=4, wait_ms=10_000)
    futures = [batcher.submit(items, "a", FOREVER) for items in ([1, 2], [3], [4, 5, 6, 7, 8, 9])]
    assert [f.result(SOON) for f in futures[:2]] == [[2, 4], [6]]
    batcher.close()
    assert futures[2].result(SOON) == [8, 10, 12, 14, 16, 18]
    assert worker.batches == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]


def test_items_of_different_keys_never_meet(start, worker) -> None:
    batcher = start(batch=4)
    first = occupied(batcher, worker)
    futures = [batcher.submit([n], "ab"[n % 2], FOREVER) for n in range(2, 8)]
    worker.gate.set()
    assert [f.result(SOON) for f in (first, *futures)] == [[0], *([2 * n] for n in range(2, 8))]
    assert worker.batches[1:] == [[2, 4, 6], [3, 5, 7]]


def test_a_lone_request_waits_no_longer_than_it_must(start) -> None:
    begin = time.monotonic()
    assert start(wait_ms=50).submit([1], "a", FOREVER).result(SOON) == [2]
    assert 0.04 < time.monotonic() - begin < SOON


def test_a_deadline_is_kept_while_the_worker_works_and_spares_the_others(start, worker) -> None:
    batcher = start(batch=2)
    worker.hold()
    impatient = batcher.submit([1], "a", time.monotonic() + 0.1)
    patient = batcher.submit([2], "a", FOREVER)
    assert worker.is_held()
    with pytest.raises(TimeoutError, match="deadline"):
        impatient.result(SOON)
    assert not patient.done()
    worker.gate.set()
    assert patient.result(SOON) == [4]


def test_what_waits_beyond_its_deadline_is_never_computed(start, worker) -> None:
    batcher = start()
    first = occupied(batcher, worker)
    late = batcher.submit([1, 2], "a", time.monotonic() + 0.05)
    later = batcher.submit([3], "a", time.monotonic() + SOON)
    assert isinstance(late.exception(SOON), TimeoutError)
    assert batcher.queue_size == 1
    worker.gate.set()
    assert (first.result(SOON), later.result(SOON)) == ([0], [6])
    assert worker.batches == [[0], [3]]


def test_a_cancelled_request_leaves_the_queue_and_can_be_waited_for(start, worker) -> None:
    batcher = start()
    occupied(batcher, worker)
    unwanted, wanted = batcher.submit([1, 2], "a", FOREVER), batcher.submit([3], "a", FOREVER)
    assert unwanted.cancel()
    assert batcher.queue_size == 1
    assert concurrent.futures.wait([unwanted], SOON).done == {unwanted}
    worker.gate.set()
    assert wanted.result(SOON) == [6]
    assert worker.batches == [[0], [3]]


def test_the_rest_of_a_large_request_is_dropped_when_nobody_wants_it(start, worker) -> None:
    batcher = start(batch=2)
    worker.hold()
    large = batcher.submit(list(range(20, 40)), "a", FOREVER)
    assert worker.is_held()
    assert large.cancel()
    assert batcher.queue_size == 0
    worker.gate.set()
    assert batcher.submit([1], "a", FOREVER).result(SOON) == [2]
    assert worker.batches == [[20, 21], [1]]


def test_after_most_callers_gave_up_the_others_and_the_next_wave_are_right(start, worker) -> None:
    batcher = start(batch=4)
    occupied(batcher, worker)
    futures = [batcher.submit([n, n + 1000], "a", FOREVER) for n in range(100, 300)]
    for n, future in enumerate(futures):
        assert n % 5 == 0 or future.cancel()
    worker.gate.set()
    assert all(futures[n].result(SOON) == [2 * (100 + n), 2 * (1100 + n)] for n in range(0, 200, 5))
    wave = [batcher.submit([n], "a", FOREVER) for n in range(500, 600)]
    assert [f.result(SOON) for f in wave] == [[2 * n] for n in range(500, 600)]
    assert sum(map(len, worker.batches)) == 1 + 2 * 40 + 100


def test_a_failure_reaches_its_batch_and_no_other(start, worker) -> None:
    batcher = start(batch=2)
    occupied(batcher, worker)
    futures = [batcher.submit(items, "a", FOREVER) for items in ([1, 2], [13], [4], [5], [6, 7, 13, 8])]
    worker.gate.set()
    assert futures[0].result(SOON) == [2, 4]
    assert futures[3].result(SOON) == [10]
    for n in (1, 2, 4):
        with pytest.raises(ValueError, match="thirteen"):
            futures[n].result(SOON)
    assert batcher.submit([9], "a", FOREVER).result(SOON) == [18]


def test_a_full_queue_refuses_and_an_empty_one_takes_anything(start, worker) -> None:
    batcher = start(capacity=3)
    occupied(batcher, worker)
    large = batcher.submit([1, 2, 3, 4, 5], "a", FOREVER)
    with pytest.raises(queue.Full, match="5 items wait and at most 3"):
        batcher.submit([6], "a", FOREVER)
    assert large.cancel()
    accepted = batcher.submit([7], "a", FOREVER)
    worker.gate.set()
    assert accepted.result(SOON) == [14]


def test_closing_finishes_what_was_accepted_and_refuses_more(start, worker) -> None:
    batcher = start(batch=2, wait_ms=10_000)
    futures = [batcher.submit([n], "a", FOREVER) for n in range(5)]
    batcher.close()
    batcher.close()
    assert [f.result(0) for f in futures] == [[2 * n] for n in range(5)]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit([1], "a", FOREVER)


def test_a_future_that_is_kept_does_not_keep_its_items(start) -> None:
    class Frames:
        pass

    batcher = Batcher[Frames, int](lambda items: [1] * len(items), batch=2, wait_ms=1, capacity=9, name="test")
    frames = Frames()
    gone = weakref.ref(frames)
    future = batcher.submit([frames], "a", time.monotonic() + 3600)
    assert future.result(SOON) == [1]
    del frames
    batcher.close()
    gc.collect()
    assert gone() is None


def test_nothing_asked_is_answered_at_once(start, worker) -> None:
    assert start().submit([], "a", FOREVER).result(0) == []
    assert worker.batches == []


def test_a_worker_that_answers_too_little_is_an_error() -> None:
    def short(items: list[int]) -> Sequence[int]:
        return items[1:]

    batcher = Batcher[int, int](short, batch=2, wait_ms=1, capacity=9, name="test")
    with pytest.raises(RuntimeError, match="1 results for 2 items"):
        batcher.submit([1, 2], "a", FOREVER).result(SOON)
    batcher.close()


def test_each_call_is_reported_with_its_size(start) -> None:
    calls: list[tuple[int, float]] = []
    batcher = start(batch=3, on_batch=lambda items, seconds: calls.append((items, seconds)))
    batcher.submit([1, 2, 3, 4], "a", FOREVER).result(SOON)
    assert [items for items, _ in calls] == [3, 1]
    assert all(seconds >= 0 for _, seconds in calls)
