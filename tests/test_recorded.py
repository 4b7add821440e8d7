"""Recorded datasets as tasks: whole vocabularies, broken clips that stay, and prompts that know nothing of the clip."""

import json
import os
import re
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from video_files import ODD, cut, write_video

from vstar_jax.config import Config, DataConfig, EvaluationConfig, VideoConfig
from vstar_jax.data.builders.videos import prepare
from vstar_jax.data.chat import Chat
from vstar_jax.data.decoding import Decoder
from vstar_jax.data.leakage import check
from vstar_jax.data.protocols import DATASETS, EXPECTED, groups
from vstar_jax.data.recorded import Dialogue, Recorded, Source, read_dialogues
from vstar_jax.dialogue import Decision, Prompts, ToolResult, first_messages, second_messages
from vstar_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = sorted((ROOT / "configs/prompts").glob("*.yaml"))
DECISIONS = [Decision(*answers) for answers in product((False, True), repeat=4)]
EXAMPLES = int(os.environ.get("VSTAR_FUZZ_EXAMPLES", "20"))  # 10,000 is the full size
PROTOCOL = {
    "hmdb51": "base_to_novel",
    "ucf101": "cross_dataset",
    "kinetics400": "base_to_novel",
    "kinetics600": "cross_dataset",
    "ssv2": "base_to_novel",
}
LABELS = ("zorbing_downhill", "Qigong [slowly]", "MopVigorously")
FILES = {
    "hmdb51": f"{{label}}/{ODD}_zorbing_downhill_f_cm_np1_ba_med_{{n}}.avi",
    "ucf101": "{label}/v_{label}_g01_c{n:02d}.avi",
    "kinetics400": "val/-7axUnKiy{n:02d}_000023_000033.mp4",
    "kinetics600": "val/{label}/_B15AUZ4F{n:02d}_000001_000011.mp4",
    "ssv2": "9071{n:02d}.webm",
}
FIRST = f"<think>the arms are small</think>{Decision(pose_estimation=True, noun_explanation=True).tags()}"
SECOND = "<think>[1] Observed: - arm: up</think><answer>zorbing downhill</answer>"


def write_lists(dataset: str, folder: Path, names: list[str], paths: list[str]) -> None:
    folder.mkdir(parents=True)
    for name in names:
        expected = EXPECTED[dataset][name]
        entries = [{"path": p, "solution": f"<answer>{LABELS[n % len(LABELS)]}</answer>"} for n, p in enumerate(paths)]
        (folder / expected.files[0]).with_suffix(".json").write_text(json.dumps(entries))
        lines = [f"{entry['path']} {n % len(LABELS)}" for n, entry in enumerate(entries)]
        (folder / expected.files[0]).write_text(
            "\n".join(lines) if not expected.files[0].endswith(".json") else json.dumps(entries)
        )
        explained = {str(n): f"{label}: a person does thing number {n}" for n, label in enumerate(LABELS)}
        text = (
            json.dumps(explained)
            if expected.labels[0].endswith(".json")
            else "\n".join(f"{n},{x}" for n, x in enumerate(LABELS))
        )
        (folder / expected.labels[0]).write_text(text)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(ROOT / "vstar_jax/assets/stick-motion-base", VideoConfig())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, chat: Chat):
    """Every dataset, prepared from a small folder of real files: five clips, of which one is broken and one missing."""
    made = {}
    for dataset in DATASETS:
        root = tmp_path_factory.mktemp(dataset)
        wanted = groups(dataset, PROTOCOL[dataset])
        train = "train_s1" if PROTOCOL[dataset] == "base_to_novel" else next(iter(wanted.values()))
        paths = [FILES[dataset].format(label=re.sub(r"\W", "", LABELS[n % len(LABELS)]), n=n) for n in range(5)]
        for n, path in enumerate(paths[:4]):
            file = write_video(root / "videos" / path, 8, seed=n, codec="vp9" if path.endswith("webm") else "mpeg4")
            if n == 3:
                cut(file, 0.1)
        write_lists(dataset, root / "lists", [*wanted.values(), train], paths)
        prepare(dataset, root / "videos", root / "lists", root / "out", workers=1)
        made[dataset] = (root, Source(dataset, str(root / "out"), wanted, (train,)))
    return made


@pytest.fixture(scope="module")
def decoder():
    with Decoder(workers=1) as made:
        yield made


