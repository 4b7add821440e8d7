"""Claims about the host's side of a rollout: static shapes, a sentence for every failure, bounded time, never an exception."""

import importlib.util
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vstar_jax.batch import collate
from vstar_jax.config import Config, DataConfig, PolicyConfig, ToolsConfig, VideoConfig, resolve
from vstar_jax.data.chat import Chat
from vstar_jax.data.processor import process
from vstar_jax.data.task import Episode
from vstar_jax.dialogue import Decision, Prompts, ToolResult, first_messages
from vstar_jax.errors import UserError
from vstar_jax.tools.host import GRACE, Host, Layout, Outcome, annotations
from vstar_jax.tools.launch import open_tools, serve
from vstar_jax.tools.protocol import SENTENCES

DEADLINE, SLACK = 0.3, 1.0  # seconds; slack is for encoding the rows on a busy machine
TOKENS, WIDTH = 256, 40
EVERYTHING, NOTHING = Decision(True, True, True, True), Decision()
ROUNDS = int(os.environ.get("VSTAR_FUZZ_EXAMPLES", "200"))


@pytest.fixture(scope="module")
def chat():
    return Chat(resolve(PolicyConfig().path), VideoConfig())


@pytest.fixture(scope="module")
def prompts():
    return Prompts.load(Path("configs/prompts/stick_motion.yaml"))


def episode(number: int) -> Episode:
    frames = np.random.default_rng(number).integers(0, 255, (16, 112, 112, 3), np.uint8)

    def tools(asked: Decision) -> ToolResult:
        return ToolResult(255 - frames if asked.pose_estimation else None, "- kaba: jump then bow", None)

    return Episode(f"clip {number}", "base", frames, 8.0, ("kaba", "tilo"), "kaba", tools)


def host_of(chat, prompts, tools, replace_history=False, tokens=TOKENS, **options) -> Host:
    """A host that has begun episodes 0 to 3."""
    episodes = {n: episode(n) for n in range(4)}
    clips = [process(e.frames, e.fps, chat.video) for e in episodes.values()]
    first = [[chat.encode(first_messages(prompts), [clip], add_generation_prompt=True)] for clip in clips]
    host = Host(chat, prompts, "tags", replace_history, tools, DEADLINE, **options)
    host.begin(episodes, Layout(tokens, collate(first, (128,), (128,)).vision))
    return host


def replies(chat, decisions) -> tuple[np.ndarray, np.ndarray]:
    """What a policy would have written, as tokens [B, M] and lengths [B]."""
    ids = [chat.tokenizer.encode(d.tags()) if isinstance(d, Decision) else list(d) for d in decisions]
    tokens = np.zeros((len(ids), WIDTH), np.int32)
    for row, i in enumerate(ids):
        tokens[row, : len(i)] = i
    return tokens, np.asarray([len(i) for i in ids], np.int32)


def ask(host, chat, decisions, turn=1):
    numbers = np.arange(len(decisions), dtype=np.int32)
    return host(turn, numbers, *replies(chat, decisions), 100 + numbers)


def texts(chat, turn) -> list[str]:
    return [chat.decode(row[kept]) for row, kept in zip(turn.batch.tokens, turn.batch.segments > 0, strict=True)]


def test_a_turn_holds_what_the_tools_gave_and_goes_on_from_the_reply(chat, prompts):
    host = host_of(chat, prompts, annotations)
    turn = ask(host, chat, [Decision(pose_estimation=True), NOTHING, EVERYTHING, NOTHING])
    assert turn.batch.tokens.shape == (4, TOKENS)
    assert turn.batch.vision.patches.shape == (4, 128, 1176)
    for row, text in enumerate(texts(chat, turn)):
        asked = row in (0, 2)
        assert ("The pose is drawn." in text) == asked
        assert ("jump then bow" in text) == asked
        assert text.strip().endswith("assistant")
        assert turn.batch.vision.patches[row].any() == asked
        assert (turn.batch.visual_index[row] >= 0).sum() == 32 * asked
    filled = turn.batch.segments > 0
    first = turn.batch.positions[:, 0, 0]
    np.testing.assert_array_equal(first, 100 + np.arange(4))
    np.testing.assert_array_equal(turn.positions, np.where(filled, turn.batch.positions.max(-1), 0).max(-1) + 1)
    assert host.counts.statuses == {"ok": 5}
    assert host.exchanges[0, 1].decision == Decision(pose_estimation=True)


