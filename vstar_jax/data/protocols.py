"""Which lists a protocol needs, how many clips and classes they should hold, and where they are in a user's folder.

Counts and file names are facts of the public releases (OVAR.md: ViFi-CLIP, FROSTER, Video-STAR and the official lists). A
user gives one folder; every list that it holds is found by its usual name, and what the official lists allow is derived.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vstar_jax.data.clips import ClipRecord, contradictions, label_key, told_class
from vstar_jax.data.lists import ClipList, Labels, read_hmdb_splits, read_labels, read_list
from vstar_jax.data.splits import SEEDS, SHOTS, by_frequency, few_shot, of_classes
from vstar_jax.errors import UserError

DATASETS = ("hmdb51", "ucf101", "kinetics400", "kinetics600", "ssv2")
PROTOCOLS = ("base_to_novel", "cross_dataset")

_FOLDERS = {
    "hmdb51": ("hmdb",),
    "ucf101": ("ucf",),
    "kinetics400": ("k400", "kinetics400", "kinetics-400", "kinetics_400"),
    "kinetics600": ("k600", "kinetics600", "kinetics-600", "kinetics_600"),
    "ssv2": ("ssv2", "something"),
}
"""What folders of a dataset's lists are called: releases use one file name in the folders of several datasets."""


@dataclass(frozen=True)
class Expected:
    """A list of a protocol: the names that files with it have, most usual first, and what it should hold.

    files and labels: file names, with folders where the name alone is not enough; labels: files that name its classes.
    """

    files: tuple[str, ...]
    labels: tuple[str, ...]
    clips: int
    classes: int


@dataclass(frozen=True)
class FoundList:
    """A list of a protocol, read.

    labels: its whole vocabulary in the order of the prompt; explanations: `label_key` -> what a file says of the class;
    source: the files, or how it was derived; expected: None for lists of the user's own.
    """

    name: str
    clips: tuple[ClipRecord, ...]
    labels: tuple[str, ...]
    explanations: dict[str, str]
    source: str
    expected: Expected | None

    def mislabelled(self) -> list[ClipRecord]:
        """The clips whose path tells another class than the list (`clips.contradictions`)."""
        return contradictions(self.clips, {label_key(label) for label in self.labels})

    def corrected(self) -> "FoundList":
        """The same clips with the labels that their paths tell."""
        names = {label_key(label): label for label in self.labels}
        clips = (replace(c, label=names.get(told_class(c.path, names), c.label)) for c in self.clips)
        return replace(self, clips=tuple(clips))

    def remark(self) -> str:
        """How it differs from what was expected; empty when it does not."""
        if self.expected is None or (len(self.clips), len(self.labels)) == (self.expected.clips, self.expected.classes):
            return ""
        return f"expected {self.expected.clips:,} clips of {self.expected.classes} classes"


def _few_shot_lists(labels: tuple[str, ...], classes: int) -> dict[str, Expected]:
    return {
        f"train_s{seed}": Expected(
            (f"fs_base_s{seed}_train.txt", f"train_s{seed}.csv", *(("train.json",) if seed == 1 else ())),
            labels,
            SHOTS * classes,
            classes,
        )
        for seed in SEEDS
    }


def _base_to_novel(base: int, novel: int, base_val: int, novel_val: int, short: str) -> dict[str, Expected]:
    base_labels = (f"{short}_base_labels.csv", "train_rephrased.json", "train_idx2cls.csv", "raw_train_idx2cls.json")
    novel_labels = (f"{short}_novel_labels.csv", "test_rephrased.json", "test_idx2cls.csv", "raw_test_idx2cls.json")
    return {
        **_few_shot_lists(base_labels, base),
        "base_val": Expected(("base_val.txt", "val.json", "val.csv"), base_labels, base_val, base),
        "novel_val": Expected(("novel_val.txt", "test.json", "test.csv"), novel_labels, novel_val, novel),
    }


_HMDB_LABELS = ("hmdb_51_labels.csv", "hmdb_rephrased_classes.json")
_UCF_LABELS = ("ucf_101_labels.csv", "ucf101_rephrased_classes.json", "classInd.txt")
_UCF_TEST = (3_783, 3_734, 3_696)
_K600_VIFI = (14_084, 13_978, 14_136)
_K600_VAL = (7_276, 7_226, 7_261)

