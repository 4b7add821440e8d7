"""What a person's joints did, measured: the person's track through a clip, its key frames, and its movements in order.

All lengths are in shares of the person's height in the clip, so that people near and far are measured alike.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vstar_jax.tools.protocol import People, Person

SURE = 0.3
"""Keypoints less sure than this count as unseen."""
NEAR = 0.75
"""Share of a box's size within which its centre may move from one frame to the next."""
RETURN = 0.6
"""A movement that goes back by at least this share of its way has come back."""
CLOSE = 0.28
"""Hands that are farther apart are not near each other, wherever they are."""
CLAPPING_ARM = 2.2
"""Arms that go up by less than this, in thresholds, while the hands clap only clap."""
IDLE = 0.15
"""Share of a movement's way before which it has not begun, and after all but which it is over."""
NOSE, SHOULDERS, WRISTS, HIPS, ANKLES = 0, (5, 6), (9, 10), (11, 12), (15, 16)
"""COCO keypoints, left before right."""


@dataclass(frozen=True)
class Movement:
    """One part of the body moving, such as "left arm:up".

    start, peak, end: frames, peak that in which it has first got there. size: of the way, in thresholds. times: how often it
    went there; back: whether it returned in the end.
    """

    what: str
    start: int
    peak: int
    end: int
    size: float
    times: int
    back: bool

    @property
    def middle(self) -> float:
        """When it happened."""
        return (self.start + self.end) / 2


def main_person(people: People) -> list[Person | None]:
    """The surest and largest person with keypoints, followed from frame to frame; None where they are lost."""
    found: list[Person | None] = [None] * len(people)
    best = [max((p for p in frame if p.keypoints), key=_weight, default=None) for frame in people]
    starts = [t for t, person in enumerate(best) if person]
    if not starts:
        return found
    start = max(starts, key=lambda t: _weight(best[t]))
    for steps in (range(start, len(people)), range(start, -1, -1)):
        last = best[start]
        for t in steps:
            near = [p for p in people[t] if p.keypoints and last and _distance(p, last) < NEAR]
            found[t] = min(near, key=lambda p: _distance(p, last), default=None)
            last = found[t] or last
    return found


def _weight(person: Person | None) -> float:
    if person is None:
        return 0.0
    left, top, right, bottom = person.box
    return person.confidence * max(right - left, 0.0) * max(bottom - top, 0.0)


def _distance(a: Person, b: Person | None) -> float:
    """Between the centres, in shares of the larger side of the boxes."""
    if b is None:
        return 0.0
    one, other = (np.asarray(p.box).reshape(2, 2) for p in (a, b))
    side = max((one[1] - one[0]).max(), (other[1] - other[0]).max(), 1.0)
    return float(np.abs(one.mean(0) - other.mean(0)).max() / side)


def track(people: People) -> np.ndarray | None:
    """The main person's joints, float64 [T, 17, 2] in body heights, with NaN for joints that are hardly ever seen.

    Gaps are filled in between. None when nobody is seen in at least half of the frames.
    """
    followed = main_person(people)
    if sum(person is not None for person in followed) * 2 < max(len(people), 2):
        return None
    points = np.full((len(people), 17, 2), np.nan)
    for t, person in enumerate(followed):
        if person is not None and person.keypoints:
            joints = np.asarray(person.keypoints)
            points[t, joints[:, 2] >= SURE] = joints[joints[:, 2] >= SURE, :2]
    seen = ~np.isnan(points[..., 0])
    if not seen.any():
        return None
    heights = [np.ptp(frame[row, 1]) for frame, row in zip(points, seen, strict=True) if row.sum() > 1]
    times = np.arange(len(people))
    for joint in range(17):
        where = seen[:, joint]
        for axis in range(2):
            points[:, joint, axis] = (
                np.interp(times, times[where], points[where, joint, axis]) if where.sum() * 2 >= len(times) else np.nan
            )
    return points / max(np.median(heights) if heights else 0.0, 1.0)


