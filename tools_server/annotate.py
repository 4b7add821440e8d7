"""Draws people's poses and boxes on clips: the pictures that the visual tools give back.

The policy learns from clips that were annotated with ground truth, so by default these look exactly alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from tools_server.yolo import Person

Colour = tuple[int, int, int]
Bones = tuple[tuple[int, int], ...]

LEFT: Bones = ((5, 7), (7, 9), (11, 13), (13, 15))
"""Arm and leg, as pairs of COCO keypoints."""
RIGHT: Bones = ((6, 8), (8, 10), (12, 14), (14, 16))
MIDDLE: Bones = ((5, 6), (11, 12), (5, 11), (6, 12), (0, 1), (0, 2), (1, 3), (2, 4))
"""Torso and face."""


@dataclass(frozen=True)
class Style:
    """How annotations look.

    background: brightness left to the picture, from 0 to 1, which keeps it; line: width of a limb in shares of the frame's
    shorter side, a box has half of it; confidence: keypoints less sure than this are not drawn; the others: RGB colours.
    """

    background: float = 0.25
    line: float = 1 / 28
    confidence: float = 0.3
    left: Colour = (255, 140, 0)
    right: Colour = (0, 170, 255)
    centre: Colour = (235, 235, 235)
    box: Colour = (60, 230, 60)


def draw(
    frames: np.ndarray,
    poses: Sequence[Sequence[Person]] | None,
    boxes: Sequence[Sequence[Person]] | None,
    style: Style,
) -> np.ndarray:
    """The clip, dimmed, with the poses of `poses` and the boxes of `boxes` drawn on it, boxes below.

    frames: uint8 [T, H, W, 3]; poses, boxes: the people in each frame, None when they were not asked for. Returns frames of
    the same shape, order and dtype. ValueError when poses or boxes are not those of T frames.
    """
    nobody: Sequence[Sequence[Person]] = [()] * len(frames)
    levels = (np.arange(256) * np.float32(style.background)).round().astype(np.uint8)
    width = max(2, round(style.line * min(frames.shape[1:3])))
    drawn = np.empty_like(frames)
    everybody = (nobody if people is None else people for people in (poses, boxes))
    for t, (frame, posed, boxed) in enumerate(zip(frames, *everybody, strict=True)):
        image = Image.fromarray(levels[frame])
        canvas = ImageDraw.Draw(image)
        for person in boxed:
            _draw_box(canvas, person.box, style.box, width // 2)
        for person in posed:
            if person.keypoints is not None:
                _draw_pose(canvas, person.keypoints, style, width)
        drawn[t] = image
    return drawn


def _draw_box(canvas: ImageDraw.ImageDraw, box: tuple[float, float, float, float], colour: Colour, width: int) -> None:
    left, top, right, bottom = box
    if right > left and bottom > top:
        canvas.rectangle(box, outline=colour, width=width)


def _draw_pose(canvas: ImageDraw.ImageDraw, keypoints: np.ndarray, style: Style, width: int) -> None:
    sure = keypoints[:, 2] >= style.confidence
    for colour, bones in ((style.centre, MIDDLE), (style.right, RIGHT), (style.left, LEFT)):
        for start, end in bones:
            if sure[start] and sure[end]:
                _draw_limb(canvas, keypoints[[start, end], :2], colour, width)


def _draw_limb(canvas: ImageDraw.ImageDraw, ends: np.ndarray, colour: Colour, width: int) -> None:
    """A line with round ends, float32 [2, 2]; computed in float32, as for the clips of training."""
    canvas.line(list(ends.ravel()), fill=colour, width=width)
    radius = (width - 1) / 2
    for x, y in ends:
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
