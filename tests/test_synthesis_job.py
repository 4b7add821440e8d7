"""The whole construction on StickMotion: real clips and tools, a teacher that answers over HTTP, the policy's own server."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policy_servers import MODEL, ROOT, PolicyServer
from tool_servers import Behaviour, completion, endpoint, fails, says, send
from video_files import write_video

from vstar_jax import config as config_module
from vstar_jax.config import Config
from vstar_jax.data.builders.videos import prepare
from vstar_jax.data.chat import Chat
from vstar_jax.data.datasets import make_task
from vstar_jax.data.recorded import read_dialogues
from vstar_jax.dialogue import parse_reply, same_label
from vstar_jax.errors import UserError
from vstar_jax.synthesis.build import Style
from vstar_jax.synthesis.endpoint import EndpointSettings
from vstar_jax.synthesis.job import HOPELESS, Job, run
from vstar_jax.synthesis.records import read_released

CLIPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("data")
    return config_module.parse(
        [f"--data.dir={folder}", "--data.clips_per_action=1", "--data.labels=4", "--tools.source=annotations"]
    )


def job(out: Path, url: str, judge: str = "", **settings: Any) -> Job:
    teacher = EndpointSettings(url, "teacher", concurrency=2, attempts=2, attempt_seconds=10.0, seconds=20.0)
    judged = EndpointSettings(url, judge, concurrency=2, attempts=2) if judge else None
    return Job(out, teacher, judged, **{"limit": CLIPS, **settings})


def words(body: dict[str, Any]) -> list[str]:
    """The texts of a request's messages."""
    texts = []
    for message in body["messages"]:
        content = message["content"]
        texts += [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    return texts


def teaches(right: Callable[[str], bool] = lambda label: True) -> Callable[[dict[str, Any]], str]:
    """A teacher that has seen the clip: it answers with the label that it was told, or where not `right` with another."""

    def reply(body: dict[str, Any]) -> str:
        texts = words(body)
        if len(body["messages"]) == 1 and "Judge" in texts[0]:
            scores = dict.fromkeys(("grounded", "consistent", "tools"), 0.5)
            return json.dumps({"keep": False, "scores": scores, "reasons": ["it says too little."]})
        if len(body["messages"]) == 1:
            return json.dumps({"thought": "One figure moves.", "tools": ["pose_estimation", "noun_explanation"]})
        found = re.search(r"calls it (.+?)\. If", texts[-1])
        listed = re.search(r"one a line:\n(.*?)\nTake", texts[-1], flags=re.DOTALL)
        assert found
        assert listed
        label, labels = found[1], listed[1].split("\n")
        other = next(name.strip() for name in labels if not same_label(name, label))
        best, next_best = (label, other) if right(label) else (other, label)
        return json.dumps(
            {
                "sub_motions": [{"name": "bow", "seen": "first"}],
                "candidates": [
                    {"label": best, "score": 0.9, "because": "it begins with the bow"},
                    {"label": next_best, "score": 0.1, "because": "it does not"},
                ],
                "decision": "the first one, by the bow",
                "answer": best,
            }
        )

    return reply


def test_every_clip_gets_a_dialogue_with_real_tools_that_training_reads(tmp_path: Path, config: Config) -> None:
    with endpoint(says(teaches())) as there:
        summary = run(config, job(tmp_path, there.url))
        sent = there.requests
    assert (summary["dialogues"], summary["kept"], summary["failed"]) == (CLIPS, CLIPS, {})
    kept = read_dialogues(tmp_path / "kept.jsonl")
    assert len({dialogue.path for dialogue in kept}) == CLIPS
    assert all(" then " in dialogue.explanation for dialogue in kept)
    assert [item.path for item in read_released(tmp_path / "released.json")] == [dialogue.path for dialogue in kept]
    lines = [json.loads(line) for line in (tmp_path / "dialogues.jsonl").read_text().splitlines()]
    assert all(line["tools"] == {"pose_estimation": "ok", "noun_explanation": "ok"} for line in lines)
    assert all(line["persons"] == [1, 1] and line["joints"] == 17 for line in lines)
    assert all(line["structure"]["answer"] == line["label"] for line in lines)
    second = [body for body in sent if len(body["messages"]) == 3]
    assert len(second) == CLIPS
    for body in second:
        clips = [p["video"] for m in body["messages"] for p in m["content"] if isinstance(p, dict) and p["type"] == "video"]
        assert len(clips) == 2  # the raw clip, and the one with the pose drawn on it
        assert clips[0] != clips[1]


def test_no_path_and_no_label_but_the_hint_reaches_the_teacher(tmp_path: Path, config: Config) -> None:
    def blind(body: dict[str, Any]) -> str:
        texts = words(body)
        if len(body["messages"]) == 1:
            return teaches()(body)
        labels = texts[-1].split("one a line:\n")[1].split("\nTake")[0].split("\n")
        return teaches()({**body, "messages": [*body["messages"], {"content": f"calls it {labels[0]}. If {texts[-1]}"}]})

    with endpoint(says(blind)) as there:
        run(config, job(tmp_path, there.url, style=Style(hint=False, pictures="images")))
        sent = [" ".join(words(body)) for body in there.requests]
    names = [json.loads(line)["path"] for line in (tmp_path / "dialogues.jsonl").read_text().splitlines()]
    assert names
    assert not any(name in text or "annotator" in text for text in sent for name in names)


def test_wrong_dialogues_are_dropped_and_the_judge_sees_the_others(tmp_path: Path, config: Config) -> None:
    with endpoint(says(teaches(lambda label: label[0] < "m"))) as there:
        summary = run(config, job(tmp_path, there.url, judge="judge"))
        judged = [body for body in there.requests if body["model"] == "judge"]
    lines = [json.loads(line) for line in (tmp_path / "dialogues.jsonl").read_text().splitlines()]
    wrong = [line["path"] for line in lines if not same_label(parse_reply(line["second"]).answer or "", line["label"])]
    assert summary["reasons"].get("answer", 0) == len(wrong)
    assert len(judged) == summary["judged"] == CLIPS - len(wrong)
    assert summary["kept"] == 0
    assert "it says too little." in (tmp_path / "report.md").read_text()


def test_what_failed_is_tried_again_and_nothing_is_made_twice(tmp_path: Path, config: Config) -> None:
    asked: Counter[str] = Counter()
    teacher = teaches()

    def sometimes(handler: Any, body: dict[str, Any]) -> None:
        asked["all"] += 1
        if asked["all"] % 5 < 2:
            fails(500)(handler, body)
        else:
            send(handler, completion(teacher(body)))

    with endpoint(sometimes) as there:
        first = run(config, job(tmp_path, there.url))
    before = (tmp_path / "dialogues.jsonl").read_bytes()
    assert first["dialogues"] + len(first["failed"]) == CLIPS
    with endpoint(says(teacher)) as there:
        second = run(config, job(tmp_path, there.url))
        assert len(there.requests) == 2 * len(first["failed"])
    assert (tmp_path / "dialogues.jsonl").read_bytes().startswith(before)
    assert second["dialogues"] == CLIPS
    with endpoint(says(teacher)) as there:
        run(config, job(tmp_path, there.url))
        assert not there.requests
    another = Job(tmp_path, EndpointSettings("http://127.0.0.1:1", "another"), limit=CLIPS)
    with pytest.raises(UserError, match="model=teacher"):
        run(config, another)


def test_the_facts_are_those_of_the_tools_server(tmp_path: Path, config: Config) -> None:
    pytest.importorskip("ultralytics")
    served = replace(config, tools=replace(config.tools, source="server"))
    with endpoint(says(teaches())) as there:
        summary = run(served, job(tmp_path, there.url, limit=1))
    assert (summary["dialogues"], summary["failed"]) == (1, {})
    (line,) = map(json.loads, (tmp_path / "dialogues.jsonl").read_text().splitlines())
    assert line["tools"] == {"pose_estimation": "ok", "noun_explanation": "ok"}
    assert line["persons"][1] >= 1
    assert line["joints"] == 17
    assert line["explanation"].count("\n") == 3


@pytest.mark.parametrize(("behave", "words"), [(fails(401), "the key"), (fails(500), f"{HOPELESS} clips in a row")])
def test_an_endpoint_that_cannot_help_ends_the_work_in_a_sentence(
    tmp_path: Path, config: Config, behave: Behaviour, words: str
) -> None:
    teacher = EndpointSettings("", "teacher", concurrency=4, attempts=1)
    with endpoint(behave) as there, pytest.raises(UserError, match=words):
        run(config, Job(tmp_path, EndpointSettings(**{**vars(teacher), "url": there.url})))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_at_any_time_goes_on(tmp_path: Path, config: Config, number: int) -> None:
    teacher = teaches()

    def slowly(handler: Any, body: dict[str, Any]) -> None:
        time.sleep(0.2)
        send(handler, completion(teacher(body)))

    with endpoint(slowly) as there:
        command = [sys.executable, str(ROOT / "scripts" / "synthesize.py"), "--url", there.url, "--model", "teacher"]
        command += ["--out", str(tmp_path), "--limit", "8", "--concurrency", "2", "--dataset=stick_motion"]
        command += [
            f"--data.dir={config.data.dir}",
            "--data.clips_per_action=1",
            "--data.labels=4",
            "--tools.source=annotations",
        ]
        process = subprocess.Popen(command, env={**os.environ, "XLA_FLAGS": ""}, stderr=subprocess.PIPE, text=True)
        lines = tmp_path / "dialogues.jsonl"
        until = time.monotonic() + 60
        while not lines.exists() or lines.read_bytes().count(b"\n") < 2:
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode in (128 + number, -number)
        assert "Traceback" not in said
        done = lines.read_bytes().count(b"\n")
        assert 2 <= done < 8
    with endpoint(says(teacher)) as there:
        made = job(tmp_path, there.url, limit=8, style=Style())
        summary = run(config, made)
        assert len(there.requests) == 2 * (8 - done)
    assert summary["dialogues"] == 8


def test_a_policy_of_ours_is_a_teacher_in_its_own_words(tmp_path: Path, config: Config) -> None:
    server = PolicyServer(tmp_path, "--new-tokens=64")
    try:
        teacher = EndpointSettings(f"{server.url}/v1", MODEL, concurrency=2, attempts=1, max_tokens=48)
        summary = run(config, Job(tmp_path / "out", teacher, style=Style(reply="dialogue"), limit=4))
    finally:
        server.close()
    assert summary["dialogues"] + len(summary["failed"]) == 4
    assert summary["usage"]["teacher"]["prompt_tokens"] > 0
    assert "500" not in summary["usage"]["teacher"]["tries"]
    assert not {"400", "connection", "malformed", "timeout"} & set(summary["usage"]["teacher"]["tries"])


def test_a_run_in_a_thread_needs_no_signals(tmp_path: Path, config: Config) -> None:
    found: list[Any] = []
    with endpoint(says(teaches())) as there:
        thread = threading.Thread(target=lambda: found.append(run(config, job(tmp_path, there.url, limit=1))))
        thread.start()
        thread.join(60)
    assert found[0]["dialogues"] == 1


def test_a_recorded_dataset_is_taught_and_then_learned_from(tmp_path: Path) -> None:
    labels = ("Jump_high", "wave")
    clips = [(f"{label.lower()}/Odd_#{n}_{label}_f_cm_np1_ba_med_{n}.avi", label) for n in range(2) for label in labels]
    (tmp_path / "lists").mkdir()
    for name in ("fs_base_s1_train.txt", "base_val.txt", "novel_val.txt"):
        (tmp_path / "lists" / name).write_text("".join(f"{path} {labels.index(label)}\n" for path, label in clips))
    for part in ("base", "novel"):
        lines = (f"{number},{label}\n" for number, label in enumerate(labels))
        (tmp_path / "lists" / f"hmdb_51_{part}_labels.csv").write_text("".join(["id,name\n", *lines]))
    for number, (path, _) in enumerate(clips):
        write_video(tmp_path / "videos" / path, 8, seed=number)
    prepare("hmdb51", tmp_path / "videos", tmp_path / "lists", tmp_path / "data", workers=1)
    settings = [f"--data.dir={tmp_path / 'data'}", "--data.dataset=hmdb51", "--data.train=[train_s1]", "--data.threads=1"]
    settings += ["--tools.source=annotations", "--data.prompts=configs/prompts/actions.yaml"]
    config = config_module.parse(settings)
    with endpoint(says(teaches())) as there:
        summary = run(config, job(tmp_path / "out", there.url))
        sent = [" ".join(words(body)) for body in there.requests]
    assert (summary["kept"], summary["failed"]) == (len(clips), {})
    assert not any("Odd_" in text or ".avi" in text for text in sent)
    learning = config_module.parse([*settings, f"--data.dialogues={tmp_path / 'out' / 'kept.jsonl'}"])
    task = make_task(learning, Chat(config_module.resolve(learning.policy.path), learning.video))
    assert len(task.train_records()) == len(clips)
    assert task.example(task.train_records()[0], np.random.default_rng(0)) is not None
