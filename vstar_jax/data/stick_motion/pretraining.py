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

LENGTHS = (0.4, 0.4, 0.2)
"""Shares of clips with one, two and three moves: single moves teach what a move looks like, the others when it happens."""
COUNTS = (2, 2, 3, 3, 4, 5, 6, 8)
"""Names defined in a look-up lesson, each as often as it stands here."""
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
    """A question that defines up to eight new names and says what was seen, and the reply.

    The reply compares three of the names with what was seen, move by move, and says which fits. A name always stands after
    its moves: a model of this size then finds it by what precedes it, where with the name ahead it learned nothing for long.
    Every line begins with a dash, so that moves have a blank before them and are the same tokens everywhere.
    """
    called = _draw_names(rng)
    order = list(called)
    shown = order[rng.integers(len(order))]
    near = sorted(order, key=lambda c: (c != shown, -_same(c, shown)))[:3]
    near = [near[i] for i in rng.permutation(len(near))]
    lines = [f"- {motions.explanation(c)} makes {called[c]}" for c in order]
    checks = [f"- {', '.join(_verdicts(c, shown))} makes {called[c]}" for c in near]
    return "\n".join([*lines, f"Seen: {', '.join(shown)}"]), "\n".join([*checks, f"It fits {called[shown]}"])


def _draw_names(rng: np.random.Generator) -> dict[motions.SubMotions, str]:
    """Two to eight free combinations of moves, some of them near misses of one, each with a new name; in random order."""
    free, length = free_combinations(), int(rng.integers(2, 4))
    pool = [c for c in free if len(c) == length]
    first = pool[rng.integers(len(pool))]
    count = int(rng.choice(COUNTS))
    chosen = [first]
    while len(chosen) < count:
        other = list(first if rng.random() < 0.5 else free[rng.integers(len(free))])
        if rng.random() < 0.5:
            other[rng.integers(len(other))] = motions.SUB_MOTIONS[rng.integers(len(motions.SUB_MOTIONS))]
        if tuple(other) in free and tuple(other) not in chosen:
            chosen.append(tuple(other))
    chosen = [chosen[i] for i in rng.permutation(count)]
    return dict(zip(chosen, rng.choice(_free_names(), count, replace=False).tolist(), strict=True))


@cache
def _free_names() -> list[str]:
    return sorted(set(names.all_names()) - names.pool_names("eval"))


def _same(a: motions.SubMotions, b: motions.SubMotions) -> int:
    return sum(x == y for x, y in zip(a, b, strict=False))


def _verdicts(candidate: motions.SubMotions, shown: motions.SubMotions) -> list[str]:
    return [f"{m} {'yes' if i < len(shown) and shown[i] == m else 'no'}" for i, m in enumerate(candidate)]


class Lessons(Sequence[int]):
    """The records and examples of pretraining; clips are drawn once into `folder` by two processes.

    watching: the share of lessons on clips, the others are on text.
    """

    def __init__(self, chat: Chat, video: VideoConfig, folder: Path, clips: int, seed: int, watching: float):
        self.chat, self.watching = chat, watching
        self.clips = _drawn(video, folder, clips, seed)

    def __len__(self) -> int:
        return EPOCH

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return range(EPOCH)[index]

    def example(self, record: int, rng: np.random.Generator) -> Example:
        """A perception or a look-up lesson, drawn with `rng`."""
        if rng.random() >= self.watching:
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