def raising(calls, deadline):
    raise ConnectionError("gone")


def hanging(calls, deadline):
    time.sleep(5)


def short(calls, deadline):
    return annotations(calls, deadline)[:-1]


def garbage(calls, deadline):
    return [None] * len(calls)


def endless(calls, deadline):
    return [Outcome(ToolResult(explanation="jump " * 10_000), {"noun_explanation": "ok"}) for _ in calls]


def misshapen(calls, deadline):
    return [Outcome(ToolResult(np.zeros((16, 56, 224, 3), np.uint8)), {"pose_estimation": "ok"}) for _ in calls]


def typeless(calls, deadline):
    return [Outcome(ToolResult(c.episode.frames.astype(float)), {"pose_estimation": "ok"}) for c in calls]


@pytest.mark.parametrize(
    ("tools", "status"),
    [
        (raising, "error"),
        (hanging, "timeout"),
        (short, "error"),
        (endless, "malformed"),
        (misshapen, "malformed"),
        (typeless, "malformed"),
    ],
)
@pytest.mark.parametrize("replace_history", [False, True])
def test_a_failure_is_a_sentence_a_count_and_no_delay(chat, prompts, tools, status, replace_history):
    host = host_of(chat, prompts, tools, replace_history)
    started = time.monotonic()
    turn = ask(host, chat, [EVERYTHING] * 4)
    assert time.monotonic() - started < DEADLINE + GRACE + SLACK
    for text in texts(chat, turn):
        assert SENTENCES[status] in text
        assert "kaba, tilo" in text
    assert set(host.counts.statuses) == {status}
    assert all(set(host.exchanges[n, 1].outcome.statuses.values()) == {status} for n in range(4))


def test_what_no_code_foresaw_still_gives_every_row_its_turn(chat, prompts):
    host = host_of(chat, prompts, garbage)
    turn = ask(host, chat, [EVERYTHING] * 4)
    assert all(SENTENCES["error"] in text for text in texts(chat, turn))
    assert host.counts.statuses == {"error": 4}


def test_what_breaks_in_the_middle_leaves_no_row_that_the_trainer_takes_for_another(chat, prompts):
    def half(calls, deadline):
        return [*annotations(calls[:2], deadline), None, None]

    host = host_of(chat, prompts, half)
    turn = ask(host, chat, [EVERYTHING] * 4)
    assert host.counts.statuses["error"] == 4
    for row in range(4):
        seen = turn.batch.tokens[row, turn.batch.segments[row] > 0]
        np.testing.assert_array_equal(host.shown(row, 1).tokens, seen)


