"""The lists that users already have, read as they are: which clips, and of which class.

`read_list` tells the formats of OVAR.md apart by their first lines and their file names; `read_labels` reads the files that
name the classes. What fits no format is a UserError that names the line and what was expected.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vstar_jax.data.clips import VIDEO_SUFFIXES, ClipRecord, readable
from vstar_jax.errors import UserError

_SUFFIX = "|".join(re.escape(suffix) for suffix in VIDEO_SUFFIXES)
_NAMED = re.compile(rf"(.+(?:{_SUFFIX}))(?:[ \t]+|,[ \t]*)(\S.*)", flags=re.IGNORECASE)
_HMDB_FILE = re.compile(r"(.+)_test_split(\d)\.txt")
_UCF_FILE = re.compile(r"(train|test)list\d+\.txt")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", flags=re.DOTALL)
_HMDB_SPLITS = {"0": "unused", "1": "train", "2": "test"}
_KINETICS = ("youtube_id", "time_start", "time_end")

FORMATS = (
    "`path label`, `path,label`, UCF-101's `Class/v_X.avi [id]`, HMDB-51's `name 0|1|2` in <class>_test_split<k>.txt, "
    "Video-STAR's JSON list of {path, solution}, Kinetics' CSV with label,youtube_id,time_start,time_end, SSv2's JSON list "
    "of {id, template}, and the manifest.jsonl of scripts/prepare.py"
)


@dataclass(frozen=True)
class ClipList:
    """What a file lists, in its order; format: the name of the format that it was read as."""

    format: str
    clips: tuple[ClipRecord, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order in which they first occur."""
        return tuple(dict.fromkeys(clip.label for clip in self.clips if clip.label))


@dataclass(frozen=True)
class Labels:
    """The classes of a list in the order of their numbers, and what the file explains about them ("" where it does not)."""

    names: tuple[str, ...]
    explanations: tuple[str, ...]

    def lines(self) -> str:
        """A line "- label: explanation" for each class that is explained."""
        pairs = zip(self.names, self.explanations, strict=True)
        return "\n".join(f"- {readable(name)}: {text}" for name, text in pairs if text)


def read_list(path: str | Path, names: Sequence[str] = ()) -> ClipList:
    """The clips of a list in any format.

    names: the classes in the order of their numbers, for lists that number them from 0. Without names a number leaves the label
    empty. UserError when the file is missing, empty, or has a line that does not fit its format.
    """
    path = Path(path)
    text = _text(path)
    if path.suffix.lower() == ".jsonl":
        made = _read_manifest(path, text)
    else:
        made = _read_json(path, text) if _is_json(path, text) else _read_lines(path, text, names)
    return replace(made, clips=tuple(c if c.split else replace(c, split=path.stem) for c in made.clips))


def read_hmdb_splits(folder: str | Path, number: int, wanted: str = "test") -> ClipList:
    """The official lists of HMDB-51: the clips of every <class>_test_split<number>.txt in a folder that are `wanted`.

    wanted: train, test or unused. UserError when the folder has no such file.
    """
    files = sorted(Path(folder).glob(f"*_test_split{number}.txt"))
    if not files:
        raise UserError(f"{folder} has no <class>_test_split{number}.txt: give the folder of HMDB-51's official lists.")
    clips = (clip for file in files for clip in read_list(file).clips if clip.split == wanted)
    return ClipList("hmdb", tuple(clips))


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"there is no list {path}: check the name.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text in UTF-8: save it as UTF-8, or give another list.") from None
    if not text.strip():
        raise UserError(f"{path} is empty: fetch it again, or give another list.")
    return text


def _is_json(path: Path, text: str) -> bool:
    """A bracket alone is no proof: names of HMDB-51 begin with one too."""
    return path.suffix.lower() == ".json" or re.match(r'\s*(\[\s*\{|\{\s*")', text) is not None


def _bad(path: Path, line: int, text: str, expected: str) -> UserError:
    shown = text if len(text) <= 120 else f"{text[:120]}..."
    return UserError(f"{path}, line {line}: expected {expected}, found {shown!r}: correct the line, or give another list.")


Parse = Callable[[str], ClipRecord | None]


def _read_lines(path: Path, text: str, names: Sequence[str]) -> ClipList:
    rows = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    first = rows[0][1]
    if set(_KINETICS) <= set(first.replace('"', "").replace(" ", "").split(",")):
        return _read_kinetics(path, text)
    name, expected, parse = _line_format(path, first, names)
    clips = []
    for number, line in rows:
        clip = parse(line)
        if clip is None:
            raise _bad(path, number, line, expected)
        clips.append(clip)
    return ClipList(name, tuple(clips))


