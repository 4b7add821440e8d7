"""A decoder that hangs, crashes or fails costs its own clip, and nothing else."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from video_files import cut, write_video

from vstar_jax.config import VideoConfig
from vstar_jax.data import decoding, processor, shared_memory, video
from vstar_jax.data.decoding import Decoder, Worker
from vstar_jax.data.shared_memory import SharedMemory
from vstar_jax.data.video import VideoError

DEADLINE = 1.0
# Seconds between a deadline and the error: the kill itself takes milliseconds, a busy machine more.
SLACK = 15.0


def open_pipe(path: str) -> None:
    """Opens a named pipe that nobody writes to, with PyAV: a real reader that waits in C for ever."""
    import av

    av.open(path)


def crash() -> None:
    """Ends the process as a fault in a decoder's C code does."""
    ctypes.string_at(0)


def own_id() -> int:
    return os.getpid()


def mistake() -> None:
    raise KeyError("a fault of the program")


def filled(value: int, size: int) -> np.ndarray:
    return np.full(size, value, np.uint8)


@pytest.fixture(scope="module")
def decoder():
    with Decoder(workers=2, deadline=20.0) as made:
        yield made


def test_clips_are_read_as_in_this_process(tmp_path: Path, decoder: Decoder) -> None:
    path = write_video(tmp_path / "a_(#1)_[x]_&_!;+.avi", frames=20)
    before = decoder.counts.snapshot()["decord"]
    clip, here = decoder.read(path, 16), video.read(path, 16)
    np.testing.assert_array_equal(clip.frames, here.frames)
    np.testing.assert_array_equal(clip.indices, here.indices)
    assert clip.fps == here.fps
    assert len(decoder.read(path, 16, exact=8).frames) == 8
    assert decoder.counts.snapshot()["decord"] == before + 2


def test_clips_are_prepared_as_in_this_process(tmp_path: Path, decoder: Decoder) -> None:
    path, config = write_video(tmp_path / "a.mp4", frames=20), VideoConfig(frames=8, max_pixels=28 * 28 * 4)
    before, clip = decoder.counts.snapshot()["decord"], video.read(path, 8)
    there, here = decoder.process(path, config), processor.process(clip.frames, clip.fps, config)
    np.testing.assert_array_equal(there.patches, here.patches)
    assert (there.grid, there.second_per_grid, there.is_video) == (here.grid, here.second_per_grid, True)
    assert decoder.counts.snapshot()["decord"] == before + 1
    with pytest.raises(VideoError, match="is not there"):
        decoder.process(tmp_path / "b.mp4", config)


def test_an_answer_stays_when_the_next_one_comes_and_may_be_written_to() -> None:
    worker = Worker(deadline=20.0)
    first, second = worker.call(filled, 1, 1_000_000), worker.call(filled, 2, 2_000_000)
    worker.stop()
    first[0] = 3
    assert first[0] == 3
    assert (first[1:] == 1).all()
    assert len(second) == 2_000_000
    assert (second == 2).all()


def test_answers_come_without_shared_memory_too(monkeypatch) -> None:
    """As where the system has none."""
    monkeypatch.delattr(os, "memfd_create")
    worker = Worker(deadline=20.0)
    assert (worker.call(filled, 1, 1_000_000) == 1).all()
    worker.stop()


def test_what_is_larger_than_the_shared_memory_travels_in_the_message(monkeypatch) -> None:
    monkeypatch.setattr(shared_memory, "SIZE", 1_000)
    memory = SharedMemory.made()
    values = {"small": filled(1, 600), "smaller": filled(2, 400)}, {"small": filled(1, 600), "larger": filled(2, 401)}
    for value, in_message in zip(values, (False, True), strict=True):
        message = memory.put(value)
        assert (len(message[0]) > 1_000) == in_message
        for name, array in memory.take(message).items():
            np.testing.assert_array_equal(array, value[name])


def test_a_process_that_ends_leaves_no_file_open() -> None:
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    worker, counts = Worker(deadline=20.0), []
    for _ in range(3):
        worker.call(filled, 1, 1_000_000)
        worker.stop()
        counts.append(opened())
    assert len(set(counts)) == 1


