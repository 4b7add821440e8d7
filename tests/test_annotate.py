"""Annotated clips: what is drawn where, and what is kept."""

import numpy as np
import pytest

from vstar_jax.data.annotate import DEFAULT, LEFT_WRIST, RIGHT_WRIST, annotate, draw_boxes, draw_pose
from vstar_jax.data.stick_motion import motions


def pose(height: int, width: int, frames: int = 3) -> np.ndarray:
    """One person squatting in the middle, float32 [T, 1, 17, 3] in pixels."""
    return (motions.keypoints(["squat"], frames, np.random.default_rng(0)) * np.array([width, height, 1]))[:, None]


def noise(frames: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 56, 56), (3, 112, 112), (2, 90, 161)])
def test_size_count_and_order_are_kept(frames: int, height: int, width: int) -> None:
    clip = noise(frames, height, width)
    boxes = np.tile(np.array([5.0, 5.0, 40.0, 50.0]), (frames, 1, 1))
    drawn = annotate(clip, pose(height, width, frames), boxes)
    assert drawn.shape == clip.shape
    assert drawn.dtype == np.uint8
    for t in range(frames):
        alone = annotate(clip[t : t + 1], pose(height, width, frames)[t : t + 1], boxes[t : t + 1])
        assert np.array_equal(drawn[t], alone[0])


def test_the_clip_itself_is_not_changed() -> None:
    clip = noise(3, 80, 80)
    before = clip.copy()
    annotate(clip, pose(80, 80), np.array([[[1.0, 1.0, 30.0, 30.0]]] * 3))
    assert np.array_equal(clip, before)


def test_left_and_right_wrists_have_their_colours() -> None:
    points = pose(112, 112)
    drawn = draw_pose(np.zeros((3, 112, 112, 3), np.uint8), points)
    for t in range(3):
        for joint, colour in ((LEFT_WRIST, DEFAULT.left), (RIGHT_WRIST, DEFAULT.right)):
            x, y = points[t, 0, joint, :2].astype(int)
            assert tuple(drawn[t, y, x]) == colour


def test_the_background_is_dimmed_and_the_skeleton_is_not() -> None:
    clip = np.full((3, 112, 112, 3), 200, np.uint8)
    drawn = annotate(clip, pose(112, 112))
    assert tuple(drawn[0, 0, 0]) == (50, 50, 50)
    assert (drawn == DEFAULT.left).all(-1).any()


def test_keypoints_that_are_not_seen_are_not_drawn() -> None:
    points = pose(112, 112)
    points[..., 2] = 0.0
    blank = np.zeros((3, 112, 112, 3), np.uint8)
    assert not draw_pose(blank, points).any()


def test_boxes_are_outlines_where_they_should_be() -> None:
    boxes = np.array([[[10.0, 20.0, 60.0, 90.0], [0.0, 0.0, 0.0, 0.0]]])
    drawn = draw_boxes(np.zeros((1, 112, 112, 3), np.uint8), boxes)[0]
    rows, columns = np.nonzero(drawn.any(-1))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (10, 20, 60, 90)
    assert not drawn[40:70, 25:45].any()


def test_nobody_in_the_picture_leaves_the_dimmed_clip() -> None:
    clip = noise(2, 60, 60)
    assert np.array_equal(annotate(clip, np.zeros((2, 0, 17, 3)), np.zeros((2, 0, 4))), annotate(clip))
