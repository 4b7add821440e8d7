"""From a folder of videos to a table: prepare, learn, evaluate by a protocol, be refused what leaks, go on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from video_files import cut, write_video

from vstar_jax import config as config_module
from vstar_jax.config import Config, DataConfig, EvaluationConfig, GrpoConfig, RolloutConfig, SftConfig, ToolsConfig
from vstar_jax.data.builders.videos import prepare
from vstar_jax.data.chat import Chat
from vstar_jax.data.datasets import make_task
from vstar_jax.dialogue import Decision
from vstar_jax.errors import UserError
from vstar_jax.evaluation.checkpoint import config_of, measure
from vstar_jax.evaluation.journal import Journal
from vstar_jax.evaluation.report import Prediction
from vstar_jax.training.job import run

ROOT = Path(__file__).resolve().parents[1]
POLICY = str(ROOT / "vstar_jax/assets/stick-motion-base")
PATIENCE = 240.0  # seconds
BASE, NOVEL = ("Jump_high", "wave"), ("mop floor", "kick")
DIALOGUE = {
    "first": f"<think>the arms are small</think>{Decision(noun_explanation=True).tags()}",
    "second": "<think>[1] Observed: - arm: up</think><answer>wave</answer>",
    "explanation": "- wave: moves a hand",
}


def clip(label: str, number: int) -> str:
    name = label.lower().replace(" ", "_")
    return f"{name}/Odd_#{number}_{name}_f_cm_np1_ba_med_{number}.avi"


TRAIN = [(clip(label, n), label) for n in range(3) for label in BASE]
BASE_VAL = [(clip(label, n), label) for n in (3, 4) for label in BASE]
NOVEL_VAL = [(clip(label, n), label) for n in range(2) for label in NOVEL]
BROKEN, MISSING = clip("kick", 0), clip("kick", 1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A small HMDB-51: real files under its names, its usual lists, and a training list that holds a novel test clip."""
    root = tmp_path_factory.mktemp("hmdb51")
    lists = root / "lists"
    lists.mkdir()
    for name, classes, clips in (
        ("fs_base_s1_train.txt", BASE, TRAIN),
        ("base_val.txt", BASE, BASE_VAL),
        ("novel_val.txt", NOVEL, NOVEL_VAL),
    ):
        (lists / name).write_text("".join(f"{path} {classes.index(label)}\n" for path, label in clips))
    for part, classes in (("base", BASE), ("novel", NOVEL)):
        lines = (f"{number},{label}\n" for number, label in enumerate(classes))
        (lists / f"hmdb_51_{part}_labels.csv").write_text("".join(["id,name\n", *lines]))
    leaking = [{"path": path, "solution": f"<answer>{label}</answer>"} for path, label in [*TRAIN, NOVEL_VAL[0]]]
    (lists / "rl.json").write_text(json.dumps(leaking))
    for number, (path, _) in enumerate([*TRAIN, *BASE_VAL, *NOVEL_VAL]):
        if path != MISSING:
            write_video(root / "videos" / path, 8, seed=number)
    cut(root / "videos" / BROKEN, 0.1)
    (root / "dialogues.jsonl").write_text("".join(json.dumps({"path": path, **DIALOGUE}) + "\n" for path, _ in TRAIN))
    prepare("hmdb51", root / "videos", lists, root / "data", workers=1)
    return root


@pytest.fixture(scope="module")
def config(prepared: Path) -> Config:
    return Config(
        run_dir=str(prepared / "run"),
        data=DataConfig(
            dataset="hmdb51",
            dir=str(prepared / "data"),
            train=("train_s1",),
            dialogues=str(prepared / "dialogues.jsonl"),
            prompts=str(ROOT / "configs/prompts/actions.yaml"),
            tokens=(512, 1024),
            patches=(128,),
            threads=1,
        ),
        sft=SftConfig(steps=1, batch_size=2, save_every=1),
        grpo=GrpoConfig(steps=0),
        rollout=RolloutConfig(max_new_tokens=(4,), turn_tokens=512),
        tools=ToolsConfig("annotations"),
        evaluation=EvaluationConfig(batch_size=2, clips_per_action=0),
    )