def salient(people: People, count: int) -> list[int]:
    """`count` frames, in order, where the joints moved most since the frame before; evenly spread when nobody is seen."""
    total = len(people)
    count = min(count, total)
    points = track(people)
    even = np.linspace(0, total - 1, count).round().astype(int).tolist()
    if points is None or total < 3:
        return even
    steps = np.nan_to_num(np.linalg.norm(np.diff(points, axis=0), axis=-1)).mean(-1)
    if not steps.max() > 0:
        return even
    gap = max(total // (2 * count), 1)
    chosen: list[int] = []
    for apart in (gap, 1):  # first at some distance from each other, then wherever there are still too few
        for t in np.argsort(-steps, kind="stable") + 1:
            if len(chosen) < count and all(abs(t - other) >= apart for other in chosen):
                chosen.append(int(t))
    return sorted([*chosen, *([0] if len(chosen) < count else [])])


def movements(points: np.ndarray) -> list[Movement]:
    """The movements of a track float [T, 17, 2] in the order of their middles."""
    found = [m for name, values, threshold in _signals(points) for m in _movements(name, values, threshold)]
    return sorted(_told(found), key=lambda m: m.middle)


def _signals(points: np.ndarray) -> Iterator[tuple[str, np.ndarray, float]]:
    """Names "part: way of growing values/way of falling ones", values [T] and the least change that counts."""
    x, y = points[..., 0], points[..., 1]
    left, right = (np.array(pair) for pair in zip(SHOULDERS, HIPS, strict=True))
    shoulders, hips = points[:, SHOULDERS].mean(1), points[:, HIPS].mean(1)
    ground = np.nanmax(y[:, ANKLES], axis=1) if not np.isnan(y[:, ANKLES]).all() else np.full(len(y), np.nan)
    facing = np.sign(np.nanmedian(x[:, left] - x[:, right])) if not np.isnan(x[:, [*left, *right]]).all() else 1.0
    for side, (name, outward) in enumerate((("left", facing), ("right", -facing))):
        shoulder, wrist, ankle, other = SHOULDERS[side], WRISTS[side], ANKLES[side], ANKLES[1 - side]
        yield f"{name} arm:up/down", y[:, shoulder] - y[:, wrist], 0.18
        yield f"{name} hand:out/in", (x[:, wrist] - x[:, shoulder]) * outward, 0.14
        yield f"{name} leg:up/down", np.maximum(y[:, other] - y[:, ankle], 0), 0.1
    between = np.linalg.norm(points[:, WRISTS[0]] - points[:, WRISTS[1]], axis=-1)
    yield "hands:together/apart", np.maximum(CLOSE - between, 0), 0.08
    yield "knees:straight/bent", ground - hips[:, 1], 0.09
    yield "body:down/up", ground, 0.09
    yield "torso:up/down", hips[:, 1] - shoulders[:, 1], 0.1
    lean = (shoulders[:, 0] - hips[:, 0]) * facing
    yield "torso:left/upright", np.maximum(lean, 0), 0.09
    yield "torso:right/upright", np.maximum(-lean, 0), 0.09
    yield "place:picture right/picture left", hips[:, 0], 0.3


def _movements(name: str, values: np.ndarray, threshold: float) -> Iterator[Movement]:
    """The strokes of a signal, those that go there and back again as one movement."""
    if np.isnan(values).any():
        return
    part, _, ways = name.partition(":")
    grows, falls = ways.split("/")
    strokes = _strokes(values, threshold)
    while strokes:
        start, peak, change = strokes.pop(0)
        end = peak
        way, size, times, back = (grows if change > 0 else falls), abs(change), 1, False
        while strokes and abs(strokes[0][2]) >= RETURN * size and strokes[0][0] - end <= len(values) / (3 if back else 2):
            _, end, _ = strokes.pop(0)
            back = not back
            times += not back
        yield Movement(f"{part}:{way}", start, peak, end, size / threshold, times, back)


def _strokes(values: np.ndarray, threshold: float) -> list[tuple[int, int, float]]:
    """Start, end and change of the strokes between turning points; a turn smaller than `threshold` is none."""
    turns, low, high, rising = [0], 0, 0, None
    for t, value in enumerate(values):
        low = t if value < values[low] else low
        high = t if value > values[high] else high
        if rising is not True and value - values[low] >= threshold:
            turns, rising, high = ([*turns, low] if rising is False else [low]), True, t
        elif rising is not False and values[high] - value >= threshold:
            turns, rising, low = ([*turns, high] if rising is True else [high]), False, t
        if rising is True and high == t:
            low = t
        if rising is False and low == t:
            high = t
    if rising is None:
        return []
    turns.append(high if rising else low)
    return [_trimmed(values, a, b) for a, b in itertools.pairwise(turns) if a != b]


def _trimmed(values: np.ndarray, start: int, end: int) -> tuple[int, int, float]:
    """A stroke without the frames at its ends in which hardly anything changes."""
    change = float(values[end] - values[start])
    done = (values[start : end + 1] - values[start]) / change
    return start + int(np.argmax(done > IDLE)) - 1, start + int(np.argmax(done >= 1 - IDLE)), change


def _told(found: Sequence[Movement]) -> list[Movement]:
    """The movements without those that are only a part or a consequence of another."""
    kept: list[Movement] = []
    for movement in sorted(found, key=lambda m: -m.size):
        if not any(_explains(other, movement) for other in found if other is not movement):
            kept.append(movement)
    return kept


def _explains(cause: Movement, effect: Movement) -> bool:
    """Whether `effect` is told with `cause`: what moves with the arm, the whole body, or a lean."""
    part, other = cause.what.partition(":")[0], effect.what.partition(":")[0]
    if other in ("left hand", "right hand"):
        return part in (other.replace("hand", "arm"), "hands", "torso", "body")
    if effect.what == "torso:down":  # a lean also lowers the shoulders, for as long as it is held
        together = min(cause.peak, effect.peak) - max(cause.start, effect.start)
        return part == "torso" and effect.size < cause.size and together * 2 >= effect.peak - effect.start
    if (min(cause.end, effect.end) - max(cause.start, effect.start)) * 2 < effect.end - effect.start:
        return False
    if other in ("left arm", "right arm"):
        return part == "hands" and cause.times > 1 and effect.size < CLAPPING_ARM
    return other == "hands" and effect.times == 1 and part.endswith("arm")