EXPECTED: dict[str, dict[str, Expected]] = {
    "hmdb51": {
        **_base_to_novel(26, 25, 780, 750, "hmdb_51"),
        **{
            f"split{k}": Expected(
                (f"hmdb_exp_split_{k}.json", f"val{k}.txt", f"hmdb_split{k}/test.csv"), _HMDB_LABELS, 1_530, 51
            )
            for k in SEEDS
        },
        "full": Expected(("hmdb_exp_split_full.json", "hmdb_full/test.csv"), _HMDB_LABELS, 5_100, 51),
        "rl": Expected(("rl.json",), _HMDB_LABELS, 4_676, 51),
    },
    "ucf101": {
        **_base_to_novel(51, 50, 2_088, 1_695, "ucf_101"),
        **{
            f"split{k}": Expected((f"ucf_split_{k}.json", f"val{k}.txt", f"ucf101_split{k}/test.csv"), _UCF_LABELS, count, 101)
            for k, count in zip(SEEDS, _UCF_TEST, strict=True)
        },
        "full": Expected(("ucf_split_full.json", "ucf101_full/test.csv"), _UCF_LABELS, 13_320, 101),
    },
    "kinetics400": _base_to_novel(200, 200, 9_944, 9_933, "kinetics_400"),
    "kinetics600": {
        **{
            f"vifi_split{k}": Expected((f"ZS_split{k}_K600_eval.txt",), (f"ZS_split{k}_K600.csv",), count, 160)
            for k, count in zip(SEEDS, _K600_VIFI, strict=True)
        },
        **{
            f"val_split{k}": Expected(
                (f"k600_split_{k}.json", f"k600_split{k}/val.csv"),
                (f"k600_split{k}_rephrased_classes.json", f"k600_split{k}_classes.json", f"ZS_split{k}_K600.csv"),
                count,
                160,
            )
            for k, count in zip(SEEDS, _K600_VAL, strict=True)
        },
    },
    "ssv2": _base_to_novel(87, 87, 17_562, 7_215, "ssv2_174"),
}
"""Dataset -> list -> what it should be. Kinetics-600 has two lists of clips under one vocabulary: vifi (the lineage of
ViFi-CLIP, clips of all splits) and val (FROSTER and Video-STAR, clips of its validation split alone)."""

_OFFICIAL = {
    "ucf101": ("trainlist01.txt", "testlist01.txt", "classInd.txt"),
    "kinetics400": ("kinetics-400_train.csv", "train.csv"),
    "ssv2": ("something-something-v2-train.json", "train.json"),
}
_OFFICIAL_TEST = {
    "kinetics400": ("kinetics-400_val.csv", "validate.csv", "val.csv"),
    "ssv2": ("something-something-v2-validation.json", "validation.json"),
}


def groups(dataset: str, protocol: str, *, full: bool = False, variant: str = "val") -> dict[str, str]:
    """What a protocol evaluates: the name of a group in the results -> the name of its list.

    full: one group of all clips in the place of the three splits; variant: val or vifi, of Kinetics-600. UserError when the
    protocol does not exist for the dataset.
    """
    if protocol == "base_to_novel" and dataset != "kinetics600":
        return {"base": "base_val", "novel": "novel_val"}
    if protocol == "cross_dataset" and dataset == "kinetics600" and not full:
        if variant not in ("val", "vifi"):
            raise UserError(
                f"there is no list of Kinetics-600 clips called {variant}: choose val (7,276 clips) or vifi (14,084)."
            )
        return {f"split{k}": f"{variant}_split{k}" for k in SEEDS}
    if protocol == "cross_dataset" and dataset in ("hmdb51", "ucf101"):
        return {"full": "full"} if full else {f"split{k}": f"split{k}" for k in SEEDS}
    raise UserError(
        f"{dataset} has no protocol {protocol}{' over all clips' if full else ''}: base_to_novel has "
        "hmdb51, ucf101, kinetics400, ssv2, and cross_dataset has hmdb51 and ucf101 (splits or full) and kinetics600 (splits)."
    )


