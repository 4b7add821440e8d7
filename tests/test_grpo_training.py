"""Claims about GRPO runs: what they write, bit for bit after a kill, one compilation, any mesh, a stop when tools fail."""

import importlib.util
import json
import os
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
from flax import nnx
from grpo_program import FRAMES, FewClips, reinforce, world
from test_tools_client import Call, answer, body, peer

from vstar_jax import config as config_module
from vstar_jax.config import Config, EvaluationConfig, SftConfig, ToolsConfig
from vstar_jax.data.chat import Chat
from vstar_jax.data.stick_motion import render
from vstar_jax.dialogue import ToolResult
from vstar_jax.errors import UserError
from vstar_jax.evaluation.checkpoint import config_of, restore
from vstar_jax.sharding import put_batch
from vstar_jax.tools.client import ToolsClient
from vstar_jax.tools.host import GRACE, Outcome, annotations
from vstar_jax.tools.launch import open_tools, serve
from vstar_jax.tools.protocol import SENTENCES, Refusal
from vstar_jax.tools.served import ServedTools
from vstar_jax.training import job
from vstar_jax.training.collect import Collector, as_record
from vstar_jax.training.grpo import Learner, Summary, experience, make_grpo_optimizer, micro_batches
from vstar_jax.training.job import load_policy
from vstar_jax.training.metrics import read_metrics
from vstar_jax.training.state import create_state

LOG_PROB = 1e-4  # float32: the sampler's cache and the trainer's whole sequence sum in another order (DESIGN, law 5)
MESH_LOSS = 1e-4  # float32 sums in another order; the update divides them by the root of their squares
DEADLINE, SLACK = 2.0, 2.0  # seconds; slack is for eight simulated devices that encode their rows on a busy machine
DARK = "d" * 64
PROGRAM = Path(__file__).with_name("grpo_program.py")
PATIENCE = 240.0  # seconds
PROGRAMS = ("encode prompts", "encode turns", "prefill prompts", "prefill turns", "first reply", "second reply")
COMPILED = "/jax/core/compile/backend_compile_duration"

compiled_at: list[float] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled_at.append(time.time()) if name == COMPILED else None
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Programs that are compiled here once, also for the processes that tests start; callbacks are never kept in it."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    settings = {"jax_compilation_cache_dir": folder, "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in settings.items()}
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def base(cache, tmp_path_factory) -> Config:
    return world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    """The uninterrupted run on one device: its directory and what it returned."""
    run_dir = tmp_path_factory.mktemp("reference")
    return run_dir, reinforce(base, run_dir)


def measured(run_dir: Path, *prefixes: str) -> list[dict[str, float]]:
    """The metrics of every step whose names begin in one of these ways."""
    return [{k: v for k, v in line.items() if k.startswith(prefixes)} for line in read_metrics(run_dir)]


def rollouts(run_dir: Path) -> list[list[dict]]:
    """The groups of every step."""
    files = sorted((run_dir / "grpo" / "rollouts").iterdir())
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_every_step_tells_of_rewards_tools_phases_and_the_policy(base, reference):
    lines = read_metrics(reference[0])
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert {f"tool/{s}" for s in ("ok", "timeout", "error", "malformed", "unavailable")} <= set(line)
        assert {f"reward/{p}" for p in ("accuracy", "format", "tool", "sub_motion", "total")} <= set(line)
        phases = [line[f"time/{p}"] for p in ("data", "encode", "prefill", "decode", "tools", "reward", "update")]
        assert min(phases) > 0
        assert sum(phases) <= line["time/step"]
        assert 0 <= line["grpo/clipped"] <= 1
        assert line["policy/sampler_trainer_kl"] < LOG_PROB
        assert line["rollout/tokens_per_s"] > 0
    assert sum(line["tool/ok"] for line in lines) > 0
    assert sum(line["grpo/groups_without_variance"] for line in lines) > 0
    assert len({line["reward/total"] for line in lines}) > 1


