"""Measures a run's last checkpoint, or a model directory, on held-out clips, on any mesh."""

import argparse

from vstar_jax import sharding
from vstar_jax.errors import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a run directory, or a model directory in Hugging Face format")
    parser.add_argument("--mesh", default=None, help="devices as DATAxMODEL; the run's own when not given")
    parser.add_argument("--out", default=None, help="folder for result.json; <checkpoint>/evaluation when not given")
    arguments, settings = parser.parse_known_args()

    from vstar_jax.evaluation import checkpoint

    config = checkpoint.config_of(arguments.checkpoint, arguments.mesh, settings)
    simulated = sharding.simulate_devices(config.mesh)
    mesh = sharding.make_mesh(config.mesh)
    sharding.announce(mesh, simulated)
    checkpoint.measure(arguments.checkpoint, config, mesh, arguments.out)


if __name__ == "__main__":
    run_script(main)
