"""Patch rows, window order and M-RoPE positions are those of the reference."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.vision_utils import get_vision_window_index

from vstar_jax.data.patches import patchify, window_order
from vstar_jax.data.positions import positions

GRIDS = [(1, 4, 4), (2, 8, 8), (3, 16, 8), (2, 6, 10), (1, 18, 26), (4, 10, 2), (1, 2, 34)]
GOLDENS = json.loads((Path(__file__).parent / "goldens" / "positions_4_51.json").read_text())


@pytest.mark.parametrize("grid", GRIDS)
def test_window_order_is_hugging_faces(grid: tuple[int, int, int]):
    order, ends = get_vision_window_index(torch.tensor([grid]), spatial_merge_size=2, window_size=112, patch_size=14)
    layout = window_order(grid)
    np.testing.assert_array_equal(layout.order[::4] // 4, order)
    np.testing.assert_array_equal(np.cumsum(np.unique(layout.window_id, return_counts=True)[1]), ends[1:])


@pytest.mark.parametrize("grid", GRIDS)
def test_window_layout_is_consistent(grid: tuple[int, int, int]):
    t, h, w = grid
    layout = window_order(grid)
    np.testing.assert_array_equal(np.sort(layout.order), np.arange(t * h * w))
    np.testing.assert_array_equal(
        layout.order.reshape(-1, 4)[layout.inverse] // 4, np.arange(t * h * w // 4)[:, None].repeat(4, 1)
    )
    assert (np.diff(layout.window_id) >= 0).all()
    assert (np.diff(layout.frame_id) >= 0).all()
    pixels = layout.patch_hw * 14
    for window in range(layout.window_id[-1] + 1):
        inside = pixels[layout.window_id == window]
        assert len(np.unique(inside // 112, axis=0)) == 1
        assert len(np.unique(layout.frame_id[layout.window_id == window])) == 1


@pytest.mark.parametrize("frames", [2, 3])
def test_a_row_holds_the_pixels_of_its_patch(frames: int):
    clip = np.random.default_rng(0).integers(0, 256, (frames, 56, 84, 3), dtype=np.uint8)
    patches, grid = patchify(clip)
    assert grid == (-(-frames // 2), 4, 6)
    assert patches.dtype == np.uint8
    layout = window_order(grid)
    for row, (y, x), frame in zip(patches[layout.order], layout.patch_hw, layout.frame_id, strict=True):
        pixels = row.reshape(3, 2, 14, 14)
        for k in range(2):
            shown = clip[min(2 * frame + k, frames - 1), 14 * y : 14 * y + 14, 14 * x : 14 * x + 14]
            np.testing.assert_array_equal(pixels[:, k], shown.transpose(2, 0, 1))


def test_frames_that_patches_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="56 x 70 pixels"):
        patchify(np.zeros((2, 56, 70, 3), np.uint8))


@pytest.mark.parametrize("golden", GOLDENS, ids=[golden["name"] for golden in GOLDENS])
def test_positions_are_those_of_transformers_4_51(golden: dict):
    config, tokens = golden["config"], np.asarray(golden["input_ids"])
    image, video = config["image_token_id"], config["video_token_id"]
    images, videos = (
        iter(golden["image_grid_thw"]),
        iter(zip(golden["video_grid_thw"], golden["second_per_grid_ts"], strict=True)),
    )
    starts = tokens[1:][tokens[:-1] == config["vision_start_token_id"]]
    pictures = [(next(images), 0.0) if kind == image else next(videos) for kind in starts if kind in (image, video)]
    found = positions(
        tokens,
        [tuple(grid) for grid, _ in pictures],
        [seconds for _, seconds in pictures],
        config["tokens_per_second"],
        image,
        video,
        config["spatial_merge_size"],
    )
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found.T, golden["position_ids"])


def test_pads_that_do_not_match_the_grids_are_refused():
    tokens = np.array([1, 6, 6, 6, 2])
    with pytest.raises(ValueError, match="3 visual tokens"):
        positions(tokens, [(1, 4, 4)], [1.0], 2, image_pad=5, video_pad=6)
    with pytest.raises(ValueError, match="one piece"):
        positions(np.array([6, 6, 1, 6, 6]), [(1, 4, 4)], [1.0], 2, image_pad=5, video_pad=6)
