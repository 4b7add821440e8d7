"""Pictures and clips of a request: what is too large is refused before it is decoded, and any bytes end in a sentence."""

import base64
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from policy_servers import png

from vstar_jax.data import video
from vstar_jax.serving import media
from vstar_jax.serving.media import MediaError, MediaLimits

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50"))
"""Damaged files that are tried; 10000 in the long run."""
LIMITS = MediaLimits()
FRAMES = np.random.default_rng(0).integers(0, 255, (12, 64, 48, 3), np.uint8)


def png_of(width: int, height: int) -> bytes:
    """A PNG that declares a size and has no pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def mp4(folder: Path) -> bytes:
    video.write(folder / "clip.mp4", FRAMES, 6.0)
    return (folder / "clip.mp4").read_bytes()


def test_a_picture_and_a_list_of_them_are_what_was_sent() -> None:
    content = media.payload(png(FRAMES[0]), "image", LIMITS)
    np.testing.assert_array_equal(media.image(content, LIMITS), FRAMES[0])
    np.testing.assert_array_equal(media.pictures([png(frame) for frame in FRAMES], LIMITS), FRAMES)


def test_a_video_is_sampled_as_a_file_is(tmp_path: Path) -> None:
    content = mp4(tmp_path)
    expected = video.read(tmp_path / "clip.mp4", 4)
    frames, fps = media.video(content, 4, LIMITS)
    np.testing.assert_allclose(frames.astype(int), expected.frames.astype(int), atol=4)  # two readers of one file
    assert fps == pytest.approx(expected.fps, rel=1e-3)


@pytest.mark.parametrize("size", [(1 << 15, 1 << 15), (5000, 5000)])
def test_a_picture_that_declares_too_many_pixels_is_not_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(MediaError):
        media.image(png_of(*size), LIMITS)


def test_each_limit_is_kept(tmp_path: Path) -> None:
    content = mp4(tmp_path)
    for limits in (MediaLimits(frames=8), MediaLimits(pixels=48 * 64 - 1), MediaLimits(clip_pixels=48 * 64 * 3)):
        with pytest.raises(MediaError):
            media.video(content, 16, limits)
        with pytest.raises(MediaError):
            media.pictures([png(frame) for frame in FRAMES], limits)
    with pytest.raises(MediaError, match="to decode"):
        media.video(content, 16, MediaLimits(seconds=0.0))
    with pytest.raises(MediaError, match="more than 100 bytes"):
        media.payload(png(FRAMES[0]), "image", MediaLimits(bytes=100))


@pytest.mark.parametrize(
    "url", ["/etc/passwd", "file:///etc/passwd", "https://host/x.png", "data:text/html;base64,aGk=", "", "data:,x"]
)
def test_nothing_but_a_data_url_of_the_kind_is_taken(url: str) -> None:
    for kind in ("image", "video"):
        with pytest.raises(MediaError, match="data URL"):
            media.payload(url, kind, LIMITS)


def test_a_playlist_of_other_files_opens_none() -> None:
    secret = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    for content in (secret, b"ffconcat version 1.0\nfile /etc/passwd\n"):
        with pytest.raises(MediaError):
            media.video(content, 4, LIMITS)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    at=st.floats(0, 1, exclude_max=True),
    damage=st.binary(max_size=8),
    cut=st.floats(0, 1),
    kind=st.sampled_from(["mp4", "png"]),
)
def test_damaged_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: float, damage: bytes, cut: float, kind: str
) -> None:
    whole = _files(tmp_path_factory)[kind]
    place = int(at * len(whole))
    content = (whole[:place] + damage + whole[place + len(damage) :])[: int(cut * len(whole)) + 1]
    found, said = None, ""
    try:
        found = media.image(content, LIMITS)[None] if kind == "png" else media.video(content, 4, LIMITS)[0]
    except MediaError as error:
        said = str(error)
    assert said.endswith(".") if found is None else found.dtype == np.uint8 and found.shape[-1] == 3


_made: dict[str, bytes] = {}


def _files(factory: pytest.TempPathFactory) -> dict[str, bytes]:
    if not _made:
        file = io.BytesIO()
        Image.fromarray(FRAMES[0]).save(file, "PNG")
        _made.update(png=file.getvalue(), mp4=mp4(factory.mktemp("files")))
        assert base64.b64decode(png(FRAMES[0]).partition(",")[2]) == _made["png"]
    return _made
