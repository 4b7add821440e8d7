"""Compares training and evaluation lists: which clips and which classes both have. The exit code is 1 when they share any.

  python scripts/check_leakage.py --train rl.json --eval novel_val.txt --eval-labels hmdb_51_novel_labels.csv

Lists may be of any format (see vstar_jax.data.lists) or manifests that scripts/prepare.py wrote, which compare by content too.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from vstar_jax.data.clips import ClipRecord, VideoFiles, content_hash
from vstar_jax.data.leakage import check
from vstar_jax.data.lists import read_labels, read_list
from vstar_jax.errors import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="lists that were trained on, taken together")
    parser.add_argument("--eval", nargs="+", required=True, help="lists that are evaluated, each by itself")
    parser.add_argument("--train-labels", help="the file that names the numbered classes of the training lists")
    parser.add_argument("--eval-labels", help="the file that names the numbered classes of the evaluated lists")
    parser.add_argument("--videos", help="the folder of videos: compare what the files hold too (reads all of them)")
    parser.add_argument("--classes-may-overlap", action="store_true", help="a shared class is no leak (base classes)")
    options = parser.parse_args()

    files = VideoFiles(options.videos) if options.videos else None
    train = [clip for path in options.train for clip in _read(path, options.train_labels, files)]
    leaks = False
    for path in options.eval:
        report = check(train, _read(path, options.eval_labels, files))
        leaks |= report.leaks(classes=not options.classes_may_overlap)
        print(f"{path}\n{report.text()}\n")
    sys.exit(1 if leaks else 0)


def _read(path: str, labels: str | None, files: VideoFiles | None) -> Sequence[ClipRecord]:
    clips = read_list(path, read_labels(labels).names if labels else ()).clips
    if files is None:
        return clips
    from tqdm import tqdm

    found = ((clip, files.find(clip.path)) for clip in tqdm(clips, desc=f"hash {Path(path).name}", unit="clip"))
    return [dataclasses.replace(c, digest=content_hash(files.folder / f)) if f else c for c, f in found]


if __name__ == "__main__":
    run_script(main)
