"""The tools' pictures: the same as those the policy learns from."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools_server import annotate
from tools_server.yolo import Person
from vstar_jax.data import annotate as learned_from
from vstar_jax.data.stick_motion import motions, render

STYLE = annotate.Style()


def noise(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def people(keypoints: np.ndarray, boxes: np.ndarray) -> list[list[Person]]:
    """Arrays float32 [T, M, 17, 3] and [T, M, 4] as the models would give them."""
    return [
        [Person(tuple(box.tolist()), 1.0, points) for points, box in zip(*frame, strict=True)]
        for frame in zip(keypoints, boxes, strict=True)
    ]


def test_the_default_style_is_the_one_of_training() -> None:
    assert dataclasses.asdict(STYLE) == dataclasses.asdict(learned_from.DEFAULT)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([(112, 112), (56, 90), (161, 240), (20, 300)]),
    count=st.integers(0, 3),
    asked=st.sampled_from(["poses", "boxes", "both"]),
)
def test_every_picture_is_the_one_that_training_draws(seed: int, size: tuple[int, int], count: int, asked: str) -> None:
    rng = np.random.default_rng(seed)
    clip = noise(2, *size, seed=seed)
    low, high = -0.2 * np.array(size[::-1]), 1.2 * np.array(size[::-1])
    places = rng.uniform(low, high, (2, count, 17, 2))
    keypoints = np.concatenate([places, rng.uniform(0, 1, (2, count, 17, 1))], -1).astype(np.float32)
    corners = np.sort(rng.uniform(low, high, (2, count, 2, 2)), axis=2).reshape(2, count, 4).astype(np.float32)
    found = people(keypoints, corners)
    poses, boxes = asked in ("poses", "both"), asked in ("boxes", "both")
    drawn = annotate.draw(clip, found if poses else None, found if boxes else None, STYLE)
    expected = learned_from.annotate(clip, keypoints if poses else None, corners if boxes else None)
    assert drawn.dtype == np.uint8
    assert np.array_equal(drawn, expected)


def test_a_moving_figure_is_drawn_as_in_training() -> None:
    rng = np.random.default_rng(3)
    shares = motions.keypoints(("jump", "bow"), 16, rng)
    clip = render.render(shares, rng, "cluttered")
    keypoints = (shares * np.array([112, 112, 1], np.float32))[:, None]
    boxes = render.boxes(shares[:, None]) * render.SIZE
    found = people(keypoints, boxes)
    assert np.array_equal(annotate.draw(clip, found, found, STYLE), learned_from.annotate(clip, keypoints, boxes))


def test_frames_differ_in_how_many_people_they_show() -> None:
    clip = np.zeros((3, 60, 60, 3), np.uint8)
    one = Person((5.0, 5.0, 30.0, 40.0), 0.9, None)
    drawn = annotate.draw(clip, None, [[], [one], [one, Person((35.0, 10.0, 55.0, 50.0), 0.5, None)]], STYLE)
    assert [bool(frame.any()) for frame in drawn] == [False, True, True]
    assert not drawn[1, :, 33:].any()
    assert drawn[2, :, 33:].any()


def test_people_without_keypoints_have_no_pose() -> None:
    clip = np.zeros((1, 60, 60, 3), np.uint8)
    assert not annotate.draw(clip, [[Person((5.0, 5.0, 30.0, 40.0), 0.9, None)]], None, STYLE).any()


def test_the_style_decides_dimming_colours_and_doubtful_keypoints() -> None:
    clip = np.full((1, 112, 112, 3), 200, np.uint8)
    points = (motions.keypoints(["squat"], 1, np.random.default_rng(0)) * np.array([112, 112, 1], np.float32)).astype(
        np.float32
    )
    points[..., 2] = 0.5
    found = people(points[None], np.zeros((1, 1, 4), np.float32))
    style = annotate.Style(background=1.0, left=(1, 2, 3), confidence=0.4)
    drawn = annotate.draw(clip, found, None, style)
    assert tuple(drawn[0, 0, 0]) == (200, 200, 200)
    assert (drawn == (1, 2, 3)).all(-1).any()
    assert np.array_equal(annotate.draw(clip, found, None, dataclasses.replace(style, confidence=0.6)), clip)


def test_the_clip_is_kept_and_wrong_counts_are_refused() -> None:
    clip = noise(2, 40, 50)
    before = clip.copy()
    annotate.draw(clip, [[], []], [[], []], STYLE)
    assert np.array_equal(clip, before)
    for wrong in ([], [[]], [[], [], []]):
        with pytest.raises(ValueError, match="zip"):
            annotate.draw(clip, wrong, None, STYLE)