class ListFolder:
    """A user's folder of lists, as far as it belongs to one dataset."""

    def __init__(self, folder: str | Path, dataset: str):
        self.folder, self.dataset = Path(folder), dataset
        if dataset not in EXPECTED:
            raise UserError(f"there is no dataset {dataset}: choose {', '.join(DATASETS)}.")
        if not self.folder.is_dir():
            raise UserError(f"there is no folder of lists {folder}: give the folder that holds the lists of {dataset}.")
        here = [Path(place, name) for place, _, names in os.walk(self.folder, followlinks=True) for name in names]
        self.files = sorted(path for path in here if self._ours(path))

    def _ours(self, path: Path) -> bool:
        parts = [part.lower() for part in path.relative_to(self.folder).parts[:-1]]
        others = [alias for name, aliases in _FOLDERS.items() if name != self.dataset for alias in aliases]
        return any(a in part for part in parts for a in _FOLDERS[self.dataset]) or not any(
            a in part for part in parts for a in others
        )

    def find(self, names: Sequence[str]) -> list[Path]:
        """The files with these names, those of the first name first."""
        ends = [(path, f"/{path.absolute().as_posix()}") for path in self.files]
        return [path for name in names for path, end in ends if end.endswith(f"/{name}")]

    def _find_list(self, names: Sequence[str], formats: Sequence[str], clips: int = 0) -> Path | None:
        """The first list that is found under these names in one of the formats, if it can be one with this number of clips."""
        counts = {path: len(read.clips) for path in self.find(names) if (read := _try(path)) and read.format in formats}
        return next((path for path, count in counts.items() if count == clips), next(iter(counts), None))

    def find_labels(self, names: Sequence[str]) -> tuple[Labels | None, dict[str, str]]:
        """The first file that names the classes, and the explanations of all of them by `label_key`."""
        found = [read_labels(path) for path in self.find(names)]
        explanations = {
            label_key(name): text
            for labels in reversed(found)
            for name, text in zip(labels.names, labels.explanations, strict=True)
            if text
        }
        return (found[0] if found else None), explanations

    def read(self, name: str) -> FoundList | None:
        """The list of that name: found, or else derived from the official lists; None when the folder has neither."""
        expected = EXPECTED[self.dataset][name]
        labels, explanations = self.find_labels(expected.labels)
        path = self._find_list(expected.files, ("path label", "path,label", "video-star"), expected.clips)
        if path is None:
            derived = self._derive(name)
            if derived is None:
                return None
            clips, vocabulary, source = derived
        else:
            read = read_list(path, labels.names if labels else ())
            if not all(clip.label for clip in read.clips):
                raise UserError(
                    f"{path} numbers its classes: put the file that names them beside it, "
                    f"such as {' or '.join(expected.labels[:2])}."
                )
            clips, source = read.clips, path.relative_to(self.folder).as_posix()
            vocabulary = labels.names if labels else read.labels
            explanations = {**{label_key(c.label): c.explanation for c in clips if c.explanation}, **explanations}
        spelled = {label_key(label): label for label in vocabulary}
        for clip in clips:
            if label_key(clip.label) not in spelled:
                raise UserError(
                    f"{source} has a clip of {clip.label}, which is none of the {len(vocabulary)} classes that the label file "
                    "names: give the list and the label file of one release."
                )
        clips = tuple(replace(clip, split=name, label=spelled[label_key(clip.label)]) for clip in clips)
        return FoundList(name, clips, tuple(vocabulary), explanations, source, expected)

    def read_all(self) -> dict[str, FoundList]:
        """Every list of the dataset that the folder holds or allows to derive."""
        return {name: found for name in EXPECTED[self.dataset] if (found := self.read(name))}

    def _derive(self, name: str) -> tuple[tuple[ClipRecord, ...], tuple[str, ...], str] | None:
        """Clips, vocabulary and source of a list that follows from the official ones by the rules of `splits`."""
        if name.startswith("split"):
            test = self._official("test", int(name[-1]))
            return (test.clips, test.labels, "official lists") if test else None
        train, test = self._official("train", 1), self._official("test", 1)
        if train is None or (test is None and not name.startswith("train")):
            return None
        if name == "full" and test:
            return (*train.clips, *test.clips), train.labels, "official lists, train and test of split 1"
        classes = by_frequency(train.clips)
        if name.startswith("train_s"):
            seed = int(name[-1])
            drawn = few_shot(of_classes(train.clips, classes.base), SHOTS, seed)
            return drawn, classes.base, f"drawn here with seed {seed}, not the published draw"
        if name in ("base_val", "novel_val") and test:
            labels = classes.base if name == "base_val" else classes.novel
            return of_classes(test.clips, labels), labels, "official lists, classes by training frequency"
        return None

    def _official(self, part: str, number: int) -> ClipList | None:
        """The official training or test clips of a split, if the folder has them."""
        names: tuple[str, ...]
        if self.dataset == "hmdb51":
            names = (f"brush_hair_test_split{number}.txt", f"wave_test_split{number}.txt")
            found = self.find(names)
            return read_hmdb_splits(found[0].parent, number, part) if found else None
        if self.dataset == "ucf101":
            found = self.find((f"{part}list{number:02d}.txt",))
            return read_list(found[0]) if found else None
        names = (_OFFICIAL if part == "train" else _OFFICIAL_TEST).get(self.dataset, ())
        path = self._find_list(names, ("kinetics", "ssv2")) if number == 1 else None
        return read_list(path) if path else None


def _try(path: Path) -> ClipList | None:
    """A list, or None where the file is none: names such as test.json are used for other things too."""
    try:
        return read_list(path)
    except UserError:
        return None
