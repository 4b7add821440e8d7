"""A clip as the lists know it: its path, its label, and what makes two of them the same clip or the same class.

`lists` makes `ClipRecord`s, `builders.videos` finds their files, `leakage` compares them. Lists of one dataset disagree in
folders, suffixes and spelling (OVAR.md), so paths and labels are compared by `canonical` and `label_key`, never as they stand.
"""

import hashlib
import os
import re
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm")

_YOUTUBE = re.compile(r"([\w-]{11})(?:_\d{6}_\d{6})?", flags=re.ASCII)
_HMDB_NAME = re.compile(r"(.+)_[fhlu]_[cn]m_np\d+_(?:ba|fr|le|ri)_(?:bad|goo|med)_\d+")
_UCF_NAME = re.compile(r"v_(\w+)_g\d+_c\d+")
_HASH_BLOCK = 1 << 20


@dataclass(frozen=True)
class ClipRecord:
    """One line of a list.

    path: relative to the folder of videos, with forward slashes, as the list spells it; label: as the list names it, empty when
    the list gives a number and no names are known; split: the list's name, or the split that the line tells; explanation: what
    the list says about the class, if anything; digest: the content hash of the file, where somebody has read it.
    """

    path: str
    label: str
    split: str = ""
    explanation: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Canonical:
    """A path without what layouts change: the stem (for Kinetics the YouTube id), and the key of its class folder, or ""."""

    stem: str
    folder: str

    def same(self, other: "Canonical") -> bool:
        """Whether both are one clip: a path without a class folder is the same as one with any."""
        return self.stem == other.stem and (not self.folder or not other.folder or self.folder == other.folder)


def label_key(label: str) -> str:
    """What two spellings of a class have in common: letters and digits alone, in lower case.

    Stricter than nothing and laxer than the scorer (`dialogue.same_label`), which keeps punctuation: lists of one class differ
    in brackets and commas too.
    """
    folded = unicodedata.normalize("NFKC", label).casefold()
    return "".join(c for c in folded if c.isalnum()) or folded.strip()


def readable(label: str) -> str:
    """A label as a prompt shows it: brush_hair and BrushHair become words, and SSv2's brackets go."""
    words = re.sub(r"[\[\]]", "", label).replace("_", " ").split()
    if len(words) == 1:
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words[0]).split()
    return " ".join(words)


def stem_of(path: str) -> str:
    """The file's name without a video suffix, in Unicode's composed form; other dots stay."""
    name = PurePosixPath(unicodedata.normalize("NFC", path.replace("\\", "/"))).name
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and f".{suffix.lower()}" in VIDEO_SUFFIXES else name


def canonical(path: str, classes: Collection[str] = ()) -> Canonical:
    """What identifies the clip at `path` in every layout: flat, class/file, train/file, val/class/file.

    classes: the `label_key`s of the dataset; a folder that is none of them says nothing about the clip. YouTube's ids are
    unique, so for them neither the folder nor the seconds count.
    """
    stem = stem_of(path)
    if youtube := _YOUTUBE.fullmatch(stem):
        return Canonical(youtube[1], "")
    parts = path.replace("\\", "/").split("/")[:-1]
    folder = label_key(parts[-1]) if parts else ""
    return Canonical(stem, folder if folder in classes else "")


def told_class(path: str, classes: Collection[str]) -> str:
    """The `label_key` of the class that the path itself tells, by its folder or by the file names of HMDB-51 and UCF-101.

    classes: the keys to choose from; "" when the path tells none of them.
    """
    if folder := canonical(path, classes).folder:
        return folder
    stem = stem_of(path)
    if ucf := _UCF_NAME.fullmatch(stem):
        return label_key(ucf[1]) if label_key(ucf[1]) in classes else ""
    if hmdb := _HMDB_NAME.fullmatch(stem):
        words = hmdb[1].split("_")
        endings = (label_key("".join(words[i:])) for i in range(len(words)))  # the longest class first: climb_stairs
        return next((key for key in endings if key in classes), "")
    return ""


def contradictions(clips: Iterable[ClipRecord], classes: Collection[str]) -> list[ClipRecord]:
    """Clips whose label is not the class that their own path tells.

    The base and novel lists of HMDB-51 that ViFi-CLIP and Video-STAR released swap kick with kick_ball and sword with
    sword_exercise in this way.
    """
    return [c for c in clips if c.label and (told := told_class(c.path, classes)) and told != label_key(c.label)]


def content_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class VideoFiles:
    """The video files below a folder, found by what lists call them."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._by_stem: dict[str, list[str]] = {}
        for place, folders, names in os.walk(self.folder, followlinks=True):
            folders.sort()
            for name in sorted(names):
                if name.lower().endswith(VIDEO_SUFFIXES):
                    path = Path(place, name).relative_to(self.folder).as_posix()
                    self._by_stem.setdefault(canonical(path).stem, []).append(path)

    def __len__(self) -> int:
        return sum(map(len, self._by_stem.values()))

    def find(self, path: str, classes: Collection[str] = ()) -> str | None:
        """The file of a listed path, relative to the folder, or None when there is none.

        The suffix and the folders may differ; of several files the one that agrees most with the list is taken.
        """
        wanted, listed = canonical(path, classes), unicodedata.normalize("NFC", path.replace("\\", "/"))
        found = [p for p in self._by_stem.get(wanted.stem, ()) if wanted.same(canonical(p, classes))]
        if not found:
            return None
        ends = [_shared_ending(listed, p) for p in found]
        return found[ends.index(max(ends))]


def _shared_ending(a: str, b: str) -> tuple[int, bool]:
    """How many parts two paths share from the end, suffixes apart, and whether the suffixes agree too."""
    first, second = ([*p.split("/")[:-1], stem_of(p)] for p in (a, unicodedata.normalize("NFC", b)))
    shared = 0
    for x, y in zip(reversed(first), reversed(second), strict=False):
        if x != y:
            break
        shared += 1
    return shared, Path(a).suffix.lower() == Path(b).suffix.lower()