def test_many_threads_get_their_own_clips(tmp_path: Path, decoder: Decoder) -> None:
    paths = [write_video(tmp_path / f"{n}.mp4", frames=2, seed=20 * n) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        means = list(pool.map(lambda p: decoder.read(p, 2).frames[0].mean(), paths * 3))
    expected = [video.read(path, 2).frames[0].mean() for path in paths] * 3
    assert means == expected
    assert len(set(expected)) == 8


def test_pyav_takes_over_and_is_counted_where_decord_cannot(tmp_path: Path, monkeypatch) -> None:
    """The process inherits a search path on which decord cannot be imported."""
    (tmp_path / "decord.py").write_text("raise ImportError('not on this platform')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with Decoder(workers=1, deadline=20.0) as made:
        assert len(made.read(write_video(tmp_path / "a.mp4", frames=4), 4).frames) == 4
        assert made.counts.snapshot() == {"decord": 0, "pyav": 1, "failed": 0, "killed": 0, "crashed": 0}


def test_broken_and_missing_files_are_listed_with_the_reason(tmp_path: Path) -> None:
    with Decoder(workers=1, deadline=20.0) as made:
        for path, message in (
            (cut(write_video(tmp_path / "a.mp4")), "cannot be decoded"),
            (tmp_path / "b.mp4", "is not there"),
        ):
            for _ in range(2):
                with pytest.raises(VideoError, match=message):
                    made.read(path, 16)
        assert list(made.failures) == [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]
        assert made.counts.snapshot()["failed"] == 4


def test_a_hanging_decoder_is_killed_at_the_deadline_and_the_next_clip_is_read(tmp_path: Path) -> None:
    fifo, good = tmp_path / "hang.mp4", write_video(tmp_path / "good.mp4")
    os.mkfifo(fifo)
    with Decoder(workers=1, deadline=DEADLINE) as made:
        hung = made.run(good, own_id)
        began = time.monotonic()
        with pytest.raises(VideoError, match=r"hang\.mp4 cannot be read, the decoder hung and was stopped after 1 seconds"):
            made.run(fifo, open_pipe, str(fifo))
        assert DEADLINE <= time.monotonic() - began < DEADLINE + SLACK
        with pytest.raises(ProcessLookupError):
            os.kill(hung, 0)
        assert len(made.read(good, 4).frames) == 4
        assert made.counts.snapshot() == {"decord": 1, "pyav": 0, "failed": 0, "killed": 1, "crashed": 0}
        assert list(made.failures) == [str(fifo)]


def test_a_hanging_clip_does_not_hold_up_the_other_threads(tmp_path: Path) -> None:
    fifo, good = tmp_path / "hang.mp4", write_video(tmp_path / "good.mp4", frames=2)
    os.mkfifo(fifo)
    with Decoder(workers=2, deadline=3.0) as made:
        made.read(good, 2)
        errors: list[VideoError] = []

        def hang() -> None:
            try:
                made.run(fifo, open_pipe, str(fifo))
            except VideoError as error:
                errors.append(error)

        thread = threading.Thread(target=hang)
        thread.start()
        for _ in range(5):
            made.read(good, 2)
        assert thread.is_alive()
        thread.join()
        assert len(errors) == 1


def test_closing_while_clips_are_read_costs_those_clips_alone(tmp_path: Path) -> None:
    fifo = tmp_path / "hang.mp4"
    os.mkfifo(fifo)
    made = Decoder(workers=2, deadline=60.0)
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            reading = [pool.submit(made.run, fifo, open_pipe, str(fifo)) for _ in range(2)]
            while any(worker._served == 0 for worker in made._workers):
                time.sleep(0.01)
            time.sleep(0.1)  # both wait for an answer that does not come
            made.close()
            for future in reading:
                with pytest.raises(VideoError, match="the decoder crashed"):
                    future.result(timeout=SLACK)
        for worker in made._workers:
            worker._served = 0


def test_a_crashing_decoder_costs_its_clip_alone(tmp_path: Path) -> None:
    good = write_video(tmp_path / "good.mp4", frames=2)
    with Decoder(workers=1, deadline=20.0) as made:
        with pytest.raises(VideoError, match=r"bad\.mp4 cannot be read, the decoder crashed .exit code -11."):
            made.run("bad.mp4", crash)
        assert len(made.read(good, 2).frames) == 2
        assert made.counts.snapshot()["crashed"] == 1


def test_a_fault_of_the_program_is_no_broken_clip(decoder: Decoder) -> None:
    before = dict(decoder.failures)
    with pytest.raises(KeyError, match="a fault of the program"):
        decoder.run("a.mp4", mistake)
    assert decoder.failures == before


def test_a_process_is_replaced_after_so_many_clips(monkeypatch) -> None:
    monkeypatch.setattr(decoding, "CLIPS_PER_PROCESS", 2)
    worker = Worker(deadline=20.0)
    ids = [worker.call(own_id) for _ in range(4)]
    worker.stop()
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_an_answer_that_comes_after_an_interruption_is_never_the_next_clip() -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    worker = Worker(deadline=20.0)
    first = worker.call(own_id)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupted):
            worker.call(time.sleep, 1.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    second = worker.call(own_id)
    worker.stop()
    assert first != second


def test_processes_end_with_their_parent_even_when_it_is_killed() -> None:
    program = (
        "from vstar_jax.data.decoding import Worker\nimport os, time\n"
        "if __name__ == '__main__':\n    w = Worker(5.0)\n    print(w.call(os.getpid), flush=True)\n    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + SLACK
    while time.monotonic() < deadline and Path(f"/proc/{child}").exists() and not _zombie(child):
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists() or _zombie(child)


def _zombie(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_one_worker_leaks_no_memory_into_this_process(tmp_path: Path) -> None:
    """A soak in small; VSTAR_SOAK_CLIPS=10000 is the full size."""
    clips = int(os.environ.get("VSTAR_SOAK_CLIPS", "60"))
    path = write_video(tmp_path / "a.mp4", frames=16)
    with Decoder(workers=1, deadline=20.0) as made:
        for _ in range(20):
            made.read(path, 16)
        before = _resident()
        for _ in range(clips):
            made.read(path, 16)
        assert _resident() - before < 8e6  # bytes; a leak of one clip's frames each time would be 9 MB in 60
        assert made.counts.snapshot()["decord"] == clips + 20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
