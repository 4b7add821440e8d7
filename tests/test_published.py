"""The paper's rows are as printed, and their arithmetic holds."""

import re
from pathlib import Path

import pytest

from vstar_jax.data.splits import Spread
from vstar_jax.evaluation.published import ABLATION, BASE_TO_NOVEL, CROSS_DATASET, TABLE_1, TABLE_2, TABLE_3, TABLE_4
from vstar_jax.evaluation.tables import OwnRow, base_to_novel_table, cross_dataset_table, own_row, table_of

# All three numbers are printed with one decimal, so the mean of two rounded ones may be off by one in the last.
ROUNDING = 0.1
PAPER = Path(__file__).resolve().parents[2] / "shared/paper/video-star.txt"


@pytest.mark.parametrize("row", TABLE_1, ids=lambda row: row.method)
@pytest.mark.parametrize("dataset", BASE_TO_NOVEL)
def test_harmonic_means_follow_from_the_printed_means(row, dataset: str) -> None:
    assert row.rounding_error(dataset) < ROUNDING


def test_some_rows_are_those_of_the_paper() -> None:
    table = {row.method: row for row in TABLE_1}
    assert table["Video-STAR-7B"].results["kinetics400"] == (96.3, 97.2, 96.7)
    assert table["FROSTER"].results["ssv2"] == (18.3, 12.2, 14.6)
    cross = {row.method: row for row in TABLE_2}
    assert cross["Video-STAR-3B"].results["hmdb51/split"] == Spread(86.2, 0.2)
    assert cross["Video-STAR-3B"].results["hmdb51/full"] == Spread(83.5, None)
    assert "ucf101/full" not in cross["X-CLIP"].results
    assert [len(table) for table in (TABLE_1, TABLE_2, TABLE_3, TABLE_4)] == [12, 12, 12, 8]


def test_every_row_says_what_it_was_trained_on() -> None:
    assert {row.trained_on for row in TABLE_1 if row.method.startswith("Video-STAR")} == {"base classes of HMDB-51"}
    assert {row.trained_on for row in TABLE_1 if "CLIP" in row.method} == {"base classes of each dataset"}
    assert {row.trained_on for row in TABLE_2 if "CLIP" in row.method} == {"Kinetics-400"}
    assert all(row.trained_on for table in (TABLE_1, TABLE_2, TABLE_3, TABLE_4) for row in table)


def test_the_same_model_has_the_same_numbers_in_every_table() -> None:
    for method in ("Qwen2.5-VL-3B", "Video-STAR-3B"):
        results = [next(row for row in table if row.method == method).results for table in (TABLE_2, TABLE_3, TABLE_4)]
        for column in ABLATION:
            assert results[0][column] == results[1][column] == results[2][column]


@pytest.mark.skipif(not PAPER.is_file(), reason="the paper's text is not there")
def test_the_cells_are_copied_without_a_slip() -> None:
    lines = [line for line in PAPER.read_text().splitlines() if line.startswith("| ")]

    def cells(method: str, count: int) -> list[list[str]]:
        found = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        return [row[1:] for row in found if re.sub(r" \(.*", "", row[0]) == method and len(row) == count + 1]

    for row in TABLE_1:
        printed = [f"{value:.1f}" for dataset in BASE_TO_NOVEL for value in row.results[dataset]]
        assert printed in cells(row.method, 12), row.method
    for row in TABLE_2:
        found = [row.results.get(column) for column in CROSS_DATASET]
        printed = ["-" if s is None else f"{s.mean:.1f}" + ("" if s.std is None else f"{s.std:.1f}") for s in found]
        assert printed in cells(row.method, 5), row.method
    text = "\n".join(lines)
    for row in (*TABLE_3, *TABLE_4):
        assert " | ".join(f"{row.results[c].mean:.1f}{row.results[c].std:.1f}" for c in ABLATION) in text, row.method


# Tables


def test_our_rows_stand_under_the_published_ones_in_the_layout_of_table_1() -> None:
    seeds = [(0.61049, 0.4621), (0.61051, 0.4629), (0.61, 0.462)]
    row = OwnRow("ours", "base classes of HMDB-51", {"hmdb51": seeds}, notes=("evaluated on 3 clips that were trained on",))
    text, content = base_to_novel_table([row])
    lines = text.splitlines()
    assert lines[0].startswith("| method | trained on | K-400 base | K-400 novel | K-400 HM | HMDB-51 base |")
    assert lines[8] == (
        "| FROSTER (published) | base classes of each dataset | 77.8 | 64.3 | 70.4 | 74.1 | 58.0 | 65.1 | 95.3 | 80.0 | 87.0 | "
        "18.3 | 12.2 | 14.6 |"
    )
    assert lines[14] == "| ours | base classes of HMDB-51 | - | - | - | 61.0 | 46.2 | 52.6 |" + " - |" * 6
    assert lines[-1] == "ours: evaluated on 3 clips that were trained on"
    base, novel = sum(s[0] for s in seeds) / 3, sum(s[1] for s in seeds) / 3
    assert content["rows"][-1]["hmdb51"][2] == pytest.approx(200 * base * novel / (base + novel))


def test_table_2_has_means_and_the_named_spread() -> None:
    row = OwnRow("ours", "HMDB-51", cross_dataset={"ucf101/split": [0.482, 0.497, 0.467], "ucf101/full": [0.48]})
    text, content = cross_dataset_table([row])
    assert "| X-CLIP (published) | Kinetics-400 | - | 72.0 ± 2.3 | - | 44.6 ± 5.2 | 65.2 ± 0.4 |" in text
    assert "| ours | HMDB-51 | 48.0 | 48.2 ± 1.5 | - | - | - |" in text
    assert "sample standard deviation (n - 1)" in text
    assert content["rows"][-1]["ucf101/split"] == {"mean": pytest.approx(48.2), "std": pytest.approx(1.5)}


def test_results_go_to_the_table_and_column_of_their_protocol() -> None:
    base = own_row(
        "ours", "HMDB-51", "ucf101", [{"base_top1": 0.5, "novel_top1": 0.25}, {"base_top1": 0.7, "novel_top1": 0.25}]
    )
    assert base.base_to_novel == {"ucf101": [(0.5, 0.25), (0.7, 0.25)]}
    assert table_of(base)[1]["table"] == 1
    splits = [{f"split{k}_top1": k / 10 for k in (1, 2, 3)}, {f"split{k}_top1": k / 5 for k in (1, 2, 3)}]
    split = own_row("ours", "HMDB-51", "kinetics600", splits, ["a note"])
    assert split.cross_dataset == {"kinetics600/split": pytest.approx([0.15, 0.3, 0.45])}
    assert "| ours | HMDB-51 | - | - | - | - | 30.0 ± 15.0 |" in table_of(split)[0]
    assert "ours: a note" in table_of(split)[0]
    full = own_row("ours", "HMDB-51", "hmdb51", [{"full_top1": 0.835}])
    assert "| ours | HMDB-51 | - | - | 83.5 | - | - |" in table_of(full)[0]
