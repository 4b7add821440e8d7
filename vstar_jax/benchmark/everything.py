"""Runs all measurements one after the other, each in a process of its own, so that memory and failures stay apart."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vstar_jax.benchmark.common import table
from vstar_jax.errors import UserError

NEEDED = {
    "tools": (("fastapi", "uvicorn", "openai", "ultralytics", "torch"), "pip install -e '.[tools,yolo]'"),
    "data": (("tensorflow_datasets", "grain", "decord", "av", "transformers"), "pip install -e '.[data]'"),
}
"""Measurement -> the modules that it needs beside those of the model, and how to get them."""
LAST_LINES = 20


def missing(what: str) -> str:
    """A sentence on the modules that a measurement lacks here; empty when it lacks none."""
    modules, command = NEEDED.get(what, ((), ""))
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed ({command})." if absent else ""


def shared_flags(flags: Sequence[str]) -> list[str]:
    """The flags that every part gets: all but what is measured, against what, and where the results go."""
    own = re.compile(r"--(what|against|out)(=|$)")
    kept, skip = [], False
    for flag in flags:
        if skip or own.match(flag):
            skip = not skip and "=" not in flag
            continue
        kept.append(flag)
    return kept


def run(command: Sequence[str], model: str, rivals: Mapping[str, Sequence[str]], against: str | None, out: Path) -> None:
    """Runs `command --what=PART` for every part of `rivals`, and writes all-MODEL.json and all-MODEL.md beside their own files.

    rivals: part -> the rivals that it knows; a part that does not know `against` is measured alone. What is not installed is
    skipped with a sentence. Raises UserError when a part failed, after all others have run and the files are written.
    """
    results: dict[str, Any] = {}
    told: dict[str, str] = {}
    skipped, failed = {}, {}
    for number, (part, known) in enumerate(rivals.items(), start=1):
        print(f"{number} of {len(rivals)}: {part}", flush=True)
        if sentence := missing(part):
            skipped[part] = sentence
            continue
        compared = [f"--against={against}"] if against in known else []
        with tempfile.TemporaryDirectory() as folder:
            error = _shown([*command, f"--what={part}", *compared, f"--out={folder}"])
            written = sorted(Path(folder).glob(f"{part}-*"))
            if error or len(written) != 2:
                failed[part] = error or "it wrote no result."
                continue
            out.mkdir(parents=True, exist_ok=True)
            results[part], told[part] = json.loads(written[0].read_text()), written[1].read_text()
            for file in written:
                shutil.copy(file, out / file.name)
    _write(model, results, told, skipped, failed, out)
    if failed:
        raise UserError(f"{', '.join(failed)} failed, as {out / f'all-{model}.md'} says beside the results of the others.")


def _shown(command: Sequence[str]) -> str:
    """Runs a command and shows all that it says; empty, or why it failed: the last line on stderr."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    lines: deque[str] = deque([""], maxlen=LAST_LINES)
    while chunk := process.stderr.read1(4096):  # type: ignore[attr-defined]  # as it comes, with the progress bars
        text = chunk.decode(errors="replace")
        sys.stderr.write(text)
        sys.stderr.flush()
        first, *rest = text.split("\n")
        lines[-1] += first
        lines.extend(rest)
    if not process.wait():
        return ""
    said = [line.rsplit("\r")[-1].strip() for line in lines]
    last = next((line for line in reversed(said) if line), "it said nothing")
    return f"{last.removeprefix('error: ')} (exit code {process.returncode})"


def _write(
    model: str,
    results: Mapping[str, Any],
    told: Mapping[str, str],
    skipped: Mapping[str, str],
    failed: Mapping[str, str],
    out: Path,
) -> None:
    """One JSON and one Markdown file: a table of how it went, then what each part says."""
    out.mkdir(parents=True, exist_ok=True)
    content = {"what": "all", "model": model, "parts": results, "skipped": skipped, "failed": failed}
    rows = {part: ["measured"] for part in results}
    rows |= {part: [f"skipped: {why}"] for part, why in skipped.items()}
    rows |= {part: [f"failed: {why}".replace("|", "/")] for part, why in failed.items()}
    text = table(["result"], rows) + "".join(f"\n## {part}\n\n{page}" for part, page in told.items())
    stem = out / f"all-{model}"
    stem.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    stem.with_suffix(".md").write_text(text)
    print(text)
