"""The arrays that pass from the data side to the model: one `Example` a dialogue, one `Batch` a step.

The data side builds examples in numpy, `collate` lays them out in static shapes, and the model, the objectives and the
rollout take the result under jit. Everything that depends on image sizes (window order, rotary grid, M-RoPE positions)
is computed here or in `data`, on the host, so that the model sees plain arrays and never a grid.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

PATCH_VALUES = 3 * 2 * 14 * 14  # channels, temporal patch, patch height, patch width
Array = jax.Array | np.ndarray  # on a device, under jit, or still on the host
MERGE = 4  # patches that the merger joins into one visual token (2 x 2)


@dataclass(frozen=True)
class Example:
    """One dialogue on the host. S tokens, P patches over all its clips and images; all arrays are numpy.

    tokens int32 [S]; positions int32 [S, 3] (time, height, width of M-RoPE); loss_mask bool [S], true where the token is
    a target; visual_index int32 [S], the visual token that stands at this place (counted over the example's own
    P / 4 visual tokens, in patch order) or -1; patches uint8 [P, 1176] in window order (`data.patches.window_order`);
    patch_hw int32 [P, 2], row and column in the grid; window_id and frame_id int32 [P], non-decreasing, the window and the
    temporal patch that each patch belongs to, counted over the example.
    """

    tokens: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray
    visual_index: np.ndarray
    patches: np.ndarray
    patch_hw: np.ndarray
    window_id: np.ndarray
    frame_id: np.ndarray


@partial(jax.tree_util.register_dataclass, data_fields=["index"], meta_fields=["size"])
@dataclass(frozen=True)
class Groups:
    """How the patches of a row split into the groups inside which the tower attends.

    size: patches in a group, static. index: None when the row is whole groups of `size` in order (then attention is a
    reshape), else int32 [B, N, size] of patch numbers, where P marks an empty slot; a group's empty slots are its last.
    """

    index: Array | None
    size: int


@partial(jax.tree_util.register_dataclass, data_fields=["patches", "patch_hw", "windows", "frames"], meta_fields=[])
@dataclass(frozen=True)
class Vision:
    """The pictures of a batch: patches uint8 [B, P, 1176], patch_hw int32 [B, P, 2], windows and frames as `Groups`."""

    patches: Array
    patch_hw: Array
    windows: Groups
    frames: Groups


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "positions", "segments", "loss_mask", "visual_index", "vision"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Batch:
    """One step's input; every array leads with B, so that one sharding over `data` fits all of it.

    tokens int32 [B, S]; positions int32 [B, S, 3]; segments int32 [B, S], 0 for padding and 1, 2, ... for the dialogues
    packed in a row; loss_mask bool [B, S]; visual_index int32 [B, S], into the row's P / 4 visual tokens or -1; vision,
    or None when no row has a picture.
    """

    tokens: Array
    positions: Array
    segments: Array
    loss_mask: Array
    visual_index: Array
    vision: Vision | None


@partial(jax.tree_util.register_dataclass, data_fields=["batch", "positions", "active"], meta_fields=[])
@dataclass(frozen=True)
class Turn:
    """What stands between two replies of an episode: the input of the next turn, from the host of a rollout.

    batch: B rows in static shapes; positions int32 [B], of the first token that the policy will write; active bool [B], the
    episodes that go on.
    """

    batch: Batch
    positions: Array
    active: Array


def joined(parts: Sequence[Example]) -> Example:
    """The pieces of one dialogue as a whole; their positions stay, visual tokens and groups of patches count on."""
    visual = np.cumsum([0, *(len(p.patches) // MERGE for p in parts)])
    windows = np.cumsum([0, *(p.window_id.max(initial=-1) + 1 for p in parts)])
    frames = np.cumsum([0, *(p.frame_id.max(initial=-1) + 1 for p in parts)])
    return Example(
        tokens=np.concatenate([p.tokens for p in parts]),
        positions=np.concatenate([p.positions for p in parts]),
        loss_mask=np.concatenate([p.loss_mask for p in parts]),
        visual_index=np.concatenate(
            [np.where(p.visual_index >= 0, p.visual_index + n, -1) for p, n in zip(parts, visual, strict=False)]
        ).astype(np.int32),
        patches=np.concatenate([p.patches for p in parts]),
        patch_hw=np.concatenate([p.patch_hw for p in parts]),
        window_id=np.concatenate([p.window_id + n for p, n in zip(parts, windows, strict=False)]).astype(np.int32),
        frame_id=np.concatenate([p.frame_id + n for p, n in zip(parts, frames, strict=False)]).astype(np.int32),
    )


def sampled(tokens: np.ndarray, start: int) -> Example:
    """What the policy wrote, int32 [S], as a piece of a dialogue whose positions go on from `start`; all of it is a target."""
    length = len(tokens)
    return Example(
        tokens=tokens.astype(np.int32),
        positions=np.repeat(np.arange(start, start + length, dtype=np.int32)[:, None], 3, axis=1),
        loss_mask=np.ones(length, bool),
        visual_index=np.full(length, -1, np.int32),
        patches=np.zeros((0, PATCH_VALUES), np.uint8),
        patch_hw=np.zeros((0, 2), np.int32),
        window_id=np.zeros(0, np.int32),
        frame_id=np.zeros(0, np.int32),
    )


def bucket(length: int, sizes: Sequence[int], what: str) -> int:
    """The smallest of the ascending `sizes` that holds `length`; ValueError names the setting `what` when none does."""
    for size in sizes:
        if length <= size:
            return size
    raise ValueError(
        f"{length} {what} are needed but the largest bucket of {what} is {max(sizes)}: add a larger one to data.{what}"
    )


Agree = Callable[[Sequence[int]], Sequence[int]]
"""The largest of each number over all that collate a part of the same batch; a part that is the whole agrees with itself."""


def collate(
    rows: Sequence[Sequence[Example]], tokens: Sequence[int], patches: Sequence[int], agree: Agree = lambda own: own
) -> Batch:
    """Lays rows of packed examples out in static shapes (a row of one example is an unpacked one).

    tokens, patches: ascending bucket sizes for S and P; each row gets the smallest bucket that holds the longest row. agree:
    makes the shapes those of all processes (`distributed.largest`).
    Raises ValueError when a row is longer than the largest bucket.
    """
    longest, most = agree([max(sum(len(getattr(e, field)) for e in row) for row in rows) for field in ("tokens", "patches")])
    length = bucket(longest, tokens, "tokens")
    batch = Batch(
        tokens=np.zeros((len(rows), length), np.int32),
        positions=np.zeros((len(rows), length, 3), np.int32),
        segments=np.zeros((len(rows), length), np.int32),
        loss_mask=np.zeros((len(rows), length), bool),
        visual_index=np.full((len(rows), length), -1, np.int32),
        vision=_collate_vision(rows, bucket(most, patches, "patches"), agree) if most else None,
    )
    for b, row in enumerate(rows):
        at = visual = 0
        for segment, example in enumerate(row, start=1):
            here = slice(at, at + len(example.tokens))
            batch.tokens[b, here] = example.tokens
            batch.positions[b, here] = example.positions
            batch.segments[b, here] = segment
            batch.loss_mask[b, here] = example.loss_mask
            batch.visual_index[b, here] = np.where(example.visual_index >= 0, example.visual_index + visual, -1)
            at, visual = here.stop, visual + len(example.patches) // MERGE
    return batch


def _collate_vision(rows: Sequence[Sequence[Example]], count: int, agree: Agree) -> Vision:
    patches = np.zeros((len(rows), count, PATCH_VALUES), np.uint8)
    patch_hw = np.zeros((len(rows), count, 2), np.int32)
    for b, row in enumerate(rows):
        at = 0
        for example in row:
            here = slice(at, at + len(example.patches))
            patches[b, here], patch_hw[b, here] = example.patches, example.patch_hw
            at = here.stop
    windows = group([[e.window_id for e in row] for row in rows], count, agree)
    frames = group([[e.frame_id for e in row] for row in rows], count, agree)
    return Vision(patches, patch_hw, windows, frames)


def group(ids: Sequence[Sequence[np.ndarray]], count: int, agree: Agree = lambda own: own) -> Groups:
    """Turns the group number of each patch into `Groups` over rows of `count` patches.

    ids: for each row and each example in it, int32 [P] non-decreasing group numbers. Groups of one size that divides
    `count` need no index: padding then fills whole groups, which attend to themselves and reach nothing else.
    """
    sizes = [np.concatenate([np.unique(i, return_counts=True)[1] for i in row] or [np.zeros(0, int)]) for row in ids]
    all_sizes = np.concatenate(sizes)
    # The smallest group by its negative, so that one maximum over all parts tells both ends; a part without patches has none.
    size, negative, most = agree(
        [int(all_sizes.max(initial=0)), int((-all_sizes).max(initial=-count)), max(len(s) for s in sizes)]
    )
    if size == -negative and count % size == 0:
        return Groups(None, size)
    most, size = rounded(most), rounded(size)
    index = np.full((len(ids), most, size), count, np.int32)
    for b, row in enumerate(sizes):
        starts = np.concatenate([[0], np.cumsum(row)])
        for n, (start, end) in enumerate(itertools.pairwise(starts)):
            index[b, n, : end - start] = np.arange(start, end)
    return Groups(index, size)


def rounded(number: int) -> int:
    """The next number whose binary form has at most three digits before its zeros: at most a quarter more."""
    step = 1 << max(number.bit_length() - 3, 0)
    return -(-number // step) * step
