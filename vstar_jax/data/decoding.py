"""Video files decoded in processes of their own, each clip with a deadline: a decoder that hangs or crashes costs one clip.

decord hangs on some files, crashes on others and leaks memory (OVAR.md); a thread can neither be stopped nor survive that.
Tasks share one `Decoder` among their threads; what cannot be decoded raises `VideoError` and stands in `failures` with the
reason.
"""

import contextlib
import math
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from vstar_jax.config import VideoConfig
from vstar_jax.data import processor, video
from vstar_jax.data.processor import ProcessedClip
from vstar_jax.data.shared_memory import SharedMemory
from vstar_jax.data.video import Clip, ReadCounts, VideoError

Result = TypeVar("Result")

DEADLINE = 60.0
"""Seconds for one clip; a long clip takes decord a few seconds on a slow core."""
START_DEADLINE = 120.0
"""Seconds for a process to start and import the readers, on a machine that is busy with other things."""
GRACE = 10
"""Seconds after its deadline when a process ends itself, should nobody be left to kill it."""
CLIPS_PER_PROCESS = 1_000
"""A process makes room for a new one after so many clips, which bounds what the decoders leak."""
EOF_RETRIES = 1_024
"""decord's attempts to find the end of a damaged file; its own default takes minutes. decord reads it when it is imported."""


class DecodeCounts(ReadCounts):
    """`ReadCounts` with the clips whose process was killed at the deadline, or died by itself."""

    def __init__(self) -> None:
        super().__init__()
        self._counts.update(killed=0, crashed=0)


class Lost(Exception):
    """A process that did not answer; outcome: killed at its deadline, or crashed."""

    def __init__(self, outcome: str, text: str):
        super().__init__(text)
        self.outcome = outcome


class Worker:
    """One process that runs functions, started when it is needed and again after it was lost; one thread at a time calls it."""

    def __init__(self, deadline: float):
        self.deadline = deadline
        self._process: Any = None
        self._pipe: Connection | None = None
        self._memory: SharedMemory | None = None
        self._served = 0
        self._stopping = threading.Lock()

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """`function(*args)` in the process, both picklable; its exception is raised here. `Lost` when no answer comes."""
        if self._served >= CLIPS_PER_PROCESS:
            self.stop()
        if self._pipe is None:
            self._start()
        pipe, memory = self._pipe, self._memory
        assert pipe is not None
        assert memory is not None
        self._served += 1
        answer = None
        try:
            pipe.send((function, args))
            if not pipe.poll(self.deadline):
                raise Lost("killed", f"the decoder hung and was stopped after {self.deadline:g} seconds")
            answer = memory.take(pipe.recv())
        except (EOFError, OSError):
            raise Lost("crashed", f"the decoder crashed (exit code {self.stop()})") from None
        finally:
            if answer is None:
                self.stop()  # also when interrupted: an answer that comes late would be taken for the next clip's
        done, value = answer
        if not done:
            raise value
        return value

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads of JAX can hang
        pipe, theirs = context.Pipe()
        self._pipe, self._memory = pipe, SharedMemory.made()
        arguments = (theirs, self._memory, self.deadline)
        self._process = context.Process(target=_serve, args=arguments, daemon=True, name="decoder")
        self._process.start()
        theirs.close()
        self._served = 0
        try:
            ready = pipe.poll(START_DEADLINE) and pipe.recv()
        except (EOFError, OSError):
            ready = False
        if not ready:
            code = self.stop()
            raise RuntimeError(f"a decoder process could not start (exit code {code}): VSTAR_DEBUG=1 shows what it says.")

    def stop(self) -> int | None:
        """Kills the process if there is one; returns its exit code. Any thread may call it, also while another does."""
        with self._stopping:
            process, pipe = self._process, self._pipe
            self._process = self._pipe = self._memory = None
        if process is None or pipe is None:
            return None
        # A process that crashed has its own code, which a kill would hide if it came first.
        process.join(timeout=0.1)
        process.kill()
        process.join()
        pipe.close()  # only now: a thread that waits for an answer is woken by the end of the process
        code = process.exitcode
        process.close()
        return int(code)


def _serve(pipe: Connection, memory: SharedMemory, deadline: float) -> None:
    """The process: answers (function, args) with (True, result) or (False, exception) until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["DECORD_EOF_RETRY_MAX"] = str(EOF_RETRIES)
    if os.environ.get("VSTAR_DEBUG") != "1":  # FFmpeg's complaints would tear up the progress bar
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for reader in ("decord", "av"):
        with contextlib.suppress(ImportError):
            __import__(reader)
    pipe.send(True)
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, args = pipe.recv()
            # Unlike the parent's kill, the kernel's alarm also ends a decoder whose parent is gone.
            signal.alarm(math.ceil(deadline) + GRACE)
            try:
                answer = (True, function(*args))
            except Exception as error:
                answer = (False, error)
            signal.alarm(0)
            pipe.send(memory.put(answer))


class Decoder:
    """Reads clips in `workers` processes; may be shared by any number of threads.

    counts: how clips were read or lost; failures: path -> why it could not be read, in the order in which they failed.
    """

    def __init__(self, workers: int = 2, deadline: float = DEADLINE):
        self.counts = DecodeCounts()
        self.failures: dict[str, str] = {}
        self._lock = threading.Lock()
        self._workers = [Worker(deadline) for _ in range(workers)]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def read(self, path: str | Path, max_frames: int, exact: int | None = None) -> Clip:
        """`video.read` in a process; VideoError when the file cannot be read, is too slow, or brings the decoder down."""
        clip, outcome = self.run(path, _read, str(path), max_frames, exact)
        self.counts.add(outcome)
        return clip

    def process(self, path: str | Path, config: VideoConfig) -> ProcessedClip:
        """What `processor.process` makes of `read`, in the process too: the calling thread only waits. VideoError as `read`."""
        clip, outcome = self.run(path, _processed, str(path), config)
        self.counts.add(outcome)
        return clip

    def run(self, path: str | Path, function: Callable[..., Result], *args: Any) -> Result:
        """`function(*args)` on the clip at `path`, in a process. VideoError, counted and listed, when that fails or is lost."""
        worker = self._idle.get()
        try:
            return worker.call(function, *args)
        except VideoError as error:
            raise self._failed(path, "failed", error) from None
        except Lost as lost:
            text = f"{path} cannot be read, {lost}: fetch the clip again, or leave it out of the list."
            raise self._failed(path, lost.outcome, VideoError(text)) from None
        finally:
            self._idle.put(worker)

    def _failed(self, path: str | Path, outcome: str, error: VideoError) -> VideoError:
        self.counts.add(outcome)
        with self._lock:
            self.failures[str(path)] = str(error)
        return error

    def close(self) -> None:
        """Ends the processes; a call that is under way loses its clip."""
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(path: str, max_frames: int, exact: int | None) -> tuple[Clip, str]:
    counts = ReadCounts()
    clip = video.read(path, max_frames, exact, counts)
    return clip, next(outcome for outcome, count in counts.snapshot().items() if count)


def _processed(path: str, config: VideoConfig) -> tuple[ProcessedClip, str]:
    clip, outcome = _read(path, config.frames, None)
    return processor.process(clip.frames, clip.fps, config), outcome
