"""The offline describer: what it says of a clip is what the joints did, in that order, and nothing else."""

import asyncio
import re

import numpy as np
import pytest
from tool_servers import clip

from tools_server import motion
from tools_server.describe import OfflineDescriber, sentences
from vstar_jax.data.stick_motion import motions, render
from vstar_jax.tools.protocol import People, Person

SAID = {
    "raise left arm": "left arm goes up|both arms go up",
    "raise right arm": "right arm goes up|both arms go up",
    "raise both arms": "both arms go up|left arm goes up.*right arm goes up|right arm goes up.*left arm goes up",
    "wave right hand": "right arm goes up|both arms go up",
    "squat": "knees bend",
    "jump": "feet off the ground",
    "kick left leg": "left leg lifts",
    "kick right leg": "right leg lifts",
    "lean left": "leans to its left",
    "lean right": "leans to its right",
    "bow": "bows down",
    "clap": "hands come together",
}
FOUND, ORDERED = 0.93, 0.85
"""Shares of sub-motions that are told, and of neighbours told in their order. Motions of the same joints run into each other at
16 frames, and what is over in the first frame is not seen."""
MIRROR = [0, *(i + 1 if i % 2 else i - 1 for i in range(1, 17))]


def people(keypoints: np.ndarray) -> People:
    """One person in each frame, from joints float [T, 17, 3] in pixels."""
    frames = []
    for joints in keypoints.astype(float):
        box = (*joints[:, :2].min(0).tolist(), *joints[:, :2].max(0).tolist())
        frames.append((Person(box=box, confidence=0.9, keypoints=tuple(map(tuple, joints.tolist()))),))
    return tuple(frames)


def performed(sub_motions: tuple[str, ...], seed: int, frames: int = 16) -> np.ndarray:
    """Joints in pixels of a figure that performs the sub-motions."""
    joints = motions.keypoints(sub_motions, frames, np.random.default_rng(seed))
    return joints * np.array([render.SIZE, render.SIZE, 1])


def said(joints: np.ndarray) -> str:
    return sentences(np.zeros((len(joints), render.SIZE, render.SIZE, 3), np.uint8), people(joints)).lower()


@pytest.mark.parametrize("sub_motion", motions.SUB_MOTIONS)
@pytest.mark.parametrize("frames", [8, 16, 40])
def test_a_single_motion_is_told_and_no_other(sub_motion: str, frames: int) -> None:
    others = {words for name, words in SAID.items() if not set(words.split("|")) & set(SAID[sub_motion].split("|"))}
    for seed in range(5):
        text = said(performed((sub_motion,), seed, frames))
        assert re.search(SAID[sub_motion], text), text
        if sub_motion not in ("jump", "clap"):  # these move the arms, too
            assert not [words for words in others if re.search(words, text)], text


def test_the_motions_of_all_actions_are_told_in_their_order() -> None:
    told, pairs = [], []
    for number, action in enumerate(motions.ACTIONS):
        text = said(performed(action.sub_motions, number))
        places = [found.start() if (found := re.search(SAID[name], text)) else None for name in action.sub_motions]
        told += [place is not None for place in places]
        same = [SAID[a] == SAID[b] for a, b in zip(action.sub_motions, action.sub_motions[1:], strict=False)]
        pairs += [
            a <= b
            for a, b, alike in zip(places, places[1:], same, strict=False)
            if a is not None and b is not None and not alike
        ]
    assert np.mean(told) >= FOUND
    assert np.mean(pairs) >= ORDERED


def test_a_mirrored_figure_swaps_left_and_right() -> None:
    for number, action in enumerate(motions.ACTIONS[::6]):
        joints = performed(action.sub_motions, number)
        mirrored = joints[:, MIRROR] * np.array([-1, 1, 1]) + np.array([render.SIZE, 0, 0])
        swapped = re.sub("left|right", lambda m: {"left": "right", "right": "left"}[m[0]], said(joints).partition(" one ")[0])
        assert sorted(re.split(r"\W+", said(mirrored).partition(" one ")[0])) == sorted(re.split(r"\W+", swapped))


