"""Claims about the study: its rows, what they share, what is run, and the table, from results as runs leave them."""

import json
from pathlib import Path

import pytest

from vstar_jax.config import Config, parse
from vstar_jax.errors import UserError
from vstar_jax.evaluation.published import TABLE_3, TABLE_4
from vstar_jax.training import study
from vstar_jax.training.study import FOLDER, ROWS, Row, collect, result_of, row_config, write_report

FULL = ROWS[1]


def row(name: str) -> Row:
    return next(r for r in ROWS if r.name == name)


def test_every_file_is_a_row_and_every_row_of_the_papers_tables_is_there():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {r.name for r in ROWS}
    published = {r.method for r in (*TABLE_3, *TABLE_4)}
    told = {r.paper for r in ROWS if r.paper}
    assert published - told == {"RL with groups of 4"}
    assert told <= published
    assert row_config(FULL, 0, Path("runs")).grpo.group == 4


@pytest.mark.parametrize("r", ROWS, ids=lambda r: r.name)
def test_a_row_differs_from_the_full_one_and_splits_its_episodes_into_equal_micro_batches(r):
    config, full = row_config(r, 1, Path("runs")), row_config(FULL, 1, Path("runs"))
    assert (config == full) == (r is FULL)
    assert config.run_dir == f"runs/{r.name}/seed1"
    if config.grpo.steps:
        assert config.grpo.prompts * config.grpo.group // config.grpo.accumulate == 16


def test_rows_that_learn_the_same_by_sft_share_it_and_others_do_not():
    shared = {r.name: study._learned(row_config(r, 0, Path("runs")), Path("runs")) for r in ROWS if not r.counterfactual}
    full = shared["full"]
    same = {name for name, folder in shared.items() if folder == full}
    assert {"without_rl", "groups_of_2", "groups_of_6", "equal_weights", "without_detection", "without_description"} < same
    for name in ("without_tools", "without_sub_motions", "without_pose", "without_explanation", "assessed", "not_assessed"):
        assert name not in same
    assert study._learned(row_config(FULL, 1, Path("runs")), Path("runs")) != full


@pytest.mark.parametrize("r", [r for r in ROWS if r.counterfactual], ids=lambda r: r.name)
def test_the_evaluation_of_a_counterfactual_row_is_told_its_tools(r):
    config = row_config(r, 0, Path("runs"), ("--tools.url=http://127.0.0.1:8765",))
    told = parse(study.tool_flags(config), row_config(FULL, 0, Path("runs")))
    assert told.tools == config.tools != Config().tools


def finished(
    runs: Path, name: str, seed: int, base: float, novel: float, assessment: dict | None = None, flags: tuple[str, ...] = ()
) -> None:
    """Leaves a result as a run does."""
    summary = {"base_top1": base, "novel_top1": novel}
    content = (
        summary if row(name).counterfactual else {"base model": {"base_top1": 0.0, "novel_top1": 0.0}, "after GRPO": summary}
    )
    if assessment:
        content["assessment"] = assessment
    folder = runs / name / f"seed{seed}"
    study._given(row_config(row(name), seed, runs, flags))
    (folder / "result.json").write_text(json.dumps(content))


def test_the_table_tells_means_spreads_and_differences_by_seed_and_whether_signs_agree(tmp_path):
    for seed, novel in enumerate((0.6, 0.7)):
        finished(tmp_path, "full", seed, 0.8, novel)
        finished(tmp_path, "without_pose", seed, 0.7, novel - 0.1)
        finished(tmp_path, "groups_of_6", seed, 0.8, novel - 0.05)
        finished(tmp_path, "tools_blank", seed, 0.2, 0.1)
        finished(tmp_path, "assessed", seed, 0.6, 0.5, {"answer": [9, 10], "order": [0, 10], "none": [1, 80]})
        finished(tmp_path, "not_assessed", seed, 0.6, 0.4)
    report = tmp_path / "study.md"
    report.write_text("before\n<!-- study -->\nold\n<!-- end of study -->\nafter\n")
    write_report(collect([0, 1, 2], tmp_path, (), report), report)
    text = report.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| SFT and RL with tools | 2 | 80.0 ± 0.0 | 65.0 ± 7.1 |  |  |  |" in text
    assert "| without pose estimation | 2 | 70.0 ± 0.0 | 55.0 ± 7.1 | -10.0 ± 0.0 | -5.2 | yes |" in text
    assert "| groups of 6 | 2 | 80.0 ± 0.0 | 60.0 ± 7.1 | -5.0 ± 0.0 | +0.5 | no |" in text
    assert "| tools return nothing | 2 | 20.0 ± 0.0 | 10.0 ± 0.0 | -55.0 ± 7.1 |  |  |" in text
    assert "| faulty dialogues, assessed | 2 | 60.0 ± 0.0 | 50.0 ± 0.0 | -15.0 ± 7.1 |  |  |" in text
    assert "| faulty dialogues, not assessed | 2 | 60.0 ± 0.0 | 40.0 ± 0.0 | -10.0 ± 0.0 | -2.9 | yes |" in text
    assert "| order | 20 | 0 |" in text
    assert "Precision 0.900, recall 0.450." in text
    assert "without RL" not in text
    assert report.with_suffix(".png").stat().st_size > 0


