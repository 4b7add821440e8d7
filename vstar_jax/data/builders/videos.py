"""TFDS builders of the five datasets over a folder of videos and a folder of lists that the user has; nothing is downloaded.

`prepare` (scripts/prepare.py) surveys every listed file once, in killable processes, and can be resumed; then it writes one
TFDS split for each list, in array_record. Videos stay where they are, encoded. Clips that are missing or broken stay in their
split, with the problem, so that an evaluation counts them. `Records` reads a prepared list.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from vstar_jax.data import video
from vstar_jax.data.clips import ClipRecord, VideoFiles, content_hash, label_key, readable
from vstar_jax.data.decoding import DEADLINE, Decoder
from vstar_jax.data.protocols import DATASETS, EXPECTED, FoundList, ListFolder
from vstar_jax.data.video import VideoError
from vstar_jax.errors import UserError

SURVEY_FRAMES = 4
"""Frames that are decoded to see whether a file can be: first, last and two between."""
MISSING = "no such file"


@dataclasses.dataclass(frozen=True)
class Record:
    """One clip of a prepared list.

    path: as the list spells it, for logs and results only; video: the file, None when it is missing;
    label: as the vocabulary spells it; group: the list; fps, frames: of the file, 0 when it cannot be read; digest: its
    SHA-256; problem: why it cannot be read, empty when it can.
    """

    path: str
    video: Path | None
    label: str
    group: str
    fps: float
    frames: int
    digest: str
    problem: str

    @property
    def name(self) -> str:
        """What tells it from other clips in logs and result files."""
        return self.path

    def clip(self) -> ClipRecord:
        """What the guard against leakage compares."""
        return ClipRecord(self.path, self.label, self.group, digest=self.digest)


class VideoFolder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Clips of a folder of videos, one split for each list; `manifest` in the data folder says which."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "path": tfds.features.Text(doc="as the list spells it"),
                "file": tfds.features.Text(doc="relative to the folder of videos; empty when it is missing"),
                "label": tfds.features.Text(),
                "fps": np.float32,
                "frames": np.int64,
                "digest": tfds.features.Text(doc="SHA-256 of the file"),
                "problem": tfds.features.Text(doc="why it cannot be read"),
            }
        )
        about = "Clips of a user's own folder of videos, which stay encoded, in the splits of the user's own lists."
        return tfds.core.DatasetInfo(builder=self, description=about, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        lines = [json.loads(line) for line in manifest_file(self._data_dir_root, self.name).read_text().splitlines()]
        splits = dict.fromkeys(line["split"] for line in lines)
        return {split: self._generate_examples([x for x in lines if x["split"] == split]) for split in splits}

    def _generate_examples(self, lines: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(lines):
            yield number, {key: value for key, value in line.items() if key != "split"}


class Hmdb51(VideoFolder):
    """HMDB-51."""


class Ucf101(VideoFolder):
    """UCF-101, with the paths and frame rates that the builder of TFDS drops."""


class Kinetics400(VideoFolder):
    """Kinetics-400."""


class Kinetics600(VideoFolder):
    """Kinetics-600: the classes that Kinetics-400 lacks."""


class Ssv2(VideoFolder):
    """Something-Something V2."""


BUILDERS: dict[str, type[VideoFolder]] = dict(zip(DATASETS, (Hmdb51, Ucf101, Kinetics400, Kinetics600, Ssv2), strict=True))


def manifest_file(out: str | Path, dataset: str) -> Path:
    """The manifest of a prepared dataset: a JSON line for each clip of each list, with path, label, split and digest."""
    return Path(out) / dataset / "manifest.jsonl"


def _about_file(out: str | Path, dataset: str) -> Path:
    return Path(out) / dataset / "prepared.json"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a file: fps and number of frames (0 when it cannot be read), content hash, and the problem if any."""

    fps: float = 0.0
    frames: int = 0
    digest: str = ""
    problem: str = ""


