"""Draws StickMotion's figure: keypoints in, frames out, on a plain background or in clutter.

Clean clips can be read from the pixels alone. Clutter (coloured texture, bars, boxes, moving limbs that belong to nobody and
a figure hardly brighter than what is behind it) hides the figure from a small model: that is what the pose tool is for.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from vstar_jax.data import annotate as a

Look = Literal["clean", "cluttered"]

SIZE, FRAMES, FPS = 112, 16, 8.0
OVERSAMPLING = 2  # drawn larger, then averaged down: Pillow draws without anti-aliasing
BOX_MARGIN = 0.04  # of the frame's side, around the outermost keypoints
FIGURE_BONES = (*a.CENTRE_BONES[:4], *a.RIGHT_BONES, *a.LEFT_BONES)


@dataclass(frozen=True)
class _Distractor:
    """A limb, box or disc that drifts and turns behind the figure; lengths in pixels of the drawing."""

    kind: str
    colour: a.Colour
    centre: np.ndarray
    drift: np.ndarray
    length: float
    width: int
    angle: float
    spin: float

    def draw(self, draw: ImageDraw.ImageDraw, t: int) -> None:
        at, angle = self.centre + t * self.drift, self.angle + t * self.spin
        along = self.length * np.array([np.cos(angle), np.sin(angle)])
        match self.kind:
            case "limb":
                a.draw_limb(draw, at - along, at + along, self.colour, self.width)
            case "box":
                draw.rectangle((*(at - abs(along)), *(at + abs(along))), outline=self.colour, width=self.width)
            case "disc":
                draw.ellipse((*(at - self.length / 3), *(at + self.length / 3)), fill=self.colour)


def render(keypoints: np.ndarray, rng: np.random.Generator, look: Look) -> np.ndarray:
    """Draws a clip; colours, line widths and clutter come from `rng`.

    keypoints float [T, 17, 3] in shares of the frame's side, as `motions.keypoints` gives them.
    Returns uint8 [T, 112, 112, 3].
    """
    side = SIZE * OVERSAMPLING
    if look == "clean":
        background, figure, distractors = _plain(rng, side)
    else:
        background, figure, distractors = _clutter(rng, side)
    width = round(side * rng.uniform(0.03, 0.045))
    frames = []
    for t, points in enumerate(keypoints[:, :, :2] * side):
        image = background.copy()
        draw = ImageDraw.Draw(image)
        for distractor in distractors:
            distractor.draw(draw, t)
        draw_figure(draw, points, figure, width)
        frames.append(np.asarray(image.reduce(OVERSAMPLING)))
    return np.stack(frames)


def draw_figure(draw: ImageDraw.ImageDraw, points: np.ndarray, colour: a.Colour, width: int) -> None:
    """One figure in one colour; points float [17, 2] in pixels."""
    for start, end in FIGURE_BONES:
        a.draw_limb(draw, points[start], points[end], colour, width)
    ears = points[[a.LEFT_EAR, a.RIGHT_EAR]]
    centre, radius = ears.mean(0), 0.62 * np.linalg.norm(ears[0] - ears[1])
    draw.ellipse((*(centre - radius), *(centre + radius)), fill=colour)


def boxes(keypoints: np.ndarray) -> np.ndarray:
    """People's boxes from their keypoints: float32 [T, M, 17, 3] -> [T, M, 4], left, top, right, bottom, same units.

    The margin is a share of the frame's side, so keypoints must be in shares too.
    """
    low, high = keypoints[..., :2].min(-2) - BOX_MARGIN, keypoints[..., :2].max(-2) + BOX_MARGIN
    return np.clip(np.concatenate([low, high], -1), 0, 1).astype(np.float32)


def _plain(rng: np.random.Generator, side: int) -> tuple[Image.Image, a.Colour, list[_Distractor]]:
    background = Image.new("RGB", (side, side), _colour(rng, 0, 60))
    return background, _colour(rng, 150, 256), []


def _clutter(rng: np.random.Generator, side: int) -> tuple[Image.Image, a.Colour, list[_Distractor]]:
    coarse = Image.fromarray(rng.integers(30, 226, (9, 9, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    fine = Image.fromarray(rng.integers(0, 256, (SIZE // 4, SIZE // 4, 3), dtype=np.uint8))
    background = Image.blend(coarse, fine.resize((side, side), Image.Resampling.BILINEAR), 0.5)
    draw = ImageDraw.Draw(background)
    for distractor in _distractors(rng, side, 14, moving=False):
        distractor.draw(draw, 0)
    mean = np.asarray(background.resize((1, 1), Image.Resampling.BOX))[0, 0]
    red, green, blue = (int(v) for v in np.clip(mean + rng.integers(-45, 46, 3), 0, 255))
    return background, (red, green, blue), _distractors(rng, side, 7, moving=True)


def _distractors(rng: np.random.Generator, side: int, count: int, *, moving: bool) -> list[_Distractor]:
    return [
        _Distractor(
            kind=str(rng.choice(["limb", "limb", "limb", "box", "disc"])),
            colour=_colour(rng, 30, 226),
            centre=rng.uniform(0, side, 2),
            drift=rng.uniform(-0.02, 0.02, 2) * side * moving,
            length=rng.uniform(0.06, 0.2) * side,
            width=round(side * rng.uniform(0.025, 0.05)),
            angle=rng.uniform(0, np.pi),
            spin=rng.uniform(-0.3, 0.3) * moving,
        )
        for _ in range(count)
    ]


def _colour(rng: np.random.Generator, low: int, high: int) -> a.Colour:
    red, green, blue = (int(v) for v in rng.integers(low, high, 3))
    return red, green, blue
