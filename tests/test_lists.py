"""Every list format is read as users have it, and what fits none is one sentence with the line."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from annotations import FOLDER, needed
from hypothesis import given, settings
from hypothesis import strategies as st

from vstar_jax.data.clips import (
    ClipRecord,
    VideoFiles,
    canonical,
    content_hash,
    contradictions,
    label_key,
    readable,
    stem_of,
    told_class,
)
from vstar_jax.data.lists import read_hmdb_splits, read_labels, read_list
from vstar_jax.errors import UserError

ODD = "EVER!_(Must_be_#1)_[cut]_A_&_B;_100%_+1_~@_kick_ball_f_cm_np1_ba_med_3"
YOUTUBE = "-7axUnKiycE"
EXAMPLES = int(os.environ.get("VSTAR_FUZZ_EXAMPLES", "50"))  # 10,000 is the full size


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def pairs(path: Path, names=()) -> list[tuple[str, str]]:
    return [(clip.path, clip.label) for clip in read_list(path, names).clips]


# Formats


@pytest.mark.parametrize("separator", [" ", ",", ", ", "\t", "  "])
def test_paths_with_odd_characters_and_numbered_or_written_labels(tmp_path: Path, separator: str) -> None:
    path = write(tmp_path, "val.txt", f"{ODD}.avi{separator}1", f"kick/a b, c.mp4{separator}0", "", f"x.avi{separator}1")
    assert pairs(path, ("kick", "kick ball")) == [
        (f"{ODD}.avi", "kick ball"),
        ("kick/a b, c.mp4", "kick"),
        ("x.avi", "kick ball"),
    ]
    assert read_list(path).format == ("path,label" if "," in separator else "path label")
    named = write(tmp_path, "named.txt", f"{ODD}.avi{separator}kick ball", f"x.webm{separator}Jump rope")
    assert pairs(named) == [(f"{ODD}.avi", "kick ball"), ("x.webm", "Jump rope")]


def test_a_path_without_suffix_ends_at_the_last_separator(tmp_path: Path) -> None:
    assert pairs(write(tmp_path, "a.txt", "val/a b c 1"), ("x", "y")) == [("val/a b c", "y")]
    assert pairs(write(tmp_path, "a.csv", "val/a,b c,1"), ("x", "y")) == [("val/a,b c", "y")]


def test_a_name_that_begins_with_a_bracket_is_no_json(tmp_path: Path) -> None:
    assert pairs(write(tmp_path, "a.txt", "[cut]_{x}.avi 0"), ("run",)) == [("[cut]_{x}.avi", "run")]


def test_a_byte_order_mark_and_windows_lines_and_paths_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffrun\\a.avi 0\r\nrun\\b.avi 0\r\n".encode())
    assert pairs(path, ("run",)) == [("run/a.avi", "run"), ("run/b.avi", "run")]


def test_numbers_without_names_leave_the_label_open(tmp_path: Path) -> None:
    assert pairs(write(tmp_path, "a.txt", "a.avi 17")) == [("a.avi", "")]


def test_ucf_official(tmp_path: Path) -> None:
    write(tmp_path, "classInd.txt", "1 ApplyEyeMakeup", "2 HandstandPushups")
    train = write(tmp_path, "trainlist01.txt", "HandstandPushups/v_HandStandPushups_g08_c01.avi 2")
    test = write(tmp_path, "testlist01.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi")
    assert pairs(train) == [("HandstandPushups/v_HandStandPushups_g08_c01.avi", "HandstandPushups")]
    assert pairs(test) == [("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "ApplyEyeMakeup")]
    wrong = write(tmp_path, "trainlist02.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 2")
    with pytest.raises(UserError, match=r"trainlist02\.txt, line 1: expected .*classInd\.txt"):
        read_list(wrong)


def test_hmdb_official(tmp_path: Path) -> None:
    write(tmp_path, "kick_ball_test_split1.txt", f"{ODD}.avi 2 ", "b.avi 1 ", "c.avi 0 ")
    write(tmp_path, "wave_test_split1.txt", "w.avi 2 ")
    write(tmp_path, "wave_test_split2.txt", "w.avi 1 ")
    assert [(c.path, c.label) for c in read_hmdb_splits(tmp_path, 1).clips] == [
        (f"kick_ball/{ODD}.avi", "kick_ball"),
        ("wave/w.avi", "wave"),
    ]
    assert [c.path for c in read_hmdb_splits(tmp_path, 1, "train").clips] == ["kick_ball/b.avi"]
    with pytest.raises(UserError, match="no <class>_test_split3"):
        read_hmdb_splits(tmp_path, 3)
    with pytest.raises(UserError, match=r"wave_test_split2\.txt, line 2: expected `name\.avi 0`, `1` or `2`"):
        read_list(write(tmp_path, "wave_test_split2.txt", "w.avi 1", "v.avi 3"))


def test_video_star_json(tmp_path: Path) -> None:
    item = {
        "problem_id": 1,
        "solution": "<answer>kick ball</answer>",
        "path": f"kick_ball/{ODD}.avi",
        "explain": "a foot, a ball",
    }
    path = write(tmp_path, "val.json", json.dumps([item, {**item, "path": "b.avi", "explain": ""}], indent=2))
    first, second = read_list(path).clips
    assert first == ClipRecord(f"kick_ball/{ODD}.avi", "kick ball", "val", "a foot, a ball")
    assert (second.path, second.explanation) == ("b.avi", "")
    broken = write(tmp_path, "b.json", json.dumps([item, {"path": "b.avi"}], indent=2))
    with pytest.raises(UserError, match=r"b\.json, line 8: expected an entry with path and solution"):
        read_list(broken)


def test_kinetics_csv(tmp_path: Path) -> None:
    path = write(
        tmp_path, "val.csv", "label,youtube_id,time_start,time_end,split", f'"petting animal (not cat)",{YOUTUBE},23,33,val'
    )
    assert read_list(path).clips == (ClipRecord(f"{YOUTUBE}_000023_000033.mp4", "petting animal (not cat)", "val"),)
    bad = write(tmp_path, "bad.csv", "label,youtube_id,time_start,time_end,split", f"run,{YOUTUBE},soon,33,val")
    with pytest.raises(UserError, match=r"bad\.csv, line 2: expected .*with seconds, found 'run"):
        read_list(bad)


def test_ssv2_json_names_the_template_as_the_class(tmp_path: Path) -> None:
    item = {"id": "78687", "label": "holding potato next to box", "template": "Holding [something] next to [something]"}
    path = write(tmp_path, "validation.json", json.dumps([{**item, "placeholders": ["potato", "box"]}, {"id": "3"}]))
    assert pairs(path) == [("78687.webm", "Holding something next to something"), ("3.webm", "")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "no label here.avi", r"line 1: expected one of `path label`.*found 'no label here\.avi'"),
        ("a.txt", "a.avi 0\nb.avi", r"line 2: expected `path label`.*found 'b\.avi'"),
        ("a.txt", "a.avi,0\nb.avi 0", r"line 2: expected `path,label`"),
        ("a.json", "[{]", r"line 1: expected valid JSON"),
        ("a.json", '[{"x": 1}]', r"line 1: expected one of .*Video-STAR"),
        ("a.json", '{"0": "run"}', "found the names of classes"),
        ("a.jsonl", '{"path": "a.avi"}', r"line 1: expected an object with path, label, split and digest"),
        ("a.txt", " \n", "is empty"),
    ],
)
def test_an_unknown_format_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_list(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_number_beyond_the_names_is_an_error_and_no_wrong_class(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 2: expected `path label` with a label number below 2"):
        read_list(write(tmp_path, "a.txt", "a.avi 1", "b.avi 2"), ("run", "walk"))


def test_files_that_are_no_text_or_missing_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (("a.txt", "no text in UTF-8"), ("b.txt", "there is no list"), ("", "there is no list")):
        with pytest.raises(UserError, match=message):
            read_list(tmp_path / name)


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.text(max_size=200))
def test_no_text_makes_the_reader_fail_in_another_way(text: str) -> None:
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.txt", "a.json", "a.jsonl", "a_test_split1.txt", "testlist01.txt"):
            path = Path(folder, name)
            path.write_text(text, encoding="utf-8", errors="replace")
            for read in (read_list, read_labels):
                try:
                    read(path)
                except UserError as error:
                    errors.append(str(error))
    assert not any("\n" in error for error in errors)


# Files of labels


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'id,name\n0,kick ball\n1,"pour, slowly"'),
        ("a.csv", '0,kick ball\n1,"pour, slowly"'),
        ("classInd.txt", "1 kick ball\n2 pour, slowly"),
        ("a.txt", "kick ball\npour, slowly"),
        ("a.json", '{"0": "kick ball", "1": "pour, slowly"}'),
        ("a.json", '{"pour, slowly": "1", "kick ball": "0"}'),
        ("a.json", '{"1": "pour, slowly: from a jug", "0": "kick ball: with a foot"}'),
    ],
)
def test_files_of_labels_are_read_in_the_order_of_their_numbers(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    labels = read_labels(tmp_path / name)
    assert labels.names == ("kick ball", "pour, slowly")
    if "foot" in text:
        assert labels.lines() == "- kick ball: with a foot\n- pour, slowly: from a jug"
    else:
        assert labels.explanations == ("", "")


def test_files_of_labels_with_gaps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="numbered from 0 without gaps"):
        read_labels(write(tmp_path, "a.csv", "0,run", "2,walk"))


# Labels and paths


@pytest.mark.parametrize("spelling", ["Kick ball", "kick_ball", "KickBall", " kick  ball\n", "KICK-BALL"])
def test_spellings_of_a_label_have_one_key(spelling: str) -> None:
    assert label_key(spelling) == label_key("kick ball")


def test_labels_read_as_words() -> None:
    assert [readable(x) for x in ("brush_hair", "ApplyEyeMakeup", "Pretending to [poke] [something]", "tai chi")] == [
        "brush hair",
        "Apply Eye Makeup",
        "Pretending to poke something",
        "tai chi",
    ]


def test_layouts_and_suffixes_do_not_change_what_clip_it_is() -> None:
    classes = {"kickball", "yoga"}
    flat, folder = canonical(f"{ODD}.avi", classes), canonical(f"/data/hmdb/kick_ball/{ODD}.mp4", classes)
    assert flat.same(folder)
    assert folder.same(flat)
    assert not canonical("yoga/1.mp4", classes).same(canonical("kick ball/1.mp4", classes))
    assert canonical("train/1.mp4", classes).same(canonical("videos/1.webm", classes))
    for path in (f"train/{YOUTUBE}_000006_000016.mp4", f"val/yoga/{YOUTUBE}.webm", f"{YOUTUBE}_000006_000016"):
        assert canonical(path, classes) == canonical(f"{YOUTUBE}.mkv")


@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="/\\\0"), min_size=1, max_size=40))
def test_a_stem_loses_video_suffixes_alone(name: str) -> None:
    assert stem_of(f"a/{name}.AVI") == stem_of(f"b/c/{name}.webm")
    assert stem_of(f"{name}.txt").endswith(".txt")


def test_the_class_that_a_path_tells() -> None:
    classes = {"kick", "kickball", "applyeyemakeup", "sword"}
    assert told_class(f"{ODD}.avi", classes) == "kickball"
    assert told_class("a_sword_f_cm_np2_ri_bad_0.avi", classes) == "sword"
    assert told_class("v_ApplyEyeMakeup_g01_c01.avi", classes) == "applyeyemakeup"
    assert told_class("kick/anything.avi", classes) == "kick"
    assert told_class("x.avi", classes) == ""
    assert contradictions([ClipRecord(f"{ODD}.avi", "kick"), ClipRecord("kick/a.avi", "Kick")], classes) == [
        ClipRecord(f"{ODD}.avi", "kick")
    ]


def test_files_are_found_by_what_lists_call_them(tmp_path: Path) -> None:
    for name in (f"kick_ball/{ODD}.mp4", "kick_ball/1.avi", "wave/1.avi", "wave/1.mkv", f"val/yoga/{YOUTUBE}.webm"):
        write(tmp_path, name, "")
    write(tmp_path, "wave/1.txt")
    files, classes = VideoFiles(tmp_path), {"kickball", "wave", "yoga"}
    assert len(files) == 5
    assert files.find(f"{ODD}.avi", classes) == f"kick_ball/{ODD}.mp4"
    assert files.find("wave/1.mkv", classes) == "wave/1.mkv"
    assert files.find("wave/1.webm", classes) == "wave/1.avi"
    assert files.find("kick ball/1.mp4", classes) == "kick_ball/1.avi"
    assert files.find(f"train/{YOUTUBE}_000001_000011.mp4", classes) == f"val/yoga/{YOUTUBE}.webm"
    assert files.find("wave/2.avi", classes) is None


def test_content_is_hashed(tmp_path: Path) -> None:
    empty = write(tmp_path, "a", "")
    empty.write_bytes(b"")
    assert content_hash(empty) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


# The released files


@needed
@pytest.mark.parametrize(
    ("name", "clips", "classes", "contradicting"),
    [
        ("rl.json", 4_676, 51, 0),
        ("json/hmdb51/val.json", 780, 26, 60),
        ("json/hmdb51/test.json", 750, 25, 60),
        ("json_split/hmdb51/hmdb_exp_split_1.json", 1_530, 51, 0),
        ("json_split/hmdb51/hmdb_exp_split_2.json", 1_530, 51, 0),
        ("json_split/hmdb51/hmdb_exp_split_3.json", 1_530, 51, 0),
    ],
)
def test_the_released_lists_hold_what_was_counted(name: str, clips: int, classes: int, contradicting: int) -> None:
    found = read_list(FOLDER / name)
    assert (found.format, len(found.clips), len(found.labels)) == ("video-star", clips, classes)
    assert len({canonical(clip.path) for clip in found.clips}) == clips
    # kick and kick_ball, sword and sword_exercise are swapped: 30 test clips each
    assert len(contradictions(found.clips, {label_key(label) for label in found.labels})) == contradicting


@needed
@pytest.mark.parametrize(
    ("name", "classes", "explained"),
    [
        ("json/hmdb51/train_rephrased.json", 26, True),
        ("json/hmdb51/test_rephrased.json", 25, True),
        ("json/ucf101/train_rephrased.json", 51, True),
        ("json/ucf101/test_rephrased.json", 50, True),
        ("json/kinetics400/train_rephrased.json", 200, True),
        ("json/kinetics400/test_rephrased.json", 200, True),
        ("json/SSv2/train_rephrased.json", 87, True),
        ("json/SSv2/test_rephrased.json", 87, True),
        ("json_split/hmdb51/hmdb_rephrased_classes.json", 51, True),
        ("json_split/ucf101/ucf101_rephrased_classes.json", 101, True),
        ("json_split/Kinetics-600-val/k600_split1_classes.json", 160, False),
        ("json_split/Kinetics-600-val/k600_split2_classes.json", 160, False),
        ("json_split/Kinetics-600-val/k600_split3_classes.json", 160, False),
    ],
)
def test_the_released_classes_are_what_was_counted(name: str, classes: int, explained: bool) -> None:
    labels = read_labels(FOLDER / name)
    assert len(labels.names) == len({label_key(label) for label in labels.names}) == classes
    assert all(bool(text) == explained for text in labels.explanations)