def look(path: str) -> Facts:
    """Reads a file's facts; VideoError when it cannot be decoded. Runs in a `Decoder`'s process."""
    clip = video.read(path, SURVEY_FRAMES, exact=SURVEY_FRAMES)
    frames = int(clip.indices[-1]) + 1
    return Facts(clip.fps * frames / len(clip.indices), frames, content_hash(path))


class Survey:
    """The facts of files, kept in a JSON Lines file as they are found, so that a survey that was killed goes on where it was.

    A file that has changed in size or time since is looked at again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, tuple[list[int], Facts]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    found = json.loads(line)
                except ValueError:
                    continue  # the line that was being written when the survey was killed
                self.known[found["file"]] = (found["stamp"], Facts(**found["facts"]))
            self._rewrite()

    def _rewrite(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(_line(file, stamp, facts) for file, (stamp, facts) in self.known.items()))
        os.replace(partial, self.path)

    def complete(self, folder: Path, files: Sequence[str], decoder: Decoder, threads: int, title: str) -> dict[str, Facts]:
        """The facts of `files`, relative to `folder`; those that are not known yet are looked up, with a progress bar."""
        stamps = {file: _stamp(folder / file) for file in dict.fromkeys(files)}
        wanted = [file for file, stamp in stamps.items() if self.known.get(file, (None,))[0] != stamp]

        def facts(file: str) -> tuple[str, Facts]:
            try:
                return file, decoder.run(folder / file, look, str(folder / file))
            except VideoError as error:
                return file, Facts(problem=str(error).replace(f"{folder / file} ", ""))

        with (
            self.path.open("a") as out,
            ThreadPoolExecutor(threads) as pool,
            tqdm(total=len(stamps), initial=len(stamps) - len(wanted), desc=title, unit="clip") as bar,
        ):
            broken = 0
            for file, found in pool.map(facts, wanted):
                self.known[file] = (stamps[file], found)
                out.write(_line(file, stamps[file], found))
                out.flush()
                broken += bool(found.problem)
                bar.update()
                bar.set_postfix_str(f"{broken} broken" if broken else "")
        return {file: self.known[file][1] for file in stamps}


def _line(file: str, stamp: list[int], facts: Facts) -> str:
    return json.dumps({"file": file, "stamp": stamp, "facts": dataclasses.asdict(facts)}) + "\n"


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `prepare` found: the lists, how many of each list's clips are missing and broken, and the problems by path."""

    lists: dict[str, FoundList]
    missing: dict[str, int]
    broken: dict[str, int]
    problems: dict[str, str]
    videos: int
    folder: Path


def prepare(
    dataset: str,
    videos: str | Path,
    lists: str | Path,
    out: str | Path,
    *,
    by_path: bool = False,
    workers: int = 2,
    deadline: float = DEADLINE,
) -> Prepared:
    """Surveys the files that the lists name and writes the dataset below `out`; begun again, it goes on where it was.

    by_path: give clips the class that their path tells where the list says another (`FoundList.corrected`); workers: processes
    that read files; deadline: seconds for a file. UserError when there are no lists or no videos.
    """
    found = ListFolder(lists, dataset).read_all()
    if not found:
        usual = ", ".join(dict.fromkeys(expected.files[0] for expected in EXPECTED[dataset].values()))
        raise UserError(f"{lists} has none of the lists of {dataset}: put one or more of {usual} there, or the official lists.")
    if by_path:
        found = {name: one.corrected() for name, one in found.items()}
    if not Path(videos).is_dir():
        raise UserError(f"there is no folder of videos {videos}: give the folder that the paths of the lists are relative to.")
    files = VideoFiles(videos)
    if not len(files):
        raise UserError(f"{videos} holds no .avi, .mp4, .mkv or .webm file: give the folder of videos.")
    classes = {label_key(label) for one in found.values() for label in one.labels}
    places = {clip.path: files.find(clip.path, classes) for one in found.values() for clip in one.clips}
    survey = Survey(Path(out) / dataset / "survey.jsonl")
    with Decoder(workers, deadline) as decoder:
        there = sorted(place for place in places.values() if place)
        facts = survey.complete(files.folder, there, decoder, workers, f"survey {dataset}")
    lines = [
        {
            **{"path": clip.path, "label": clip.label, "split": name, "file": (place := places[clip.path]) or ""},
            **dataclasses.asdict(facts[place] if place else Facts(problem=MISSING)),
        }
        for name, one in found.items()
        for clip in one.clips
    ]
    _write(dataset, Path(out), Path(videos), found, lines)
    return Prepared(
        lists=found,
        missing={name: sum(x["split"] == name and not x["file"] for x in lines) for name in found},
        broken={name: sum(x["split"] == name and bool(x["file"] and x["problem"]) for x in lines) for name in found},
        problems={x["path"]: x["problem"] for x in lines if x["problem"]},
        videos=len(files),
        folder=Path(out) / dataset,
    )


