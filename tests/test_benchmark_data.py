"""The benchmark of the input pipeline: both sides make the same inputs, what is reported follows from it, and memory stays."""

import json
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from vstar_jax import config as config_module
from vstar_jax.benchmark import common, data
from vstar_jax.config import Config
from vstar_jax.errors import UserError

SCRIPTS = Path(__file__).parents[1] / "scripts"
SMALLEST = data.Workload(clips=4, batch=2, workers=1, threads=2)
SOAK = int(os.environ.get("VSTAR_SOAK_CLIPS", "64"))  # 10,000 is the full size


@pytest.fixture
def torch_loader(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    import reference_torch

    return reference_torch.Torch


@pytest.fixture(scope="module")
def config() -> Config:
    return config_module.load(config_module.resolve(data.SETTINGS))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return data.write_files(tmp_path_factory.mktemp("videos"), 2)


def test_a_comparison_reports_every_repeat_and_what_follows(torch_loader, tmp_path):
    result = data.measure_data(repeats=5, work=SMALLEST, soak=0, rival=torch_loader, files=2)
    ours, theirs = (result["contenders"][name] for name in ("vstar_jax", "torch DataLoader"))
    assert result["ratios"] == [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
    assert len(result["ratios"]) == len(result["cpu_ratios"]) == 5
    per_core = SMALLEST.clips / np.median(ours["seconds"]) / len(os.sched_getaffinity(0))
    assert ours["clips_per_s_per_core"] == pytest.approx(per_core)
    assert min(ours["cpu_seconds_per_clip"] + theirs["cpu_seconds_per_clip"]) > 0  # workers are counted on both sides
    assert 0 < result["difference_levels"] <= data.GREY_LEVELS  # the two resizers do differ
    assert result["soak"] is None
    common.write(result, data.report(result), tmp_path)
    assert json.loads((tmp_path / "data-hmdb51.json").read_text()) == result
    text = (tmp_path / "data-hmdb51.md").read_text()
    assert "|  | vstar_jax | torch DataLoader |" in text
    assert f"vstar_jax is {common.spread(result['ratios'], '.2f')} times as fast as torch DataLoader" in text


def test_a_rival_that_makes_other_inputs_is_refused(torch_loader, paths, config):
    messages = data.dialogue(config)
    smaller = replace(config, video=replace(config.video, min_pixels=50_000, max_pixels=50_000))
    with closing(data.Ours(paths, messages, config, SMALLEST)) as ours:
        with pytest.raises(UserError, match=r"token ids differ, grids .* so their speed is not compared"):
            data.check_agreement(ours, torch_loader(paths, messages[:-1], config, SMALLEST), 1)
        with pytest.raises(UserError, match=r"grids \[4, 20, 28\] and \[4, 12, 18\], patches inf grey levels apart"):
            data.check_agreement(ours, torch_loader(paths, messages, smaller, SMALLEST), 1)
        with pytest.raises(UserError, match=r"token ids equal, .* grey levels apart"):
            data.check_agreement(ours, torch_loader(paths[::-1], messages, config, SMALLEST), 1)
        theirs = torch_loader(paths, messages, config, SMALLEST)
        assert data.check_agreement(ours, theirs, 2) <= data.GREY_LEVELS


def test_a_turn_is_the_training_stream_over_every_file_and_leaves_nothing_behind(paths, config):
    with closing(data.Ours(paths, data.dialogue(config), config, SMALLEST)) as ours:
        example = ours.example(0)
        batches = list(ours.batches(SMALLEST.clips))
        assert [batch.tokens.shape for batch in batches] == [(SMALLEST.batch, len(example.tokens))] * 2
        assert all((batch.segments == 1).all() for batch in batches)  # one shape: nothing is padded
        seen = [(row == example.patches).all() for batch in batches for row in batch.vision.patches]
        assert sorted(seen) == [False, False, True, True]
        assert ours.run() == SMALLEST.clips
        assert ours.decoder.counts.snapshot()["decord"] == 1 + 1 + 2 * SMALLEST.clips


def test_a_long_run_keeps_its_memory_and_reports_every_block(paths, config):
    with closing(data.Ours(paths, data.dialogue(config), config, SMALLEST)) as ours:
        found = data.measure_soak(ours, SOAK)
    assert found["clips"] == found["block"] * len(found["clips_per_s"]) == found["block"] * len(found["memory_mib"])
    assert len(found["clips_per_s"]) >= 4
    assert min(found["memory_mib"]) > psutil.Process().memory_info().rss / common.MIB  # the worker is counted too
    assert found["memory_range"] <= data.FLAT
    result = {"contenders": {"vstar_jax": {"seconds": [1.0], "clips_per_s_per_core": 1.0, "cpu_seconds_per_clip": [1.0]}}}
    about = dict(
        clips=4, batch=2, workers=1, threads=2, size=[320, 240], file_frames=120, frames=8, patches=1, tokens=1, model="hmdb51"
    )
    text = data.report({**result, **about, "machine": common.machine(), "ratios": [], "soak": found})
    assert f"the most memory was {found['memory_range']:.1%} above the least (target 5%)" in text


def test_what_cannot_be_measured_is_one_sentence():
    with pytest.raises(UserError, match="5 clips are no whole batches of 2"):
        data.measure_data(5, replace(SMALLEST, clips=5), 0)
    with pytest.raises(UserError, match="a spread needs at least 5"):
        data.measure_data(2, SMALLEST, 0)
