"""Parts of the construction of dialogues: replies are read and written without loss, and every rule finds what it is for."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vstar_jax.config import resolve
from vstar_jax.data.assessment import RULES, Item, Rules, assess
from vstar_jax.data.lists import read_list
from vstar_jax.data.recorded import read_dialogues
from vstar_jax.dialogue import Decision, parse_decision, parse_reply, same_label
from vstar_jax.errors import UserError
from vstar_jax.synthesis import replies, report
from vstar_jax.synthesis.build import read_judgement
from vstar_jax.synthesis.endpoint import ReplyError
from vstar_jax.synthesis.prompts import TeacherPrompts
from vstar_jax.synthesis.records import Judgement, Lines, read_released, write_all, write_released
from vstar_jax.synthesis.report import assess_all

LABELS = ("brush hair", "pour", "shoot ball, standing", "wave")
SECOND: dict[str, Any] = {
    "sub_motions": [{"name": "right arm", "seen": "swings up and down"}, {"name": "torso", "seen": "stays still"}],
    "candidates": [
        {"label": "Wave", "score": 0.9, "because": "the right arm swings, as in a greeting"},
        {"label": "pour", "score": 0.2, "because": "nothing is held"},
    ],
    "decision": "the arm swings freely, so the first one",
    "answer": "wave",
}
FIRST = {"thought": "One person stands in a room; the joints would show the arm.", "tools": ["pose_estimation"]}


def item(**changes: Any) -> Item:
    first = replies.write_first(replies.read_first(json.dumps(FIRST)), "tags")
    second = replies.write_second(replies.read_second(json.dumps(SECOND), LABELS))
    made = Item("wave/clip_0042.avi", first, second, label="wave", labels=LABELS, tools={"pose_estimation": "ok"})
    return dataclasses.replace(made, persons=(1, 1), joints=17, **changes)


@pytest.mark.parametrize("dialect", ["tags", "hermes"])
def test_what_a_teacher_says_is_read_back_from_the_dialogue(dialect: Any) -> None:
    first = replies.write_first(replies.read_first(json.dumps(FIRST)), dialect)
    assert parse_decision(first, dialect) == Decision(pose_estimation=True)
    second = replies.read_second("Sure:\n```json\n" + json.dumps(SECOND) + "\n```", LABELS)
    text = replies.write_second(second)
    replies.check_written(second, text)
    reply = parse_reply(text)
    assert reply.well_formed
    assert reply.sub_motions == ("right arm", "torso")
    assert reply.candidates == ("wave", "pour")
    assert reply.scores == {"wave": 0.9, "pour": 0.2}
    assert reply.answer == "wave"


@given(st.text(max_size=40), st.text(max_size=40), st.sampled_from(LABELS), st.sampled_from(LABELS))
def test_no_words_of_a_teacher_break_the_dialogue(name: str, words: str, one: str, other: str) -> None:
    content = {
        **SECOND,
        "sub_motions": [{"name": name, "seen": words}],
        "candidates": [{"label": label, "score": 0.5, "because": words} for label in (one, other)],
        "decision": words,
        "answer": one,
    }
    try:
        second = replies.read_second(json.dumps(content), LABELS)
        text = replies.write_second(second)
        replies.check_written(second, text)
    except ReplyError:
        return
    reply = parse_reply(text)
    assert reply.well_formed
    assert same_label(reply.answer or "", one)
    assert len(reply.candidates) == 2
    assert len(reply.sub_motions) == 1


BAD_SECONDS: dict[str, Any] = {
    "no JSON": "I cannot help with that.",
    "a list": "[1]",
    "an answer of another list": json.dumps({**SECOND, "answer": "sing"}),
    "one candidate": json.dumps({**SECOND, "candidates": SECOND["candidates"][:1]}),
    "a candidate twice": json.dumps({**SECOND, "candidates": SECOND["candidates"][:1] * 2}),
    "a score above 1": json.dumps({**SECOND, "candidates": [{**SECOND["candidates"][0], "score": 9}, SECOND["candidates"][1]]}),
    "no observations": json.dumps({**SECOND, "sub_motions": []}),
    "a number for a text": json.dumps({**SECOND, "decision": 3}),
    "cut short": json.dumps(SECOND)[:-30],
    "deep": '{"a":' * 100_000,
}


@pytest.mark.parametrize("name", BAD_SECONDS)
def test_a_reply_of_no_use_is_said_to_be_one(name: str) -> None:
    with pytest.raises(ReplyError):
        replies.read_second(BAD_SECONDS[name], LABELS)


def test_a_judge_must_give_a_verdict_with_scores_and_reasons() -> None:
    said = {"keep": False, "scores": {"grounded": 0.1, "consistent": 1, "tools": 0.5}, "reasons": ["it sees a dog"]}
    assert read_judgement(json.dumps(said), "x") == Judgement("x", False, ("it sees a dog",), said["scores"])
    for bad in ({**said, "keep": "no"}, {**said, "reasons": []}, {**said, "scores": {"grounded": 2}}):
        with pytest.raises(ReplyError):
            read_judgement(json.dumps(bad), "x")


def test_a_sound_dialogue_is_kept() -> None:
    assert assess(item(), Rules()).problems == {}


def edited(old: str, new: str) -> Item:
    sound = item()
    assert old in sound.first + sound.second
    return dataclasses.replace(sound, first=sound.first.replace(old, new), second=sound.second.replace(old, new))


CORRUPTED: dict[str, tuple[Item, str]] = {
    "no answer": (edited("<answer>wave</answer>", ""), "parses"),
    "a tool that was not asked for": (item(), "parses"),
    "another answer": (edited("<answer>wave", "<answer>pour"), "answer"),
    "a label that is no candidate": (item(), "candidates"),
    "a candidate of no list": (edited("pour", "sing"), "candidates"),
    "a better candidate": (edited("0.20", "0.95"), "candidates"),
    "a part that was not observed": (edited("the first one", "as the left knee bends"), "grounded"),
    "a part that the comparison invents": (edited("as in a greeting", "and both feet jump"), "grounded"),
    "the label in the first reply": (edited("stands in a room", "gives a wave"), "leak"),
    "the label in the observations": (edited("swings up and down", "makes a wave"), "leak"),
    "the file's name": (edited("freely", "as in clip_0042"), "leak"),
    "two people": (edited("One person", "Two persons"), "counts"),
    "too many joints": (edited("nothing is held", "all 25 joints rest"), "counts"),
}
CORRUPTED["a tool that was not asked for"] = (
    dataclasses.replace(item(), tools={"person_detection": "ok"}),
    "parses",
)
CORRUPTED["a label that is no candidate"] = (
    dataclasses.replace(item(), second=item().second.replace("- wave", "- brush hair")),
    "candidates",
)


@pytest.mark.parametrize("name", CORRUPTED)
def test_each_rule_finds_what_it_is_for(name: str) -> None:
    broken, rule = CORRUPTED[name]
    assert rule in assess(broken, Rules()).problems


def test_every_rule_is_tested() -> None:
    assert {rule for _, rule in CORRUPTED.values()} == set(RULES)


def test_counts_are_not_held_against_a_dialogue_where_no_tool_looked() -> None:
    unseen = dataclasses.replace(edited("One person", "Two persons"), persons=None)
    assert assess(unseen, Rules()).kept


def test_names_of_motions_are_looked_for_as_a_whole() -> None:
    text = "<think>[1] - bow: first [2] Candidates: mazu, ruta [3] - mazu: {} score 1.0 [4] 1.0</think><answer>mazu</answer>"
    rules = Rules(motions=("bow", "lean left", "lean right"))
    plain = Item("clip-1", "<think>no</think>", "", label="mazu", labels=("mazu", "ruta"))
    for words, kept in (("bow yes", True), ("left of it bow yes", True), ("lean left yes", False)):
        assert assess(dataclasses.replace(plain, second=text.format(words)), rules).kept is kept


@given(st.text(max_size=300), st.text(max_size=300))
def test_rules_read_any_text(first: str, second: str) -> None:
    assess(item(), Rules())
    assess(dataclasses.replace(item(), first=first, second=second), Rules())


def test_the_report_says_what_was_dropped_and_why(tmp_path: Path) -> None:
    items = [item(), *(dataclasses.replace(bad, path=f"{n}/{bad.path}") for n, (bad, _) in enumerate(CORRUPTED.values()))]
    judged = {items[0].path: Judgement(items[0].path, False, ("it sees | a dog.",), {"grounded": 0.25})}
    summary = report.summarise(assess_all(items, judged, Rules()), judged)
    report.write(tmp_path, summary)
    assert summary["kept"] == 0
    assert summary["dropped"] == len(items)
    assert set(summary["reasons"]) == {*RULES, "judge"}
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(summary))
    assert "it sees \\| a dog." in (tmp_path / "report.md").read_text()


def test_what_is_written_is_what_training_reads(tmp_path: Path) -> None:
    made = item(explanation="- wave: a hand goes to and fro", description="A person greets.\u2028Then\x85none.")
    write_all(tmp_path / "kept.jsonl", [made])
    (found,) = read_dialogues(tmp_path / "kept.jsonl")
    names = ("path", "first", "second", "explanation", "description")
    assert [getattr(found, name) for name in names] == [getattr(made, name) for name in names]


def test_a_line_that_was_being_written_goes_and_the_others_stay(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "x.jsonl", Item)
    for number in range(3):
        lines.add(dataclasses.replace(item(), path=str(number)))
    whole = lines.path.read_bytes()
    for cut in (1, 40, len(whole) // 3):
        lines.path.write_bytes(whole[:-cut])
        again = Lines(lines.path, Item)
        assert list(again.found) == ["0", "1"]
        again.add(dataclasses.replace(item(), path="2"))
        assert Lines(lines.path, Item).found == lines.found
    lines.path.write_text("{}\n")
    with pytest.raises(UserError, match="line 1"):
        Lines(lines.path, Item)


def test_the_released_format_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "released.json"
    made = item(explanation="- wave: a hand goes to and fro")
    write_released(path, [made])
    (found,) = read_released(path)
    assert (found.path, found.label, found.first, found.second) == (made.path, made.label, made.first, made.second)
    (record,) = read_list(path).clips
    assert (record.path, record.label) == (made.path, made.label)
    path.write_text('[{"path": "x"}]')
    with pytest.raises(UserError, match="entry 1"):
        read_released(path)


RELEASED = Path(__file__).parents[2] / "shared" / "release_annotations" / "json_split" / "hmdb51" / "hmdb_exp_split_1.json"


@pytest.mark.skipif(not RELEASED.exists(), reason="needs the released annotation files")
def test_a_released_list_is_read_as_it_is() -> None:
    items = read_released(RELEASED)
    assert len(items) == 1530
    assert items[0].label == "brush hair"
    assert items[0].explanation


def test_prompts_are_checked(tmp_path: Path) -> None:
    prompts = TeacherPrompts.load(resolve("configs/synthesis/prompts.yaml"))
    assert '{"thought"' in prompts.first.format()
    broken = tmp_path / "prompts.yaml"
    broken.write_text(Path(resolve("configs/synthesis/prompts.yaml")).read_text().replace("{label}", "{path}"))
    with pytest.raises(UserError, match="placeholders"):
        TeacherPrompts.load(broken)