def test_a_study_goes_on_from_the_record_where_the_folders_of_its_runs_are_not(tmp_path):
    report, runs = tmp_path / "docs" / "study.md", tmp_path / "runs"
    finished(runs, "full", 0, 0.8, 0.6)
    finished(runs, "assessed", 0, 0.6, 0.5, {"answer": [9, 10], "none": [1, 80]})
    finished(runs, "tools_off", 0, 0.1, 0.0)
    here = collect([0], runs, (), report)
    write_report(here, report)
    told = report.read_text()
    elsewhere = tmp_path / "elsewhere"
    assert collect([0], elsewhere, (), report) == here
    write_report(collect([0], elsewhere, (), report), report)
    assert report.read_text() == told
    # With the tools served elsewhere it is the same run; with other settings it is another.
    assert collect([0], elsewhere, ("--tools.url=http://127.0.0.1:8765",), report) == here
    assert collect([0], elsewhere, ("--grpo.steps=2",), report) == {}
    # A folder is newer than the record; what the record has of other runs stays.
    finished(elsewhere, "full", 0, 0.9, 0.7)
    finished(elsewhere, "full", 1, 0.9, 0.7)
    write_report(collect([1], elsewhere, (), report), report)
    runs = {(r["row"], r["seed"]): r["novel_top1"] for r in json.loads(report.with_suffix(".json").read_text())["runs"]}
    assert runs == {("full", 0): 0.7, ("assessed", 0): 0.5, ("tools_off", 0): 0.0, ("full", 1): 0.7}
    assert "| SFT and RL with tools | 2 | 90.0 ± 0.0 | 70.0 ± 0.0 |" in report.read_text()
    assert "| faulty dialogues, assessed | 1 | 60.0 | 50.0 | -20.0 |" in report.read_text()


@pytest.mark.parametrize(("recorded", "trained"), [((), ["train.py", "evaluate.py"]), (("tools_off",), [])])
def test_a_counterfactual_row_has_its_policy_trained_again_where_the_record_alone_knows_it(
    tmp_path, monkeypatch, recorded, trained
):
    report, runs = tmp_path / "study.md", tmp_path / "runs"
    for name in ("full", *recorded):
        finished(tmp_path / "gone", name, 0, 0.8, 0.6, flags=("--sft.steps=0",))
    write_report(collect([0], tmp_path / "gone", ("--sft.steps=0",), report), report)
    called = []

    def call(command, folder):
        called.append(command[0])
        name, seed = folder.relative_to(runs).parts
        finished(runs, name, int(seed.removeprefix("seed")), 0.8, 0.6, flags=("--sft.steps=0",))

    monkeypatch.setattr(study, "_call", call)
    study.run_study([FULL, row("tools_off")], [0], runs, ("--sft.steps=0",), report)
    assert called == trained


def test_a_run_made_with_other_settings_is_refused_and_nothing_is_written(tmp_path):
    report = tmp_path / "study.md"
    finished(tmp_path, "full", 0, 0.8, 0.6)
    with pytest.raises(UserError, match="made with other settings: choose another folder with --runs"):
        study.run_study([FULL], [0], tmp_path, ("--grpo.steps=2",), report)
    assert not report.exists()


def test_a_run_without_a_result_is_missing_and_the_last_phase_counts(tmp_path):
    assert result_of(FULL, 0, tmp_path) is None
    finished(tmp_path, "full", 0, 0.5, 0.25)
    assert result_of(FULL, 0, tmp_path) == {"base_top1": 0.5, "novel_top1": 0.25}
