"""What the figure of StickMotion does: twelve sub-motions, the actions made of them and the figure's kinematics.

An action is an ordered pair or triple of distinct sub-motions. Base and novel actions share sub-motions and no combination,
and no action is the beginning of another, so that a comparison from the first sub-motion on tells any two apart.
The figure faces the viewer: its left is the picture's right.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Group = Literal["base", "novel"]
SubMotions = tuple[str, ...]

ACTION_SEED = 2026
PAIRS = {"base": 40, "novel": 20}
TRIPLES = {"base": 20, "novel": 10}
JOINTS = 17  # COCO: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; left before right

Curve = np.ndarray  # float [T], one joint parameter over time


def _held(u: Curve) -> Curve:
    """Rises from 0 to 1, stays and falls back: most of a sub-motion's time shows its extreme."""
    return np.minimum(1.6 * np.sin(np.pi * u), 1.0)


def _beats(u: Curve, cycles: float) -> Curve:
    return np.sin(2 * np.pi * cycles * u)


# Each gives offsets of joint parameters (radians; jump in body heights, bow and squat as shares) over its own time u in
# 0..1, and vanishes at both ends, so that a clip is the sum of its sub-motions.
_OFFSETS: dict[str, Callable[[Curve], dict[str, Curve]]] = {
    "raise left arm": lambda u: {"left_arm": 2.6 * _held(u)},
    "raise right arm": lambda u: {"right_arm": 2.6 * _held(u)},
    "raise both arms": lambda u: {"left_arm": 2.6 * _held(u), "right_arm": 2.6 * _held(u)},
    "wave right hand": lambda u: {"right_arm": 1.2 * _held(u), "right_elbow": _held(u) * (1.4 + 0.7 * _beats(u, 2))},
    "squat": lambda u: {"squat": _held(u)},
    "jump": lambda u: {"jump": 0.2 * _held(u), "left_arm": 0.8 * _held(u), "right_arm": 0.8 * _held(u)},
    "kick left leg": lambda u: {"left_leg": 1.25 * _held(u)},
    "kick right leg": lambda u: {"right_leg": 1.25 * _held(u)},
    "lean left": lambda u: {"lean": 0.75 * _held(u)},
    "lean right": lambda u: {"lean": -0.75 * _held(u)},
    "bow": lambda u: {"bow": _held(u)},
    "clap": lambda u: {
        side + part: value
        for side in ("left_", "right_")
        for part, value in (("arm", 0.45 * _held(u)), ("elbow", _held(u) * (-1.3 + 1.2 * _beats(u, 2))))
    },
}
SUB_MOTIONS: SubMotions = tuple(_OFFSETS)


@dataclass(frozen=True)
class Action:
    """An ordered combination of sub-motions; `number` counts base actions first, then novel ones."""

    number: int
    group: Group
    sub_motions: SubMotions


def combinations(length: int) -> Iterator[SubMotions]:
    """All ordered combinations of `length` distinct sub-motions."""
    return itertools.permutations(SUB_MOTIONS, length)


def one_begins_other(a: SubMotions, b: SubMotions) -> bool:
    """Whether the shorter of two combinations is the longer one's beginning (equal ones are)."""
    return all(x == y for x, y in zip(a, b, strict=False))


def _draw_actions() -> tuple[Action, ...]:
    rng = np.random.default_rng(ACTION_SEED)
    actions: list[Action] = []
    groups: tuple[Group, ...] = ("base", "novel")
    uses = {group: Counter[str]() for group in groups}
    for length, counts in ((2, PAIRS), (3, TRIPLES)):
        pool = list(combinations(length))
        pool = [pool[i] for i in rng.permutation(len(pool))]
        for group in groups:
            for _ in range(counts[group]):
                free = (c for c in pool if not any(one_begins_other(c, a.sub_motions) for a in actions))
                # The combination of the least used sub-motions: all are well represented in both groups.
                chosen = min(free, key=lambda c: sum(uses[group][m] ** 2 for m in c) / len(c))
                uses[group].update(chosen)
                actions.append(Action(0, group, chosen))
    ordered = sorted(actions, key=lambda a: a.group)
    return tuple(Action(number, a.group, a.sub_motions) for number, a in enumerate(ordered))


ACTIONS: tuple[Action, ...] = _draw_actions()


def actions(group: Group) -> tuple[Action, ...]:
    """The actions of a group: 60 base, 30 novel ones."""
    return tuple(a for a in ACTIONS if a.group == group)


