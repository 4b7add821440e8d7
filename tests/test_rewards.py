"""The reward of Eq. (6): each part by hand, and what no policy can gain by."""

import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vstar_jax.config import RewardConfig
from vstar_jax.dialogue import Decision, Dialect, Reply, parse_decision, parse_reply
from vstar_jax.rewards import Reward, length_bonus, score, sub_motion_reward, sub_motion_weights, temporal_bonus

EXAMPLES = settings(max_examples=int(os.environ.get("VSTAR_FUZZ_EXAMPLES", "200")), deadline=None)
"""The full size is 10000."""
ROUNDING = 1e-12  # float64 sums of a few weights

CONFIG = RewardConfig()
MOTIONS = ("squat", "bow", "clap", "jump", "lean left")
EXPLANATION = "squat then lean left then clap"
POSE = Decision(pose_estimation=True)
REPLY = (
    "<think>[1] Observed: - Squat: first - bow: second - lean  left: third [2] Candidates: zuko, mila "
    "[3] Comparison: - zuko: squat yes, bow yes, score 1.0 - mila: squat yes, score 0.5 [4] Decision: zuko</think>"
    "<answer>zuko</answer>"
)


def paid(text: str, label: str = "zuko", config: RewardConfig = CONFIG, decision: Decision = POSE, **statuses: str) -> Reward:
    return score(config, decision, statuses or {"pose_estimation": "ok"}, parse_reply(text), label, EXPLANATION)


def configs() -> st.SearchStrategy[RewardConfig]:
    switches = dict.fromkeys(("accuracy", "format", "tool", "sub_motion"), st.booleans())
    variants = {
        "weights": st.sampled_from(("exponential", "linear", "uniform")),
        "reference": st.sampled_from(("explanation", "own")),
    }
    return st.builds(RewardConfig, **switches, **variants)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("exponential", (8 / 15, 4 / 15, 2 / 15, 1 / 15)),
        ("linear", (4 / 10, 3 / 10, 2 / 10, 1 / 10)),
        ("uniform", (1 / 4,) * 4),
    ],
)
def test_weights_fall_with_rank_and_sum_to_one(weights, expected):
    config = RewardConfig(weights=weights)
    assert sub_motion_weights(4, config) == pytest.approx(expected, abs=ROUNDING)
    assert sub_motion_weights(1, config) == (1.0,)
    assert sub_motion_weights(0, config) == ()


def test_a_right_answer_earns_all_four_parts():
    """Squat and lean left, of ranks 1 and 3 of 3, stand in the explanation: (4 + 1) / 7."""
    assert paid(REPLY) == Reward(1.0, 1.0, 1.0, pytest.approx(5 / 7, abs=ROUNDING), pytest.approx(3 + 5 / 7, abs=ROUNDING))
    assert paid(REPLY, config=RewardConfig(weights="linear")).sub_motion == pytest.approx(4 / 6, abs=ROUNDING)
    assert paid(REPLY, config=RewardConfig(weights="uniform")).sub_motion == pytest.approx(2 / 3, abs=ROUNDING)


def test_a_wrong_answer_earns_its_format_alone():
    assert paid(REPLY, label="mila") == Reward(0.0, 1.0, 0.0, 0.0, 1.0)
    assert paid("zuko") == Reward(0.0, 0.0, 0.0, 0.0, 0.0)


def test_a_broken_format_costs_the_format_alone():
    whole, broken = paid(REPLY), paid(REPLY + "!")
    assert broken == replace(whole, format=0.0, total=whole.total - 1)


def test_labels_are_compared_as_the_released_scorer_does():
    assert paid(REPLY, label="ZU_ko\n").accuracy == 1.0
    assert paid(REPLY, label="zukos").accuracy == 0.0


@pytest.mark.parametrize("status", ["timeout", "error", "malformed", "unavailable"])
def test_a_failed_call_is_not_paid(status):
    assert paid(REPLY, pose_estimation=status).tool == 0.0
    both = Decision(pose_estimation=True, noun_explanation=True)
    assert paid(REPLY, decision=both, pose_estimation=status, noun_explanation="ok").tool == 1.0


