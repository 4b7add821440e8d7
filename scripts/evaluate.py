"""Measures a run's last checkpoint, or a model directory, on held-out clips, on any mesh.

  python scripts/evaluate.py --checkpoint runs/hmdb51 --protocol cross_dataset --dataset ucf101
  python scripts/evaluate.py --checkpoint MODEL_DIR --dataset hmdb51 --data.train=rl --data.allow_leakage

Without --dataset a run is measured as its own config says; a model directory is measured as configs/DATASET.yaml says. Any
setting of scripts/train.py --help may follow. An evaluation that was killed goes on where it was.
"""

import argparse

from vstar_jax import huge_pages
from vstar_jax.errors import run_script

COUNTERFACTUALS = {
    "off": ["--tools.offered=[]"],
    **{kind: [f"--tools.counterfactual={kind}"] for kind in ("blank", "shuffled", "other")},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, help="a run directory, or a model directory in Hugging Face format")
    parser.add_argument("--dataset", help="stick_motion, hmdb51, ucf101, kinetics400, kinetics600 or ssv2")
    parser.add_argument("--protocol", help="base_to_novel or cross_dataset")
    parser.add_argument("--prompts", help="a file of prompt texts, such as those in configs/prompts")
    parser.add_argument(
        "--tools",
        choices=list(COUNTERFACTUALS),
        help="counterfactuals: no tools, or tools that return nothing, their results in another order, or another clip's",
    )
    parser.add_argument("--mesh", help="devices as DATAxMODEL; the run's own when not given")
    parser.add_argument("--out", help="folder for result.json; <checkpoint>/evaluation when not given")
    parser.add_argument(
        "--seeds", nargs="+", default=[], help="folders of finished evaluations to average: the policy trained with other seeds"
    )
    arguments, settings = parser.parse_known_args()

    from vstar_jax import distributed, sharding
    from vstar_jax.evaluation import checkpoint

    for name in ("protocol", "prompts"):
        if value := getattr(arguments, name):
            settings.append(f"--data.{name}={value}")
    settings += COUNTERFACTUALS.get(arguments.tools, [])
    config = checkpoint.config_of(arguments.checkpoint, arguments.mesh, settings, arguments.dataset)
    simulated = sharding.simulate_devices(config.mesh, config.distributed.processes)
    distributed.start(config.distributed)
    mesh = sharding.make_mesh(config.mesh)
    sharding.announce(mesh, simulated)
    checkpoint.measure(arguments.checkpoint, config, mesh, arguments.out, arguments.seeds)


if __name__ == "__main__":
    huge_pages.ask()
    run_script(main)
