"""Prepares a dataset from a folder of videos and a folder of lists: surveys the files, and writes what training reads.

  python scripts/prepare.py --dataset hmdb51 --videos DIR --lists DIR [--out data]

Nothing is downloaded. A survey that was stopped goes on where it was. Clips that are missing or broken are listed in
problems.txt and stay in the denominator of an evaluation.
"""

import argparse
from typing import TYPE_CHECKING

from vstar_jax.data.decoding import DEADLINE
from vstar_jax.data.protocols import DATASETS, EXPECTED
from vstar_jax.errors import run_script

if TYPE_CHECKING:
    from vstar_jax.data.builders.videos import Prepared

SHOWN_PROBLEMS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--videos", required=True, help="folder of videos: flat, or in folders by class or split")
    parser.add_argument("--lists", required=True, help="folder of lists under their usual names, in any of the known formats")
    parser.add_argument("--out", default="data", help="folder of prepared datasets (data.dir of a run; default: data)")
    parser.add_argument("--labels-by-path", action="store_true", help="correct labels that a clip's own path contradicts")
    parser.add_argument("--workers", type=int, default=2, help="processes that read files (default: 2)")
    parser.add_argument("--deadline", type=float, default=DEADLINE, help=f"seconds for a file (default: {DEADLINE:g})")
    options = parser.parse_args()

    from vstar_jax.data.builders.videos import prepare

    prepared = prepare(
        options.dataset,
        options.videos,
        options.lists,
        options.out,
        by_path=options.labels_by_path,
        workers=max(1, options.workers),
        deadline=options.deadline,
    )
    show(options.dataset, prepared)
    problems(prepared)


def show(dataset: str, prepared: "Prepared") -> None:
    """Prints what was found against what was expected."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{dataset}: {prepared.videos:,} videos")
    for column in ("list", "clips", "expected", "classes", "expected", "missing", "broken"):
        table.add_column(column, justify="left" if column == "list" else "right", no_wrap=True)
    for name, found in prepared.lists.items():
        expected = EXPECTED[dataset][name]
        clips, classes = f"{len(found.clips):,}", str(len(found.labels))
        problems = str(prepared.missing[name]), str(prepared.broken[name])
        table.add_row(name, clips, f"{expected.clips:,}", classes, str(expected.classes), *problems)
    Console().print(table)
    print("\n".join(f"{name} is read from: {found.source}" for name, found in prepared.lists.items()))
    differing = [f"{name}: {remark}" for name, found in prepared.lists.items() if (remark := found.remark())]
    print("\n".join(differing) or "all of these lists hold what was expected")
    if absent := [name for name in EXPECTED[dataset] if name not in prepared.lists]:
        print(f"not in the folder of lists: {', '.join(absent)}")
    for name, found in prepared.lists.items():
        if swapped := found.mislabelled():
            top = 1 - len(swapped) / len(found.clips)
            print(
                f"{name}: {len(swapped)} clips have another label than their path tells, such as {swapped[0].path} as "
                f"{swapped[0].label}; a policy that is always right scores {100 * top:.1f} % here "
                "(--labels-by-path corrects them; ViFi-CLIP's and Video-STAR's lists of HMDB-51 have them so)"
            )


def problems(prepared: "Prepared") -> None:
    """Writes and counts what is missing or broken."""
    path = prepared.folder / "problems.txt"
    path.write_text("".join(f"{clip}: {problem}\n" for clip, problem in prepared.problems.items()))
    if not prepared.problems:
        print("all clips are there and can be read")
        return
    print(f"{len(prepared.problems):,} clips are missing or broken; all of them are in {path}:")
    for clip, problem in list(prepared.problems.items())[:SHOWN_PROBLEMS]:
        print(f"  {clip}: {problem}")


if __name__ == "__main__":
    run_script(main)
