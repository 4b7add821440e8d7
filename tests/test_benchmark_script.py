"""The benchmark's command: what runs where extras are missing, and all measurements in one go."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import pytest

from vstar_jax.benchmark import everything
from vstar_jax.errors import UserError

SCRIPT = Path(__file__).parents[1] / "scripts/benchmark.py"
EXTRAS = ("tensorflow_datasets", "tensorflow", "decord", "grain", "av", "openai", "ultralytics", "mcp", "fastapi", "orbax")
"""What an image for the device has not."""
WITHOUT = """
import runpy, sys
_, modules, *sys.argv = sys.argv
sys.modules.update(dict.fromkeys(modules.split(",")))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
QUICK = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
"""Compiling takes longer than running here."""
SMALLEST = ("--model=tiny", "--repeats=5", "--batch-size=1", "--prompts=2", "--group=2", "--tokens=12")


def without(modules: Sequence[str], *flags: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that finds none of the modules."""
    command = [sys.executable, "-c", WITHOUT, ",".join(modules), SCRIPT, *SMALLEST, *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **QUICK})


@pytest.mark.parametrize(("what", "more"), [("sft", ()), ("rollout", ("transformers",)), ("grpo", ())])
def test_the_model_is_measured_where_no_extra_is_installed(what, more, tmp_path):
    done = without((*EXTRAS, *more), f"--what={what}", "--dtype=bfloat16", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / f"{what}-tiny.json").read_text())
    (ours,) = result["contenders"].values()
    assert result["dtype"] == "bfloat16"
    assert result["compilations"]["in_repeats"] == 0
    assert ours["mfu"] * result["matrix_rate"] == pytest.approx(ours["flops_per_s"])
    assert ours["flops_per_s"] == pytest.approx(result["operations"] / sorted(ours["seconds"])[2])
    text = (tmp_path / f"{what}-tiny.md").read_text()
    assert f"| MFU | {ours['mfu']:.1%} |" in text
    if what == "rollout":
        assert "fastapi, openai, ultralytics are not installed (pip install -e '.[tools,yolo]')." in text
        decode = sorted(result["phases"]["decode"])[2]
        assert result["decode_bytes_per_s"] == pytest.approx(result["decode_bytes"] / decode)


PART = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
for flag in ("--what", "--against", "--out", "--model"):
    parser.add_argument(flag)
given = parser.parse_args()
if given.what == "rollout":
    sys.exit("error: the memory of the device is full: take fewer prompts.")
stem = pathlib.Path(given.out, f"{given.what}-{given.model}")
stem.with_suffix(".json").write_text(json.dumps(vars(given)))
stem.with_suffix(".md").write_text(f"{given.what} against {given.against}")
"""


def test_all_parts_run_and_a_failure_leaves_the_others(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(everything.NEEDED, "tools", (("no_such_module",), "pip install it"))
    rivals = {"sft": ("hf",), "rollout": ("hf",), "tools": ("ultralytics",), "grpo": ("trl",)}
    with pytest.raises(UserError, match=r"rollout failed, as .*all-tiny\.md says beside the results of the others"):
        everything.run([sys.executable, "-c", PART, "--model=tiny"], "tiny", rivals, "hf", tmp_path)
    whole = json.loads((tmp_path / "all-tiny.json").read_text())
    assert whole["skipped"] == {"tools": "no_such_module is not installed (pip install it)."}
    assert whole["failed"] == {"rollout": "the memory of the device is full: take fewer prompts. (exit code 1)"}
    assert {part: result["against"] for part, result in whole["parts"].items()} == {"sft": "hf", "grpo": None}
    text = (tmp_path / "all-tiny.md").read_text()
    assert "| rollout | failed: the memory of the device is full: take fewer prompts. (exit code 1) |" in text
    assert "## sft\n\nsft against hf" in text
    assert json.loads((tmp_path / "sft-tiny.json").read_text())["what"] == "sft"
    assert "the memory of the device is full" in capfd.readouterr().err  # shown as it came


def test_a_part_gets_all_flags_but_those_that_each_has_of_its_own():
    flags = ["--what", "all", "--model=3b", "--against=hf", "--repeats", "9", "--out", "somewhere", "--no-tools"]
    assert everything.shared_flags(flags) == ["--model=3b", "--repeats", "9", "--no-tools"]


@pytest.mark.parametrize("said", ["RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte.", "another failure"])
def test_a_device_that_is_full_is_one_sentence_and_no_other_failure_is(said, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import benchmark

    def full(_: argparse.Namespace) -> None:
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setitem(benchmark.MEASURES, "sft", full)
    expected = UserError if "RESOURCE" in said else jax.errors.JaxRuntimeError
    with pytest.raises(expected, match="memory is full: take fewer rows" if expected is UserError else said):
        benchmark._measured(argparse.Namespace(what="sft"))
