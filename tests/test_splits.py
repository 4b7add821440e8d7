"""The rules of the protocols, and the lists that they need as users have them."""

import json
import statistics
from fractions import Fraction
from pathlib import Path

import pytest
from annotations import FOLDER, needed
from hypothesis import given
from hypothesis import strategies as st

from vstar_jax.data.clips import ClipRecord, label_key
from vstar_jax.data.protocols import DATASETS, EXPECTED, ListFolder, groups
from vstar_jax.data.splits import base_to_novel, by_frequency, few_shot, harmonic_mean, of_classes, spread
from vstar_jax.errors import UserError

NAMES = """
brush_hair cartwheel catch chew clap climb climb_stairs dive draw_sword dribble drink eat fall_floor fencing flic_flac
golf handstand hit hug jump kick kick_ball kiss laugh pick pour pullup punch push pushup ride_bike ride_horse run
shake_hands shoot_ball shoot_bow shoot_gun sit situp smile smoke somersault stand swing_baseball sword sword_exercise
talk throw turn walk wave
"""
HMDB = NAMES.split()


def clips(counts: dict[str, int]) -> list[ClipRecord]:
    return [ClipRecord(f"{label}/{label}_{i}.avi", label) for label, count in counts.items() for i in range(count)]


def write(folder: Path, name: str, *lines: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n")


# Base and novel


def test_the_rarer_half_of_the_classes_is_novel() -> None:
    split = by_frequency(clips({"often": 9, "never": 1, "seldom": 2, "daily": 5}))
    assert (split.base, split.novel) == (("daily", "often"), ("never", "seldom"))


def test_of_equally_frequent_classes_the_cut_is_alphabetical_as_in_hmdb() -> None:
    split = by_frequency(clips(dict.fromkeys(reversed(HMDB), 70)))
    assert len(split.base) == 26
    assert list(split.novel) == HMDB[:25]
    assert set(split.base) == set(HMDB[25:])


def test_spellings_of_a_class_are_counted_together() -> None:
    found = by_frequency([ClipRecord("1", "jump rope"), ClipRecord("2", "JumpRope"), ClipRecord("3", "run")])
    assert (found.base, found.novel) == (("jump rope",), ("run",))


@needed
def test_the_rule_gives_the_released_classes_of_hmdb() -> None:
    lists = ListFolder(FOLDER, "hmdb51").read_all()
    train = [clip for clip in lists["split1"].clips for _ in range(70)]
    split = by_frequency(train)
    assert {label_key(x) for x in split.base} == {label_key(x) for x in lists["base_val"].labels}
    assert {label_key(x) for x in split.novel} == {label_key(x) for x in lists["novel_val"].labels}


# Shots


def test_a_seed_draws_the_same_shots_whatever_the_order_and_the_other_classes() -> None:
    train = clips({"a": 40, "b": 16})
    drawn = few_shot(train, 16, seed=1)
    assert len(drawn) == len(set(drawn)) == 32
    assert few_shot(reversed(train), 16, seed=1) == drawn
    assert few_shot(of_classes(train, ["a"]), 16, seed=1) == of_classes(drawn, ["a"])
    assert len({few_shot(train, 16, seed=seed) for seed in (1, 2, 3)}) == 3


def test_too_few_clips_for_the_shots_are_named() -> None:
    with pytest.raises(UserError, match="the class b has 15 training clips: 16 shots"):
        few_shot(clips({"a": 16, "b": 15}))


# Means


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_the_harmonic_mean_is_that_of_the_definition(base: int, novel: int) -> None:
    exact = Fraction(2 * base * novel, (base + novel) * 10_000) if base + novel else Fraction(0)
    assert harmonic_mean(base / 10_000, novel / 10_000) == pytest.approx(float(exact), abs=1e-15)


def test_means_are_rounded_last() -> None:
    # rounded to one decimal first, 91.9 and 2 * 92.1 * 91.7 / 183.8 would hide the difference of the third seed
    base, novel, mean = base_to_novel([(0.61049, 0.4621), (0.61051, 0.4629), (0.6100, 0.4620)])
    assert base == pytest.approx(0.61033, abs=1e-5)
    assert mean == pytest.approx(2 * base * novel / (base + novel), abs=1e-15)


def test_the_spread_is_the_sample_standard_deviation() -> None:
    found = spread([0.1, 0.2, 0.6])
    assert (found.mean, found.std) == (pytest.approx(0.3), pytest.approx(statistics.stdev([0.1, 0.2, 0.6])))
    assert spread([0.482, 0.497, 0.467]).text() == "48.2 ± 1.5"
    assert spread([0.482]).text() == "48.2"


# Protocols


def test_the_expected_counts_are_those_of_the_public_lists() -> None:
    for dataset, base, novel, base_val, novel_val in (
        ("kinetics400", 200, 200, 9_944, 9_933),
        ("hmdb51", 26, 25, 780, 750),
        ("ucf101", 51, 50, 2_088, 1_695),
        ("ssv2", 87, 87, 17_562, 7_215),
    ):
        lists = EXPECTED[dataset]
        assert {lists[f"train_s{seed}"].clips for seed in (1, 2, 3)} == {16 * base}
        assert (lists["base_val"].clips, lists["base_val"].classes) == (base_val, base)
        assert (lists["novel_val"].clips, lists["novel_val"].classes) == (novel_val, novel)
    assert [EXPECTED["ucf101"][f"split{k}"].clips for k in (1, 2, 3)] == [3_783, 3_734, 3_696]
    assert [EXPECTED["hmdb51"][f"split{k}"].clips for k in (1, 2, 3)] == [1_530] * 3
    assert (EXPECTED["hmdb51"]["full"].clips, EXPECTED["ucf101"]["full"].clips) == (5_100, 13_320)
    assert [EXPECTED["kinetics600"][f"vifi_split{k}"].clips for k in (1, 2, 3)] == [14_084, 13_978, 14_136]
    assert [EXPECTED["kinetics600"][f"val_split{k}"].clips for k in (1, 2, 3)] == [7_276, 7_226, 7_261]


def test_a_protocol_names_its_groups_and_the_variant_of_kinetics_600() -> None:
    assert groups("hmdb51", "base_to_novel") == {"base": "base_val", "novel": "novel_val"}
    assert groups("ucf101", "cross_dataset") == {f"split{k}": f"split{k}" for k in (1, 2, 3)}
    assert groups("ucf101", "cross_dataset", full=True) == {"full": "full"}
    assert groups("kinetics600", "cross_dataset", variant="vifi")["split2"] == "vifi_split2"
    for dataset, protocol, options in (
        ("kinetics600", "base_to_novel", {}),
        ("ssv2", "cross_dataset", {}),
        ("kinetics600", "cross_dataset", {"full": True}),
        ("kinetics600", "cross_dataset", {"variant": "test"}),
        ("hmdb51", "zero_shot", {}),
    ):
        with pytest.raises(UserError, match=r"base_to_novel has|val .7,276"):
            groups(dataset, protocol, **options)


def test_every_protocol_has_its_lists() -> None:
    for dataset in DATASETS:
        for protocol in ("base_to_novel", "cross_dataset"):
            for options in ({}, {"full": True}, {"variant": "vifi"}):
                try:
                    wanted = groups(dataset, protocol, **options)
                except UserError:
                    continue
                assert set(wanted.values()) <= set(EXPECTED[dataset])


def vifi(folder: Path) -> None:
    """A folder as ViFi-CLIP's repository has it, in small."""
    for short, name in (("hmdb", "hmdb_51"), ("ucf", "ucf_101")):
        base = folder / "datasets_splits/base2novel_splits" / f"{short}_splits"
        write(base, "base_val.txt", f"a_{short}_kick_ball_f_cm_np1_ba_med_3.avi 1", f"b_{short}.avi 0")
        write(base, "fs_base_s2_train.txt", f"c_{short}.avi 0")
        write(folder / "labels", f"{name}_base_labels.csv", "id,name", "0,kick ball", "1,kick")


def test_lists_are_found_by_their_usual_names_and_kept_apart_by_folder(tmp_path: Path) -> None:
    vifi(tmp_path)
    found = ListFolder(tmp_path, "ucf101").read_all()
    assert list(found) == ["train_s2", "base_val"]
    base = found["base_val"]
    assert [(c.path, c.label, c.split) for c in base.clips] == [
        ("a_ucf_kick_ball_f_cm_np1_ba_med_3.avi", "kick", "base_val"),
        ("b_ucf.avi", "kick ball", "base_val"),
    ]
    assert base.labels == ("kick ball", "kick")
    assert base.remark() == "expected 2,088 clips of 51 classes"
    assert ListFolder(tmp_path, "kinetics400").read_all() == {}


def test_swapped_labels_are_named_and_can_be_corrected(tmp_path: Path) -> None:
    vifi(tmp_path)
    found = ListFolder(tmp_path, "hmdb51").read("base_val")
    assert found is not None
    assert [clip.label for clip in found.mislabelled()] == ["kick"]
    assert [clip.label for clip in found.corrected().clips] == ["kick ball", "kick ball"]


def test_numbers_need_names(tmp_path: Path) -> None:
    write(tmp_path, "base_val.txt", "a.avi 0")
    with pytest.raises(UserError, match=r"numbers its classes.*ssv2_174_base_labels\.csv"):
        ListFolder(tmp_path, "ssv2").read("base_val")


def test_labels_of_another_release_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "val.json", json.dumps([{"path": "a.avi", "solution": "<answer>fly</answer>"}]))
    write(tmp_path, "train_rephrased.json", json.dumps({str(i): f"class {i}: c" for i in range(26)}))
    with pytest.raises(UserError, match="a clip of fly, which is none of the 26 classes"):
        ListFolder(tmp_path, "hmdb51").read("base_val")


