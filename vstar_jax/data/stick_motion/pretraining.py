"""What StickMotion's base model learns from: naming moves on clean clips, repeating words, looking freshly named actions up.

The wording is not the dialogues' and no combination of moves is one of StickMotion's actions; names of the evaluation pool
never occur.
"""

import multiprocessing
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

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
"""Shares of clips and of look-ups with one, two and three moves: single moves teach what a move is, the others its order."""
REPEATED = 0.5
"""Share of the lessons on text in which words are only repeated: among so many words copying is learned as a rule and soon,
and looking up is copying what stood after the same moves; without these lessons the moves were never told apart (tried)."""
COUNTS = (2, 2, 3, 3, 4, 5, 6, 8)
"""Names defined in a look-up lesson, each as often as it stands here."""
MOST_NAMES = 12
"""Names in a lesson in which words are repeated."""
NEAR = 0.25
"""Chance that a combination defined in a look-up lesson differs from another in one move only."""
NAME_THE_MOVES = ({"type": "video"}, {"type": "text", "text": "Name the moves."})
"""The question of a lesson on a clip."""
EPOCH = 100_000
"""Draws that the shuffled source counts as an epoch; every draw is fresh in any case."""


@cache
def free_combinations(length: int) -> tuple[motions.SubMotions, ...]:
    """All combinations of `length` sub-motions that are no action of StickMotion."""
    taken = {a.sub_motions for a in motions.ACTIONS}
    return tuple(c for c in motions.combinations(length) if c not in taken)


def draw_clip(seed: Sequence[int], length: int | None = None) -> tuple[np.ndarray, motions.SubMotions]:
    """A clean clip uint8 [T, H, W, 3] of a free combination of `length` moves (one to three when not given).

    Half of them are drawn as a skeleton is drawn over a clip.
    """
    rng = np.random.default_rng(list(seed))
    pool = free_combinations(length or int(rng.choice([1, 2, 3], p=LENGTHS)))
    moves = pool[rng.integers(len(pool))]
    keypoints = motions.keypoints(moves, render.FRAMES, rng)
    frames = render.render(keypoints, rng, "clean")
    if rng.random() < 0.5:
        frames = draw_pose(frames, (keypoints * np.array([render.SIZE, render.SIZE, 1], np.float32))[:, None])
    return frames, moves


def repeat_texts(words: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    """A row of random `words` and names, and the same once more.

    No word and no syllable stands twice in a row, so that what follows a token is always what followed it before.
    """
    called: list[str] = []
    for name in rng.permutation(_free_names()).tolist()[:100]:
        if len(called) < MOST_NAMES and not any(n[:2] == name[:2] or n[2:] == name[2:] for n in called):
            called.append(name)
    called = called[: rng.integers(MOST_NAMES + 1)]
    mixed = [*(f" {name}" for name in called), *rng.choice(words, rng.integers(3, 16), replace=False).tolist()]
    text = "".join(mixed[i] for i in rng.permutation(len(mixed)))
    return text, text


def lookup_texts(rng: np.random.Generator, count: int | None = None) -> tuple[str, str]:
    """A question that defines `count` new names (two to eight when not given) and says what was seen, and the reply.

    The reply repeats three of the definitions, says for each move whether it was seen in its place, and then which name fits.
    Every line begins with a dash, so that moves have a blank before them and are the same tokens everywhere.
    """
    called = _draw_names(rng, count or int(rng.choice(COUNTS)))
    order = list(called)
    shown = order[rng.integers(len(order))]
    near = sorted(order, key=lambda c: (c != shown, -_same(c, shown)))[:3]
    near = [near[i] for i in rng.permutation(len(near))]
    defined = {c: f"- {motions.explanation(c)} makes {name}" for c, name in called.items()}
    question = "\n".join([*defined.values(), f"Seen: {', '.join(shown)}"])
    checks = [f"{defined[c]}: {', '.join(_verdicts(c, shown))}" for c in near]
    return question, "\n".join([*checks, f"It fits {called[shown]}"])


def _draw_names(rng: np.random.Generator, count: int) -> dict[motions.SubMotions, str]:
    """Free combinations of one number of moves, each with a new name; some differ from one in a single move."""
    pool = free_combinations(int(rng.choice([1, 2, 3], p=LENGTHS)))
    first = pool[rng.integers(len(pool))]
    near = [c for c in pool if _same(c, first) == len(first) - 1]
    chosen = dict.fromkeys([first])
    while len(chosen) < count:
        source = near if near and rng.random() < NEAR else pool
        chosen[source[rng.integers(len(source))]] = None
    order = [list(chosen)[i] for i in rng.permutation(count)]
    return dict(zip(order, rng.choice(_free_names(), count, replace=False).tolist(), strict=True))


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
        decoded = (chat.decode([token]) for token in range(len(chat.tokenizer)))
        syllables = {f" {s}" for s in names.SYLLABLES}
        self.words = sorted({word for word in decoded if re.fullmatch(" [a-z ]+", word)} - syllables)

    def __len__(self) -> int:
        return EPOCH

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return range(EPOCH)[index]

    def example(self, record: int, rng: np.random.Generator) -> Example:
        """A perception or a look-up lesson, drawn with `rng`."""
        if rng.random() >= self.watching:
            question, reply = repeat_texts(self.words, rng) if rng.random() < REPEATED else lookup_texts(rng)
            return self.chat.encode([user({"type": "text", "text": question}), assistant(reply)])
        patches, moves = self.clips
        index = int(rng.integers(len(patches)))
        clip = ProcessedClip(np.asarray(patches[index]), (render.FRAMES // 2, 4, 4), 1.0)
        return self.chat.encode([user(*NAME_THE_MOVES), assistant(named(moves[index]))], [clip])


def named(moves: motions.SubMotions) -> str:
    """The reply to `NAME_THE_MOVES`."""
    return f"It is {', '.join(moves)}"


def user(*parts: dict[str, str]) -> dict[str, Any]:
    """A question as a message."""
    return {"role": "user", "content": list(parts)}


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
    yield NAME_THE_MOVES[1]["text"]
