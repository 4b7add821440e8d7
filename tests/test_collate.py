"""`collate` and `group` lay examples out so that nothing is lost and no group mixes patches."""

import numpy as np
import pytest

from vstar_jax.batch import PATCH_VALUES, Example, Groups, collate, group, rounded
from vstar_jax.data.patches import window_order

TOKENS, PATCHES = (16, 32), (64, 256)


def example(rng: np.random.Generator, length: int, *grids: tuple[int, int, int]) -> Example:
    """Random tokens; every visual token of the grids stands somewhere in them, in random order."""
    layouts = [window_order(grid) for grid in grids]
    windows, frames = ([np.zeros(0, np.int32)] for _ in range(2))
    for layout in layouts:
        windows.append(layout.window_id + sum(w[-1] + 1 for w in windows if len(w)))
        frames.append(layout.frame_id + sum(f[-1] + 1 for f in frames if len(f)))
    count = sum(len(layout.order) for layout in layouts)
    visual = np.full(length, -1, np.int32)
    visual[rng.permutation(length)[: count // 4]] = rng.permutation(count // 4)
    return Example(
        tokens=rng.integers(1, 100, length, dtype=np.int32),
        positions=rng.integers(0, 100, (length, 3), dtype=np.int32),
        loss_mask=rng.random(length) < 0.5,
        visual_index=visual,
        patches=rng.integers(0, 256, (count, PATCH_VALUES), dtype=np.uint8),
        patch_hw=np.concatenate([np.zeros((0, 2), np.int32), *(layout.patch_hw for layout in layouts)]),
        window_id=np.concatenate(windows),
        frame_id=np.concatenate(frames),
    )


def members(groups: Groups, count: int) -> list[list[list[int]]]:
    """The patches of each group of each row, whichever way they are told; groups without a patch are left out."""
    if groups.index is None:
        return [[list(range(i, i + groups.size)) for i in range(0, count, groups.size)]]
    assert groups.index.shape[-1] == groups.size
    rows = [[[int(p) for p in slots if p < count] for slots in row] for row in groups.index]
    return [[slots for slots in row if slots] for row in rows]


def test_every_example_is_found_again_in_its_segment():
    rng = np.random.default_rng(0)
    rows = [
        [example(rng, 12, (1, 4, 4)), example(rng, 15), example(rng, 5, (1, 2, 2), (1, 2, 4))],
        [example(rng, 20, (2, 4, 4))],
    ]
    batch = collate(rows, TOKENS, PATCHES)
    assert batch.tokens.shape == (2, 32)
    assert batch.vision is not None
    assert batch.vision.patches.shape == (2, 64, PATCH_VALUES)
    for b, row in enumerate(rows):
        for segment, one in enumerate(row, start=1):
            here = batch.segments[b] == segment
            np.testing.assert_array_equal(batch.tokens[b, here], one.tokens)
            np.testing.assert_array_equal(batch.positions[b, here], one.positions)
            np.testing.assert_array_equal(batch.loss_mask[b, here], one.loss_mask)
            visual = batch.visual_index[b, here]
            merged = batch.vision.patches[b].reshape(-1, 4, PATCH_VALUES)
            shown = one.visual_index >= 0
            np.testing.assert_array_equal(visual >= 0, shown)
            expected = one.patches.reshape(-1, 4, PATCH_VALUES)[one.visual_index[shown]]
            np.testing.assert_array_equal(merged[visual[shown]], expected)
        padding = batch.segments[b] == 0
        assert not batch.loss_mask[b, padding].any()
        assert (batch.visual_index[b, padding] == -1).all()


@pytest.mark.parametrize("field", ["window_id", "frame_id"])
@pytest.mark.parametrize(
    "grids", [[(2, 8, 8)], [(1, 8, 8), (3, 8, 8)], [(2, 8, 12)], [(1, 4, 4), (2, 8, 8)], [(1, 6, 10), (2, 2, 2), (1, 8, 8)]]
)
def test_groups_hold_exactly_the_patches_of_a_window_or_frame(grids: list[tuple[int, int, int]], field: str):
    rng = np.random.default_rng(0)
    row = [example(rng, 128, grid) for grid in grids]
    count = PATCHES[-1]
    found = members(group([[getattr(e, field) for e in row]], count), count)[0]
    expected, at = [], 0
    for one in row:
        for number in np.unique(getattr(one, field)):
            expected.append((at + np.flatnonzero(getattr(one, field) == number)).tolist())
        at += len(one.patches)
    assert found[: len(expected)] == expected
    assert all(min(slots) >= at for slots in found[len(expected) :])  # what is left is padding on its own


def test_equal_groups_are_a_reshape_and_unequal_ones_an_index():
    whole, ragged = np.repeat(np.arange(4), 64).astype(np.int32), np.repeat([0, 1, 1], 4).astype(np.int32)
    assert group([[whole]], 256) == Groups(None, 64)
    assert group([[ragged]], 256).index is not None
    assert group([[whole]], 96 * 3).index is not None  # groups of 64 do not divide the bucket


def test_text_alone_has_no_vision():
    assert collate([[example(np.random.default_rng(0), 8)]], TOKENS, PATCHES).vision is None


def test_rows_get_the_smallest_bucket_that_holds_the_longest():
    rng = np.random.default_rng(0)
    assert collate([[example(rng, 8)], [example(rng, 16)]], TOKENS, PATCHES).tokens.shape == (2, 16)
    assert collate([[example(rng, 8)], [example(rng, 17)]], TOKENS, PATCHES).tokens.shape == (2, 32)


@pytest.mark.parametrize(("length", "grid", "what"), [(33, (1, 4, 4), "tokens"), (32, (1, 8, 10), "patches")])
def test_what_no_bucket_holds_names_the_setting(length: int, grid: tuple[int, int, int], what: str):
    with pytest.raises(ValueError, match=rf"data\.{what}"):
        collate([[example(np.random.default_rng(0), length, grid)]], TOKENS, (32, 64))


def test_clips_of_any_sizes_have_few_shapes():
    """A shape is compiled once, so batches of mixed clips must share some: of 200 layouts, few remain."""
    rng, shapes = np.random.default_rng(0), set()
    for _ in range(200):
        ids = [[np.repeat(np.arange(n), rng.integers(100, 512))[:4096].astype(np.int32)] for n in rng.integers(6, 9, 4)]
        groups = group(ids, 4096)
        assert groups.index is not None
        for row, index in zip(ids, groups.index, strict=True):
            assert sorted(index[index < 4096]) == list(range(len(row[0])))
        shapes.add((groups.index.shape, groups.size))
    assert len(shapes) <= 12  # 3 numbers of groups, and 4 sizes in the octave where the largest group nearly always lies


@pytest.mark.parametrize("number", [*range(1, 200), 511, 512, 513, 10_000])
def test_rounding_up_adds_at_most_a_quarter(number):
    assert number <= rounded(number) <= number * 1.25
    assert rounded(rounded(number)) == rounded(number)
