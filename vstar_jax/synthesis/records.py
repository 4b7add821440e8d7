"""What is on disk: dialogues as they are made, verdicts as they are given, and the released JSON format.

Files grow by whole lines, so that a run that was killed goes on: what is there is not made again, and a line that was being
written goes.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from vstar_jax.data.assessment import Item
from vstar_jax.errors import UserError


@dataclass(frozen=True)
class Judgement:
    """What a judge says of a dialogue; scores: criterion -> 0 to 1."""

    path: str
    keep: bool
    reasons: tuple[str, ...]
    scores: Mapping[str, float] = field(default_factory=dict)


Line = TypeVar("Line", Item, Judgement)


class Lines(Generic[Line]):
    """A JSON Lines file of one kind, by the path of the clip."""

    def __init__(self, path: Path, kind: type[Line]):
        """Reads what is there. UserError when a whole line of it is none of this kind."""
        self.path = path
        self.found: dict[str, Line] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found = parse(json.loads(line), kind)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(f"{path}, line {number} is no {kind.__name__.lower()}: remove the line.") from None
            self.found[found.path] = found

    def add(self, line: Line) -> None:
        """Appends a line, which is on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(write_line(line))
            file.flush()
            os.fsync(file.fileno())
        self.found[line.path] = line


def write_line(line: Item | Judgement) -> str:
    """One line of JSON Lines, in ASCII, since some readers take other characters than a line feed for the end of a line."""
    return json.dumps(asdict(line)) + "\n"


def parse(item: Mapping[str, Any], kind: type[Line]) -> Line:
    """An object of a line; other fields are left alone. ValueError or TypeError when it is of another kind."""
    given = {f.name: item[f.name] for f in fields(kind) if f.name in item}
    for name in ("labels", "reasons", "persons"):
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    found = kind(**given)
    if not isinstance(found.path, str) or (isinstance(found, Item) and not isinstance(found.first + found.second, str)):
        raise ValueError("texts were expected")
    return found


def same_run(folder: Path, about: Mapping[str, Any]) -> None:
    """UserError when the folder has dialogues that were made in another way."""
    path, about = folder / "synthesis.json", json.loads(json.dumps(about))
    if path.exists() and (folder / "dialogues.jsonl").exists():
        before = json.loads(path.read_text())
        for key in dict.fromkeys((*before, *about)):
            if before.get(key) != about.get(key):
                raise UserError(
                    f"{folder} holds dialogues made with {key}={before.get(key)}, but now it is {about.get(key)}: set it back "
                    "to go on, or give another --out."
                )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def write_all(path: Path, lines: Iterable[Item]) -> None:
    """A whole file at once: it is there complete or not at all."""
    new = path.with_suffix(".new")
    new.write_text("".join(map(write_line, lines)), encoding="utf-8")
    new.replace(path)


PROBLEM = "Which human action does the clip show?"


def write_released(path: Path, items: Sequence[Item]) -> None:
    """The dialogues as a list in the released format; the replies are in fields of their own, which its readers leave alone."""
    content = [
        {
            "problem_id": number,
            "problem": PROBLEM,
            "data_type": "video",
            "problem_type": "action-detection",
            "solution": f"<answer>{item.label}</answer>",
            "explain": item.explanation,
            "path": item.path,
            "process": [item.first, item.second],
            "description": item.description,
        }
        for number, item in enumerate(items, 1)
    ]
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_released(path: Path) -> list[Item]:
    """A list in the released format; without replies of their own entries have empty ones. UserError with the entry."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path} is no JSON file: give a list in the released format.") from None
    items = []
    for number, entry in enumerate(content if isinstance(content, list) else [None], 1):
        try:
            answer = re.search(r"<answer>(.*?)</answer>", entry["solution"], flags=re.DOTALL)
            first, second = entry.get("process") or ("", "")
            texts = entry["path"], first, second, entry.get("explain") or "", entry.get("description") or ""
            if answer is None or not all(isinstance(text, str) for text in texts):
                raise ValueError
            items.append(Item(*texts, label=answer[1].strip()))
        except (TypeError, KeyError, ValueError, AttributeError):
            raise UserError(
                f"{path}, entry {number}: expected an object with the texts solution and path: correct it."
            ) from None
    return items
