"""Claims about scores: the released matching rule, a denominator that keeps every clip, unrounded harmonic means."""

import json

import pytest

from vstar_jax.evaluation.report import Prediction, print_table, summarise, write_predictions


def prediction(group: str, label: str, answer: str, readable: bool = True, tools: tuple[str, ...] = ()) -> Prediction:
    return Prediction("clip", group, label, answer, True, tools, ("a", "b"), 8, readable)


def test_answers_match_whatever_their_case_blanks_and_underscores():
    assert prediction("base", "Shoot_Ball", " shoot ball\n").correct
    assert not prediction("base", "shoot ball", "shoot balls").correct
    assert not prediction("base", "shoot ball", "").correct


def test_clips_that_cannot_be_read_stay_in_the_denominator():
    summary = summarise([prediction("base", "a", "a"), prediction("base", "", "", readable=False)])
    assert summary["base_top1"] == 0.5
    assert (summary["base_clips"], summary["base_unreadable"]) == (2, 1)


def test_the_harmonic_mean_is_of_unrounded_means():
    predictions = [prediction("base", "a", "a")] * 2 + [prediction("base", "a", "b")]
    predictions += [prediction("novel", "a", "a")] + [prediction("novel", "a", "b")] * 2
    assert summarise(predictions)["harmonic_mean"] == pytest.approx(2 * (2 / 3) * (1 / 3), abs=1e-12)


def test_the_harmonic_mean_of_two_zeros_is_zero():
    assert summarise([prediction("base", "a", "b"), prediction("novel", "a", "b")])["harmonic_mean"] == 0.0


def test_replies_without_an_answer_are_counted_apart():
    summary = summarise(
        [prediction("base", "a", ""), prediction("base", "a", "b"), prediction("base", "a", "", readable=False)]
    )
    assert (summary["base_unparsable"], summary["base_unreadable"], summary["base_clips"]) == (1, 1, 3)


def test_tool_rates_are_shares_of_all_clips():
    summary = summarise([prediction("base", "a", "a", tools={"pose_estimation": "ok"}), prediction("base", "a", "a")])
    assert summary["tool_pose_estimation"] == 0.5


def test_the_table_names_chance(capsys):
    print_table({"after SFT": summarise([prediction("base", "a", "a"), prediction("novel", "a", "b")])}, "title")
    printed = capsys.readouterr().out
    assert "12.5 %" in printed
    assert "100.0 %" in printed
    assert "chance" in printed


def test_three_splits_stand_beside_each_other_with_their_spread(capsys):
    print_table({"ours": summarise([prediction(f"split{k}", "a", "ab"[k > 1]) for k in (1, 2, 3)])}, "title")
    printed = capsys.readouterr().out
    assert "33.3 ± 57.7 %" in printed
    assert "split3" in printed


def test_a_prediction_is_read_back_as_it_was_written():
    assert Prediction.parse(prediction("base", "a", "b", tools={"pose_estimation": "ok"}).line()) == prediction(
        "base", "a", "b", tools={"pose_estimation": "ok"}
    )


def test_predictions_are_one_json_line_a_clip_with_the_verdict(tmp_path):
    write_predictions(tmp_path / "p.jsonl", [prediction("base", "a", "a"), prediction("novel", "a", "b")])
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in lines] == [True, False]
    assert lines[0]["turns"] == ["a", "b"]