def test_a_tool_that_was_not_asked_for_is_not_paid():
    assert paid(REPLY, decision=Decision()).tool == 0.0
    assert paid(REPLY, noun_explanation="ok").tool == 0.0
    assert score(CONFIG, POSE, {}, parse_reply(REPLY), "zuko", EXPLANATION).tool == 0.0


@pytest.mark.parametrize("part", ["accuracy", "format", "tool", "sub_motion"])
def test_a_part_that_is_switched_off_is_told_and_not_paid(part):
    whole, without = paid(REPLY), paid(REPLY, config=replace(CONFIG, **{part: False}))
    assert without == replace(whole, total=without.total)
    assert without.total == pytest.approx(whole.total - getattr(whole, part), abs=ROUNDING)


def test_sub_motions_are_looked_up_as_whole_words():
    for name, expected in [
        ("lean", 1.0),
        ("LEAN-left", 1.0),
        ("lean then", 0.0),
        ("ean", 0.0),
        ("left lean", 0.0),
        ("...", 0.0),
    ]:
        assert sub_motion_reward((name,), EXPLANATION, CONFIG) == expected, name


def test_words_that_name_no_motion_earn_nothing():
    assert sub_motion_reward(("then",), EXPLANATION, CONFIG) == 0.0
    assert sub_motion_reward(("then", "squat"), EXPLANATION, CONFIG) == pytest.approx(1 / 3, abs=ROUNDING)


def test_the_policy_cannot_pay_itself_unless_it_is_told_to():
    """Bow is no part of the action, but the policy's comparison says so."""
    own = paid(REPLY, config=RewardConfig(reference="own"))
    assert own.sub_motion == pytest.approx((4 + 2) / 7, abs=ROUNDING)
    assert score(CONFIG, POSE, {}, parse_reply(REPLY), "zuko", None).sub_motion == 0.0
    assert paid(REPLY.replace("[3]", ""), config=RewardConfig(reference="own")).sub_motion == 0.0


def test_the_temporal_bonus_needs_a_group_that_is_accurate_in_order():
    right, wrong = paid(REPLY), paid(REPLY, label="mila")
    config = RewardConfig(temporal=0.3)
    assert temporal_bonus([right, wrong, wrong, wrong, wrong], [right, wrong, wrong, wrong], config) == (0.3, 0, 0, 0, 0)
    assert temporal_bonus([right, wrong, wrong, wrong], [right, wrong], config) == (0, 0, 0, 0)
    assert temporal_bonus([wrong, wrong], [wrong, wrong], config) == (0, 0)
    assert temporal_bonus([right], [wrong], CONFIG) == (0,)


def test_the_length_bonus_is_for_right_answers_of_a_middling_length():
    right, wrong = paid(REPLY), paid(REPLY, label="mila")
    config = RewardConfig(length=0.2)
    assert [length_bonus(right, tokens, config) for tokens in (319, 320, 512, 513)] == [0, 0.2, 0.2, 0]
    assert length_bonus(wrong, 400, config) == 0
    assert length_bonus(right, 400, CONFIG) == 0


FRAGMENTS = [
    *(
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<ANSWER>",
        "[1]",
        "[2]",
        "[3]",
        " - ",
        ": ",
        ", ",
        "zuko",
        "mila",
        "0.5",
    ),
    *("squat", "bow", "lean left", "then", "\n", "<pose_estimation>yes</pose_estimation>", "<tool_call>", "</tool_call>"),
    *('{"name": "pose_estimation", "arguments": {}}', "[" * 500, "9" * 400, "{", "\ue000", "\u0130", "\ud800"),
]
ANY_TEXT = st.one_of(st.text(), st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join), st.just(REPLY))
STATUSES = st.dictionaries(st.sampled_from(("pose_estimation", "noun_explanation", "?")), st.sampled_from(("ok", "error", "")))


