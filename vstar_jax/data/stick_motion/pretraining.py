"""What StickMotion's base model learns from: naming moves on clean clips, and looking freshly named actions up in text.

The wording is not the dialogues' and no combination of moves is one of StickMotion's actions; names of the evaluation pool
never occur.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from vstar_jax.batch import Example
from vstar_jax.config import VideoConfig
from vstar_jax.data.annotate import draw_pose
from vstar_jax.data.chat import Chat
from vstar_jax.data.processor import ProcessedClip, process
from vstar_jax.data.stick_motion import motions, names, render
from vstar_jax.dialogue import assistant

PERCEPTION_SHARE = 0.65
LENGTHS = (0.4, 0.4, 0.2)
"""Shares of clips with one, two and three moves: single moves teach what a move looks like, the others when it happens."""
DEFINITIONS = ("A {name} means {moves}", "The {moves} is called {name}", "A {name} is {moves}")
MOST_ACTIONS = 8
EPOCH = 100_000
"""Draws that the shuffled source counts as an epoch; every draw is fresh in any case."""


@cache
def free_combinations() -> tuple[motions.SubMotions, ...]:
    """All pairs and triples of sub-motions that are no action of StickMotion."""
    taken = {a.sub_motions for a in motions.ACTIONS}
    return tuple(c for n in (2, 3) for c in motions.combinations(n) if c not in taken)


def draw_clip(seed: Sequence[int]) -> tuple[np.ndarray, motions.SubMotions]:
    """A clean clip uint8 [T, H, W, 3] of a free combination; half of them drawn as a skeleton is drawn over a clip."""
    rng = np.random.default_rng(list(seed))
    length = int(rng.choice([1, 2, 3], p=LENGTHS))
    pool = list(motions.combinations(1)) if length == 1 else [c for c in free_combinations() if len(c) == length]
    moves = pool[rng.integers(len(pool))]
    keypoints = motions.keypoints(moves, render.FRAMES, rng)
    frames = render.render(keypoints, rng, "clean")
    if rng.random() < 0.5:
        frames = draw_pose(frames, (keypoints * np.array([render.SIZE, render.SIZE, 1], np.float32))[:, None])
    return frames, moves


def lookup_texts(rng: np.random.Generator) -> tuple[str, str]:
    """A question that defines up to eight new names, and the reply: three compared move by move, and the one that fits."""
    length = int(rng.integers(2, 4))
    pool = [c for c in free_combinations() if len(c) == length]
    count = int(rng.choice([2, 3, 3, 4, 4, 5, 6, MOST_ACTIONS]))
    shown = pool[rng.integers(len(pool))]
    combinations = [shown]
    while len(combinations) < count:
        other = list(
            free_combinations()[rng.integers(len(free_combinations()))] if rng.random() < 0.3 else pool[rng.integers(len(pool))]
        )
        if rng.random() < 0.5:  # a near miss: one move of the shown one changed
            other = list(shown)
            other[rng.integers(len(other))] = motions.SUB_MOTIONS[rng.integers(len(motions.SUB_MOTIONS))]
        if tuple(other) in free_combinations() and tuple(other) not in combinations:
            combinations.append(tuple(other))
    allowed = sorted(set(names.all_names()) - names.pool_names("eval"))
    called = dict(zip(combinations, rng.choice(allowed, count, replace=False).tolist(), strict=True))
    order = [combinations[i] for i in rng.permutation(count)]
    template = DEFINITIONS[rng.integers(len(DEFINITIONS))]
    lines = [template.format(name=called[c], moves=motions.explanation(c)) for c in order]
    near = sorted(order, key=lambda c: (c != shown, -_same(c, shown)))[:3]
    near = [near[i] for i in rng.permutation(len(near))]
    checks = [f"A {called[c]} is {', '.join(_verdicts(c, shown))}" for c in near]
    question = "\n".join([*lines, f"Seen: {', '.join(shown)}. What is it called?"])
    return question, "\n".join([*checks, f"It is called {called[shown]}"])


def _same(a: motions.SubMotions, b: motions.SubMotions) -> int:
    return sum(x == y for x, y in zip(a, b, strict=False))


def _verdicts(candidate: motions.SubMotions, shown: motions.SubMotions) -> list[str]:
    return [f"{m} {'yes' if i < len(shown) and shown[i] == m else 'no'}" for i, m in enumerate(candidate)]


class Lessons(Sequence[int]):
    """The records and examples of pretraining; clips are drawn once into `folder` by two processes."""

    def __init__(self, chat: Chat, video: VideoConfig, folder: Path, clips: int, seed: int):
        self.chat = chat
        self.clips = _drawn(video, folder, clips, seed)

    def __len__(self) -> int:
        return EPOCH

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return range(EPOCH)[index]

    def example(self, record: int, rng: np.random.Generator) -> Example:
        """A perception or a look-up lesson, drawn with `rng`."""
        if rng.random() >= PERCEPTION_SHARE:
            question, reply = lookup_texts(rng)
            return self.chat.encode([{"role": "user", "content": [{"type": "text", "text": question}]}, assistant(reply)], [])
        patches, moves = self.clips
        index = int(rng.integers(len(patches)))
        clip = ProcessedClip(np.asarray(patches[index]), (render.FRAMES // 2, 4, 4), 1.0)
        task = {"type": "text", "text": "Name the moves."}
        messages = [{"role": "user", "content": [{"type": "video"}, task]}, assistant(f"It is {', '.join(moves[index])}")]
        return self.chat.encode(messages, [clip])


def _drawn(video: VideoConfig, folder: Path, count: int, seed: int) -> tuple[np.ndarray, list[motions.SubMotions]]:
    folder.mkdir(parents=True, exist_ok=True)
    patches_file, moves_file = folder / f"patches-{count}-{seed}.npy", folder / f"moves-{count}-{seed}.txt"
    if not moves_file.exists():
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            drawn = pool.imap(_drawn_patches, (((seed, i), video) for i in range(count)), chunksize=25)
            pairs = list(tqdm(drawn, total=count, desc="draw clips", unit="clip"))
        np.save(patches_file, np.stack([p for p, _ in pairs]))
        moves_file.write_text("".join(", ".join(m) + "\n" for _, m in pairs))
    moves = [tuple(line.split(", ")) for line in moves_file.read_text().splitlines()]
    return np.load(patches_file, mmap_mode="r"), moves


def _drawn_patches(arguments: tuple[tuple[int, int], VideoConfig]) -> tuple[np.ndarray, motions.SubMotions]:
    seed, video = arguments
    frames, moves = draw_clip(seed)
    return process(frames, render.FPS, video).patches, moves


def texts() -> Iterator[str]:
    """Texts that together hold every word of the lessons, for the tokenizer."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        yield from lookup_texts(rng)
    yield "Name the moves."
