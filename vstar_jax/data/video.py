"""Clips in video files: which frames to take, reading them with decord or, where that fails, with PyAV, and writing.

Broken files raise `VideoError`; who reads many files logs the name and leaves the clip out. `ReadCounts` says how often
each reader served. Frame sampling follows the reference processor of Qwen2.5-VL.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vstar_jax.data.patches import TEMPORAL_PATCH
from vstar_jax.errors import UserError

SAMPLE_FPS = 2.0
MIN_FRAMES = 4


class VideoError(UserError):
    """A video file that cannot be read, in one sentence that names it."""


@dataclass(frozen=True)
class Clip:
    """Frames uint8 [T, H, W, 3], RGB; fps: of these frames, not of the file; indices int64 [T]: their places in the file."""

    frames: np.ndarray
    fps: float
    indices: np.ndarray


class ReadCounts:
    """How many clips each reader served and how many failed; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {"decord": 0, "pyav": 0, "failed": 0}

    def add(self, outcome: str) -> None:
        """Counts one clip: outcome is decord, pyav or failed."""
        with self._lock:
            self._counts[outcome] += 1

    def snapshot(self) -> dict[str, int]:
        """The counts so far."""
        with self._lock:
            return dict(self._counts)


def frame_indices(total: int, fps: float, max_frames: int, exact: int | None = None) -> np.ndarray:
    """Which of `total` frames at `fps` frames a second to take: int64 [T], evenly spread from the first to the last.

    T is `exact` rounded to an even number if given, else two frames a second of the clip, at least 4, at most `max_frames` and
    `total`, rounded down to an even number and never below 2: a clip of one frame repeats it. ValueError when total < 1.
    """
    if total < 1:
        raise ValueError("a clip of no frames has none to take: leave it out.")
    if exact is None:
        wanted = min(max(total / fps * SAMPLE_FPS, MIN_FRAMES), max_frames, total)
        count = math.floor(wanted / TEMPORAL_PATCH) * TEMPORAL_PATCH
    else:
        count = round(exact / TEMPORAL_PATCH) * TEMPORAL_PATCH
    return np.round(np.linspace(0, total - 1, max(count, TEMPORAL_PATCH))).astype(np.int64)


def read(path: str | Path, max_frames: int, exact: int | None = None, counts: ReadCounts | None = None) -> Clip:
    """Reads the sampled frames (`frame_indices`) of a video file.

    Raises VideoError when the file is missing, empty or cannot be decoded. decord may repeat the last good frame of a damaged
    stream without saying so.
    """
    path, counts = Path(path), counts or ReadCounts()
    try:
        if not path.is_file():
            raise VideoError(f"{path} is not there: check the path, or leave the clip out.")
        if not path.stat().st_size:
            raise VideoError(f"{path} is an empty file: fetch the clip again, or leave it out.")
        clip, reader = _decode(path, lambda total, fps: frame_indices(total, fps, max_frames, exact))
    except VideoError:
        counts.add("failed")
        raise
    counts.add(reader)
    return clip


Sampler = Callable[[int, float], np.ndarray]


def _decode(path: Path, sample: Sampler) -> tuple[Clip, str]:
    try:
        return _read_decord(path, sample), "decord"
    except Exception as first:  # decord raises plain and own errors alike, and is missing on some platforms
        try:
            return _read_pyav(path, sample), "pyav"
        except Exception as second:
            raise VideoError(
                f"{path} cannot be decoded, it may be cut short or damaged (decord: {_line(first)}; PyAV: {_line(second)}): "
                "fetch the clip again, or leave it out."
            ) from second


def _read_decord(path: Path, sample: Sampler) -> Clip:
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    fps = _checked_fps(reader.get_avg_fps())
    indices = sample(len(reader), fps)
    return Clip(reader.get_batch(indices.tolist()).asnumpy(), _sampled_fps(indices, len(reader), fps), indices)


def _read_pyav(path: Path, sample: Sampler) -> Clip:
    """Decodes twice, first to count: containers lie about their length, and a whole clip in memory can be gigabytes."""
    import av

    def decode():
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise ValueError("the file has no pictures")
            stream = container.streams.video[0]
            try:
                for frame in container.decode(stream):
                    yield stream, frame
            except av.error.FFmpegError:
                return  # what came before the damage is the clip

    total, fps = 0, 0.0
    for stream, _ in decode():
        total, fps = total + 1, float(stream.average_rate or stream.guessed_rate or 0)
    if not total:
        raise ValueError("no frame can be decoded")
    indices = sample(total, _checked_fps(fps))
    wanted = set(indices.tolist())
    pictures = {i: frame.to_ndarray(format="rgb24") for i, (_, frame) in enumerate(decode()) if i in wanted}
    return Clip(np.stack([pictures[i] for i in indices.tolist()]), _sampled_fps(indices, total, fps), indices)


def _checked_fps(fps: float) -> float:
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError("the file gives no frame rate")
    return float(fps)


def _sampled_fps(indices: np.ndarray, total: int, fps: float) -> float:
    return len(indices) / total * fps


def _line(error: Exception) -> str:
    """The first line of an error, short enough for a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


def write(path: str | Path, frames: np.ndarray, fps: float) -> None:
    """Writes frames uint8 [T, H, W, 3], of even height and width, as an mp4 file (H.264, nearly lossless)."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=round(fps), options={"crf": "18", "preset": "veryfast", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