def test_every_step_keeps_its_rollouts_and_they_give_its_metrics(base, reference):
    run_dir = reference[0]
    steps = rollouts(run_dir)
    assert len(steps) == base.grpo.steps
    for groups, line in zip(steps, read_metrics(run_dir), strict=True):
        episodes = [e for group in groups for e in group["episodes"]]
        assert len(episodes) == base.grpo.prompts * base.grpo.group
        assert np.isclose(np.mean([e["reward"]["total"] for e in episodes]), line["reward/total"])
        assert sum(s == "ok" for e in episodes for s in e["statuses"].values()) == line["tool/ok"]
        assert all(len(e["turns"]) == 2 and group["clip"].startswith("clip") for group in groups for e in group["episodes"])
        same = [len({e["reward"]["total"] for e in group["episodes"]}) == 1 for group in groups]
        assert sum(same) == line["grpo/groups_without_variance"]


def test_nothing_is_compiled_after_the_second_step(base, reference):
    run_dir, run = reference
    assert run.compilations == {"rollout": len(PROGRAMS), "reference": 1, "update": 1}
    second, last = ((run_dir / "grpo" / "rollouts" / f"{n:06d}.jsonl").stat().st_mtime for n in (2, base.grpo.steps))
    assert not [at for at in compiled_at if second < at <= last]


def start(config: Config, run_dir: Path, cache: dict[str, str]) -> subprocess.Popen:
    config_module.save(replace(config, run_dir=str(run_dir)), run_dir / "given.yaml")
    command = [sys.executable, str(PROGRAM), str(run_dir / "given.yaml")]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, **cache})


def test_a_run_killed_at_any_step_and_started_again_gives_the_same_rewards_and_losses_bit_for_bit(
    base, reference, cache, tmp_path
):
    first = start(base, tmp_path, cache)
    step, deadline = int(np.random.default_rng(time.time_ns()).integers(1, base.grpo.steps)), time.monotonic() + PATIENCE
    while len(read_metrics(tmp_path)) < step:
        assert first.poll() is None, first.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait(PATIENCE)
    again = start(base, tmp_path, cache)
    _, printed = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, printed
    names = ("step", "reward/", "grpo/", "policy/", "tool/", "rollout/tokens")
    expected, found = measured(reference[0], *names), measured(tmp_path, *names)
    for line in (*expected, *found):
        line.pop("rollout/tokens_per_s")
    assert found == expected
    assert rollouts(tmp_path) == rollouts(reference[0])


class World:
    """The parts of a run at its first step."""

    def __init__(self, config: Config, mesh):
        self.config, self.mesh = config, mesh
        chat = Chat(config.policy.path, config.video)
        optimizer = make_grpo_optimizer(config)
        self.graphdef, self.state = create_state(load_policy(config, mesh), optimizer, config.policy.lora, mesh, 0)
        self.collector = Collector(self.graphdef, FewClips(config, chat), chat, annotations, config, mesh)
        self.learner = Learner(self.graphdef, optimizer, config, mesh, self.state, None)

    def play(self, tools=annotations):
        self.collector.player.host.tools = tools
        with jax.set_mesh(self.mesh):
            return self.collector.collect(nnx.merge_state(self.state.params, self.state.frozen), 1)

    def experience(self, step, useful):
        rewards = np.where(useful, np.arange(len(useful)) % 2, 0).astype(np.float32)
        accumulate = self.config.grpo.accumulate
        content = experience([p.played for p in step.paid], rewards, useful, step.tokens, step.patches, accumulate)
        return content, micro_batches(int(useful.sum()), len(useful), accumulate)


@pytest.fixture(scope="module")
def parts(base, mesh):
    with jax.set_mesh(mesh("1x1")):
        return World(base, mesh("1x1"))


@pytest.fixture(scope="module")
def step(parts):
    return parts.play()


