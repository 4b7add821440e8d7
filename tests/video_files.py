"""Small real video files with the names that datasets have."""

from pathlib import Path

import av
import numpy as np

FPS = 10
ODD = "EVER!_(Must_be_#1)_[cut]_A_&_B;_+1_~@"
"""What names of HMDB-51 are made of."""


def write_video(path: Path, frames: int = 12, seed: int = 0, codec: str = "mpeg4") -> Path:
    """A file whose frames are flat pictures of different greys, 64 x 48, at `FPS`; seed makes its bytes differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(frames):
            picture = np.full((48, 64, 3), (20 + 10 * n + seed) % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def cut(path: Path, share: float = 0.4) -> Path:
    """Leaves the first part of a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path