def test_no_reply_of_any_tokens_raises(chat, prompts):
    host = host_of(chat, prompts, annotations)
    rng = np.random.default_rng(0)
    for turn in range(ROUNDS // 4):
        rows = [rng.integers(0, chat.tokenizer.vocab_size + 60, rng.integers(0, WIDTH)) for _ in range(4)]
        assert ask(host, chat, rows, turn).batch.tokens.shape == (4, TOKENS)
    assert set(host.counts.statuses) <= {"ok"}


def test_no_fault_of_the_tools_leaves_the_host(chat, prompts):
    """Whatever the tools do, short of hanging, every row gets a turn: an exception here would end a jitted program."""
    rng, odd = (
        np.random.default_rng(0),
        [None, 7, "text", b"", [], {}, Outcome(None, None), Outcome(ToolResult("x", 3, [], ()), {})],
    )

    def faulty(calls, deadline):
        kind = rng.integers(4)
        if kind == 0:
            raise [ConnectionError("gone"), ValueError("bad"), MemoryError(), KeyError(1), RecursionError(), OSError(5, "io")][
                rng.integers(6)
            ]
        if kind == 1:
            return odd[rng.integers(len(odd))]
        good = annotations(calls, deadline)
        if kind == 2:
            return [odd[rng.integers(len(odd))] if rng.random() < 0.5 else g for g in good]
        shape = tuple(rng.integers(0, 20, rng.integers(1, 5)))
        frames = np.zeros(shape, rng.choice([np.uint8, np.float32, np.int64]))
        return [
            Outcome(replace(g.result, frames=frames, explanation="\ud800<|im_end|>" * 3), {"pose_estimation": "ok"})
            for g in good
        ]

    host = host_of(chat, prompts, faulty)
    for turn in range(1, ROUNDS + 1):
        given = ask(host, chat, [EVERYTHING, Decision(noun_explanation=True)], turn)
        assert given.batch.tokens.shape == (2, TOKENS)
        assert given.active.all()


def test_asking_again_gives_the_same_turn_and_calls_no_tool_twice(chat, prompts):
    calls = []

    def counting(asked, deadline):
        calls.extend(asked)
        return annotations(asked, deadline)

    host = host_of(chat, prompts, counting)
    first, second = (ask(host, chat, [EVERYTHING, NOTHING]) for _ in range(2))
    np.testing.assert_array_equal(first.batch.tokens, second.batch.tokens)
    assert [c.episode.name for c in calls] == ["clip 0"]


def test_members_of_a_group_who_ask_the_same_are_answered_by_one_call(chat, prompts):
    calls = []

    def counting(asked, deadline):
        calls.extend(asked)
        return annotations(asked, deadline)

    host = host_of(chat, prompts, counting)
    one, other = episode(0), episode(1)
    host.begin({0: one, 1: one, 2: one, 3: other}, host.layout)
    turn = ask(host, chat, [EVERYTHING, EVERYTHING, Decision(noun_explanation=True), EVERYTHING])
    assert [(c.episode.name, len(c.decision.chosen())) for c in calls] == [("clip 0", 4), ("clip 0", 1), ("clip 1", 4)]
    assert host.counts.statuses == {"ok": 13}
    np.testing.assert_array_equal(turn.batch.tokens[0], turn.batch.tokens[1])


def test_rows_that_only_fill_up_call_no_tool_and_are_over(chat, prompts):
    host = host_of(chat, prompts, annotations)
    host.begin({0: episode(0)}, host.layout)
    turn = ask(host, chat, [EVERYTHING] * 4)
    assert turn.active.tolist() == [True, False, False, False]
    assert host.counts.statuses == {"ok": 4}


def test_from_the_second_reply_on_an_episode_is_over_with_an_answer(chat, prompts):
    host = host_of(chat, prompts, annotations)
    reply = chat.tokenizer.encode("<think></think><answer> kaba</answer>")
    assert ask(host, chat, [reply, EVERYTHING], turn=1).active.all()
    turn = ask(host, chat, [reply, EVERYTHING], turn=2)
    assert turn.active.tolist() == [False, True]
    assert host.counts.statuses == {"ok": 8}


def test_a_wish_for_a_tool_that_is_not_offered_is_not_heard(chat, prompts):
    host = host_of(chat, prompts, annotations, offered=("noun_explanation",))
    turn = ask(host, chat, [EVERYTHING, Decision(pose_estimation=True)])
    assert host.counts.statuses == {"ok": 1}
    assert not turn.batch.vision.patches.any()
    assert "jump then bow" in texts(chat, turn)[0]
    assert "jump then bow" not in texts(chat, turn)[1]


def test_replaced_history_starts_from_the_beginning_with_a_clip_in_any_case(chat, prompts):
    host = host_of(chat, prompts, annotations, replace_history=True)
    turn = ask(host, chat, [Decision(pose_estimation=True), NOTHING])
    assert (turn.batch.positions[:, 0] == 0).all()
    assert ((turn.batch.visual_index >= 0).sum(1) == 32).all()
    raw = process(episode(1).frames, 8.0, chat.video).patches
    np.testing.assert_array_equal(np.sort(turn.batch.vision.patches[1].ravel()), np.sort(raw.ravel()))


def test_a_turn_that_could_never_fit_is_refused_before_the_rollout(chat, prompts):
    with pytest.raises(UserError, match=r"raise rollout[.]turn_tokens"):
        host_of(chat, prompts, annotations, tokens=16)


def test_without_the_servers_extras_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    there = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ultralytics" else there)
    with (
        pytest.raises(UserError, match=r"ultralytics is not installed: pip install .*\[yolo\].*tools.source=annotations"),
        serve({}, tmp_path),
    ):
        pass


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nowhere"])
def test_an_address_without_a_server_is_refused_before_the_run(url, tmp_path):
    with pytest.raises(UserError, match=r"tools\.url"), open_tools(Config(tools=ToolsConfig("server", url)), tmp_path):
        pass


def test_a_server_of_stick_figures_is_not_started_for_videos_of_people(tmp_path):
    with (
        pytest.raises(UserError, match=r"not the people of hmdb51: .*--yolo\.detect.*tools\.url.*tools\.source=annotations"),
        open_tools(Config(data=DataConfig(dataset="hmdb51")), tmp_path),
    ):
        pass
