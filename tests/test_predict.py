"""One video file, named by a policy that has learnt one dialogue by heart, with a real tools server."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import wave
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from video_files import cut

# Looked for and not imported: only the tools server's own tests may import it, in isolation.
if importlib.util.find_spec("ultralytics") is None:
    pytest.skip("the tools server needs the extra yolo", allow_module_level=True)

from tool_servers import RunningServer

from vstar_jax import config as config_module
from vstar_jax.config import Config
from vstar_jax.data import video
from vstar_jax.data.chat import Chat
from vstar_jax.data.pipeline import train_batches
from vstar_jax.data.stick_motion import motions, render
from vstar_jax.data.stick_motion.dialogues import Cast, draw_cast, first_reply, second_reply, tool_result
from vstar_jax.dialogue import Prompts, ToolResult, assistant, first_messages, parse_decision, second_messages
from vstar_jax.errors import UserError
from vstar_jax.evaluation import predict, strip
from vstar_jax.tools.host import Outcome
from vstar_jax.training.job import load_policy
from vstar_jax.training.sft import train

ROOT = Path(__file__).parent.parent
STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predict")


@pytest.fixture(scope="module")
def cast() -> Cast:
    return draw_cast(motions.ACTIONS[3], 4, "eval", np.random.default_rng(3))


@pytest.fixture(scope="module")
def clip(folder: Path, cast: Cast) -> Path:
    """A cluttered clip of the action that the cast shows."""
    rng = np.random.default_rng(3)
    keypoints = motions.keypoints(cast.actions[cast.shown].sub_motions, render.FRAMES, rng)
    video.write(folder / "clip.mp4", render.render(keypoints, rng, "cluttered"), render.FPS)
    return folder / "clip.mp4"


@pytest.fixture(scope="module")
def meanings(folder: Path, cast: Cast) -> Path:
    pairs = (line.removeprefix("- ").split(": ") for line in cast.explanations.split("\n"))
    numbered = {str(n): f"{label}: {text}" for n, (label, text) in enumerate(pairs)}
    (folder / "all_rephrased.json").write_text(json.dumps(numbered))
    return folder / "all_rephrased.json"


@pytest.fixture(scope="module")
def run(folder: Path, clip: Path, cast: Cast, mesh: Any) -> Path:
    """A run directory whose policy has learnt the clip's dialogue."""
    run_dir = folder / "run"
    flags = [
        f"--run_dir={run_dir}",
        f"--sft.steps={STEPS}",
        f"--sft.save_every={STEPS}",
        "--sft.batch_size=2",
        "--data.labels=4",
    ]
    config = config_module.parse([*flags, "--grpo.steps=0", "--sft.learning_rate=2e-3"])
    chat = Chat(config_module.resolve(config.policy.path), config.video)
    prompts = Prompts.load(config_module.resolve(config.data.prompts))
    seen = predict.read_clip(clip, config)
    first, second = first_reply(cluttered=True), second_reply(cast, np.random.default_rng(0))
    rng = np.random.default_rng(3)
    keypoints = motions.keypoints(cast.actions[cast.shown].sub_motions, render.FRAMES, rng) * [render.SIZE, render.SIZE, 1]
    result = tool_result(parse_decision(first), seen.frames, keypoints, np.zeros((16, 1, 4)), cast.explanations)
    turns = [*first_messages(prompts), assistant(first), *second_messages(prompts, result, cast.names), assistant(second)]
    example = chat.encode(turns, [chat.clip(frames, seen.fps) for frames in (seen.frames, result.frames)])
    config_module.start_run(config)
    train(load_policy(config, mesh("1x1")), train_batches([0, 1], lambda *_: example, config), config, mesh("1x1"), run_dir)
    return run_dir


@pytest.fixture(scope="module")
def server(folder: Path, meanings: Path) -> Iterator[RunningServer]:
    running = RunningServer(folder, f"--glossary={meanings}")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def config(run: Path, server: RunningServer) -> Config:
    return config_module.parse([f"--tools.url={server.url}"], config_module.load(run / "config.yaml"))


@pytest.fixture(scope="module")
def watched(run: Path, config: Config, mesh: Any, clip: Path, cast: Cast, folder: Path) -> predict.Watched:
    return predict.watch(str(run), config, mesh("1x1"), clip, cast.names, folder / "tools")


