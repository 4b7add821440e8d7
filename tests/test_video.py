"""Video files become sampled frames, and broken ones one clear sentence."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest

from vstar_jax.data import video
from vstar_jax.data.video import ReadCounts, VideoError, frame_indices, read

FPS = 10
# Grey levels that a flat picture may lose in a lossy codec and in the way to YUV and back.
CODEC = 6


def level(frame: int) -> int:
    """The grey of a frame, by which it is known again."""
    return 20 + 10 * frame


def write(path: Path, frames: int, codec: str = "mpeg4") -> Path:
    """A real video file in which every frame has a grey of its own."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(frames):
            picture = np.full((48, 64, 3), level(n), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def cut(path: Path, share: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


@pytest.fixture
def without_decord(monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)


def assert_shows(frames: np.ndarray, numbers: np.ndarray) -> None:
    assert frames.dtype == np.uint8
    assert frames.shape == (len(numbers), 48, 64, 3)
    expected = np.asarray([level(n) for n in numbers])
    np.testing.assert_allclose(frames.mean((1, 2, 3)), expected, atol=CODEC)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "h264"), ("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.webm", "vp9")])
def test_the_sampled_frames_are_read_and_counted(tmp_path: Path, name: str, codec: str):
    counts = ReadCounts()
    clip = read(write(tmp_path / name, 20, codec), max_frames=16, counts=counts)
    assert clip.indices.tolist() == [0, 6, 13, 19]  # two a second
    assert clip.fps == pytest.approx(2.0)
    assert_shows(clip.frames, clip.indices)
    assert counts.snapshot() == {"decord": 1, "pyav": 0, "failed": 0}


def test_pyav_reads_the_same_frames_where_decord_fails(tmp_path: Path, without_decord):
    counts = ReadCounts()
    clip = read(write(tmp_path / "a.mp4", 20), max_frames=16, exact=8, counts=counts)
    assert clip.indices.tolist() == frame_indices(20, FPS, 16, exact=8).tolist()
    assert clip.fps == pytest.approx(4.0)
    assert_shows(clip.frames, clip.indices)
    assert counts.snapshot() == {"decord": 0, "pyav": 1, "failed": 0}


def test_metadata_that_is_no_text_does_not_hinder_pyav(tmp_path: Path, without_decord):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "marker"
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), level(0), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"marker", b"\xff\xfe\xfdxyz"))
    assert len(read(path, 16).frames) == 2


@pytest.mark.parametrize("decord", [True, False])
def test_a_clip_of_one_frame_repeats_it(tmp_path: Path, decord: bool, request):
    if not decord:
        request.getfixturevalue("without_decord")
    clip = read(write(tmp_path / "a.mp4", 1), max_frames=16)
    assert clip.indices.tolist() == [0, 0]
    assert_shows(clip.frames, clip.indices)


def test_a_truncated_file_is_one_clear_sentence_and_counted(tmp_path: Path):
    counts = ReadCounts()
    path = cut(write(tmp_path / "a.mp4", 20), 0.5)
    with pytest.raises(VideoError, match=r"a\.mp4 cannot be decoded") as error:
        read(path, 16, counts=counts)
    assert "\n" not in str(error.value)
    assert counts.snapshot() == {"decord": 0, "pyav": 0, "failed": 1}


def test_what_a_cut_stream_still_holds_is_read(tmp_path: Path, without_decord):
    path = cut(write(tmp_path / "a.ts", 20), 0.6)
    clip = read(path, 16)
    assert 0 < clip.indices[-1] < 19
    assert_shows(clip.frames, clip.indices)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is not there"), (b"", "is an empty file"), (b"no video", "cannot be decoded")]
)
def test_files_that_are_no_videos_are_one_clear_sentence(tmp_path: Path, content: bytes | None, message: str):
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    counts = ReadCounts()
    with pytest.raises(VideoError, match=message):
        read(path, 16, counts=counts)
    assert counts.snapshot()["failed"] == 1


@pytest.mark.parametrize(
    ("total", "fps", "most", "exact", "expected"),
    [
        (100, 25.0, 16, None, 8),  # 4 seconds
        (110, 25.0, 16, None, 8),  # 8.8 is floored to an even number
        (1000, 25.0, 16, None, 16),
        (1000, 25.0, 15, None, 14),
        (10, 25.0, 16, None, 4),  # never fewer than 4 ...
        (3, 25.0, 16, None, 2),  # ... but for a clip that has not so many
        (1, 25.0, 16, None, 2),
        (100, 25.0, 16, 32, 32),
        (100, 25.0, 16, 5, 4),  # rounded half to even, as the reference does
        (4, 25.0, 16, 8, 8),
    ],
)
def test_frame_counts_follow_the_reference(total: int, fps: float, most: int, exact: int | None, expected: int):
    indices = frame_indices(total, fps, most, exact)
    assert len(indices) == expected
    assert (indices[0], indices[-1]) == (0, total - 1)
    np.testing.assert_array_equal(indices, [round(i * (total - 1) / (expected - 1)) for i in range(expected)])


def test_a_clip_of_no_frames_is_refused():
    with pytest.raises(ValueError, match="no frames"):
        frame_indices(0, 25.0, 16)


def test_written_clips_are_read_again(tmp_path: Path):
    frames = np.stack([np.full((48, 64, 3), level(n), np.uint8) for n in range(8)])
    video.write(tmp_path / "a.mp4", frames, FPS)
    clip = read(tmp_path / "a.mp4", 16, exact=8)
    assert clip.fps == FPS
    assert_shows(clip.frames, np.arange(8))
