"""Pictures and clips of a chat request: data URLs, decoded in memory and within limits, by Pillow and PyAV.

What a file declares is checked before work is done for it, and what comes out is checked again. Nothing is fetched: a path or
an address of the network in the place of a data URL is refused.
"""

import base64
import binascii
import io
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vstar_jax.data.video import frame_indices

_DATA_URL = re.compile(r"data:(image|video)/[a-z0-9.+-]+;base64,", re.IGNORECASE)


class MediaError(Exception):
    """One sentence on what is wrong with a picture or a clip."""


@dataclass(frozen=True)
class MediaLimits:
    """bytes: of one file; frames: of one clip, as it lies in its file; pixels: of a frame; clip_pixels: of all frames that are
    kept of a clip; seconds: of decoding one clip.
    """

    bytes: int = 32 << 20
    frames: int = 4096
    pixels: int = 4096 * 4096
    clip_pixels: int = 1 << 26
    seconds: float = 20.0


def payload(url: str, kind: str, limits: MediaLimits) -> bytes:
    """The bytes of a base64 data URL of a `kind`, image or video. MediaError when it is something else, or too large."""
    head = _DATA_URL.match(url[:200])
    if head is None or head[1].lower() != kind:
        raise MediaError(f"a {kind} must be a data URL such as data:{kind}/{'png' if kind == 'image' else 'mp4'};base64,...")
    if (len(url) - head.end()) * 3 // 4 > limits.bytes + 3:
        raise MediaError(f"a file has more than {limits.bytes} bytes, which is the most: send a smaller {kind}.")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise MediaError(f"the {kind}'s data URL is not valid base64.") from None


def image(content: bytes, limits: MediaLimits) -> np.ndarray:
    """A picture uint8 [H, W, 3]; transparent ones lie on black. MediaError when it is too large or cannot be decoded."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as picture:
            _check_pixels(*picture.size, limits)
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise MediaError("an image cannot be decoded: send a whole PNG, JPEG or WebP file.") from None


def pictures(urls: Sequence[str], limits: MediaLimits) -> np.ndarray:
    """The frames of a clip uint8 [T, H, W, 3] from a list of image data URLs. MediaError when their sizes differ."""
    if not 0 < len(urls) <= limits.frames:
        raise MediaError(f"a clip has {len(urls)} frames and must have 1 to {limits.frames}.")
    frames: list[np.ndarray] = []
    for url in urls:
        frames.append(image(payload(url, "image", limits), limits))
        if frames[-1].shape != frames[0].shape:
            raise MediaError("the frames of a clip differ in size: send all of them in one size.")
        _check_clip(len(urls), frames[0].shape[1], frames[0].shape[0], limits)
    return np.stack(frames)


def video(content: bytes, most: int, limits: MediaLimits) -> tuple[np.ndarray, float]:
    """The sampled frames uint8 [T, H, W, 3] of a video file (`data.video.frame_indices`, at most `most`), and how many they are
    a second.

    Decodes twice, first to count, so that only the sampled frames are held. MediaError when it is too long, too large or cannot
    be decoded.
    """
    import av

    until = time.monotonic() + limits.seconds
    try:
        with av.open(io.BytesIO(content), "r", metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            _check_pixels(stream.width, stream.height, limits)
            _check_frames(stream.frames, limits)
            fps, total = float(stream.average_rate or stream.guessed_rate or 0), 0
            for frame in container.decode(stream):
                total += 1
                _check_frames(total, limits)
                _check_pixels(frame.width, frame.height, limits)
                _check_time(until, limits)
        if not total or not 0 < fps < 1000:
            raise MediaError("a video has no frames or no frame rate: send a whole file.")
        indices = frame_indices(total, fps, most)
        _check_clip(len(indices), stream.width, stream.height, limits)
        wanted, found = set(indices.tolist()), dict[int, np.ndarray]()
        with av.open(io.BytesIO(content), "r", metadata_errors="ignore") as container:
            for number, frame in enumerate(container.decode(video=0)):
                _check_time(until, limits)
                if number in wanted:
                    found[number] = frame.to_ndarray(format="rgb24")
        return np.stack([found[i] for i in indices.tolist()]), len(indices) / total * fps
    except (av.FFmpegError, AttributeError, IndexError, KeyError, ValueError, OSError):  # a stream without codec has no width
        raise MediaError("a video cannot be decoded: send a whole file that FFmpeg reads, such as MP4.") from None


def _check_pixels(width: int, height: int, limits: MediaLimits) -> None:
    if width * height > limits.pixels:
        raise MediaError(f"a picture has {width} x {height} pixels and may have {limits.pixels} in all: send a smaller one.")


def _check_frames(frames: int, limits: MediaLimits) -> None:
    if frames > limits.frames:
        raise MediaError(f"a clip has more than {limits.frames} frames, which is the most: send a shorter one.")


def _check_time(until: float, limits: MediaLimits) -> None:
    if time.monotonic() > until:
        raise MediaError(f"a clip takes more than {limits.seconds:g} s to decode: send a shorter or a smaller one.")


def _check_clip(frames: int, width: int, height: int, limits: MediaLimits) -> None:
    if frames * width * height > limits.clip_pixels:
        raise MediaError(f"{frames} frames of {width} x {height} pixels are too much: send fewer or smaller ones.")