def explanation(sub_motions: Sequence[str]) -> str:
    """The action in plain words, such as "raise left arm then squat"."""
    return " then ".join(sub_motions)


def keypoints(sub_motions: Sequence[str], frames: int, rng: np.random.Generator) -> np.ndarray:
    """The figure performing `sub_motions`, with a body, place, timing and vigour of its own drawn from `rng`.

    Returns float32 [T, 17, 3]: x and y in shares of a square frame's side (y down), visibility 1 inside the frame, else 0.
    Raises KeyError for an unknown sub-motion.
    """
    parameters = _parameters(sub_motions, frames, rng)
    points = _body(parameters, rng)
    visible = ((points >= 0) & (points <= 1)).all(-1, keepdims=True)
    return np.concatenate([points, visible], -1).astype(np.float32)


def _parameters(sub_motions: Sequence[str], frames: int, rng: np.random.Generator) -> dict[str, Curve]:
    sides = ("left_arm", "right_arm", "left_elbow", "right_elbow", "left_leg", "right_leg")
    curves = {name: np.zeros(frames) for name in (*sides, "lean", "bow", "squat", "jump")}
    shares = rng.uniform(0.85, 1.15, len(sub_motions))
    ends = np.concatenate([[0], np.cumsum(shares / shares.sum())])
    ends += np.linspace(rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03), len(ends))
    times = (np.arange(frames) + 0.5) / frames
    for sub_motion, start, end in zip(sub_motions, ends, ends[1:], strict=False):
        vigour = rng.uniform(0.9, 1.1)
        u = np.clip((times - start) / (end - start), 0, 1)
        for name, offset in _OFFSETS[sub_motion](u).items():
            curves[name] += vigour * offset
    for side in ("left", "right"):
        curves[f"{side}_arm"] += rng.uniform(0.1, 0.35)
        curves[f"{side}_elbow"] += rng.uniform(-0.1, 0.2)
        curves[f"{side}_leg"] += rng.uniform(0.08, 0.2)
    curves["lean"] += 0.03 * np.sin(2 * np.pi * (times * rng.uniform(0.5, 1.5) + rng.uniform()))
    return curves


def _body(p: dict[str, Curve], rng: np.random.Generator) -> np.ndarray:
    """Forward kinematics, float [T, 17, 2]. Lengths are in shares of the body's height until the last line."""
    height, slim, limbs = rng.uniform(0.68, 0.8), rng.uniform(0.85, 1.15), rng.uniform(0.94, 1.06)
    ground = np.array([rng.uniform(0.42, 0.58), rng.uniform(0.93, 0.97)])

    def toward(angle: Curve) -> np.ndarray:
        return np.stack([np.sin(angle), np.cos(angle)], -1)

    leg, upper_arm, forearm, torso = 0.225 * limbs, 0.165 * limbs, 0.155 * limbs, 0.3
    bend = 1.1 * p["squat"]
    standing = leg * (np.cos(0.12 + bend) + np.cos(0.12 - bend)) + p["jump"]
    hip = np.stack([np.zeros_like(standing), -standing], -1)
    up = -toward(-p["lean"])
    across = np.stack([-up[:, 1], up[:, 0]], -1)
    neck = hip + up * (torso * (1 - 0.8 * p["bow"]))[:, None]
    head = neck + up * (0.14 * (1 - 1.5 * p["bow"]))[:, None]

    face = [(0.0, -0.01), (0.025, 0.015), (-0.025, 0.015), (0.06, 0.0), (-0.06, 0.0)]
    joints = [head + x * across + y * up for x, y in face]
    arms, legs = [], []
    for side, sign in (("left", 1), ("right", -1)):
        mirror = np.array([sign, 1])
        shoulder = neck + sign * 0.105 * slim * across
        elbow = shoulder + upper_arm * mirror * toward(p[f"{side}_arm"])
        wrist = elbow + forearm * mirror * toward(p[f"{side}_arm"] + p[f"{side}_elbow"])
        socket = hip + np.array([sign * 0.065 * slim, 0])
        knee = socket + leg * mirror * toward(p[f"{side}_leg"] + bend)
        ankle = knee + leg * mirror * toward(p[f"{side}_leg"] - bend)
        arms.append((shoulder, elbow, wrist))
        legs.append((socket, knee, ankle))
    for limbs_of_both in (arms, legs):
        joints += [joint for pair in zip(*limbs_of_both, strict=True) for joint in pair]
    return ground + height * np.stack(joints, 1)
