"""Draws poses and boxes on clips: what the visual tools return, with the size, number and order of frames kept.

Left and right limbs have different colours, and the picture behind is dimmed, so that the skeleton stands out after the
processor has scaled the clip down to what the model sees.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

NOSE, LEFT_EYE, RIGHT_EYE, LEFT_EAR, RIGHT_EAR = range(5)
LEFT_SHOULDER, RIGHT_SHOULDER, LEFT_ELBOW, RIGHT_ELBOW, LEFT_WRIST, RIGHT_WRIST = range(5, 11)
LEFT_HIP, RIGHT_HIP, LEFT_KNEE, RIGHT_KNEE, LEFT_ANKLE, RIGHT_ANKLE = range(11, 17)
CENTRE_BONES = (
    (LEFT_SHOULDER, RIGHT_SHOULDER),
    (LEFT_HIP, RIGHT_HIP),
    (LEFT_SHOULDER, LEFT_HIP),
    (RIGHT_SHOULDER, RIGHT_HIP),
    (NOSE, LEFT_EYE),
    (NOSE, RIGHT_EYE),
    (LEFT_EYE, LEFT_EAR),
    (RIGHT_EYE, RIGHT_EAR),
)
LEFT_BONES = ((LEFT_SHOULDER, LEFT_ELBOW), (LEFT_ELBOW, LEFT_WRIST), (LEFT_HIP, LEFT_KNEE), (LEFT_KNEE, LEFT_ANKLE))
RIGHT_BONES = tuple((a + 1, b + 1) for a, b in LEFT_BONES)


@dataclass(frozen=True)
class Style:
    """How annotations look.

    background: brightness left to the picture, 1 keeps it; line: width of a limb in shares of the frame's shorter side;
    confidence: keypoints less visible than this are not drawn; the rest are RGB colours.
    """

    background: float = 0.25
    line: float = 1 / 28
    confidence: float = 0.3
    left: Colour = (255, 140, 0)
    right: Colour = (0, 170, 255)
    centre: Colour = (235, 235, 235)
    box: Colour = (60, 230, 60)

    def width(self, frame: np.ndarray) -> int:
        """The line's width in pixels on a frame [H, W, 3]."""
        return max(2, round(self.line * min(frame.shape[:2])))


DEFAULT = Style()


def annotate(
    frames: np.ndarray, keypoints: np.ndarray | None = None, boxes: np.ndarray | None = None, style: Style = DEFAULT
) -> np.ndarray:
    """The clip with its background dimmed and poses, boxes or both drawn on it.

    frames uint8 [T, H, W, 3]; keypoints float [T, M, 17, 3], x, y in pixels and visibility in COCO order, of M people;
    boxes float [T, M, 4], left, top, right, bottom in pixels. Returns uint8 [T, H, W, 3].
    """
    drawn = (frames * np.float32(style.background)).round().astype(np.uint8)
    if boxes is not None:
        drawn = draw_boxes(drawn, boxes, style)
    return drawn if keypoints is None else draw_pose(drawn, keypoints, style)


def draw_pose(frames: np.ndarray, keypoints: np.ndarray, style: Style = DEFAULT) -> np.ndarray:
    """Draws COCO skeletons on a copy of the clip; shapes as in `annotate`."""
    images = []
    for frame, people in zip(frames, keypoints, strict=True):
        image = Image.fromarray(frame)
        draw = ImageDraw.Draw(image)
        for person in people:
            _draw_person(draw, person, style, style.width(frame))
        images.append(np.asarray(image))
    return np.stack(images)


def draw_boxes(frames: np.ndarray, boxes: np.ndarray, style: Style = DEFAULT) -> np.ndarray:
    """Draws people's boxes on a copy of the clip; shapes as in `annotate`. A box of no area is left out."""
    images = []
    for frame, people in zip(frames, boxes, strict=True):
        image = Image.fromarray(frame)
        draw = ImageDraw.Draw(image)
        for left, top, right, bottom in people:
            if right > left and bottom > top:
                draw.rectangle((left, top, right, bottom), outline=style.box, width=style.width(frame) // 2)
        images.append(np.asarray(image))
    return np.stack(images)


def _draw_person(draw: ImageDraw.ImageDraw, person: np.ndarray, style: Style, width: int) -> None:
    seen = person[:, 2] >= style.confidence
    coloured = ((style.centre, CENTRE_BONES), (style.right, RIGHT_BONES), (style.left, LEFT_BONES))
    for colour, bones in coloured:
        for a, b in bones:
            if seen[a] and seen[b]:
                draw_limb(draw, person[a, :2], person[b, :2], colour, width)


def draw_limb(draw: ImageDraw.ImageDraw, start: np.ndarray, end: np.ndarray, colour: Colour | int, width: int) -> None:
    """A line with round ends, from and to float [2] in pixels."""
    draw.line((*start, *end), fill=colour, width=width)
    for x, y in (start, end):
        radius = (width - 1) / 2
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