def _write(dataset: str, out: Path, videos: Path, lists: dict[str, FoundList], lines: list[dict[str, Any]]) -> None:
    """The manifest and, when it has changed, the TFDS files; prepared.json comes last and says that all is there."""
    manifest, about = manifest_file(out, dataset), _about_file(out, dataset)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    builder = BUILDERS[dataset](data_dir=str(out), file_format="array_record")
    if not (about.is_file() and manifest.is_file() and manifest.read_text() == text):
        about.unlink(missing_ok=True)
        shutil.rmtree(builder.data_dir, ignore_errors=True)
        manifest.write_text(text)
        BUILDERS[dataset](data_dir=str(out), file_format="array_record").download_and_prepare(file_format="array_record")
    content = {
        "videos": str(videos.absolute()),
        "lists": {
            name: {"labels": one.labels, "explanations": one.explanations, "source": one.source} for name, one in lists.items()
        },
    }
    partial = about.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, about)


class Records(Sequence[Record]):
    """Random access to a prepared list, in its order, with its vocabulary.

    name: of the list, or `other/list` for one of another dataset. labels: all classes of the list, as prompts show them, in the
    list's order; explanations: label -> what a file says of it; videos: the folder of the dataset's own videos, if they have
    moved. UserError when the dataset or the list was not prepared.
    """

    def __init__(self, dataset: str, out: str | Path, name: str, videos: str | Path | None = None):
        other, _, split = name.rpartition("/")
        if other not in ("", dataset):
            dataset, videos = other, None
        if dataset not in DATASETS:
            raise UserError(f"there is no dataset {dataset}: choose {', '.join(DATASETS)}.")
        about = _about_file(out, dataset)
        if not about.is_file():
            raise UserError(
                f"{dataset} is not prepared in {out}: run scripts/prepare.py --dataset {dataset} --out {out} first."
            )
        content = json.loads(about.read_text())
        if split not in content["lists"]:
            known = ", ".join(content["lists"])
            raise UserError(
                f"{dataset} in {out} has no list {split}, only {known}: add it to the folder of lists and prepare again."
            )
        self.name, self.folder = name, Path(videos or content["videos"])
        found = content["lists"][split]
        self.labels = tuple(readable(label) for label in found["labels"])
        self.explanations = {
            readable(label): text for label in found["labels"] if (text := found["explanations"].get(label_key(label)))
        }
        self.source = BUILDERS[dataset](data_dir=str(out), file_format="array_record").as_data_source(split)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        found = self.source[range(len(self))[index]]
        text = {key: value.decode() for key, value in found.items() if isinstance(value, bytes)}
        return Record(
            path=text["path"],
            video=self.folder / text["file"] if text["file"] else None,
            label=readable(text["label"]),
            group=self.name,
            fps=float(found["fps"]),
            frames=int(found["frames"]),
            digest=text["digest"],
            problem=text["problem"],
        )