def test_a_clip_shown_backwards_is_told_backwards() -> None:
    joints = performed(("kick left leg", "bow"), 0)
    assert re.search("left leg lifts.*bows down", said(joints))
    assert re.search("bows down.*left leg lifts", said(joints[::-1]))


def test_still_people_hardly_move_and_noise_is_no_motion() -> None:
    joints = np.repeat(performed(("squat",), 0)[:1], 16, 0)
    assert said(joints).startswith("the person hardly moves.")
    noisy = joints + np.random.default_rng(0).normal(0, 1.0, joints.shape) * np.array([1, 1, 0])
    assert said(noisy).startswith("the person hardly moves.")


def test_gaps_and_unsure_joints_do_not_matter() -> None:
    joints = performed(("raise left arm", "squat"), 1)
    blinking = [list(frame) for frame in people(joints)]
    blinking[3], blinking[9] = [], []
    unsure = joints.copy()
    unsure[5, 9] = (0, 0, 0.1)
    expected = said(joints)
    frames = np.zeros((16, render.SIZE, render.SIZE, 3), np.uint8)
    assert "left arm goes up" in sentences(frames, tuple(map(tuple, blinking))).lower()
    assert "left arm goes up" in said(unsure)
    assert "knees bend" in expected


def test_the_main_person_is_followed_past_others() -> None:
    doer, bystander = performed(("raise left arm",), 0), np.repeat(performed(("jump",), 1)[:1], 16, 0)
    small = bystander * np.array([0.4, 0.4, 1])
    both = tuple((*a, *b) if t % 2 else (*b, *a) for t, (a, b) in enumerate(zip(people(doer), people(small), strict=True)))
    text = sentences(np.zeros((16, render.SIZE, render.SIZE, 3), np.uint8), both).lower()
    assert "left arm goes up" in text
    assert "2 people are seen" in text


@pytest.mark.parametrize("count", [1, 4, 16, 40])
def test_key_frames_are_those_before_which_the_joints_moved_most(count: int) -> None:
    joints = np.repeat(performed(("jump",), 0)[:1], 16, 0)
    joints[9:, 9] += np.array([20, -20, 0])
    chosen = motion.salient(people(joints), count)
    assert len(chosen) == min(count, 16)
    assert chosen == sorted(set(chosen))
    assert 9 in chosen


def test_key_frames_are_spread_evenly_when_nobody_is_seen() -> None:
    assert motion.salient(((),) * 16, 4) == [0, 5, 10, 15]
    assert motion.salient(((),), 4) == [0]


def test_without_people_the_changes_of_the_picture_are_told() -> None:
    frames = np.zeros((8, 60, 90, 3), np.uint8)
    assert sentences(frames, ((),) * 8) == "Nothing moves. No person is clearly seen in a dark, plain picture."
    frames[5:, :15, 70:] = 255
    text = sentences(frames, ((),) * 8)
    assert "upper right" in text
    assert "picture 6 of 8" in text


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 50, 2), (2, 1, 400), (3, 7, 5)])
def test_any_clip_is_described(shape: tuple[int, ...]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for somebody in (((),) * shape[0], people(performed(("clap",), 0)[: shape[0]])):
        text = asyncio.run(OfflineDescriber().describe(frames, somebody, 1.0))
        assert 1 <= len(re.findall(r"\.(?: |$)", text)) <= 3


@pytest.mark.parametrize("look", ["clean", "cluttered"])
def test_surroundings_are_measured(look: render.Look) -> None:
    frames, joints = clip(3, look=look)
    assert "One person is seen" in sentences(frames, people(joints))
    assert "bright, plain" in sentences(np.full_like(frames, 220), people(joints))
    assert "dark, plain" in sentences(np.full_like(frames, 20), people(joints))
    for seed in range(8):
        frames, joints = clip(seed, look=look)
        assert {"clean": "plain picture", "cluttered": "busy picture"}[look] in sentences(frames, people(joints))
    noise = np.random.default_rng(0).integers(0, 256, frames.shape, np.uint8)
    assert "half-bright, busy" in sentences(noise, people(joints))


def test_there_are_never_more_than_three_sentences() -> None:
    for number, action in enumerate(motions.ACTIONS):
        assert len(re.findall(r"\.(?: |$)", said(performed(action.sub_motions, number)))) <= 3
