"""The benchmarks time two implementations of one piece of work, and report nothing when they are not of one."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tool_servers import RunningServer

from vstar_jax.benchmark import common, drivers, grpo, rollout, sft, tools, waiting
from vstar_jax.benchmark.size import Size
from vstar_jax.config import PolicyConfig, resolve
from vstar_jax.errors import UserError
from vstar_jax.tools.protocol import Person

SCRIPTS = Path(__file__).parents[1] / "scripts"
SLACK = 0.25  # of what was allocated; other parts of the process allocate a little meanwhile
TINY = Size.of("tiny")
SMALLEST = rollout.Workload(prompts=2, group=2, tokens=4)
LONGER = rollout.Workload(prompts=2, group=2, tokens=16)  # so that the members of a group are paid differently


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The measurements here are of the same few programs."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def hugging_face(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    import reference_hf

    return reference_hf


@pytest.fixture
def tokenizer() -> Path:
    return resolve(PolicyConfig().path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "glossary.json").write_text(json.dumps(dict(waiting.glossary())))
    running = RunningServer(folder, f"--glossary={folder / 'glossary.json'}")
    yield running
    running.stop()


def test_a_comparison_of_sft_reports_every_repeat_and_their_ratios(hugging_face, tmp_path):
    result = sft.measure_sft(TINY, batch_size=1, repeats=5, rival=hugging_face.HuggingFace)
    ours, theirs = (result["contenders"][name] for name in ("vstar_jax", "Hugging Face"))
    assert result["ratios"] == [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
    assert len(result["ratios"]) == 5
    assert ours["losses"][1] < ours["losses"][0]  # the steps do train
    assert ours["tokens_per_s"] == result["tokens"] / np.median(ours["seconds"])
    common.write(result, sft.report(result), tmp_path / "new")
    assert json.loads((tmp_path / "new/sft-tiny.json").read_text()) == result
    text = (tmp_path / "new/sft-tiny.md").read_text()
    assert "|  | vstar_jax | Hugging Face |" in text
    assert f"vstar_jax is {common.spread(result['ratios'], '.2f')} times as fast as Hugging Face" in text


def test_a_rival_that_trains_otherwise_is_refused_although_its_first_loss_agrees(hugging_face):
    def eager(path, dialogues, config, size):
        return hugging_face.HuggingFace(path, dialogues, replace(config, learning_rate=10 * config.learning_rate), size)

    with pytest.raises(UserError, match="disagree on the loss of step 2"):
        sft.measure_sft(TINY, batch_size=1, repeats=5, rival=eager)


def test_a_rival_that_sees_other_clips_is_refused_in_bfloat16_by_its_gradient_in_float32(hugging_face):
    def blind(path, dialogues, config, size):
        same = hugging_face.HuggingFace(path, dialogues, config, size)
        exact[same.name] = same.exact()
        return hugging_face.HuggingFace(path, [replace(d, patches=np.zeros_like(d.patches)) for d in dialogues], config, size)

    exact: dict[str, tuple[float, float]] = {}
    size = Size.of("tiny", dtype="bfloat16", param_dtype="bfloat16")
    with pytest.raises(UserError, match=r"disagree on the loss \(in float32\)"):
        sft.measure_sft(size, batch_size=1, repeats=5, rival=blind)
    dialogue = size.example(np.random.default_rng(0), size.dialogue, learned=size.dialogue[-1])
    ours = sft.Ours(size.random_policy(), [dialogue], sft.SFT, size)
    sft.check_agreement({ours.name: ours.exact(), **exact}, "float32", ("loss", "norm"))  # with its clips it is not


@pytest.mark.parametrize("dtype", sft.TOLERANCES)
@pytest.mark.parametrize("wide", [2.0, float("nan")])
def test_losses_that_disagree_are_refused(dtype: str, wide: float):
    what = ("loss of step 1", "loss of step 2")
    with pytest.raises(UserError, match="disagree on the loss of step 1"):
        sft.check_agreement({"a": [7.0, 6.9], "b": [7.0 * (1 + wide * sft.TOLERANCES[dtype]), 6.9]}, dtype, what)


def test_a_comparison_of_rollouts_is_of_the_same_greedy_tokens_and_counts_all_that_were_written(hugging_face):
    result = rollout.measure_rollout(TINY, SMALLEST, 5, hugging_face.Generation)
    ours, theirs = (result["contenders"][name] for name in ("vstar_jax", "Hugging Face"))
    assert result["ratios"] == [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
    assert ours["tokens_per_s"] == 16 / np.median(ours["seconds"])
    assert all(len(seconds) == 5 for seconds in result["phases"].values())
    for total, *parts in zip(ours["seconds"], *result["phases"].values(), strict=True):
        assert 0 < sum(parts) <= total
    text = rollout.report(result)
    assert f"vstar_jax is {common.spread(result['ratios'], '.2f')} times as fast as Hugging Face" in text
    json.dumps(result)


def test_a_rival_that_sees_other_clips_is_refused(hugging_face):
    def blind(path, prompts, work, size):
        return hugging_face.Generation(path, [replace(p, patches=np.zeros_like(p.patches)) for p in prompts], work, size)

    with pytest.raises(UserError, match="continue the prompts by other tokens"):
        rollout.measure_rollout(TINY, SMALLEST, 5, blind)


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        (np.arange(12).reshape(4, 3), r"wrote tokens \[4, 3\] and not \[4, 4\]"),
        (np.arange(8).reshape(2, 4).repeat(2, axis=0), "the same reply for all members"),
    ],
)
def test_who_writes_less_or_does_not_sample_is_refused(tokens, error):
    rollout.check_written({"good": np.arange(16).reshape(4, 4)}, SMALLEST)
    with pytest.raises(UserError, match=error):
        rollout.check_written({"bad": tokens}, SMALLEST)


def test_both_drivers_are_timed_on_the_same_episodes():
    result = drivers.measure_drivers(TINY, SMALLEST, 5)
    taken = result["seconds"]
    assert result["ratios"] == [b / a for a, b in zip(taken["callback"], taken["segmented"], strict=True)]
    assert len(result["ratios"]) == 5


def test_the_share_that_waits_for_tools_is_of_the_whole_rollout_and_falls_when_the_answers_are_known(server):
    client = server.client()
    result = waiting.measure_waiting(client, SMALLEST, 5)
    client.close()
    for name in ("cold", "warm"):
        phases = result[name]["phases"]
        for n, share in enumerate(result[name]["shares"]):
            assert share == phases["tools"][n] / sum(seconds[n] for seconds in phases.values())
    assert np.median(result["warm"]["phases"]["tools"]) < np.median(result["cold"]["phases"]["tools"])
    assert server.metric("tools_batch_frames_sum") == (5 + 1) * SMALLEST.prompts * tools.FRAMES


class Again:
    """A rival that is ours once more, from the same weights, with settings of its own."""

    name, compile_seconds = "again", 0.0

    def __init__(self, path, texts, config, tokenizer):
        from transformers import AutoTokenizer

        size = grpo.text_only(TINY)
        _, examples = grpo.prompts(AutoTokenizer.from_pretrained(str(tokenizer)), len(texts), size)
        self.ours = grpo.Ours(size.random_policy(), examples, config)

    def step(self) -> grpo.Taken:
        return self.ours.step()

    def tune(self) -> None:
        pass

    def device_peak(self) -> None:
        pass


def test_a_whole_step_of_grpo_is_timed_when_learning_from_what_the_rival_wrote_finds_its_gradients(tokenizer):
    result = grpo.measure_grpo(TINY, LONGER, 5, lambda *given: Again(*given, tokenizer), tokenizer)
    assert result["grad_norm_difference"] < grpo.TOLERANCE
    ours, again = (result["contenders"][name] for name in ("vstar_jax", "again"))
    assert result["ratios"] == [b / a for a, b in zip(ours["seconds"], again["seconds"], strict=True)]
    assert ours["tokens_per_s"] == LONGER.written / np.median(ours["seconds"])
    assert f"vstar_jax is {common.spread(result['ratios'], '.2f')} times as fast as again" in grpo.report(result)
    json.dumps(result)


def test_a_rival_that_updates_otherwise_is_refused_although_its_first_gradient_agrees(tokenizer):
    def rival(path, texts, config):
        other = replace(config, grpo=replace(config.grpo, learning_rate=1e3 * config.grpo.learning_rate))
        return Again(path, texts, other, tokenizer)

    with pytest.raises(UserError, match="disagree on the gradient of step 2"):
        grpo.measure_grpo(TINY, LONGER, 5, rival, tokenizer)


def test_tools_are_timed_against_the_same_model_in_this_process(server, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import reference_yolo

    from tools_server.yolo import WEIGHTS

    client = server.client()
    result = tools.measure_tools(client, 5, 2, 20, 2, "figures-pose", reference_yolo.InProcess(WEIGHTS["pose"]))
    client.close()
    cold, cached, theirs = (
        result["contenders"][n]["seconds"] for n in ("wire, cold", "wire, cached", "ultralytics in process")
    )
    assert np.median(cached) < np.median(cold)  # the cold clips were not known
    assert result["ratios"]["wire, cold"] == [b / a for a, b in zip(cold, theirs, strict=True)]
    assert result["cached_ms"]["p50"] <= result["cached_ms"]["p95"] <= result["cached_ms"]["p99"]
    assert "ultralytics in process" in tools.report(result)
    json.dumps(result)


def test_a_rival_that_finds_other_people_is_refused():
    def people(shift: float) -> tuple[tuple[Person, ...], ...]:
        keypoints = tuple((10.0 + shift, 20.0, 0.9) for _ in range(17))
        return ((Person(box=(1.0, 2.0, 30.0, 40.0), confidence=0.9, keypoints=keypoints),), ())

    assert tools.check_agreement("other", people(0.0), people(0.01)) == pytest.approx(0.01)
    for other in (people(1.0), people(0.0)[::-1], ((), ())):
        with pytest.raises(UserError, match="find other people"):
            tools.check_agreement("other", people(0.0), other)


def test_unseen_clips_differ_from_each_other_in_one_pixel_a_frame():
    (clip,) = tools.clips(1)
    (first,), (second,) = tools.unseen([clip], 1), tools.unseen([clip], 2)
    assert (first != second).any(axis=-1).sum() == len(clip)
    assert clip.shape == (tools.FRAMES, 112, 112, 3)


def test_peak_memory_sees_what_a_step_frees_before_it_ends():
    def allocate(mib: int) -> Callable[[], int]:
        return lambda: np.ones(mib * common.MIB, np.uint8).size

    common.peak_memory(allocate(100))
    for mib in (300, 100):
        assert common.peak_memory(allocate(mib)) == pytest.approx(mib, rel=SLACK)


def test_parts_take_turns():
    order: list[str] = []
    seconds = common.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b", "a", "b"]
    assert [len(s) for s in seconds.values()] == [2, 2]


def test_a_spread_needs_repeats():
    for measure in (
        lambda: sft.measure_sft(TINY, batch_size=1, repeats=2),
        lambda: rollout.measure_rollout(TINY, SMALLEST, 2),
        lambda: grpo.measure_grpo(TINY, SMALLEST, 2),
    ):
        with pytest.raises(UserError, match="repeats is 2: a spread needs at least 5"):
            measure()


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--what=disk"], "error: there is no benchmark 'disk': choose one of sft, rollout, grpo, tools, data, all.\n"),
        (
            ["--what=sft", "--against=tunix"],
            "error: there is no comparison of sft with 'tunix': give hf, or leave --against out.\n",
        ),
        (
            ["--what=tools", "--against=hf"],
            "error: there is no comparison of tools with 'hf': give ultralytics, or leave --against out.\n",
        ),
    ],
)
def test_what_does_not_exist_is_one_sentence(flags, error):
    done = subprocess.run([sys.executable, SCRIPTS / "benchmark.py", *flags], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, error)
