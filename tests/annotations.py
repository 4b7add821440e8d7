"""The released annotation files, read in place where they are: VSTAR_ANNOTATIONS names their folder."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("VSTAR_ANNOTATIONS") or Path(__file__).resolve().parents[2] / "shared/release_annotations")

needed = pytest.mark.skipif(not FOLDER.is_dir(), reason="the released annotation files are not there (VSTAR_ANNOTATIONS)")