@EXAMPLES
@given(configs(), ANY_TEXT, ANY_TEXT, st.sampled_from(("tags", "hermes")), STATUSES, st.sampled_from(("zuko", "")))
def test_any_episode_earns_a_bounded_reward_and_little_without_a_right_answer(
    config: RewardConfig, first: str, second: str, dialect: Dialect, statuses: dict[str, str], label: str
):
    reward = score(config, parse_decision(first, dialect), statuses, parse_reply(second), label, EXPLANATION)
    assert reward.accuracy in (0, 1)
    assert reward.format in (0, 1)
    assert reward.tool in (0, 1)
    assert 0 <= reward.sub_motion <= 1
    assert 0 <= reward.total <= 4
    if not reward.accuracy:
        assert reward.tool == reward.sub_motion == 0
        assert reward.total <= 1


def reply_of(sub_motions: list[str]) -> Reply:
    return replace(parse_reply(REPLY), sub_motions=tuple(sub_motions))


NAMES = st.lists(st.sampled_from((*MOTIONS, "nod", "then", "raise left arm")), min_size=1, max_size=8)


@EXAMPLES
@given(configs(), NAMES, st.data())
def test_one_more_sub_motion_that_matches_never_costs(config: RewardConfig, names: list[str], data: st.DataObject):
    names = list(dict.fromkeys(names))
    at = data.draw(st.integers(0, len(names) - 1))
    matching = " then ".join(data.draw(st.lists(st.sampled_from(names), unique=True)))
    before = sub_motion_reward(names, matching, config)
    assert sub_motion_reward(names, f"{matching} then {names[at]}", config) >= before - ROUNDING


@EXAMPLES
@given(configs(), NAMES, st.data())
def test_repeating_a_sub_motion_changes_nothing(config: RewardConfig, names: list[str], data: st.DataObject):
    at = data.draw(st.integers(0, len(names) - 1))
    where = data.draw(st.integers(at + 1, len(names)))
    spelt = data.draw(st.sampled_from((str.upper, str.title, lambda name: name.replace(" ", "_") + "!")))
    repeated = [*names[:where], spelt(names[at]), *names[where:]]
    assert sub_motion_reward(repeated, EXPLANATION, config) == sub_motion_reward(names, EXPLANATION, config)


TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@EXAMPLES
@given(configs(), st.lists(st.tuples(st.sampled_from(TAGS), st.integers(0, len(REPLY))), min_size=1, max_size=4))
def test_doubled_and_nested_tags_of_a_reply_gain_nothing(config: RewardConfig, tags: list[tuple[str, int]]):
    text, whole = REPLY, paid(REPLY, config=config)
    for tag, at in tags:
        text = text[:at] + tag + text[at:]
    mangled = paid(text, config=config)
    assert mangled.format == 0
    assert mangled.accuracy <= whole.accuracy
    assert mangled.tool <= whole.tool
    assert mangled.total < whole.total or not config.format


@pytest.mark.parametrize("dialect", ["tags", "hermes"])
def test_doubled_and_nested_decisions_are_one_call(dialect: Dialect):
    tag = "tool_call" if dialect == "hermes" else "pose_estimation"
    once = POSE.tags(dialect)
    for text in (once * 2, f"<{tag}>{once}</{tag}>", f"<{tag}>{once}", f"{once}</{tag}>"):
        assert parse_decision(text, dialect) == parse_decision(once, dialect)


@EXAMPLES
@given(configs(), ANY_TEXT)
def test_text_after_the_answer_gains_nothing(config: RewardConfig, after: str):
    whole, longer = paid(REPLY, config=config), paid(REPLY + after, config=config)
    assert longer.format == (0 if after.strip() else 1)
    assert longer.accuracy == (parse_reply(REPLY + after).answer is not None)
    if longer.accuracy:
        assert longer == replace(whole, format=longer.format, total=longer.total)


@pytest.mark.parametrize("lost", ["</think>", "<think>"])
def test_text_after_the_answer_is_not_read_when_a_tag_was_forgotten(lost: str):
    text = REPLY.replace(lost, "").replace("[2]", "").replace("[3]", "")
    assert paid(text + " [1] - clap: x - jump: y") == paid(text)
