"""Files that a program brings up to date in one piece, so that a reader never sees half of one: JSON, and the parts of a
Markdown page that stand between marks of their own.
"""

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: str | Path, content: Any) -> None:
    """Writes JSON."""
    _replace(Path(path), json.dumps(content, indent=2) + "\n")


def write_part(page: str | Path, name: str, text: str) -> None:
    """Writes Markdown between the marks <!-- NAME --> and <!-- end of NAME --> of a page.

    A page without these marks gets them at its end, and one that is not there is made.
    """
    path, start, end = Path(page), f"<!-- {name} -->", f"<!-- end of {name} -->"
    there = path.read_text() if path.exists() else ""
    if start not in there:
        there += f"{start}\n{end}\n"
    before, _, rest = there.partition(start)
    _replace(path, f"{before}{start}\n{text.strip()}\n{end}{rest.partition(end)[2]}")


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
