"""Trains a policy as a config says and measures it on held-out clips: see --help and configs/."""

import sys

from vstar_jax import huge_pages
from vstar_jax.config import parse
from vstar_jax.errors import run_script


def main() -> None:
    config = parse(sys.argv[1:])

    from vstar_jax import sharding

    simulated = sharding.simulate_devices(config.mesh, config.distributed.processes)

    from vstar_jax import distributed
    from vstar_jax.training.job import run

    distributed.start(config.distributed)
    mesh = sharding.make_mesh(config.mesh)
    sharding.announce(mesh, simulated)
    run(config, mesh)


if __name__ == "__main__":
    huge_pages.ask()
    run_script(main)