def script(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """scripts/predict.py in a folder of its own."""
    environment = {**os.environ, "XLA_FLAGS": "", "OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    command = [sys.executable, str(ROOT / "scripts/predict.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_script_starts_a_server_for_invented_names_prints_the_episode_and_draws_it(folder, clip, run, cast, meanings):
    done = script(folder, clip, "--labels", ",".join(cast.names), "--checkpoint", run, "--meanings", meanings)
    assert done.returncode == 0, done.stderr
    name = cast.names[cast.shown]
    flat = " ".join(done.stdout.split())
    assert "First look the background is busy so the pose helps, the names are new" in flat
    assert "pose_estimation ok the clip with joints drawn on it" in flat
    assert all(f"{line}" in flat for line in cast.explanations.split("\n"))
    assert " ".join(f"{n}. {m}" for n, m in enumerate(cast.actions[cast.shown].sub_motions, 1)) in flat
    assert f"{name} 1 " in flat
    assert f"Answer {name}" in flat
    assert "tools server ready" in done.stderr  # and not in the report
    assert "tools server ready" not in done.stdout
    with Image.open(folder / "runs/predict/clip.png") as picture:
        assert picture.format == "PNG"


def test_the_episode_tells_what_was_asked_seen_weighed_and_answered(watched, cast, run):
    found = json.loads(json.dumps(watched.summary()))
    shown = cast.actions[cast.shown]
    assert found["label"] == found["answer"] == cast.names[cast.shown]
    assert found["well_formed"]
    assert found["labels"] == list(cast.names)
    assert found["sub_motions"] == list(shown.sub_motions)
    assert found["tools"] == {"pose_estimation": "ok", "noun_explanation": "ok"}
    assert found["explanation"] == cast.explanations
    assert found["description"] is None
    (best,) = [c for c in found["candidates"] if c["score"] == 1]
    assert best["name"] == cast.names[cast.shown]
    assert all(f"{move} yes" in best["comparison"] for move in shown.sub_motions)
    assert len(found["turns"]) == 2
    assert set(found["seconds"]) == {"load", "clip", "server", "compile", "policy", "tools"}
    assert all(seconds >= 0 for seconds in found["seconds"].values())


def test_the_picture_shows_frames_of_the_clip_above_what_the_tools_drew(watched):
    frames, drawn = watched.clip.frames, watched.drawn
    assert drawn.shape == frames.shape
    assert (drawn != frames).any()
    sheet = np.asarray(strip.draw(watched)).astype(int)

    def stands(frame: np.ndarray, column: int) -> list[int]:
        """The rows of the sheet at which the frame begins in a column of tiles."""
        tile = np.asarray(Image.fromarray(frame).resize((strip.TILE, strip.TILE), Image.Resampling.BICUBIC))
        left = strip.MARGIN + column * (strip.TILE + strip.GAP)
        place = sheet[:, left : left + strip.TILE]
        return [top for top in range(len(sheet) - strip.TILE) if (place[top : top + strip.TILE] == tile).all()]

    for column, number in ((0, 0), (strip.COLUMNS - 1, len(frames) - 1)):
        (above,), (below,) = stands(frames[number], column), stands(drawn[number], column)
        assert above < below
    undrawn = strip.draw(replace(watched, exchanges=()))
    assert len(sheet) - undrawn.height > strip.TILE


def test_an_answer_that_is_no_label_and_tools_that_fail_are_said(watched, cast, capsys):
    exchange = watched.exchanges[0]
    statuses = {"pose_estimation": "timeout", "noun_explanation": "malformed"}
    failing = replace(watched, labels=("run", "walk"), exchanges=(replace(exchange, outcome=Outcome(ToolResult(), statuses)),))
    assert failing.label is None
    predict.show(failing, "a policy")
    flat = " ".join(capsys.readouterr().out.split())
    assert "pose_estimation timeout The tools took too long and gave nothing." in flat
    assert "It may be longer than rollout.turn_tokens=192 holds." in flat
    assert f"Answer {cast.names[cast.shown]} (which is none of the labels)" in flat
    silent = replace(watched, exchanges=(), played=replace(watched.played, reply=replace(watched.played.reply, answer=None)))
    predict.show(silent, "a policy")
    flat = " ".join(capsys.readouterr().out.split())
    assert "Tools none were asked for" in flat
    assert "Answer no answer that can be read" in flat


def test_what_is_printed_holds_nothing_that_a_terminal_obeys(watched, capsys):
    evil = replace(watched.played.reply, sub_motions=("\x1b[2Jgone", "[red]not markup[/red]"), answer="\x1b]0;title\x07")
    predict.show(replace(watched, name="\x1b[31m.mp4", played=replace(watched.played, reply=evil)), "a policy")
    written = capsys.readouterr().out
    assert not set(written) & {"\x1b", "\x07"}
    assert "[red]not markup[/red]" in written


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["run", " "], "1 label is given"),
        ([], "no label is given"),
        (["run", "Brush Hair", "brush_hair"], "'Brush Hair' and 'brush_hair' are one and the same"),
        ([f"name {n}" for n in range(60)], r"needs \d+ tokens .* rollout.turn_tokens is 192 .* give fewer labels"),
    ],
)
def test_labels_that_cannot_be_chosen_from_are_refused(run, config, mesh, clip, folder, labels, says):
    with pytest.raises(UserError, match=says):
        predict.watch(str(run), config, mesh("1x1"), clip, labels, folder / "tools")


