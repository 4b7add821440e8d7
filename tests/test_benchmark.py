"""The benchmark times two implementations of one step, and reports nothing when they are not of one step."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vstar_jax import benchmark
from vstar_jax.errors import UserError

SCRIPTS = Path(__file__).parents[1] / "scripts"
MIB = 1 << 20
SLACK = 0.25  # of what was allocated; other parts of the process allocate a little meanwhile


@pytest.fixture
def hugging_face(monkeypatch) -> benchmark.Rival:
    monkeypatch.syspath_prepend(SCRIPTS)
    import reference_hf

    return reference_hf.HuggingFace


def test_a_comparison_reports_every_repeat_and_their_ratios(hugging_face, tmp_path):
    result = benchmark.measure_sft("tiny", batch_size=1, repeats=5, rival=hugging_face)
    ours, theirs = (result["contenders"][name] for name in ("vstar_jax", "Hugging Face"))
    assert result["ratios"] == [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
    assert len(result["ratios"]) == 5
    assert ours["losses"][1] < ours["losses"][0]  # the steps do train
    assert ours["tokens_per_s"] == result["tokens"] / np.median(ours["seconds"])
    benchmark.write(result, tmp_path / "new")
    assert json.loads((tmp_path / "new/sft-tiny.json").read_text()) == result
    text = (tmp_path / "new/sft-tiny.md").read_text()
    assert "|  | vstar_jax | Hugging Face |" in text
    assert f"vstar_jax is {benchmark.spread(result['ratios'], '.2f')} times as fast as Hugging Face" in text


def test_a_rival_that_trains_otherwise_is_refused_although_its_first_loss_agrees(hugging_face):
    def eager(path, dialogues, config):
        return hugging_face(path, dialogues, replace(config, learning_rate=10 * config.learning_rate))

    with pytest.raises(UserError, match="disagree on the loss of step 2"):
        benchmark.measure_sft("tiny", batch_size=1, repeats=5, rival=eager)


@pytest.mark.parametrize("factor", [1 + 2 * benchmark.TOLERANCE, float("nan")])
def test_losses_that_disagree_are_refused(factor: float):
    with pytest.raises(UserError, match="disagree on the loss of step 1"):
        benchmark.check_agreement({"a": [7.0, 6.9], "b": [7.0 * factor, 6.9]})


def test_peak_memory_sees_what_a_step_frees_before_it_ends():
    def allocate(mib: int) -> Callable[[], int]:
        return lambda: np.ones(mib * MIB, np.uint8).size

    benchmark.peak_memory(allocate(100))
    for mib in (300, 100):
        assert benchmark.peak_memory(allocate(mib)) == pytest.approx(mib, rel=SLACK)


def test_a_spread_needs_repeats():
    with pytest.raises(UserError, match="repeats is 2: a spread needs at least 5"):
        benchmark.measure_sft("tiny", batch_size=1, repeats=2)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--what=grpo"], "error: there is no benchmark 'grpo': sft is the one that exists.\n"),
        (["--against=tunix"], "error: there is no comparison with 'tunix': give hf, or leave --against out.\n"),
    ],
)
def test_what_does_not_exist_is_one_sentence(flags, error):
    done = subprocess.run([sys.executable, SCRIPTS / "benchmark.py", *flags], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, error)
