"""Compiles the programs of a run for a TPU slice or GPUs that are not there, and says whether they fit and what they cost.

  python scripts/compile.py --model=qwen2.5-vl-7b --topology=v5p:2x2x1 --mesh=4x1 --what=sft
  python scripts/compile.py --table

The settings of scripts/train.py go on top of the paper's, such as --policy.lora.rank=16 or --sft.accumulate=2.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from vstar_jax.errors import UserError, run_script


def main() -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the slice is only compiled for; whatever this machine has stays free
    arguments, flags = _arguments()

    from vstar_jax.config import parse
    from vstar_jax.pages import write_json
    from vstar_jax.scaling import chips, compiler, programs, tables

    if arguments.table:
        tables.run(arguments.report, Path(__file__), flags, arguments.workers)
        print(f"the tables are in {arguments.report}")
        return
    whole = f"{chips.size(arguments.topology)}x1"
    config = parse(flags, replace(programs.paper(arguments.model), mesh=whole), f"{__doc__}\n{OPTIONS}")
    records = compiler.compile_all(config, arguments.model, arguments.topology, arguments.what, flags)
    if arguments.json:
        write_json(arguments.json, [r.as_json() for r in records])
    if not all(r.fits for r in records):
        raise UserError(
            f"{arguments.model} does not fit on {arguments.topology} with mesh {config.mesh}: see above for what would help."
        )


OPTIONS = """Options:
  --model=tiny                 tiny, qwen2.5-vl-3b or qwen2.5-vl-7b
  --topology=v5e:2x2           v5e:AxB, v6e:AxB or v5p:AxBxC of TPUs, h100:N or h200:N of GPUs in one node
  --what=sft                   sft, rollout (not for GPUs) or grpo (the reference's log-probabilities and the update)
  --json=FILE                  writes what is printed as JSON, too
  --table                      compiles every cell of the tables of docs/scaling.md in a process of its own
  --report=docs/scaling.md     page with the tables; cells that the JSON beside it records are not compiled again
  --workers=1                  cells of the tables that are compiled at a time
"""


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--what", default="sft")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--report", type=Path, default=Path("docs/scaling.md"))
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_known_args(sys.argv[1:])


if __name__ == "__main__":
    run_script(main)
