"""Claims about runs: the same losses on every mesh, bit for bit after a kill, one compilation, a clean stop, a whole job."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from vstar_jax import config as config_module
from vstar_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    GrpoConfig,
    PolicyConfig,
    RolloutConfig,
    SftConfig,
    ToolsConfig,
)
from vstar_jax.data.chat import Chat
from vstar_jax.data.datasets import make_task
from vstar_jax.data.pipeline import train_batches
from vstar_jax.errors import UserError
from vstar_jax.evaluation.checkpoint import config_of, measure, restore
from vstar_jax.training.checkpoint import Checkpointer
from vstar_jax.training.job import load_policy, run
from vstar_jax.training.metrics import read_metrics
from vstar_jax.training.pretrain import blank_model
from vstar_jax.training.sft import train

MESH_LOSS = 1e-4  # float32 sums in another order, carried through a few updates
PROGRAM = Path(__file__).with_name("sft_program.py")
PATIENCE = 240.0  # seconds


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Config:
    """A run of a few small steps from random weights on a small StickMotion."""
    folder = tmp_path_factory.mktemp("training")
    blank_model(folder / "model", 0)
    return Config(
        policy=PolicyConfig(path=str(folder / "model")),
        data=DataConfig(dir=str(folder / "data"), clips_per_action=1, labels=4),
        sft=SftConfig(steps=6, batch_size=8, save_every=2, warmup=2),
        grpo=GrpoConfig(steps=0),
        tools=ToolsConfig("annotations"),
        rollout=RolloutConfig(max_new_tokens=(4,)),
        evaluation=EvaluationConfig(batch_size=16, clips_per_action=1),
    )


def losses(run_dir: Path) -> list[float]:
    return [line["sft/loss"] for line in read_metrics(run_dir) if "sft/loss" in line]


def trained(config: Config, mesh, run_dir: Path):
    task = make_task(config, Chat(config.policy.path, config.video))
    batches = train_batches(task.train_records(), task.example, config)
    return train(load_policy(config, mesh), batches, config, mesh, run_dir)


@pytest.fixture(scope="module")
def reference(base, mesh, tmp_path_factory):
    """The uninterrupted run on one device: its directory and what it returned."""
    run_dir = tmp_path_factory.mktemp("reference")
    config_module.save(replace(base, run_dir=str(run_dir)), run_dir / "config.yaml")
    return run_dir, trained(base, mesh("1x1"), run_dir)


def test_the_loss_falls(reference):
    assert losses(reference[0])[-1] < losses(reference[0])[0]


def test_the_step_is_compiled_once_for_each_shape_of_batch(base, reference):
    task = make_task(base, Chat(base.policy.path, base.video))
    batches = train_batches(task.train_records(), task.example, base)
    shapes = {(b.tokens.shape, b.vision.patches.shape) for b, _ in zip(batches, range(base.sft.steps), strict=False)}
    assert reference[1].compilations == len(shapes)


@pytest.mark.parametrize("shape", ["8x1", "4x2"])
def test_losses_are_those_of_one_device_on_every_mesh(base, reference, mesh, tmp_path, shape):
    trained(base, mesh(shape), tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(reference[0]), atol=MESH_LOSS)


def test_a_checkpoint_is_restored_bit_for_bit_on_another_mesh(base, reference, mesh):
    run_dir, result = reference
    _, state = restore(str(run_dir), config_of(str(run_dir), "4x2", []), mesh("4x2"))
    expected = jax.tree.leaves(result.state.params)
    found = jax.tree.leaves(state)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def start(config: Config, run_dir: Path, largest_file: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    config_module.save(replace(config, run_dir=str(run_dir)), run_dir / "given.yaml")
    command = [sys.executable, str(PROGRAM), str(run_dir / "given.yaml")]
    environment = {**os.environ, "XLA_FLAGS": ""}
    if largest_file != resource.RLIM_INFINITY:
        command = ["bash", "-c", f'ulimit -f {largest_file // 1024}; exec "$@"', "bash", *command]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if (run_dir / "metrics.jsonl").exists() and len(losses(run_dir)) >= step:
            return
        if process.poll() is not None:
            raise AssertionError(process.stderr.read())
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    """The losses of a run that nothing stops, in a process of its own as the others are: threads decide the last bit."""
    run_dir = tmp_path_factory.mktemp("whole")
    process = start(base, run_dir)
    assert process.wait(PATIENCE) == 0, process.stderr.read()
    assert len(losses(run_dir)) == base.sft.steps
    return losses(run_dir)


def test_a_run_killed_at_any_step_and_started_again_gives_the_same_losses_bit_for_bit(base, uninterrupted, tmp_path):
    first = start(base, tmp_path)
    wait_for_step(first, tmp_path, int(np.random.default_rng(time.time_ns()).integers(1, 6)))
    first.send_signal(signal.SIGKILL)
    first.wait(PATIENCE)
    again = start(base, tmp_path)
    assert again.wait(PATIENCE) == 0, again.stderr.read()
    assert losses(tmp_path) == uninterrupted


def test_a_disk_that_refuses_a_checkpoint_is_one_sentence_and_the_run_resumes_when_there_is_room(base, uninterrupted, tmp_path):
    """A limit on the size of files stands for a full disk: the write fails in the same place with another errno."""
    process = start(base, tmp_path, largest_file=512 * 1024)
    _, printed = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, printed
    sentence = printed.strip().splitlines()[-1]
    assert "cannot be written to" in sentence
    assert "free some space" in sentence
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    again = start(base, tmp_path)
    assert again.wait(PATIENCE) == 0, again.stderr.read()
    assert losses(tmp_path) == uninterrupted


def test_a_disk_without_room_is_found_before_anything_is_written(reference, tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match=r"0\.0 GB are free\): free some space and run the same command again") as caught:
        checkpointer.save(reference[1].state, {})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_sigterm_saves_and_says_how_to_go_on(base, tmp_path):
    process = start(replace(base, sft=replace(base.sft, steps=200, save_every=100)), tmp_path)
    wait_for_step(process, tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    assert "run the same command again" in printed
    assert "Traceback" not in printed
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert steps == [len(losses(tmp_path))]


def test_a_whole_job_reports_base_and_trained_and_evaluation_repeats_it(base, mesh, tmp_path, capsys):
    config = replace(base, run_dir=str(tmp_path / "run"), sft=replace(base.sft, steps=2))
    result = run(config, mesh("1x1"))
    printed = capsys.readouterr().out
    assert "25.0 %" in printed  # chance with four labels
    assert {"base model", "after SFT"} <= set(result)
    run_dir = Path(config.run_dir)
    assert json.loads((run_dir / "result.json").read_text()) == json.loads(json.dumps(result))
    assert (run_dir / "curves.png").stat().st_size > 0
    found = measure(str(run_dir), config_of(str(run_dir), "2x1", []), mesh("2x1"), None)
    assert {k: found[k] for k in result["after SFT"]} == result["after SFT"]
    first = (run_dir / "rollouts" / "sft.jsonl").read_text().splitlines()
    second = (run_dir / "evaluation" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["turns"] for line in first] == [json.loads(line)["turns"] for line in second]