def _line_format(path: Path, first: str, names: Sequence[str]) -> tuple[str, str, Parse]:
    """Name, shape and parser of the lines of a text file, told by its name and its first line."""
    if hmdb := _HMDB_FILE.fullmatch(path.name):
        return "hmdb", "`name.avi 0`, `1` or `2`", lambda line: _hmdb_line(line, hmdb[1])
    if _UCF_FILE.fullmatch(path.name) or (" " not in first and _ucf_line(first) is not None):
        classes = path.parent / "classInd.txt"
        known = read_labels(classes).names if classes.is_file() else ()
        shape = "`Class/v_Class_gNN_cNN.avi`, with the number of that class in classInd.txt or none,"
        return "ucf", shape, lambda line: _ucf_line(line, known)
    for separator, title in ((",", "path,label"), (" ", "path label")):
        if _pair(first, separator) is not None:
            shape = f"`{title}` with a label number below {len(names)}" if names else f"`{title}`"
            return title, shape, partial(_labelled, separator=separator, names=names)
    raise _bad(path, 1, first, f"one of {FORMATS}")


def _pair(line: str, separator: str) -> tuple[str, str] | None:
    """Path and label of a line: split after the last video suffix, or without one at the last separator before a number."""
    if named := _NAMED.fullmatch(line):
        between = line[named.end(1) : named.start(2)]
        return (named[1], named[2]) if ("," in between) == (separator == ",") else None
    path, found, label = line.rpartition(separator)
    return (path.strip(), label) if found and path.strip() and label.isascii() and label.isdigit() else None


def _labelled(line: str, *, separator: str, names: Sequence[str]) -> ClipRecord | None:
    pair = _pair(line, separator)
    if pair is None:
        return None
    path, label = pair[0].replace("\\", "/"), pair[1].strip().strip('"')
    if label.isascii() and label.isdigit():
        if names and int(label) >= len(names):
            return None
        label = names[int(label)] if names else ""
    return ClipRecord(path, label)


def _hmdb_line(line: str, label: str) -> ClipRecord | None:
    name, _, mark = line.rpartition(" ")
    if mark not in _HMDB_SPLITS or not name.strip():
        return None
    return ClipRecord(f"{label}/{name.strip()}", label, split=_HMDB_SPLITS[mark])


def _ucf_line(line: str, known: Sequence[str] = ()) -> ClipRecord | None:
    found = re.fullmatch(rf"((\w+)/v_\w+_g\d+_c\d+(?:{_SUFFIX}))(?:\s+(\d+))?", line)
    if found is None:
        return None
    label, number = found[2], found[3]
    if known and (label not in known or (number is not None and known.index(label) != int(number) - 1)):
        return None
    return ClipRecord(found[1], label)


def _read_kinetics(path: Path, text: str) -> ClipList:
    rows = csv.DictReader(text.splitlines(), skipinitialspace=True)
    clips = []
    for row in rows:
        try:
            start, end = (round(float(row[k])) for k in _KINETICS[1:])
            name = f"{row['youtube_id'].strip()}_{start:06d}_{end:06d}.mp4"
        except (TypeError, ValueError, AttributeError):
            line = ",".join(str(v) for v in row.values())
            raise _bad(path, rows.line_num, line, "`label,youtube_id,time_start,time_end,split` with seconds") from None
        clips.append(ClipRecord(name, (row.get("label") or "").strip(), split=(row.get("split") or "").strip()))
    if not clips:
        raise _bad(path, 1, text.strip(), "lines after the header of a Kinetics CSV")
    return ClipList("kinetics", tuple(clips))


def _read_manifest(path: Path, text: str) -> ClipList:
    clips = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            item = json.loads(line)
            clips.append(ClipRecord(item["path"], item["label"], item["split"], digest=item["digest"]))
        except (ValueError, TypeError, KeyError):
            raise _bad(path, number, line, "an object with path, label, split and digest") from None
    return ClipList("manifest", tuple(clips))


