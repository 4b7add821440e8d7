"""Claims about runs of several processes: the same as of one, ended together when one dies, resumed, and refused in words."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from grpo_program import world

from vstar_jax import distributed
from vstar_jax.config import Config, DistributedConfig, EvaluationConfig, check, save
from vstar_jax.errors import UserError
from vstar_jax.training.metrics import read_metrics

PROGRAM = Path(__file__).with_name("distributed_program.py")
PROCESSES = 2
PATIENCE = 300.0  # seconds for a program of eight simulated devices on two cores that others use
DEADLINE = 12.0  # seconds; long enough for a process that compiles beside the other
LOSS = 1e-4  # float32: rows lie on other devices, so sums have another order, and the updates carry it on
MEASURED = ("time/", "sft/tokens_per_s", "rollout/tokens_per_s", "rollout/tools_share")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    base = world(tmp_path_factory.mktemp("world"))
    return replace(
        base,
        mesh="8x1",
        sft=replace(base.sft, steps=3, batch_size=8, learning_rate=1e-3, save_every=1),
        grpo=replace(base.grpo, steps=3, accumulate=2, save_every=1),
        rollout=replace(base.rollout, mode="callback"),
        evaluation=EvaluationConfig(batch_size=8),
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, str]:
    return {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")), "JAX_PLATFORMS": "cpu"}


def start(config: Config, run_dir: Path, environment: dict[str, str], processes: int) -> list["subprocess.Popen[str]"]:
    """The processes of a run; what they say stands in process0.log, process1.log, ... of the run directory's neighbour."""
    logs = run_dir.with_suffix(".logs")
    logs.mkdir(exist_ok=True)
    save(replace(config, run_dir=str(run_dir)), logs / "config.yaml")
    flags = [f"--distributed.coordinator=127.0.0.1:{free_port()}", f"--distributed.processes={processes}"]
    flags = [*flags, f"--distributed.deadline={DEADLINE}"] if processes > 1 else []
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    started = []
    for process in range(processes):
        own = [*flags, f"--distributed.process={process}"] if processes > 1 else []
        with (logs / f"process{process}.log").open("w") as log:
            command = [sys.executable, str(PROGRAM), str(logs / "config.yaml"), *own]
            started.append(subprocess.Popen(command, stdout=log, stderr=log, text=True, env={**kept, **environment}))
    return started


def log_of(run_dir: Path, process: int) -> str:
    return (run_dir.with_suffix(".logs") / f"process{process}.log").read_text()


def finish(started: list["subprocess.Popen[str]"], run_dir: Path) -> None:
    for process, running in enumerate(started):
        assert running.wait(PATIENCE) == 0, log_of(run_dir, process)[-3000:]


def numbers(run_dir: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in read_metrics(run_dir)]


def written(run_dir: Path) -> dict[str, str]:
    files = [run_dir / "predictions.jsonl", *sorted((run_dir / "grpo" / "rollouts").glob("*.jsonl"))]
    return {file.name: file.read_text() for file in files}


@pytest.fixture(scope="module")
def alone(config, cache, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "alone"
    finish(start(config, run_dir, cache, 1), run_dir)
    return run_dir


def test_two_processes_give_the_losses_rewards_and_tokens_of_one(config, cache, alone, tmp_path):
    run_dir = tmp_path / "two"
    finish(start(config, run_dir, cache, PROCESSES), run_dir)
    one, two = numbers(alone), numbers(run_dir)
    assert [line["step"] for line in two] == list(range(1, 7))
    assert any(line.get("grpo/groups_without_variance", 8) < 8 for line in one)  # something was learned from
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=LOSS, abs=LOSS)
    assert written(run_dir) == written(alone)
    assert len(json.loads(written(run_dir)["000001.jsonl"].splitlines()[0])["episodes"]) == config.grpo.group


def kill(config: Config, cache: dict[str, str], run_dir: Path, killed: int, lines: int) -> float:
    """Kills one of two processes after `lines` lines of metrics; returns how long the other one lived on."""
    started = start(config, run_dir, cache, PROCESSES)
    until = time.monotonic() + PATIENCE
    while len(read_metrics(run_dir)) < lines:
        assert all(running.poll() is None for running in started), log_of(run_dir, 0)[-3000:]
        assert time.monotonic() < until
        time.sleep(0.1)
    started[killed].send_signal(signal.SIGKILL)
    died = time.monotonic()
    assert started[1 - killed].wait(PATIENCE) != 0
    assert started[killed].wait() == -signal.SIGKILL
    return time.monotonic() - died


def test_when_a_process_dies_the_other_ends_and_a_restart_resumes(config, cache, alone, tmp_path):
    run_dir, fewer = tmp_path / "killed", replace(config, mesh="2x1")
    # Twice: a silence begins to count with the last sign of life, and the others ask for news once more.
    assert kill(fewer, cache, run_dir, killed=1, lines=4) < 2 * DEADLINE
    assert "another task died" in log_of(run_dir, 0)
    finish(start(fewer, run_dir, cache, PROCESSES), run_dir)
    for a, b in zip(numbers(alone), numbers(run_dir), strict=True):
        assert b == pytest.approx(a, rel=LOSS, abs=LOSS)
    assert written(run_dir) == written(alone)


def test_the_others_end_at_once_when_the_first_process_dies(config, cache, tmp_path):
    run_dir = tmp_path / "killed"
    assert kill(replace(config, mesh="2x1"), cache, run_dir, killed=0, lines=1) < DEADLINE
    assert "another task died" in log_of(run_dir, 1)


def test_another_number_of_processes_cannot_go_on_and_a_model_axis_stays_in_a_process(config, cache, alone, tmp_path):
    longer = replace(config, sft=replace(config.sft, steps=4))
    started = start(longer, alone, cache, PROCESSES)
    assert {running.wait(PATIENCE) for running in started} == {1}
    assert "was saved by 1 processes, but there are 2: start as many, or begin another run." in log_of(alone, 0)
    started = start(replace(config, mesh="1x8"), tmp_path / "wide", cache, PROCESSES)
    assert {running.wait(PATIENCE) for running in started} == {1}
    assert "mesh 1x8 does not give each of the 2 processes rows of its own" in log_of(tmp_path / "wide", 0)


def test_a_process_that_finds_no_first_one_says_so():
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=f"was not found at {address} in 0.5 seconds"):
        distributed.start(DistributedConfig(address, 2, 1, 0.5))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (DistributedConfig("10.0.0.1", 2), "must be the HOST:PORT of the first process"),
        (DistributedConfig("10.0.0.1:1234", 2, 2), "must be below distributed.processes"),
        (DistributedConfig("", 2), "nobody says where they meet"),
        (DistributedConfig("10.0.0.1:1234", 2, deadline=0.0), "distributed.deadline is 0.0, but must be greater than 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said: str):
    with pytest.raises(UserError, match=said):
        check(replace(Config(), distributed=settings))


def test_one_process_agrees_with_itself():
    distributed.start(DistributedConfig())
    assert distributed.first()
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    assert distributed.largest([3, -1]) == [3, -1]
    assert distributed.told("x") == "x"