def make(tasks, chat: Chat, decoder: Decoder, dataset: str, clips_per_action: int = 0, **options) -> Recorded:
    data = DataConfig(prompts=str(ROOT / "configs/prompts/actions.yaml"), threads=1)
    config = Config(data=data, evaluation=EvaluationConfig(clips_per_action=clips_per_action))
    return Recorded(config, chat, tasks[dataset][1], decoder=decoder, **options)


def drawn(frames: np.ndarray, fps: float, labels, asked: Decision) -> ToolResult:
    """Tools that answer everything, from what they are given alone."""
    visual = asked.pose_estimation or asked.person_detection
    return ToolResult(
        frames=255 - frames if visual else None,
        explanation="\n".join(f"- {label}: moves" for label in labels) if asked.noun_explanation else None,
        description="first the left arm moves" if asked.video_explanation else None,
    )


@pytest.mark.parametrize("dataset", DATASETS)
def test_an_episode_offers_the_whole_vocabulary_and_the_answer_is_in_it(tasks, chat, decoder, dataset: str) -> None:
    task = make(tasks, chat, decoder, dataset)
    assert task.groups == tuple(groups(dataset, PROTOCOL[dataset]))
    for group in task.groups:
        episodes = [task.episode(record, np.random.default_rng(0)) for record in task.test_records(group)]
        assert [episode is None for episode in episodes] == [False, False, False, True, True]
        for episode in filter(None, episodes):
            assert episode.labels == ("zorbing downhill", "Qigong slowly", "Mop Vigorously")
            assert episode.answer in episode.labels
            assert (episode.group, episode.frames.shape[1:], episode.frames.dtype) == (group, (48, 64, 3), np.uint8)
            assert episode.tools(Decision(noun_explanation=True)) == task.tools(
                episode.frames, episode.fps, episode.labels, Decision(noun_explanation=True)
            )


def test_the_lists_explain_their_vocabulary_when_there_is_no_server(tasks, chat, decoder) -> None:
    task = make(tasks, chat, decoder, "kinetics600")
    asked = task.tools(np.zeros((2, 4, 4, 3), np.uint8), 2.0, task.test_records("split1").labels, DECISIONS[-1])
    assert asked.explanation == "\n".join(
        f"- {label}: a person does thing number {n}"
        for n, label in enumerate(("zorbing downhill", "Qigong slowly", "Mop Vigorously"))
    )
    assert (asked.frames, asked.description) == (None, None)


def test_clips_that_fail_stay_in_the_denominator(tasks, chat, decoder) -> None:
    task = make(tasks, chat, decoder, "hmdb51")
    records = task.test_records("novel")
    assert len(records) == 5
    assert [bool(record.problem) for record in records] == [False, False, False, True, True]
    assert len({record.name for record in records}) == 5
    assert len(task.train_records()) == 3
    assert len(make(tasks, chat, decoder, "hmdb51", clips_per_action=1).test_records("novel")) == 3


# Leaks


def texts(messages) -> str:
    return json.dumps(messages)


@pytest.mark.parametrize("prompts", PROMPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("dialect", ["tags", "hermes"])
@pytest.mark.parametrize("dataset", DATASETS)
def test_no_prompt_tells_one_clip_from_another(tasks, chat, decoder, dataset: str, dialect, prompts: Path) -> None:
    """Clips of different classes, names and folders get the same words, whatever tools they ask for."""
    task, written = make(tasks, chat, decoder, dataset, tools=drawn), Prompts.load(prompts)
    records = task.test_records(task.groups[0])
    episodes = [e for e in (task.episode(r, np.random.default_rng(0)) for r in records) if e is not None]
    assert len({episode.answer for episode in episodes}) == 3
    for asked in DECISIONS:
        said = {
            texts(first_messages(written, dialect)) + texts(second_messages(written, e.tools(asked), e.labels, dialect))
            for e in episodes
        }
        (words,) = said
        for record in records:
            assert_silent(words, record.path, str(record.video), record.digest)


def assert_silent(said: str, *secrets: str) -> None:
    """No secret, and no part of a path that is long enough to be more than chance, occurs in what is said."""
    for secret in secrets:
        for part in {secret, *secret.split("/"), Path(secret).stem}:
            if len(part) > 5:
                assert part not in said, part


names = st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="/"), min_size=6, max_size=30)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(folder=names, name=names, label=names, shown=st.integers(0, 2), asked=st.sampled_from(DECISIONS))
@pytest.mark.parametrize("dataset", DATASETS)
def test_whatever_a_clip_is_called_its_prompts_stay_the_same(
    tasks, chat, decoder, dataset, folder, name, label, shown, asked
) -> None:
    task = make(tasks, chat, decoder, dataset, tools=drawn)
    record = task.test_records(task.groups[0])[shown]
    renamed = replace(record, path=f"{folder}/{name}.avi", label=label, digest=name)
    plain, odd = (task.episode(r, np.random.default_rng(0)) for r in (record, renamed))
    assert plain is not None
    assert odd is not None
    for dialect in ("tags", "hermes"):
        said = [texts(second_messages(task.prompts, e.tools(asked), e.labels, dialect)) for e in (plain, odd)]
        assert said[0] == said[1]
    np.testing.assert_array_equal(plain.frames, odd.frames)


