"""A folder of videos and a folder of lists become a dataset that keeps every clip, and scripts/prepare.py can be resumed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from annotations import FOLDER, needed
from video_files import FPS, ODD, cut, write_video

from vstar_jax.data.builders.videos import BUILDERS, MISSING, Records, manifest_file, prepare
from vstar_jax.data.clips import content_hash
from vstar_jax.data.lists import read_list
from vstar_jax.data.protocols import DATASETS, EXPECTED
from vstar_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FRAMES = 12


def hmdb(root: Path) -> tuple[Path, Path]:
    """HMDB-51 in small: .mp4 where the list says .avi and the other way round, one file missing, one broken."""
    videos, lists = root / "videos", root / "lists"
    kick, wave = f"{ODD}_kick_ball_f_cm_np1_ba_med_", f"{ODD}_wave_u_cm_np2_le_goo_"
    for n in range(2):
        write_video(videos / "kick_ball" / f"{kick}{n}.mp4", FRAMES, seed=n)
        write_video(videos / "wave" / f"{wave}{n}.avi", FRAMES - n, seed=9 + n)
    cut(write_video(videos / "wave" / "broken.avi"))
    lists.mkdir()
    lines = [f"{kick}0.avi 0", f"{wave}1.mp4 1", "missing.avi 1", "broken.avi 1", f"{kick}1.avi 1", f"{wave}0.avi 1"]
    (lists / "novel_val.txt").write_text("\n".join(lines) + "\n")
    (lists / "hmdb_51_novel_labels.csv").write_text("id,name\n0,kick ball\n1,wave\n")
    return videos, lists


def test_every_listed_clip_is_kept_with_its_facts_or_its_problem(tmp_path: Path) -> None:
    videos, lists = hmdb(tmp_path)
    prepared = prepare("hmdb51", videos, lists, tmp_path / "out")
    assert (prepared.videos, prepared.missing, prepared.broken) == (5, {"novel_val": 1}, {"novel_val": 1})
    records = Records("hmdb51", tmp_path / "out", "novel_val")
    assert [r.path for r in records] == [c.path for c in read_list(lists / "novel_val.txt").clips]
    assert records.labels == ("kick ball", "wave")
    first = records[0]
    assert first.video == videos / "kick_ball" / f"{ODD}_kick_ball_f_cm_np1_ba_med_0.mp4"
    assert (first.label, first.fps, first.frames, first.problem) == ("kick ball", FPS, FRAMES, "")
    assert first.digest == content_hash(first.video)
    assert [r.frames for r in records] == [FRAMES, FRAMES - 1, 0, 0, FRAMES, FRAMES]
    assert (records[2].video, records[2].problem) == (None, MISSING)
    assert "cannot be decoded" in records[3].problem
    assert str(tmp_path) not in records[3].problem.split("(")[0]
    assert len(records[1:3]) == 2
    assert records[-1].name == f"{ODD}_wave_u_cm_np2_le_goo_0.avi"


def test_labels_that_paths_contradict_are_kept_or_corrected(tmp_path: Path) -> None:
    videos, lists = hmdb(tmp_path)
    for by_path, label in ((False, "wave"), (True, "kick ball")):
        prepare("hmdb51", videos, lists, tmp_path / "out", by_path=by_path)
        assert Records("hmdb51", tmp_path / "out", "novel_val")[4].label == label


def test_a_second_survey_looks_only_at_what_has_changed(tmp_path: Path) -> None:
    videos, lists = hmdb(tmp_path)
    prepare("hmdb51", videos, lists, tmp_path / "out")
    survey = tmp_path / "out/hmdb51/survey.jsonl"
    known = survey.read_text().splitlines()
    forged = [line.replace('"fps": 10.0', '"fps": 7.0') for line in known]
    survey.write_text("\n".join([*forged, '{"file": "torn off']))
    write_video(videos / "wave" / "broken.avi", 3)
    prepare("hmdb51", videos, lists, tmp_path / "out")
    assert [(r.fps, r.frames) for r in Records("hmdb51", tmp_path / "out", "novel_val")][3:5] == [(FPS, 3), (7.0, FRAMES)]
    assert len(survey.read_text().splitlines()) == len(known) + 1


YOUTUBE = "-7axUnKiycE_000023_000033.mp4"
WAVE = f"{ODD}_wave_u_cm_np2_le_goo_0.avi"
LAYOUTS = {
    "ucf101": ("novel_val", "Surfing/v_Surfing_g01_c01.avi", "v_Surfing_g01_c01.avi 0", "ucf_101_novel_labels.csv"),
    "kinetics400": ("base_val", f"val/{YOUTUBE}", f"val/{YOUTUBE} 0", "kinetics_400_base_labels.csv"),
    "kinetics600": ("vifi_split2", "val/yoga/_B15AUZ4Fsg.webm", "train/_B15AUZ4Fsg_000001_000011.mp4 0", "ZS_split2_K600.csv"),
    "ssv2": ("novel_val", "20bn/42.webm", "42.webm 0", "ssv2_174_novel_labels.csv"),
    "hmdb51": ("base_val", f"wave/{WAVE}", f"{WAVE} 0", "hmdb_51_base_labels.csv"),
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_layouts_of_every_dataset_are_read(tmp_path: Path, dataset: str) -> None:
    name, file, line, labels = LAYOUTS[dataset]
    lists = tmp_path / "lists"
    write_video(tmp_path / "videos" / file, 3, codec="vp9" if file.endswith("webm") else "mpeg4")
    lists.mkdir()
    (lists / EXPECTED[dataset][name].files[0]).write_text(line + "\n")
    (lists / labels).write_text("id,name\n0,yoga (hot)\n")
    prepare(dataset, tmp_path / "videos", lists, tmp_path / "out")
    record = Records(dataset, tmp_path / "out", name)[0]
    assert record.video == tmp_path / "videos" / file
    assert (record.label, record.frames) == ("yoga (hot)", 3)
    assert (tmp_path / "out" / dataset / "1.0.0" / f"{dataset}-{name}.array_record-00000-of-00001").is_file()
    assert BUILDERS[dataset].name == dataset


def test_the_manifest_is_a_list_that_the_guard_reads(tmp_path: Path) -> None:
    videos, lists = hmdb(tmp_path)
    prepare("hmdb51", videos, lists, tmp_path / "out")
    read = read_list(manifest_file(tmp_path / "out", "hmdb51"))
    assert [clip for clip in read.clips if clip.digest] == [
        r.clip() for r in Records("hmdb51", tmp_path / "out", "novel_val") if r.digest
    ]


def test_videos_may_have_moved_since(tmp_path: Path) -> None:
    videos, lists = hmdb(tmp_path)
    prepare("hmdb51", videos, lists, tmp_path / "out")
    moved = videos.rename(tmp_path / "elsewhere")
    record = Records("hmdb51", tmp_path / "out", "novel_val", videos=moved)[0]
    assert record.video is not None
    assert record.video.is_file()


def test_what_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    videos, lists = hmdb(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        (("hmdb51", videos, empty), "has none of the lists of hmdb51: put one or more of fs_base_s1_train.txt"),
        (("hmdb51", tmp_path / "none", lists), "there is no folder of videos"),
        (("hmdb51", empty, lists), "holds no .avi, .mp4"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(*arguments, tmp_path / "out")
    with pytest.raises(UserError, match=r"ssv2 is not prepared in .*: run scripts/prepare.py --dataset ssv2"):
        Records("ssv2", tmp_path / "out", "base_val")
    prepare("hmdb51", videos, lists, tmp_path / "out")
    with pytest.raises(UserError, match="has no list split1, only novel_val"):
        Records("hmdb51", tmp_path / "out", "split1")


# The script


def script(root: Path, videos: Path, lists: Path, *options: str) -> list[str]:
    folders = ["--videos", str(videos), "--lists", str(lists), "--out", str(root / "out")]
    return [sys.executable, str(ROOT / "scripts/prepare.py"), "--dataset", "hmdb51", *folders, *options]


def test_a_survey_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    videos, lists = tmp_path / "videos", tmp_path / "lists"
    count = 300
    first = write_video(videos / "0.avi", 16)
    for n in range(1, count):
        (videos / f"{n}.avi").write_bytes(first.read_bytes() + bytes(n))
    lists.mkdir()
    (lists / "novel_val.txt").write_text("".join(f"{n}.avi 0\n" for n in range(count)))
    (lists / "hmdb_51_novel_labels.csv").write_text("id,name\n0,wave\n")
    survey = tmp_path / "out/hmdb51/survey.jsonl"

    def lines() -> list[str]:
        return survey.read_text().splitlines() if survey.is_file() else []

    process = subprocess.Popen(script(tmp_path, videos, lists), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(lines()) < 20:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = lines()[:-1]
    assert 19 <= len(before) < count - 1
    done = subprocess.run(script(tmp_path, videos, lists), capture_output=True, text=True, timeout=120, check=True)
    assert "novel_val: expected 750 clips of 25 classes" in done.stdout
    after = lines()
    assert after[: len(before)] == before
    assert len({json.loads(line)["file"] for line in after}) == len(after) == count
    assert len(Records("hmdb51", tmp_path / "out", "novel_val")) == count


def test_the_script_prints_what_it_found_and_what_is_wrong(tmp_path: Path) -> None:
    videos, lists = hmdb(tmp_path)
    done = subprocess.run(script(tmp_path, videos, lists), capture_output=True, text=True, timeout=120, check=True)
    for part in (
        "hmdb51: 5 videos",
        "novel_val is read from: novel_val.txt",
        "not in the folder of lists: train_s1,",
        "novel_val: 1 clips have another label than their path tells",
        "2 clips are missing or broken",
        "missing.avi: no such file",
    ):
        assert part in done.stdout
    assert (tmp_path / "out/hmdb51/problems.txt").read_text().count("\n") == 2
    assert "survey hmdb51: 100%" in done.stderr
    failed = subprocess.run(script(tmp_path, videos, videos), capture_output=True, text=True, timeout=120, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


@needed
def test_the_released_lists_of_hmdb_are_prepared_with_their_counts(tmp_path: Path) -> None:
    clip = read_list(FOLDER / "json/hmdb51/val.json").clips[0]
    write_video(tmp_path / "videos" / Path(clip.path).with_suffix(".mp4").name)
    done = subprocess.run(
        script(tmp_path, tmp_path / "videos", FOLDER), capture_output=True, text=True, timeout=120, check=True
    )
    assert "all of these lists hold what was expected" in done.stdout
    assert "novel_val: 60 clips have another label than their path tells" in done.stdout
    counts = {name: len(Records("hmdb51", tmp_path / "out", name)) for name in ("base_val", "novel_val", "split1", "rl")}
    assert counts == {"base_val": 780, "novel_val": 750, "split1": 1_530, "rl": 4_676}
    assert Records("hmdb51", tmp_path / "out", "base_val")[0].video is not None
