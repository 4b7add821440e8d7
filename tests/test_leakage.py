"""The guard finds every clip and class that training and evaluation share."""

import subprocess
import sys
from pathlib import Path

import pytest
from annotations import FOLDER, needed

from vstar_jax.data.clips import ClipRecord
from vstar_jax.data.leakage import check, refuse
from vstar_jax.data.lists import read_list
from vstar_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
YOUTUBE = "-7axUnKiycE"


def record(path: str, label: str = "run", digest: str = "") -> ClipRecord:
    return ClipRecord(path, label, digest=digest)


def test_a_clip_is_known_again_in_another_layout() -> None:
    train = [record("run/a_b.avi"), record(f"train/{YOUTUBE}_000001_000011.mp4", "yoga"), record("walk/1.mp4", "walk")]
    for path, shared in (
        ("a_b.mp4", True),
        ("Run/a_b.webm", True),
        (f"val/yoga/{YOUTUBE}.mkv", True),
        ("walk/1.mkv", True),
        ("run/1.mp4", False),
        ("a_c.avi", False),
    ):
        assert bool(check(train, [record(path)]).same_path) == shared, path


def test_a_renamed_copy_is_known_by_its_content() -> None:
    report = check([record("a.avi", digest="1"), record("b.avi")], [record("c.avi", digest="1"), record("d.avi")])
    assert [clip.path for clip in report.same_content] == ["c.avi"]
    assert (report.same_path, report.hashed, len(report.shared_clips)) == ((), 1, 1)
    assert "0 by path, 1 by content (1 have a hash), such as c.avi" in report.text()


def test_classes_are_compared_without_their_spelling() -> None:
    report = check([record("a", "kick_ball"), record("b", "kick_ball"), record("c", "run")], [record("d", "Kick ball")])
    assert (report.shared_classes, report.train_clips_of_shared) == (("Kick ball",), 2)
    assert report.leaks()
    assert not report.leaks(classes=False)


def test_classes_that_are_only_numbered_are_said_to_be_unknown() -> None:
    report = check([record("a", "")], [record("b", "run")])
    assert "shared classes: unknown" in report.text()
    assert not report.leaks()


def test_what_leaks_is_refused_with_counts_and_examples_unless_it_is_allowed() -> None:
    leaking = check([record("run/a.avi"), record("run/b.avi")], [record("a.mp4"), record("c.mp4")])
    with pytest.raises(
        UserError, match=r"1 of the 2 clips of novel, such as a\.mp4 and 1 of its 1 classes .2 training clips"
    ) as error:
        refuse(leaking, "novel", classes=True, allowed=False, option="--allow-leakage")
    assert "--allow-leakage" in str(error.value)
    with pytest.raises(UserError, match=r"1 of the 2 clips of base, such as a\.mp4: train without them"):
        refuse(leaking, "base", classes=False, allowed=False, option="x")
    refuse(leaking, "novel", classes=True, allowed=True, option="x")
    refuse(check([record("a")], [record("b")]), "base", classes=False, allowed=False, option="x")
    refuse(check([record("a")], [record("b", "walk")]), "novel", classes=True, allowed=False, option="x")
    assert leaking.summary()["shared_clips"] == 1


@needed
def test_the_released_training_list_is_contaminated_as_counted() -> None:
    train = read_list(FOLDER / "rl.json").clips
    names = [
        "json/hmdb51/val.json",
        "json/hmdb51/test.json",
        *(f"json_split/hmdb51/hmdb_exp_split_{k}.json" for k in (1, 2, 3)),
    ]
    reports = [check(train, read_list(FOLDER / name).clips) for name in names]
    assert [(r.train_clips, len(r.train_classes)) for r in reports] == [(4_676, 51)] * 5
    assert [len(r.same_path) for r in reports] == [0, 0, 0, 1_340, 1_311]
    assert reports[1].train_clips_of_shared == 2_185
    assert len(reports[1].shared_classes) == 25


# The script


def run(*args: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/check_leakage.py", *args], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_the_script_tells_by_its_exit_code(tmp_path: Path) -> None:
    for name, line in (
        ("train.txt", "a.avi run"),
        ("same.txt", "a.mp4 walk"),
        ("other.txt", "b.avi run"),
        ("clean.txt", "b.avi fly"),
    ):
        (tmp_path / name).write_text(line + "\n")
    train = ("--train", str(tmp_path / "train.txt"), "--eval")
    assert run(*train, str(tmp_path / "clean.txt"))[0] == 0
    assert run(*train, str(tmp_path / "clean.txt"), str(tmp_path / "same.txt"))[0] == 1
    code, out, _ = run(*train, str(tmp_path / "other.txt"))
    assert code == 1
    assert "shared classes: 1, with 1 training clips, such as run" in out
    assert run(*train, str(tmp_path / "other.txt"), "--classes-may-overlap")[0] == 0
    code, _, err = run(*train, str(tmp_path / "none.txt"))
    assert code == 1
    assert err.startswith("error: there is no list")


def test_the_script_compares_files_by_content(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, content in (("a.avi", b"one"), ("copy.avi", b"one"), ("b.avi", b"two")):
        (videos / name).write_bytes(content)
    (tmp_path / "train.txt").write_text("a.avi run\n")
    (tmp_path / "eval.txt").write_text("copy.avi walk\nb.avi walk\nmissing.avi walk\n")
    code, out, _ = run("--train", str(tmp_path / "train.txt"), "--eval", str(tmp_path / "eval.txt"), "--videos", str(videos))
    assert code == 1
    assert "0 by path, 1 by content (2 have a hash), such as copy.avi" in out


@needed
def test_the_script_reports_the_released_lists() -> None:
    code, out, _ = run("--train", str(FOLDER / "rl.json"), "--eval", str(FOLDER / "json/hmdb51/test.json"))
    assert code == 1
    assert "4,676 clips of 51 classes" in out
    assert "shared classes: 25, with 2,185 training clips" in out
