"""Clips are resized as torchvision does it, the reference's resizer of clips, whatever their sizes, and on one thread."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from vstar_jax.data.bicubic import LARGEST, resize, strips

# Old and new height and width: larger, smaller, both at once, sides of one pixel, and strips that need several products.
SIZES = [
    ((240, 320), (280, 392)),
    ((480, 640), (252, 364)),
    ((120, 500), (224, 308)),
    ((1, 40), (28, 140)),
    ((300, 1), (28, 28)),
    ((33, 2900), (28, 1036)),
    ((2900, 33), (1036, 28)),
]
# torchvision rounds the weights to whole numbers: near a half the two part by a level, and once more in the second pass.
LEVELS = 2
SHARE = 0.01
# Of processor time that may go to other threads of the process: the interpreter's own, and the clocks' coarseness.
OTHERS = 0.1


def picture(height: int, width: int) -> np.ndarray:
    """Waves with noise to black and white, so that the filter overshoots: uint8 [2, H, W, 3]."""
    rng = np.random.default_rng(height)
    waves = np.sin(np.indices((2, height, width, 3)).sum(0) / 5) * 100 + 128
    return (waves + rng.integers(-60, 60, waves.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_resizing_is_torchvisions(old: tuple[int, int], new: tuple[int, int]) -> None:
    frames = picture(*old)
    reference = functional.resize(
        torch.from_numpy(frames).permute(0, 3, 1, 2), list(new), functional.InterpolationMode.BICUBIC, antialias=True
    )
    apart = np.abs(resize(frames, *new).astype(int) - reference.permute(0, 2, 3, 1).numpy())
    assert apart.max() <= LEVELS
    assert (apart > 0).mean() <= SHARE


def test_frames_of_the_right_size_stay_as_they_are() -> None:
    frames = picture(28, 56)
    assert resize(frames, 28, 56) is frames


@pytest.mark.parametrize(("old", "new"), [(240, 280), (640, 364), (1, 28), (4000, 30)])
def test_strips_cover_a_side_and_keep_the_brightness(old: int, new: int) -> None:
    parts = strips(old, new)
    assert [outputs.start for outputs, _, _ in parts] == [0, *(outputs.stop for outputs, _, _ in parts[:-1])]
    assert parts[-1][0].stop == new
    for outputs, inputs, weights in parts:
        assert weights.shape == (outputs.stop - outputs.start, inputs.stop - inputs.start)
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)  # float32
        assert weights.size <= LARGEST


def test_no_other_thread_works_for_it() -> None:
    """With threads of the linear algebra at hand, which on a busy machine wait for each other."""
    program = (
        "import time, numpy as np\nfrom vstar_jax.data.bicubic import resize\n"
        "frames = np.zeros((4, 1080, 1920, 3), np.uint8)\nresize(frames, 280, 392)\n"
        "time.sleep(0.5)\n"  # threads that were only started look around for work for a while
        "began = time.process_time(), time.thread_time()\n"
        "for _ in range(3):\n    resize(frames, 280, 392)\n"
        "print(time.process_time() - began[0], time.thread_time() - began[1])\n"
    )
    several = {**os.environ, "OPENBLAS_NUM_THREADS": "4", "OMP_NUM_THREADS": "4"}
    made = subprocess.run([sys.executable, "-c", program], env=several, capture_output=True, text=True, check=True)
    process, thread = map(float, made.stdout.split())
    assert process - thread <= OTHERS * process
