"""Runs SFT alone, in a process that tests may kill: sft_program.py CONFIG.yaml."""

import sys
from pathlib import Path

from vstar_jax.config import load
from vstar_jax.data.chat import Chat
from vstar_jax.data.datasets import make_task
from vstar_jax.data.pipeline import train_batches
from vstar_jax.errors import run_script
from vstar_jax.sharding import make_mesh
from vstar_jax.training.job import load_policy
from vstar_jax.training.sft import train


def main() -> None:
    config = load(sys.argv[1])
    mesh = make_mesh(config.mesh)
    task = make_task(config, Chat(config.policy.path, config.video))
    train(
        load_policy(config, mesh), train_batches(task.train_records(), task.example, config), config, mesh, Path(config.run_dir)
    )


if __name__ == "__main__":
    run_script(main)