def test_official_lists_of_hmdb_give_every_protocol(tmp_path: Path) -> None:
    for label in HMDB:
        for split in (1, 2, 3):
            marks = ["1"] * 70 + ["2"] * 30 + ["0"]
            write(tmp_path, f"{label}_test_split{split}.txt", *(f"{label}_{i}.avi {mark} " for i, mark in enumerate(marks)))
    found = ListFolder(tmp_path, "hmdb51").read_all()
    assert set(found) == set(EXPECTED["hmdb51"]) - {"rl"}
    assert not any(one.remark() for one in found.values())
    assert "not the published draw" in found["train_s1"].source
    assert len({found[f"train_s{k}"].clips for k in (1, 2, 3)}) == 3


def test_official_lists_of_ssv2_and_kinetics_give_base_and_novel(tmp_path: Path) -> None:
    counts = {"Holding [something]": 20, "Tearing [something]": 18, "Showing [something]": 17, "Hiding [something]": 16}
    entries = [{"id": f"{label}{i}", "template": label} for label, n in counts.items() for i in range(n)]
    write(tmp_path, "train.json", json.dumps(entries))
    write(tmp_path, "validation.json", json.dumps(entries))
    found = ListFolder(tmp_path, "ssv2").read_all()
    assert found["novel_val"].labels == ("Hiding something", "Showing something")
    assert {name: len(one.clips) for name, one in found.items()} == {
        "train_s1": 32,
        "train_s2": 32,
        "train_s3": 32,
        "base_val": 38,
        "novel_val": 33,
    }
    header = "label,youtube_id,time_start,time_end,split"
    rows = [f"{label},{n:07d}{i:04d},0,10,x" for n, label in enumerate(("run", "walk")) for i in range(16 + n)]
    write(tmp_path / "k400", "train.csv", header, *rows)
    write(tmp_path / "k400", "val.csv", header, *rows)
    kinetics = ListFolder(tmp_path / "k400", "kinetics400").read_all()
    assert (kinetics["base_val"].labels, kinetics["novel_val"].labels) == (("walk",), ("run",))


@needed
def test_the_released_folder_gives_the_protocols_of_hmdb() -> None:
    found = ListFolder(FOLDER, "hmdb51").read_all()
    assert not any(one.remark() for one in found.values())
    assert {"base_val", "novel_val", "split1", "split2", "split3", "rl"} <= set(found)
    for one in found.values():
        assert {clip.label for clip in one.clips} == set(one.labels)
        assert {label_key(label) for label in one.labels} <= set(one.explanations)
    # 30 test clips of kick, kick_ball, sword and sword_exercise each, so that a policy that is always right
    # scores 720 / 780 and 690 / 750 on the lists as released
    for name in ("base_val", "novel_val"):
        assert len(found[name].mislabelled()) == 60
        assert not found[name].corrected().mislabelled()


def test_a_missing_folder_and_an_unknown_dataset_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder of lists"):
        ListFolder(tmp_path / "none", "hmdb51")
    with pytest.raises(UserError, match="there is no dataset hmdb: choose hmdb51"):
        ListFolder(tmp_path, "hmdb")