def _read_json(path: Path, text: str) -> ClipList:
    items = _parse_json(path, text)
    if not isinstance(items, list) or not items:
        raise UserError(
            f"{path}, line 1: expected a list of clips, found the names of classes or nothing: give the list of clips here, "
            "and this file where the names of classes are asked for."
        )
    name = next((n for n, (keys, _) in _JSON_FORMATS.items() if isinstance(items[0], dict) and keys <= set(items[0])), None)
    if name is None:
        raise _bad(path, 1, json.dumps(items[0]), f"one of {FORMATS}")
    keys, make = _JSON_FORMATS[name]
    clips = []
    for place, item in enumerate(items):
        clip = make(item) if isinstance(item, dict) and keys <= set(item) else None
        if clip is None:
            raise _bad(path, _item_line(text, place), json.dumps(item), f"an entry with {' and '.join(sorted(keys))}")
        clips.append(clip)
    return ClipList(name, tuple(clips))


def _video_star(item: dict[str, Any]) -> ClipRecord | None:
    path, answer = item["path"], _ANSWER.fullmatch(str(item["solution"]).strip())
    if not isinstance(path, str) or not path.strip() or answer is None or not answer[1].strip():
        return None
    return ClipRecord(path.strip(), answer[1].strip(), explanation=str(item.get("explain") or "").strip())


def _ssv2(item: dict[str, Any]) -> ClipRecord | None:
    """The class is the template; the label of the file is the sentence with the objects filled in. The test set has neither."""
    if not isinstance(item["id"], str | int) or not str(item["id"]).strip():
        return None
    return ClipRecord(f"{str(item['id']).strip()}.webm", re.sub(r"[\[\]]", "", item.get("template") or ""))


_JSON_FORMATS: dict[str, tuple[set[str], Callable[[dict[str, Any]], ClipRecord | None]]] = {
    "video-star": ({"path", "solution"}, _video_star),
    "ssv2": ({"id"}, _ssv2),
}


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        lines = text.splitlines()
        found = lines[error.lineno - 1].strip() if error.lineno <= len(lines) else "the end of the file"
        raise _bad(path, error.lineno, found, f"valid JSON ({error.msg.lower()})") from None


def _item_line(text: str, place: int) -> int:
    """The line in which an item of a JSON list begins."""
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    for _ in range(place + 1):
        start = re.compile(r"[\s,]*").match(text, at).end()  # type: ignore[union-attr]
        _, at = decoder.raw_decode(text, start)
    return text.count("\n", 0, start) + 1


def read_labels(path: str | Path) -> Labels:
    """The classes that a file names, in the order of their numbers.

    Formats: JSON {"0": "label"} or {"0": "label: explanation"} (Video-STAR), {"label": "0"} (SSv2), CSV `id,name` with or
    without its header, UCF-101's `1 Class`, or one label a line. UserError when it is none of them or numbers are missing.
    """
    path = Path(path)
    text = _text(path)
    pairs = list(_json_labels(path, text) if _is_json(path, text) else _line_labels(path, text))
    numbers = sorted(number for number, _ in pairs)
    first = 1 if numbers and numbers[0] == 1 else 0
    if numbers != list(range(first, first + len(pairs))):
        raise UserError(
            f"{path}: expected classes numbered from {first} without gaps, found {len(pairs)} that are not: correct it."
        )
    return _explained(text for _, text in sorted(pairs))


def _explained(texts: Iterable[str]) -> Labels:
    parts = [text.partition(":") for text in texts]
    return Labels(tuple(p[0].strip() for p in parts), tuple(p[2].strip() for p in parts))


def _json_labels(path: Path, text: str) -> Iterator[tuple[int, str]]:
    found = _parse_json(path, text)
    if not isinstance(found, dict):
        raise _bad(path, 1, text.lstrip().splitlines()[0], 'the names of classes as {"0": "label", ...}')
    for key, value in found.items():
        if str(key).isdigit() and isinstance(value, str) and value.strip():
            yield int(key), value
        elif str(value).isdigit() and key.strip():
            yield int(value), key
        else:
            raise _bad(path, _line_of(text, key), f"{key}: {value}", '`"number": "label"` or `"label": "number"`')


def _line_of(text: str, key: str) -> int:
    return text.count("\n", 0, max(text.find(json.dumps(key)), 0)) + 1


def _line_labels(path: Path, text: str) -> Iterator[tuple[int, str]]:
    rows = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if rows[0][1].replace(" ", "").lower() in ("id,name", "id,label"):
        rows = rows[1:]
    numbered = re.compile(r"(\d+)(?:\s*,\s*|\s+)(\S.*)")
    plain = not numbered.fullmatch(rows[0][1]) if rows else True
    for place, (number, line) in enumerate(rows):
        if plain:
            yield place, line
        elif found := numbered.fullmatch(line):
            yield int(found[1]), next(csv.reader([found[2]]))[0] if found[2].startswith('"') else found[2]
        else:
            raise _bad(path, number, line, "`number,label` or `number label`")