@pytest.fixture(scope="module")
def trained(config: Config, mesh):
    return run(config, mesh("1x1"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_recorded_dataset_is_learned_from_and_evaluated_by_its_protocol(trained, config: Config) -> None:
    for summary in (trained["base model"], trained["after SFT"]):
        assert (summary["base_clips"], summary["novel_clips"]) == (4, 4)
        assert (summary["base_unreadable"], summary["novel_unreadable"]) == (0, 2)
        assert (summary["base_chance"], summary["novel_chance"]) == (0.5, 0.5)
    assert trained["leakage"]["groups"]["novel"] == {
        "train_clips": 6,
        "eval_clips": 4,
        "shared_clips": 0,
        "shared_clips_by_path": 0,
        "shared_clips_by_content": 0,
        "shared_classes": 0,
        "train_clips_of_shared_classes": 0,
    }
    assert trained["leakage"]["groups"]["base"]["shared_classes"] == 2
    assert trained["leakage"]["notes"] == []
    assert json.loads((Path(config.run_dir) / "result.json").read_text())["leakage"] == trained["leakage"]
    told = {line["clip"]: line for line in lines(Path(config.run_dir) / "rollouts/sft.jsonl")}
    assert set(told) == {path for path, _ in [*BASE_VAL, *NOVEL_VAL]}
    for path in (BROKEN, MISSING):
        assert (told[path]["label"], told[path]["readable"], told[path]["correct"]) == ("kick", False, False)


def test_an_evaluation_stands_beside_the_papers_rows_with_its_training_source(trained, config: Config, mesh, tmp_path) -> None:
    checkpoint, other = config.run_dir, {"dataset": "hmdb51", "protocol": "base_to_novel", "base_top1": 1.0, "novel_top1": 0.5}
    (tmp_path / "result.json").write_text(json.dumps(other))
    found = measure(checkpoint, config_of(checkpoint, "2x1", [], "hmdb51"), mesh("2x1"), None, seeds=[str(tmp_path)])
    assert {key: found[key] for key in trained["after SFT"]} == trained["after SFT"]
    assert found["trained_on"] == "HMDB-51 train_s1"
    folder = Path(checkpoint) / "evaluation"
    assert len(lines(folder / "predictions.jsonl")) == 8
    base, novel = 50 * (found["base_top1"] + 1.0), 50 * (found["novel_top1"] + 0.5)
    text = (folder / "table.md").read_text()
    assert "| FROSTER (published) | base classes of each dataset |" in text
    assert f"| run | HMDB-51 train_s1 | - | - | - | {base:.1f} | {novel:.1f} |" in text
    assert "run: 2 clips could not be read and count as wrong" in text
    rows = json.loads((folder / "table.json").read_text())["rows"]
    assert rows[-1]["hmdb51"] == pytest.approx([base, novel, 2 * base * novel / (base + novel)])
    with pytest.raises(UserError, match="has no result of hmdb51, base_to_novel, base, novel"):
        measure(checkpoint, config_of(checkpoint, None, []), mesh("1x1"), None, seeds=[str(folder.parent)])


SENTENCE = (
    r"the training list holds 1 of the 4 clips of hmdb51 novel, such as mop_floor/\S+\.avi and 1 of its 2 classes "
    r"\(1 training clips, such as mop floor\): train without them, or set data\.allow_leakage=true to measure all the same"
)


def test_what_leaks_is_refused_before_any_work_and_allowed_on_request_which_the_results_say(
    config: Config, prepared: Path, mesh
) -> None:
    leaking = replace(config, run_dir=str(prepared / "leaking"), data=replace(config.data, train=("rl",)))
    with pytest.raises(UserError, match=SENTENCE):
        run(leaking, mesh("1x1"))
    assert not Path(leaking.run_dir).exists()
    settings = [f"--data.dir={config.data.dir}", "--data.tokens=512,1024", "--video.min_pixels=3136", "--video.max_pixels=3136"]
    settings += ["--rollout.turn_tokens=512", "--tools.source=annotations", "--data.train=rl"]
    settings += ["--evaluation.clips_per_action=1", "--rollout.max_new_tokens=2", "--data.threads=1"]
    with pytest.raises(UserError, match=SENTENCE):
        measure(POLICY, config_of(POLICY, None, settings, "hmdb51"), mesh("1x1"), str(prepared / "out"))
    assert not (prepared / "out").exists()
    allowed = config_of(POLICY, None, [*settings, "--data.allow_leakage"], "hmdb51")
    found = measure(POLICY, allowed, mesh("1x1"), str(prepared / "out"))
    (note,) = found["leakage"]["notes"]
    assert note.startswith("measured although it was trained on 1 of the 4 clips of hmdb51 novel")
    assert found["leakage"]["groups"]["novel"]["shared_clips"] == 1
    text = (prepared / "out/table.md").read_text()
    assert note in text
    assert "only the first 1 clips of each class" in text


# What a checkpoint is evaluated with


def test_a_model_directory_is_evaluated_as_the_shipped_config_of_the_dataset_says() -> None:
    found = config_of(POLICY, "8x1", [], "kinetics600")
    shipped = config_module.load(ROOT / "configs/kinetics600.yaml")
    assert found == replace(
        shipped, mesh="8x1", policy=replace(shipped.policy, path=POLICY), data=replace(shipped.data, train=())
    )
    assert config_of(POLICY, None, ["--data.train=rl"], "hmdb51").data.train == ("rl",)


def test_what_a_run_was_trained_on_stays_with_it_on_another_dataset(config: Config, tmp_path: Path) -> None:
    config_module.save(config, tmp_path / "config.yaml")
    found = config_of(str(tmp_path), None, ["--data.protocol=cross_dataset", "--data.train=full"], "ucf101")
    assert (found.data.dataset, found.data.protocol, found.data.train) == ("ucf101", "cross_dataset", ("hmdb51/train_s1",))
    assert (found.video, found.data.prompts) == (config.video, config.data.prompts)
    assert set(found.data.tokens) == {512, 1024, *config_module.load(ROOT / "configs/ucf101.yaml").data.tokens}


def test_lists_of_another_dataset_are_learned_from_and_compared(config: Config, prepared: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    entries = [{"path": path, "solution": f"<answer>{label}</answer>"} for path, label in BASE_VAL]
    (lists / "ucf_split_full.json").write_text(json.dumps(entries))
    prepare("ucf101", prepared / "videos", lists, config.data.dir, workers=1)
    data = replace(config.data, dataset="ucf101", protocol="cross_dataset", full=True, train=("hmdb51/train_s1",))
    task = make_task(replace(config, data=data), Chat(POLICY, config.video))
    assert task.groups == ("full",)
    assert [record.path for record in task.train_records()] == [path for path, _ in TRAIN]
    assert {c.split for c in task.train_clips()} == {"hmdb51/train_s1"}
    assert len(task.test_clips("full")) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "hmdb52"}, "data.dataset is 'hmdb52': choose stick_motion, hmdb51"),
        ({"dataset": "stick_motion", "protocol": "cross_dataset"}, "stick_motion has no protocol cross_dataset"),
        ({"dataset": "kinetics600"}, "kinetics600 has no protocol base_to_novel"),
        ({"dataset": "ssv2"}, "ssv2 is not prepared in"),
        ({"train": ("train_s3",)}, "has no list train_s3, only train_s1, base_val, novel_val, rl"),
        ({"dialogues": "nowhere.jsonl"}, "there is no file of dialogues nowhere.jsonl"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(config: Config, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(replace(config, data=replace(config.data, **change)), Chat(POLICY, config.video))


# Going on after a kill


def start(config: Config, out: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts/evaluate.py"), "--checkpoint", config.run_dir, "--out", str(out)]
    environment = {**os.environ, "XLA_FLAGS": ""}
    flags = ["--dataset", "hmdb51", "--protocol", "base_to_novel", "--prompts", config.data.prompts]
    flags += ["--evaluation.batch_size=1", "--rollout.max_new_tokens=32"]
    return subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)


def test_an_evaluation_killed_and_begun_again_plays_no_clip_twice_and_loses_none(trained, config: Config, tmp_path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(config, whole)
    assert process.wait(PATIENCE) == 0, process.stderr.read()
    first, path = start(config, killed), killed / "predictions.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not (path.exists() and path.read_text().count("\n") >= 2):
        assert first.poll() is None, first.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait(PATIENCE)
    before = path.read_text().splitlines()
    assert 2 <= len(before) < 8
    path.write_text("\n".join([*before, '{"clip": "half a li']))
    again = start(config, killed)
    _, printed = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, printed
    assert f"| {len(before)}/8 " in printed
    assert path.read_text().splitlines()[: len(before)] == before
    assert path.read_text() == (whole / "predictions.jsonl").read_text()
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, killed)]
    assert results[0] == results[1]


ABOUT = {"checkpoint": "a", "data.labels": 8}
PREDICTION = Prediction("a.avi", "base", "wave", "wave", True, {"pose_estimation": "ok"}, ("one", "two\n"), 8)


def test_a_journal_goes_on_only_with_the_same_evaluation(tmp_path: Path) -> None:
    journal = Journal(tmp_path, ABOUT)
    journal.add([PREDICTION, replace(PREDICTION, answer="")])
    assert Journal(tmp_path, ABOUT).predictions == journal.predictions == [PREDICTION, replace(PREDICTION, answer="")]
    with pytest.raises(UserError, match=r"an unfinished evaluation with data\.labels=8, but now it is 4: set it back"):
        Journal(tmp_path, {**ABOUT, "data.labels": 4})
    journal.finish({"base_top1": 0.5})
    assert Journal(tmp_path, {**ABOUT, "data.labels": 4}).predictions == []
    assert not (tmp_path / "result.json").exists()