def test_the_sampler_and_the_trainer_give_a_token_the_same_probability(parts, step):
    with jax.set_mesh(parts.mesh):
        content, used = parts.experience(step, np.ones(len(step.paid), bool))
        found = parts.learner.reference(parts.state.params, parts.state.frozen, put_batch(content, parts.mesh), used)
    videos = [len(p.played.parts[0].patches) // 32 for p in step.paid]
    assert {1, 2} == set(videos)
    mask = content.batch.loss_mask
    assert mask.sum() == sum(sum(p.played.lengths) for p in step.paid)
    assert (content.old[mask] < 0).all()
    np.testing.assert_allclose(np.asarray(found.reference)[mask], content.old[mask], atol=LOG_PROB)


def test_with_replaced_history_each_turn_is_a_sequence_of_its_own_with_the_same_probabilities(base, mesh):
    limits = replace(base.rollout, history="replace", turn_tokens=112)
    with jax.set_mesh(mesh("1x1")):
        parts = World(replace(base, rollout=limits), mesh("1x1"))
        step = parts.play()
        content, used = parts.experience(step, np.ones(len(step.paid), bool))
        found = parts.learner.reference(parts.state.params, parts.state.frozen, put_batch(content, parts.mesh), used)
    for p in step.paid:
        assert [int(e.loss_mask.sum()) for e in p.played.parts] == list(p.played.lengths)
        assert all((e.visual_index >= 0).any() and not e.positions[0].any() for e in p.played.parts)
    mask = content.batch.loss_mask
    assert set(content.batch.segments[mask]) == {1, 2}
    np.testing.assert_allclose(np.asarray(found.reference)[mask], content.old[mask], atol=LOG_PROB)


def test_only_micro_batches_with_something_to_learn_are_looked_at(parts, step):
    """Rows that are never read may hold anything: numbers that are none would spoil every sum."""
    useful = np.zeros(len(step.paid), bool)
    useful[[2, 3, 8, 9]] = True
    content, used = parts.experience(step, useful)
    assert used == 1
    unread = np.arange(len(useful)) % parts.config.grpo.accumulate >= used
    wanted = sum(sum(p.played.lengths) for p, u in zip(step.paid, useful, strict=True) if u)
    assert content.batch.loss_mask[~unread].sum() == content.batch.loss_mask.sum() == wanted
    spoilt = replace(
        content, old=np.where(unread[:, None], np.nan, content.old), advantages=np.where(unread, np.nan, content.advantages)
    )
    with jax.set_mesh(parts.mesh):
        copied = jax.tree.map(lambda x: x.copy(), parts.state)
        batch = parts.learner.reference(parts.state.params, parts.state.frozen, put_batch(spoilt, parts.mesh), used)
        state, metrics = parts.learner.update(copied, batch, used)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state.params))
    assert np.isfinite(float(metrics["grpo/loss"]))
    changed = [
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(parts.state.params), strict=True)
    ]
    assert any(changed)


def test_a_step_without_any_variance_is_counted_and_changes_nothing(parts, step):
    equal = [replace(p, reward=replace(p.reward, total=1.0)) for p in step.paid]
    with jax.set_mesh(parts.mesh):
        state, metrics = parts.learner.learn(parts.state, replace(step, paid=equal))
    assert metrics["grpo/groups_without_variance"] == parts.config.grpo.prompts
    assert "grpo/loss" not in metrics
    assert int(state.step) == int(parts.state.step) + 1
    assert state.params is parts.state.params


@pytest.fixture(scope="module")
def spread(base, mesh):
    """The parts on eight devices, where the rollout is one program that calls the host in its middle."""
    config = replace(base, mesh="8x1", rollout=replace(base.rollout, mode="callback", deadline=DEADLINE))
    with jax.set_mesh(mesh("8x1")):
        return World(config, mesh("8x1"))


def test_eight_devices_and_the_callback_give_what_one_device_gives(parts, spread, reference):
    step = spread.play()
    with jax.set_mesh(spread.mesh):
        copied = jax.tree.map(lambda x: x.copy(), spread.state)
        found = Summary.of(step, spread.config.grpo.group).metrics() | spread.learner.learn(copied, step)[1]
    expected = read_metrics(reference[0])[0]
    groups = [as_record(step, n, spread.config.grpo.group) for n in range(len(step.episodes))]
    assert json.loads(json.dumps(groups)) == rollouts(reference[0])[0]
    for name in ("reward/total", "tool/ok", "rollout/tokens", "grpo/groups_without_variance"):
        assert found[name] == expected[name]
    for name in ("grpo/loss", "grpo/kl", "grpo/grad_norm", "grpo/entropy", "policy/sampler_trainer_kl"):
        assert np.isclose(found[name], expected[name], atol=MESH_LOSS), name
    assert min(found[f"time/{p}"] for p in ("encode", "prefill", "decode", "tools")) > 0


