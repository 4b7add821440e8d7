"""Predictions on disk as they are made, so that an evaluation that was killed goes on where it was.

A folder of results is a finished evaluation when it has result.json, and then a new one may begin there; without it, only the
same evaluation may go on.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vstar_jax.errors import UserError
from vstar_jax.evaluation.report import Prediction
from vstar_jax.pages import write_json


class Journal:
    """predictions.jsonl of a folder: one line a clip, in the order of the records, whole lines only.

    predictions: those that are there, also from before.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any]):
        """about: what the predictions depend on, as flat JSON. UserError when the folder has an unfinished evaluation of other
        things.
        """
        self.folder = Path(folder)
        self.path, about_file = self.folder / "predictions.jsonl", self.folder / "evaluation.json"
        self.result = self.folder / "result.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        about = json.loads(json.dumps(about))
        if self.result.exists():
            # The result goes last: without it, what is left of a finished evaluation would pass for one to go on with.
            self.path.unlink(missing_ok=True)
            write_json(about_file, about)
            self.result.unlink()
        elif self.path.exists() and self.path.stat().st_size:
            before = json.loads(about_file.read_text()) if about_file.exists() else {}
            for key in dict.fromkeys((*before, *about)):
                if before.get(key) != about.get(key):
                    raise UserError(
                        f"{self.folder} holds an unfinished evaluation with {key}={before.get(key)}, but now it is "
                        f"{about.get(key)}: set it back to go on, give another --out, or remove that folder."
                    )
        else:
            write_json(about_file, about)
        self.predictions = self._read()

    def _read(self) -> list[Prediction]:
        """The predictions of the whole lines; a line that was being written when the evaluation was killed goes."""
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return [Prediction.parse(line) for line in whole.decode().splitlines()]

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Appends predictions; they are on the disk when this returns."""
        with self.path.open("a") as file:
            file.writelines(prediction.line() for prediction in predictions)
            file.flush()
            os.fsync(file.fileno())
        self.predictions += predictions

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes result.json."""
        write_json(self.result, result)