def test_a_file_without_pictures_is_refused(folder, config, clip):
    with pytest.raises(UserError, match=r"there is no file .*nothing\.mp4"):
        predict.read_clip(folder / "nothing.mp4", config)
    broken = folder / "broken.mp4"
    broken.write_bytes(clip.read_bytes())
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    for path in (cut(broken, 0.3), folder / "sound.wav"):
        with pytest.raises(UserError, match=f"{path.name} cannot be decoded"):
            predict.read_clip(path, config)


def test_meanings_go_to_a_server_that_is_started_and_to_no_other(run, config, mesh, clip, folder):
    with pytest.raises(UserError, match=r"has explanations of its own: .* or leave tools\.url out"):
        predict.watch(str(run), config, mesh("1x1"), clip, ["a", "b"], folder / "tools", {"a": "a move"})
    recorded = replace(config, data=replace(config.data, dataset="hmdb51"), tools=replace(config.tools, url=""))
    with pytest.raises(UserError, match="sees stick figures alone, not the people of hmdb51"):
        predict.watch(str(run), recorded, mesh("1x1"), clip, ["a", "b"], folder / "tools", {"a": "a move"})


def test_without_a_server_a_policy_for_recorded_videos_gets_the_meanings_alone(
    run, config, mesh, watched, cast, folder, capsys
):
    tools = replace(config.tools, url="", source="annotations")
    recorded = replace(config, data=replace(config.data, dataset="hmdb51"), tools=tools)
    meant = dict(line.removeprefix("- ").split(": ") for line in cast.explanations.split("\n"))
    video.write(folder / "slow.mp4", watched.clip.frames, video.SAMPLE_FPS)  # of recorded videos, as many frames are taken
    seen = predict.watch(str(run), recorded, mesh("1x1"), folder / "slow.mp4", cast.names, folder / "tools", meant)
    assert len(seen.clip.frames) == len(watched.clip.frames)
    assert seen.exchanges[0].outcome.result == ToolResult(explanation=cast.explanations)
    predict.show(seen, "a policy")
    assert "pose_estimation ok nothing is known" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--labels=run,walk"], "there is no trained policy in runs/default: train one with make train"),
        (["--labels=run,walk", "--checkpoint=nowhere"], "nowhere is neither a run"),
        (["--labels-file=nowhere"], "there is no text file nowhere"),
        (["--labels=run,walk", "--meanings=nowhere.json"], "there is no glossary at nowhere.json"),
        (["--labels=run,walk", "--out=strip.txt"], "give --out a path that ends in .png"),
    ],
)
def test_the_script_refuses_in_one_sentence_what_it_cannot_do(arguments, says, tmp_path, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setattr(sys, "argv", ["predict.py", str(clip), *arguments])
    with pytest.raises(UserError, match=says):
        importlib.import_module("predict").main()
    assert not list(tmp_path.iterdir())


def test_the_script_takes_what_was_trained_by_default_and_prints_json_alone(
    folder, run, server, config, clip, cast, monkeypatch, capsys
):
    home = folder / "home"
    (home / "runs").mkdir(parents=True)
    (home / "runs/default").symlink_to(run)
    (home / "labels.txt").write_text("\n".join(cast.names) + "\n")
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    flags = ["--labels-file=labels.txt", "--json", "--out=pictures/strip.png", f"--tools.url={server.url}"]
    monkeypatch.setattr(sys, "argv", ["predict.py", str(clip), *flags])
    importlib.import_module("predict").main()
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoint"] == "runs/default"
    assert found["label"] == cast.names[cast.shown]
    assert (home / found["strip"]).is_file()