def well(call: Call) -> None:
    """Explains, and darkens every clip."""
    clips = {r.clip for r in call.requests if r.clip}
    if missing := clips - set(call.peer.clips):
        refusal = Refusal(error="missing", message="upload", missing=tuple(missing))
        call.send(404, refusal.model_dump_json().encode())
        return
    dark = np.zeros((FRAMES, render.SIZE, render.SIZE, 3), np.uint8)
    rows = [answer(r, annotated=r.clip and DARK, explanation="- kaba: bow") for r in call.requests]
    call.send(200, body(rows, {DARK: dark} if clips else {}))


def misshapen(call: Call) -> None:
    small = np.zeros((FRAMES, 8, 8, 3), np.uint8)
    call.send(200, body([answer(r, annotated=DARK) for r in call.requests], {DARK: small}))


def slow(call: Call) -> None:
    time.sleep(3 * DEADLINE)


def of_others(call: Call) -> None:
    call.send(200, body([answer(r.model_copy(update={"episode": "x"})) for r in call.requests], {}))


def test_a_server_answers_the_rows_of_all_devices(spread, mesh):
    with peer(well) as server:
        step = spread.play(ServedTools(ToolsClient(server.url)))
    assert set(step.counts.statuses) == {"ok"}
    assert server.calls <= 2 * 8  # a shard calls once, and once more after it has uploaded its clips
    poses = [p for p in step.paid if p.played.decision.pose_estimation]
    assert poses
    for p in poses:
        patches = p.played.parts[0].patches
        assert not patches[len(patches) // 2 :].any()
        assert p.reward.tool == p.reward.accuracy


@pytest.mark.parametrize(
    ("respond", "statuses"),
    [
        (None, {"unavailable"}),
        (slow, {"timeout"}),
        (Call.hang_up, {"unavailable", "timeout"}),
        (lambda call: call.handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{"), {"unavailable", "timeout"}),
        (lambda call: call.send(200, b"no JSON at all"), {"malformed"}),
        (lambda call: call.send(500, b"{}"), {"error"}),
        (misshapen, {"malformed"}),
        (of_others, {"malformed"}),
    ],
    ids=["down", "slow", "closes", "cut off", "garbage", "broken", "another shape", "mixed up"],
)
def test_whatever_the_server_does_the_rollout_of_eight_devices_ends_in_time_and_pays_nothing(spread, respond, statuses):
    with peer(respond or well) as server:
        url = server.url if respond else "http://127.0.0.1:9"
        step = spread.play(ServedTools(ToolsClient(url)))
    assert step.seconds["tools"] < DEADLINE + GRACE + SLACK
    assert set(step.counts.statuses) <= statuses
    assert step.counts.statuses.total() == sum(len(p.played.decision.chosen()) for p in step.paid)
    assert not any(p.reward.tool for p in step.paid)
    shown = {spread.collector.player.chat.decode(p.played.parts[0].tokens) for p in step.paid if p.played.statuses}
    assert all(any(SENTENCES[status] in text for status in statuses) for text in shown)


@pytest.mark.parametrize(("prompts", "accumulate", "name"), [(4, 1, "grpo.prompts"), (8, 4, "grpo.accumulate")])
def test_rows_that_do_not_split_over_the_devices_are_refused(base, tmp_path, prompts, accumulate, name):
    grpo = replace(base.grpo, prompts=prompts, accumulate=accumulate)
    with pytest.raises(UserError, match=rf"{name} is .* splits rows over 8 devices"):
        reinforce(replace(base, mesh="8x1", grpo=grpo), tmp_path)


def test_a_run_whose_tools_fail_stops_between_steps_with_a_checkpoint_and_goes_on_when_they_work(base, reference, tmp_path):
    steps = []

    def failing(calls, deadline):
        steps.append(calls)
        if len(steps) < 3:
            return annotations(calls, deadline)
        return [Outcome(ToolResult(), dict.fromkeys(c.decision.chosen(), "unavailable")) for c in calls]

    with pytest.raises(UserError, match=r"tool calls of step 3 failed \(.* unavailable\).* run the same command again"):
        reinforce(base, tmp_path, failing)
    assert [p.name for p in (tmp_path / "grpo" / "checkpoints").iterdir() if p.name.isdigit()] == ["2"]
    last = read_metrics(tmp_path)[-1]
    assert (last["step"], last["tool/ok"], last["reward/tool"]) == (3, 0, 0)
    assert last["tool/unavailable"] > 0
    reinforce(base, tmp_path)
    assert measured(tmp_path, "reward/", "grpo/") == measured(reference[0], "reward/", "grpo/")


def test_the_temporal_bonus_is_paid_to_right_answers_of_groups_that_beat_shuffled_frames(parts, step):
    collector = parts.collector
    collector.config = replace(parts.config, reward=replace(parts.config.reward, temporal=0.3, temporal_ratio=0.0))
    try:
        paid = parts.play()
    finally:
        collector.config = parts.config
    for p, before in zip(paid.paid, step.paid, strict=True):
        assert p.played.turns == before.played.turns
        assert np.isclose(p.reward.total, before.reward.total + 0.3 * before.reward.accuracy)
    assert sum(p.reward.accuracy for p in paid.paid) > 0


def test_a_job_measures_every_phase_and_resumes_in_the_one_in_which_it_was_left(base, mesh, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "make_task", FewClips)
    config = replace(
        base,
        run_dir=str(tmp_path),
        sft=SftConfig(steps=2, batch_size=8),
        grpo=replace(base.grpo, steps=2, save_every=1),
        evaluation=EvaluationConfig(batch_size=2),
    )
    result = job.run(config, mesh("1x1"))
    assert list(result)[-3:] == ["base model", "after SFT", "after GRPO"]
    assert "after GRPO" in capsys.readouterr().out
    lines = read_metrics(tmp_path)
    assert {"sft/loss", "eval/base_top1", "reward/total"} <= {name for line in lines for name in line}
    assert lines[-1].keys() == {"step", "eval/base_top1"}
    shutil.rmtree(tmp_path / "grpo" / "checkpoints" / "2")
    assert job.run(config, mesh("1x1")) == result
    names = ("step", "sft/loss", "reward/", "grpo/", "eval/")
    again = measured(tmp_path, *names)
    assert again == [{k: v for k, v in line.items() if k.startswith(names)} for line in lines]
    _, restored = restore(str(tmp_path / "grpo"), config_of(str(tmp_path / "grpo"), "1x1", []), mesh("1x1"))
    _, before = restore(str(tmp_path), config_of(str(tmp_path), "1x1", []), mesh("1x1"))
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (restored, before)), strict=True))


needs_server = pytest.mark.skipif(
    importlib.util.find_spec("ultralytics") is None, reason="the tools server's extras are not installed"
)


@needs_server
def test_a_run_plays_with_the_server_that_it_starts_and_stops(base, tmp_path):
    glossary = {"kaba": "squat then bow = kaba", "tilo": "jump then clap = tilo"}
    config = replace(base, grpo=replace(base.grpo, steps=1))
    with serve(glossary, tmp_path / "tools") as url, open_tools(Config(tools=ToolsConfig("server", url)), tmp_path) as tools:
        reinforce(config, tmp_path / "run", tools)
    (line,) = read_metrics(tmp_path / "run")
    assert line["tool/ok"] > 0
    assert sum(line[f"tool/{s}"] for s in ("timeout", "error", "malformed", "unavailable")) == 0
    with (
        pytest.raises(UserError, match="no tools server answers"),
        open_tools(Config(tools=ToolsConfig("server", url)), tmp_path),
    ):
        pass
