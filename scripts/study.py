"""Runs the miniature study, the paper's ablations on StickMotion, and writes docs/study.md with a plot.

  python scripts/study.py                                       all rows, three seeds: hours on two cores
  python scripts/study.py --rows full without_rl --seeds 0      some of it
  python scripts/study.py --sft.steps=20 --grpo.steps=2 --runs /tmp/study --report /tmp/study.md

Every run stays in its folder and its result in docs/study.json, and the same command goes on with what is missing. Any setting
of scripts/train.py --help may follow and then holds for all rows. The rows are the files of configs/study.
"""

import argparse
from pathlib import Path

from vstar_jax import huge_pages
from vstar_jax.errors import UserError, run_script


def main() -> None:
    from vstar_jax.training import study

    names = [row.name for row in study.ROWS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", nargs="+", default=names, help=f"some of: {', '.join(names)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of all runs")
    parser.add_argument(
        "--report",
        type=Path,
        default=Path("docs/study.md"),
        help="Markdown file with the table; the plot and the record of all results lie beside it",
    )
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each on its share of the cores (%(default)s)")
    arguments, flags = parser.parse_known_args()
    if unknown := [name for name in arguments.rows if name not in names]:
        raise UserError(f"there is no row {unknown[0]}: choose some of {', '.join(names)}.")
    rows = [row for row in study.ROWS if row.name in arguments.rows]
    study.run_study(rows, arguments.seeds, arguments.runs, flags, arguments.report, arguments.workers)
    print(f"the table is in {arguments.report}, the plot in {arguments.report.with_suffix('.png')}")


if __name__ == "__main__":
    huge_pages.ask()
    run_script(main)