@pytest.mark.parametrize("dataset", DATASETS)
def test_training_prompts_tell_nothing_either(tasks, chat, decoder, dataset: str) -> None:
    plain = make(tasks, chat, decoder, dataset, tools=drawn)
    records = plain.train_records()
    dialogues = [Dialogue(r.path, FIRST, SECOND, explanation="what the names mean") for r in records]
    task = make(tasks, chat, decoder, dataset, tools=drawn, dialogues=dialogues)
    seen = []
    for record in task.train_records():
        example = task.example(record, np.random.default_rng(0))
        assert example is not None
        seen.append(example.tokens.tolist())
        assert_silent(task.chat.decode(example.tokens), record.path, str(record.video), record.digest)
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]


# Training and the guard


def test_a_dialogue_is_paired_with_its_clip_and_calls_the_visual_tools(tasks, chat, decoder) -> None:
    path = FILES["hmdb51"].format(label="zorbing_downhill", n=0)
    asked: list[Decision] = []

    def tools(frames, fps, labels, decision):
        asked.append(decision)
        return drawn(frames, fps, labels, decision)

    task = make(tasks, chat, decoder, "hmdb51", tools=tools, dialogues=[Dialogue(path, FIRST, SECOND, "what the names mean")])
    (record,) = task.train_records()
    example = task.example(record, np.random.default_rng(0))
    assert record.path == path
    assert example is not None
    said = task.chat.decode(example.tokens)
    assert FIRST in said
    assert SECOND in said
    assert "what the names mean" in said
    assert asked == [Decision(pose_estimation=True, noun_explanation=True)]
    clip = task.episode(record, np.random.default_rng(0))
    assert clip is not None
    assert len(example.patches) == 2 * len(chat.clip(clip.frames, clip.fps).patches)


def test_training_without_dialogues_is_one_sentence(tasks, chat, decoder) -> None:
    task = make(tasks, chat, decoder, "hmdb51")
    with pytest.raises(UserError, match="train_s1 have no dialogues to learn from"):
        task.example(task.train_records()[0], np.random.default_rng(0))


def test_the_guard_compares_the_lists_of_a_task(tasks, chat, decoder) -> None:
    task = make(tasks, chat, decoder, "hmdb51")
    report = check(task.train_clips(), task.test_clips("novel"))
    assert (len(report.same_path), len(report.same_content), report.hashed) == (5, 3, 3)


def test_dialogues_are_read_and_what_is_none_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "dialogues.jsonl"
    path.write_text(json.dumps({"path": "a.avi", "first": "1", "second": "2", "cost": 3}) + '\n{"path": "b.avi"}\n')
    with pytest.raises(UserError, match=r"dialogues\.jsonl, line 2: expected an object with the texts path, first, second"):
        read_dialogues(path)
    path.write_text(path.read_text().splitlines()[0])
    assert read_dialogues(path) == [Dialogue("a.avi", "1", "2")]
    with pytest.raises(UserError, match="there is no file of dialogues"):
        read_dialogues(tmp_path / "none.jsonl")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_dialogue_keeps_characters_that_end_a_line_elsewhere(tmp_path: Path, end: str) -> None:
    told = [
        Dialogue("a.mp4", FIRST, SECOND, description=f"A person greets.{mark}Then none.") for mark in "\u2028\u2029\x85\x0c"
    ]
    lines = (json.dumps(asdict(dialogue), ensure_ascii=False) + end for dialogue in told)
    (tmp_path / "dialogues.jsonl").write_bytes("".join(lines).encode())
    assert read_dialogues(tmp_path / "dialogues.jsonl") == told
